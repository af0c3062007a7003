"""A bad checkpoint folder is an error that names what is wrong with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import text, vlm, vlm_model, write

from vlmalign.models.model import Model
from vlmalign.weights.checkpoint import INDEX, load_config, load_params, tensor_files

NORM = "language_model.model.norm.weight"
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
    with pytest.raises(ValueError, match=r"lacks model\.safetensors \(found pytorch_model\.bin: pickled"):
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


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16"):
        Model(vlm().model.config, dtype="float16")
