"""A bad checkpoint folder is an error that names what is wrong with it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import text, vlm, vlm_model, write

from vlmalign.models.model import Model
from vlmalign.weights.checkpoint import INDEX, load_config, load_params, out_of_place, tensor_files

NORM = "language_model.model.norm.weight"
TABLE = "language_model.model.embed_tokens.weight"
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good single-file checkpoint to spoil."""
    shutil.copytree(vlm().folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(tmp_path) -> Path:
    source = write(vlm_model(), "sharded", max_shard_size="40KB")
    shutil.copytree(source, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    return tmp_path / "checkpoint"


def load(folder: Path):
    assert load_config(folder) == vlm().model.config
    return load_params(folder, vlm().model)


def retensor(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_sharded_equals_single(sharded):
    found = load(sharded)
    assert found.keys() == vlm().params.keys()
    assert all(np.array_equal(found[name], vlm().params[name]) for name in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), r"missing \(1\): language_model\.norm\.weight"),
        (lambda t: t.update({"vision_tower.extra.weight": t[NORM]}), r"unknown \(1\): vision_tower\.extra\.weight"),
        (lambda t: t.update({"language_model.model.layers.9.mlp.up_proj.weight": t[NORM]}), r"unknown.*layers\.9"),
        (
            lambda t: t.update({"model.language_model.norm.weight": t[NORM].copy()}),
            r"doubled \(1\): .*norm\.weight \(already read as .*norm\.weight\)",
        ),
        (
            lambda t: t.update({"vision_tower.vision_model.post_layernorm.bias": np.zeros(24, np.float32)}),
            r"doubled \(1\): vision_tower.*post_layernorm\.bias",
        ),
        (
            lambda t: t.update({QUERY: np.ascontiguousarray(t[QUERY].T)}),
            r"misshaped \(1\): .*layers\.0\.self_attn\.q_proj\.weight is \[32, 64\], config\.json says \[64, 32\]",
        ),
        (lambda t: t.update({NORM: t[NORM][None]}), r"misshaped \(1\): .*norm\.weight is \[1, 32\]"),
        (lambda t: t.update({"vision_tower.head.probe": t[NORM]}), r"unknown \(1\): vision_tower\.head\.probe"),
        (lambda t: t.update({QUERY[:-7] + ".lora_A.weight": t[NORM]}), r"unknown \(1\): .*lora_A"),
        (lambda t: t.clear(), r"missing \(\d+\): .* and \d+ more"),
    ],
    ids=["missing", "extra", "layer", "doubled", "doubled tower", "transposed", "rank", "head", "adapter", "empty"],
)
def test_tensors_that_do_not_fit(folder, change, said):
    retensor(folder, change)
    with pytest.raises(ValueError, match=said) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_all_problems_come_in_one_message(folder):
    def change(tensors):
        del tensors[NORM]
        tensors["surprise"] = np.zeros(3, np.float32)
        tensors[QUERY] = tensors[QUERY][:, :5].copy()

    retensor(folder, change)
    with pytest.raises(ValueError, match=r"unknown.*surprise.*misshaped.*q_proj.*missing.*norm"):
        load(folder)


def test_a_text_checkpoint_under_a_vision_config(folder):
    shutil.copy(text().folder / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"unknown|missing"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


def test_a_truncated_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match=victim.name):
        load(sharded)


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"lacks model\.safetensors \(found pytorch_model\.bin: pickled.*save_pretrained"
    ):
        load(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        load(folder)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_a_missing_file(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(ValueError, match=f"lacks {victim.name}"):
        load(sharded)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/model.safetensors", "..", "a\\b.safetensors", ""])
def test_an_index_that_names_a_file_outside(sharded, outside):
    (sharded.parent / "model.safetensors").write_bytes(b"")
    edit_index(sharded, lambda index: index["weight_map"].update({NORM: outside}))
    with pytest.raises(ValueError, match=f"{INDEX}.*outside"):
        tensor_files(sharded)


@pytest.mark.parametrize(
    "change",
    [lambda i: i.pop("weight_map"), lambda i: i.update(weight_map=[1]), lambda i: i["weight_map"].update(x=3)],
    ids=["none", "list", "number"],
)
def test_an_index_without_a_proper_map(sharded, change):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=f"{INDEX}.*weight_map"):
        load(sharded)


def test_a_broken_index(sharded):
    (sharded / INDEX).write_text('{"weight_map": {')
    with pytest.raises(ValueError, match=rf"{INDEX} is not valid JSON"):
        load(sharded)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "has no config.json"), ("{", "not valid JSON"), ("[]", "must hold a JSON object, found list")],
)
def test_a_bad_config_file(folder, content, said):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_config(folder)


def test_code_of_a_checkpoint_is_never_run(folder):
    reconfigure(folder, auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(ValueError, match="auto_map"):
        load_config(folder)


def test_an_unknown_family_is_named(folder):
    reconfigure(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"gemma3, gemma3_text, .*; config\.json says 'mamba'") as error:
        load_config(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("missing", ["text_config", "vision_config"])
def test_a_vision_config_with_a_part_missing(folder, missing):
    config = json.loads((folder / "config.json").read_text())
    del config[missing]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=missing):
        load_config(folder)


def test_a_file_that_the_index_does_not_describe(sharded):
    """A shard of another save: what it holds and what the index says differ."""
    victim = sorted(sharded.glob("*.safetensors"))[1]
    edit_index(sharded, lambda index: index["weight_map"].pop(NORM))
    other = next(name for name, file in json.loads((sharded / INDEX).read_text())["weight_map"].items()
                 if file == victim.name)  # fmt: skip
    tensors = load_file(victim)
    del tensors[other]
    save_file(tensors, victim)
    with pytest.raises(
        ValueError, match=r"not in the index \(1\): .*norm\.weight of model-.*not in the file \(1\)"
    ) as e:
        load(sharded)
    assert f"{other}, which {INDEX} places in {victim.name}" in str(e.value)
    assert "missing (1)" in str(e.value)


def test_a_tensor_in_two_files_of_an_index(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shared = load_file(first)
    name = next(iter(shared))
    save_file({**load_file(second), name: shared[name]}, second)
    with pytest.raises(ValueError, match=r"doubled \(1\): .* \(already read as .*\)"):
        load(sharded)


def test_two_sets_of_weights_in_one_folder(sharded):
    """Which one was meant? transformers reads the single file, others the index."""
    shutil.copy(vlm().folder / "model.safetensors", sharded)
    with pytest.raises(ValueError, match=r"two sets of weights: model\.safetensors, and the files that model.*index"):
        load(sharded)


def test_an_index_over_a_single_file(folder):
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    found = load(folder)
    assert all(np.array_equal(found[name], value) for name, value in vlm().params.items())


def test_shards_without_their_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors \(found model-00001.*without .*index\.json; fetch"):
        load(sharded)


@pytest.mark.parametrize(
    ("dtype", "word"), [(np.int8, "I8"), (np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.float64, "F64")]
)
def test_tensors_of_a_dtype_that_is_not_read(folder, dtype, word):
    retensor(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(dtype)}))
    with pytest.raises(ValueError, match=rf"dtype that is not read \(1\): {QUERY} is {word} \(.*BF16.*dequantise"):
        load(folder)


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_a_quantised_checkpoint_is_refused_with_what_to_do(folder, place):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads((folder / "config.json").read_text())
    if place == "top":
        reconfigure(folder, quantization_config=settings)
    else:
        reconfigure(folder, text_config={**config["text_config"], "quantization_config": settings})
    with pytest.raises(ValueError, match=r"quantised \(quantization_config: bitsandbytes\).*model\.dequantize\(\)"):
        load_config(folder)
    reconfigure(folder, quantization_config=None, text_config=config["text_config"])
    load_config(folder)


@pytest.mark.parametrize(
    "name", ["Gemma3ForSequenceClassification", "Gemma3TextModel", "Gemma3ForTokenClassification", "RewardModel"]
)
def test_models_that_do_not_write_text_are_refused(folder, name):
    """Their head would be an unknown tensor at best; a bare encoder may even attend in both directions."""
    reconfigure(folder, architectures=[name])
    with pytest.raises(ValueError, match=rf"describes a {name}; only models that write text .*ForCausalLM"):
        load_config(folder)


@pytest.mark.parametrize("architectures", [None, [], ["Gemma3ForConditionalGeneration"], ["Gemma3ForCausalLM"]])
def test_models_that_write_text_are_read(folder, architectures):
    reconfigure(folder, architectures=architectures)
    assert load_config(folder) == vlm().model.config


def test_everything_that_is_refused_is_said_at_once(folder):
    reconfigure(folder, auto_map={}, quantization_config={"bits": 8}, architectures=["X"])
    with pytest.raises(ValueError, match=r"auto_map.*of unknown kind.*describes a X"):
        load_config(folder)


@pytest.mark.parametrize(
    ("changes", "said"), [({"rope_scaling": {"rope_type": "linear"}}, "'factor'"), ({"hidden_size": "wide"}, "str")]
)
def test_a_setting_out_of_place(folder, changes, said):
    config = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
    reconfigure(folder, text_config={**text, **changes})
    with pytest.raises(ValueError, match=rf"config\.json: a setting is missing or of the wrong kind .*{said}"):
        load_config(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # Annotations are checked in tests, and say it first; `out_of_place` has a test of its own below.
        ({"vocab_size": 96.0}, r"of the wrong kind.*vocab.*96\.0"),
        ({"num_key_value_heads": None}, "of the wrong kind.*kv_heads.*None"),
        ({"rms_norm_eps": float("nan")}, "norm_eps = nan"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"attention_bias": "false"}, "of the wrong kind.*qkv_bias.*false"),
        ({"num_attention_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, found 3 and 2"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "ZeroDivisionError"),
        ({"is_causal": False}, "is_causal: false, as encoders"),
    ],
)
def test_settings_that_are_no_sizes_switches_or_numbers(folder, changes, said):
    """They would fail far from here or, as a word for false, count as true."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    reconfigure(folder, text_config={**text, **changes})
    with pytest.raises(ValueError, match=said):
        load_config(folder)


def test_out_of_place():
    @dataclass
    class Part:
        size: "int" = 1
        switch: "bool" = True
        scale: "float" = 1
        cap: "float | None" = None

    assert out_of_place(Part()) == []
    assert out_of_place(Part(96.0, "false", "1e-6")) == ["size = 96.0", "switch = 'false'", "scale = '1e-6'"]
    assert out_of_place(Part(0, None, float("inf"))) == ["size = 0", "switch = None", "scale = inf"]
    assert out_of_place(Part(True, 1, True)) == ["size = True", "switch = 1", "scale = True"]


def test_a_head_that_is_tied_and_another_matrix(folder):
    """transformers would not tie such a head; leaving it out would train another model."""
    table = load_file(folder / "model.safetensors")[TABLE]
    retensor(folder, lambda tensors: tensors.update({"lm_head.weight": table.copy()}))
    assert load(folder).keys() == vlm().params.keys()
    table[-1, -1] += 1
    retensor(folder, lambda tensors: tensors.update({"lm_head.weight": table}))
    with pytest.raises(ValueError, match=r"ties the output head .* but lm_head\.weight is another matrix than"):
        load(folder)


def test_float16_is_refused_with_the_reason(folder):
    """A folder that asks for float16 is read, in a dtype that holds its activations."""
    with pytest.raises(ValueError, match=r"float32 or bfloat16, found 'float16': activations .* overflow float16"):
        Model(vlm().model.config, dtype="float16")
    reconfigure(folder, torch_dtype="float16")
    retensor(folder, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    found = load(folder)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
