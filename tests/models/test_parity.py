"""Logits equal transformers' (torch, float32) to 1e-4 on checkpoints that transformers wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import (
    SOFT,
    TEXT,
    Checkpoint,
    adapted,
    assert_close,
    edit_config,
    group,
    logits,
    occurrences,
    put,
    read,
    scratch,
    text,
    text_model,
    torch_logits,
    vlm,
    vlm_model,
    write,
)
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from vlmalign.models import gemma3
from vlmalign.types import Layout
from vlmalign.weights.checkpoint import load_config, save_params

LAYOUT = Layout(24, 0, 0)
TOKENS = np.random.default_rng(7).integers(3, 90, size=64).tolist()
#: longer than every window; padded to 24; one of a single token
TEXTS = [group(0, TOKENS[:24]), group(1, TOKENS[30:43]), group(2, TOKENS[50:51])]
#: one image; several, one of them twice and two on end; text alone
FILMS = [
    group(0, [2, 5, "a", 8, 9, 10, 11, 12]),
    group(1, [2, "b", "c", 7, "b"]),
    group(2, TOKENS[:20]),
]


def check(checkpoint: Checkpoint, groups, params=None, tolerance=1e-4):
    images = None if checkpoint.model.config.vision is None else 3
    found = np.asarray(logits(checkpoint.model, params or checkpoint.params, put(groups, LAYOUT, images=images)))
    for row, item in enumerate(groups):
        expected = torch_logits(checkpoint.torch, item.prompt.tokens, occurrences(item))
        assert expected.std() > 0.5, "logits that do not vary prove nothing"
        assert_close(found[row, : len(item.prompt)], expected, tolerance, f"row {row}")


def test_text():
    check(text(), TEXTS)


def test_images():
    check(vlm(), FILMS)


def test_the_window_and_the_image_block_matter():
    """Were these ignored, the tests above would pass for the wrong reason."""
    item = FILMS[0]
    batch = put([item], LAYOUT)
    found = np.asarray(logits(vlm().model, vlm().params, batch))
    for change in (
        {"block": np.full_like(batch.block, -1)},
        {"order": np.where(batch.segment == 0, 0, batch.order)},
    ):
        other = np.asarray(logits(vlm().model, vlm().params, batch._replace(**change)))
        assert np.abs(other - found)[0, : len(item.prompt)].max() > 0.01


def test_padded_as_transformers_pads():
    """A torch batch padded on the right with an attention mask gives the same real rows."""
    ids, mask = np.zeros((3, 24), np.int64), np.zeros((3, 24), np.int64)
    for row, item in enumerate(TEXTS):
        ids[row, : len(item.prompt)], mask[row, : len(item.prompt)] = item.prompt.tokens, 1
    with torch.no_grad():
        expected = text().torch(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    found = np.asarray(logits(text().model, text().params, put(TEXTS, LAYOUT, images=None)))
    for row, item in enumerate(TEXTS):
        assert_close(found[row, : len(item.prompt)], expected[row, : len(item.prompt)], 1e-4)


def test_untied_head_softcap_bias_and_default_layer_pattern():
    """The settings Gemma 3 leaves at their defaults, all moved at once; seven layers so that the pattern shows."""
    module = text_model(
        1,
        tie_word_embeddings=False,
        final_logit_softcapping=4.0,
        attention_bias=True,
        layer_types=None,
        rope_parameters=None,
        num_hidden_layers=3,
        sliding_window_pattern=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
    )
    checkpoint = read(write(module, "untied"), module)
    assert [spec.window for spec in checkpoint.model.config.decoder.layers] == [6, None, 6]
    assert not checkpoint.model.config.decoder.tied_head
    check(checkpoint, TEXTS)


def test_untied_head_of_a_vision_model():
    """transformers goes by the top-level setting; the text part of the same file says the default."""
    module = vlm_model(2, top={"tie_word_embeddings": False})
    checkpoint = read(write(module, "vlm-untied"), module)
    check(checkpoint, FILMS)
    folder = scratch() / "vlm-untied-again"
    save_params(
        folder,
        checkpoint.params,
        checkpoint.model,
        json.loads((checkpoint.folder / "config.json").read_text()),
    )
    again = type(module).from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, module.lm_head.weight)


def test_text_config_does_not_untie_a_vision_model():
    module = vlm_model()
    folder = edit_config(vlm().folder, "text-says-untied", lambda c: c["text_config"].update(tie_word_embeddings=False))
    check(read(folder, module), FILMS)


def test_pooling_head_of_the_tower_is_known_and_unused():
    module = vlm_model(3, vision={"vision_use_head": True})
    folder = write(module, "pooling-head", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3, "sharded"
    check(read(folder, module), FILMS)


def test_bfloat16_files_load_as_float32():
    folder = write(text_model().bfloat16(), "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    module = type(text().torch).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    checkpoint = read(folder, module)
    assert {value.dtype for value in checkpoint.params.values()} == {jnp.dtype("float32")}
    check(checkpoint, TEXTS)


def test_bfloat16_model_is_near_its_float32_self():
    # The factor on embeddings is rounded to bfloat16 and activations are held in it: 8 bits of mantissa.
    half = read(vlm().folder, vlm().torch, dtype="bfloat16")
    assert {value.dtype for value in half.params.values()} == {jnp.dtype("bfloat16")}
    batch = put(FILMS, LAYOUT)
    narrow, wide = (np.asarray(logits(c.model, c.params, batch)) for c in (half, vlm()))
    assert narrow.dtype == np.float32
    kept = batch.segment == 0
    assert 1e-4 < np.abs(narrow - wide)[kept].mean() < 0.1


HUB = (("language_model.model.", "language_model.model."), ("vision_tower.", "vision_tower.vision_model."))
NEWEST = (
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
NEWEST_FLAT = (*NEWEST[:1], ("vision_tower.", "model.vision_tower."), *NEWEST[2:])


@pytest.mark.parametrize("rules", [HUB, NEWEST, NEWEST_FLAT], ids=["hub", "newest", "newest flat"])
def test_every_generation_of_tensor_names(rules, tmp_path):
    tensors = load_file(vlm().folder / "model.safetensors")
    renamed = {}
    for name, value in tensors.items():
        old, new = next(((o, n) for o, n in rules if name.startswith(o)), ("", ""))
        renamed[new + name.removeprefix(old)] = value
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((vlm().folder / "config.json").read_text())
    found = read(tmp_path, vlm().torch).params
    assert found.keys() == vlm().params.keys()
    assert all(np.array_equal(found[name], vlm().params[name]) for name in found)


def test_a_written_folder_is_read_by_transformers_and_by_us(tmp_path):
    for checkpoint in (vlm(), text()):
        folder = tmp_path / checkpoint.model.config.family / str(checkpoint is vlm())
        config = json.loads((checkpoint.folder / "config.json").read_text())
        save_params(folder, checkpoint.params, checkpoint.model, config)
        again, report = type(checkpoint.torch).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        for name, value in checkpoint.torch.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        ours = read(folder, checkpoint.torch).params
        assert all(np.array_equal(ours[name], checkpoint.params[name]) for name in checkpoint.params)


def old_spelling(config: dict) -> None:
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        config.pop(key, None)
    config.update(
        rope_theta=500_000.0,
        rope_local_base_freq=20_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )


def new_spelling(config: dict) -> None:
    config.update(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        },
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def test_old_and_new_spellings_of_a_config_are_the_same_model():
    old = load_config(edit_config(text().folder, "old", old_spelling))
    assert old == load_config(edit_config(text().folder, "new", new_spelling))
    local, wide, _ = old.decoder.layers
    assert (local.window, local.rope.theta, local.rope.factor) == (6, 20_000.0, 1.0)
    assert (wide.window, wide.rope.theta, wide.rope.factor) == (None, 500_000.0, 8.0)


def test_an_old_config_gives_transformers_logits():
    config = {key: value for key, value in TEXT.items() if key not in ("rope_parameters", "layer_types")}
    old_spelling(config)
    module = text_model(
        4,
        **dict.fromkeys(("rope_parameters", "layer_types")),
        **{k: config[k] for k in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")},
    )
    folder = edit_config(write(module, "old-config"), "old-config-spelled", old_spelling)
    check(read(folder, module), TEXTS)


def test_defaults_are_those_of_transformers():
    """Hub files leave out what equals these."""
    reference = Gemma3TextConfig()
    special = {"sliding_window_pattern": 6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    assert (
        special | {key: getattr(reference, key) for key in gemma3.TEXT_DEFAULTS if key not in special}
        == gemma3.TEXT_DEFAULTS
    )
    assert reference.rope_parameters["full_attention"]["rope_theta"] == special["rope_theta"]
    assert reference.rope_parameters["sliding_attention"]["rope_theta"] == special["rope_local_base_freq"]
    vision = SiglipVisionConfig()
    assert {k: getattr(vision, k, True) for k in gemma3.VISION_DEFAULTS} == gemma3.VISION_DEFAULTS
    whole = Gemma3Config()
    assert {k: getattr(whole, k) for k in gemma3.IMAGE_DEFAULTS} == gemma3.IMAGE_DEFAULTS


def test_adapted_logits_equal_torch_with_merged_weights():
    check(adapted(), FILMS)


def test_soft_token_id_beyond_the_embedding_table():
    """Some text tables end before the soft token's id; such a token never reaches the table."""
    item = FILMS[0]
    batch = put([item], LAYOUT)
    beyond = batch._replace(tokens=np.where(batch.tokens == SOFT, 10_000, batch.tokens))
    assert np.array_equal(logits(vlm().model, vlm().params, batch), logits(vlm().model, vlm().params, beyond))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (lambda c: c.update(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (lambda c: c.update(hidden_activation="relu"), "hidden_activation"),
        (lambda c: c.update(layer_types=["full_attention"]), "layer_types"),
        (lambda c: c["rope_parameters"]["full_attention"].update(rope_type="yarn"), "yarn"),
        (lambda c: c.update(sliding_window=0), "sliding_window"),
        (lambda c: c.update(sliding_window=None), "sliding_window"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_this_decoder_does_not_have_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        load_config(edit_config(text().folder, f"refused-{named}", change))


def test_both_spellings_of_rotary_settings_in_one_file():
    """transformers lays `rope_scaling` over the global layers' `rope_parameters`."""
    change = {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "use_bidirectional_attention": None}
    ropes = [s.rope for s in load_config(edit_config(text().folder, "both", lambda c: c.update(change))).decoder.layers]
    config = json.loads((text().folder / "config.json").read_text())
    expected = Gemma3TextConfig(**{**config, **change}).rope_parameters
    assert expected["full_attention"]["factor"] == 3.0
    assert [(r.theta, r.factor) for r in ropes] == [
        (expected[kind]["rope_theta"], expected[kind].get("factor", 1.0)) for kind in config["layer_types"]
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["text_config"].update(final_logit_softcapping=5.0), "final_logit_softcapping must be null"),
        (lambda c: c["vision_config"].update(model_type="clip_vision_model"), "must be a siglip_vision_model"),
    ],
)
def test_settings_of_a_vision_language_model_that_are_refused(change, named):
    """transformers would compute the logits without the cap, which nobody who wrote it there meant."""
    with pytest.raises(ValueError, match=named):
        load_config(edit_config(vlm().folder, "refused-vlm", change))


def test_patch_grid_that_does_not_pool_is_refused():
    with pytest.raises(ValueError, match="mm_tokens_per_image"):
        load_config(edit_config(vlm().folder, "pool", lambda c: c.update(mm_tokens_per_image=9)))
