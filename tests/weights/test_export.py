"""Merged models: opened by transformers with equal logits, every tensor accounted for, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import SOFT, assert_close, group, random_adapter, scratch, vlm
from tiny_checkpoints import torch_logits as torch_logits_of
from tiny_families import FRESH, KINDS, TOWERS, decoder_only, family, peft_adapter, torch_logits
from transformers import AutoConfig

from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.weights import export, merged
from vlmalign.weights.adapter import load_adapter
from vlmalign.weights.export import export_adapter, export_merged, probe_logits
from vlmalign.weights.layout import INDEX, SINGLE
from vlmalign.weights.new_folder import new_folder

#: adapters of the kinds, spread over the families; the programs that compute them are those of test_adapter
CASES = [("llama", "rslora"), ("qwen2", "lora"), ("gemma3 text", "dora"), ("gemma3", "both"), ("qwen2.5-vl", "lora")]


def spec_of(kind: str) -> LoraSpec:
    return LoraSpec(2, 3.0, rank_stabilised=kind in ("rslora", "both"), magnitude=kind in ("dora", "both"), dropout=0.2)


def adapted(name: str, kind: str, seed: int = 2) -> tuple[Model, dict]:
    model = Model(family(name).model.config, lora=spec_of(kind))
    return model, random_adapter(model, seed=seed)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def reopened(name: str, folder: Path, **options):
    return type(family(name).torch).from_pretrained(folder, attn_implementation="eager", **options).eval()


@pytest.mark.parametrize(
    ("name", "kind"), [case if case == CASES[0] else pytest.param(*case, marks=pytest.mark.full) for case in CASES]
)
def test_merged_model_opens_in_transformers(name, kind, tmp_path):
    source = family(name).folder
    model, adapter = adapted(name, kind)
    done = export_merged(tmp_path / "merged", source, model, adapter)
    assert done.gap <= done.tolerance == 1e-5
    assert done.effect > 0.1
    module = reopened(name, tmp_path / "merged")
    assert_close(probe_logits(model, {**family(name).params, **adapter}), torch_logits(module), 1e-5)
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {f.name for f in source.iterdir()} == set(done.files)
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert len(changed) == 7 * len(model.config.decoder.layers)
    assert all("layers." in key and key.endswith("_proj.weight") and not tower(name, key) for key in changed)


def tower(name: str, key: str) -> bool:
    return name in TOWERS and TOWERS[name] in key


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_equals_what_peft_computes(kind, tmp_path):
    """From peft's folder to transformers' model, without peft."""
    module = peft_adapter("gemma3", tmp_path / "peft", decoder_only("gemma3", ("q_proj", "down_proj")), **KINDS[kind])
    found = load_adapter(tmp_path / "peft", family("gemma3").model.config)
    model = Model(family("gemma3").model.config, lora=found.spec)
    source = family("gemma3").folder
    plan = merged.plan_merged(source, model, found.params, dtype=None, max_shard_bytes=None)
    with new_folder(tmp_path / "merged") as folder:
        merged.write_merged(folder, source, plan, found.params, found.spec.scale, dtype=None)
    assert_close(torch_logits(reopened("gemma3", tmp_path / "merged")), torch_logits(module), 1e-5)


def test_merged_vision_language_model_sees_the_same_image(tmp_path):
    """transformers' answer about an image, with peft's adapter on and merged by us."""
    module = peft_adapter("gemma3", tmp_path / "peft", decoder_only("gemma3", ("v_proj", "up_proj")))
    found = load_adapter(tmp_path / "peft", family("gemma3").model.config)
    model = Model(family("gemma3").model.config, lora=found.spec)
    export_merged(tmp_path / "merged", family("gemma3").folder, model, found.params)
    tokens = group(0, [2, 5, "film", 8, 9, 10]).prompt.tokens
    assert (tokens == SOFT).sum() == 4
    with_image = torch_logits_of(reopened("gemma3", tmp_path / "merged"), tokens, ["film"])
    assert_close(with_image, torch_logits_of(module.get_base_model(), tokens, ["film"]), 1e-5)
    assert np.abs(with_image - torch_logits_of(vlm().torch, tokens, ["film"])).max() > 0.1


# ---------------------------------------------------------------- files


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


def assert_index_is_right(folder: Path) -> None:
    """As transformers writes it: total_size counts the tensors' bytes, weight_map has every tensor where it is."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            found |= {key: (file.name, opened.get_tensor(key).nbytes) for key in opened.keys()}  # noqa: SIM118
    index = index_of(folder)
    assert index["weight_map"] == {key: file for key, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in found.values())


@pytest.fixture(scope="module")
def sharded() -> Path:
    """The tiny vision-language model in several files, as transformers splits it."""
    folder = scratch() / "merge-sharded"
    family("gemma3").torch.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


def test_files_stay_as_they_are_split(sharded, tmp_path):
    model, adapter = adapted("gemma3", "both")
    export_merged(tmp_path / "merged", sharded, model, adapter)
    assert_index_is_right(tmp_path / "merged")
    assert index_of(tmp_path / "merged")["weight_map"] == index_of(sharded)["weight_map"]
    assert index_of(tmp_path / "merged")["metadata"]["total_size"] == index_of(sharded)["metadata"]["total_size"]


@pytest.mark.parametrize("limit", [12_000, 40_000, 10**9])
def test_files_can_be_split_anew(limit, sharded, tmp_path):
    model, adapter = adapted("gemma3", "both")
    done = export_merged(tmp_path / "merged", sharded, model, adapter, max_shard_bytes=limit)
    files = sorted(name for name in done.files if name.endswith(".safetensors"))
    if limit == 10**9:
        assert files == [SINGLE]
        assert INDEX not in done.files
    else:
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert_index_is_right(tmp_path / "merged")
        for name in files:
            stored = load_file(tmp_path / "merged" / name)
            assert len(stored) == 1 or sum(value.nbytes for value in stored.values()) <= limit
    assert_close(
        torch_logits(reopened("gemma3", tmp_path / "merged")),
        probe_logits(model, {**family("gemma3").params, **adapter}),
        1e-5,
    )


def test_everything_a_model_is_opened_with_comes_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(family("llama").folder, source)
    kept = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
            "LICENSE", "additional_chat_templates/tool.jinja"]  # fmt: skip
    # Beside an adapter's settings transformers would look for the adapter.
    left = ["modeling.py", "README.md", "pytorch_model.bin", "original/params.json", "adapter_config.json"]
    for name in kept + left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(name.encode())
    before = {path.name for path in family("llama").folder.iterdir()}
    model, adapter = adapted("llama", "rslora")
    done = export_merged(tmp_path / "merged", source, model, adapter)
    assert set(done.files) == before | set(kept)
    assert "generation_config.json" in before
    for name in (set(done.files) - {SINGLE}) | set(kept):
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()


def test_a_tied_head_that_is_stored_twice_stays_so(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(family("qwen2").folder, source)
    stored = load_file(source / SINGLE)
    assert "lm_head.weight" not in stored
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].copy()}, source / SINGLE)
    model, adapter = adapted("qwen2", "lora")
    export_merged(tmp_path / "merged", source, model, adapter)
    after = load_file(tmp_path / "merged" / SINGLE)
    assert np.array_equal(after["lm_head.weight"], stored["model.embed_tokens.weight"])
    module = reopened("qwen2", tmp_path / "merged")
    assert_close(torch_logits(module), probe_logits(model, {**family("qwen2").params, **adapter}), 1e-5)


# ---------------------------------------------------------------- other dtypes


@pytest.fixture(scope="module")
def half() -> Path:
    """Llama in bfloat16."""
    folder = scratch() / "llama-bfloat16"
    FRESH["llama"]().to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


def test_a_bfloat16_source_stays_so_and_each_merge_is_rounded_once(half, tmp_path):
    model, adapter = adapted("llama", "rslora")
    done = export_merged(tmp_path / "merged", half, model, adapter)
    assert done.rounded_to == "bfloat16"
    assert 1e-3 < done.gap <= done.tolerance == 0.1 + 1e-5
    assert (tmp_path / "merged/config.json").read_bytes() == (half / "config.json").read_bytes()
    before, after = tensors(half), tensors(tmp_path / "merged")
    assert {value.dtype.name for value in after.values()} == {"bfloat16"}
    name = "model.layers.1.mlp.up_proj"
    a, b = (np.asarray(adapter[f"language_{name}.lora_{m}.weight"], np.float64) for m in "AB")
    exact = before[name + ".weight"].astype(np.float64) + model.lora.scale * (b @ a)
    # Rounded from float32, which may itself lie on the other side of a tie: nearest, or as near as makes no matter.
    error = np.abs(after[name + ".weight"].astype(np.float64) - exact)
    nearest = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert np.all(error <= nearest * (1 + 1e-4) + 1e-9)
    assert_close(torch_logits(reopened("llama", tmp_path / "merged", dtype=torch.float32)),
                 probe_logits(model.without_lora(), _read(tmp_path / "merged", model)), 1e-5)  # fmt: skip


def _read(folder: Path, model: Model):
    return export.load_params(folder, model.without_lora())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2 + 1e-5)])
def test_the_dtype_of_the_weights_can_be_chosen(dtype, tolerance, half, tmp_path):
    model, adapter = adapted("llama", "rslora")
    done = export_merged(tmp_path / "merged", half, model, adapter, dtype=dtype)
    assert done.gap <= done.tolerance == tolerance
    assert {value.dtype.name for value in tensors(tmp_path / "merged").values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    assert reopened("llama", tmp_path / "merged", dtype="auto").dtype == getattr(torch, dtype)


def test_every_mention_of_the_dtype_follows(tmp_path):
    model, adapter = adapted("gemma3", "both")
    source = tmp_path / "source"
    shutil.copytree(family("gemma3").folder, source)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    export_merged(tmp_path / "merged", source, model, adapter, dtype="bfloat16")
    after = json.loads((tmp_path / "merged/config.json").read_text())
    mentions = [part.get(key) for part in (after, after["text_config"], after["vision_config"])
                for key in ("dtype", "torch_dtype") if key in part]  # fmt: skip
    assert set(mentions) == {"bfloat16"}
    assert "dtype" not in after, "one spelling, the file's own"


# ---------------------------------------------------------------- whole, or not there


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")
    model, adapter = adapted("llama", "rslora")
    for call in (
        lambda: export_merged(tmp_path, family("llama").folder, model, adapter),
        lambda: export_adapter(tmp_path, model, family("llama").params, adapter, base_path="x"),
        lambda: export_merged(tmp_path / "kept", family("llama").folder, model, adapter),
    ):
        with pytest.raises(ValueError, match="is not empty; choose a new folder"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_logits_that_differ_leave_nothing(what, monkeypatch, tmp_path):
    model, adapter = adapted("llama", "rslora")
    wrong = {name: value * 1.1 for name, value in adapter.items()}
    if what == "merged":
        # What is written is whole, but of another adapter: only the comparison of logits can tell.
        write, check = merged.write_merged, merged.check_merged
        monkeypatch.setattr(
            export, "write_merged", lambda f, s, p, a, scale, *, dtype: write(f, s, p, wrong, scale, dtype=dtype)
        )
        monkeypatch.setattr(export, "check_merged", lambda f, p, a, scale: check(f, p, wrong, scale))
        with pytest.raises(
            ValueError, match=r"was removed: read again, its logits differ by .* of the largest, allowed is 1e-05"
        ):
            export_merged(tmp_path / "out", family("llama").folder, model, adapter)
    else:
        save = export.save_adapter
        monkeypatch.setattr(export, "save_adapter", lambda f, a, m, *, base: save(f, wrong, m, base=base))
        with pytest.raises(ValueError, match="was removed"):
            export_adapter(tmp_path / "out", model, family("llama").params, adapter, base_path="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["untouched", "adapted", "lost"])
def test_a_tensor_that_is_not_what_was_meant_is_named(damage, monkeypatch, tmp_path):
    """In the tower too, which no text would show."""
    part = "language_model.model.layers.1.self_attn.v_proj" if damage == "adapted" else "vision_tower.*layers.1.mlp.fc1"
    (key,) = (key for key in load_file(family("gemma3").folder / SINGLE) if re.fullmatch(part + ".weight", key))
    write = merged.write_merged

    def spoiling(folder, *arguments, dtype):
        write(folder, *arguments, dtype=dtype)
        stored = load_file(folder / SINGLE)
        assert key in stored
        if damage == "lost":
            del stored[key]
        else:
            stored[key] = np.nextafter(stored[key], np.float32(9))
        save_file(stored, folder / SINGLE)

    monkeypatch.setattr(export, "write_merged", spoiling)
    model, adapter = adapted("gemma3", "both")
    said = "holds other tensors" if damage == "lost" else f"1 tensors differ, such as {key}"
    with pytest.raises(ValueError, match=said):
        export_merged(tmp_path / "out", family("gemma3").folder, model, adapter)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.weights import merged
from vlmalign.weights.checkpoint import load_config
from vlmalign.weights.new_folder import new_folder

source, out = Path(sys.argv[1]), Path(sys.argv[2])
model = Model(load_config(source), lora=LoraSpec(2, 3.0))
rng = np.random.default_rng(0)
adapter = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in model.shapes.items() if "lora_" in n}
save, done = merged.save_file, []

def save_two(*arguments, **options):
    save(*arguments, **options)
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

merged.save_file = save_two
plan = merged.plan_merged(source, model, adapter, dtype=None, max_shard_bytes=None)
with new_folder(out) as folder:
    merged.write_merged(folder, source, plan, adapter, model.lora.scale, dtype=None)
"""


@pytest.mark.full
def test_a_killed_export_leaves_no_folder_that_looks_whole_and_can_be_repeated(sharded, tmp_path):
    command = [sys.executable, "-c", KILLED, str(sharded), str(tmp_path / "out")]
    died = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert len(list((tmp_path / "out.partial").iterdir())) == 2
    model, adapter = adapted("gemma3", "both")
    export_merged(tmp_path / "out", sharded, model, adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "weights can be written as float32, float16, bfloat16, found 'int8'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, found 0"),
    ],
)
def test_options_that_make_no_sense(options, said, tmp_path):
    model, adapter = adapted("llama", "rslora")
    with pytest.raises(ValueError, match=said):
        export_merged(tmp_path / "out", family("llama").folder, model, adapter, **options)
    with pytest.raises(ValueError, match="has no adapter to merge"):
        export_merged(tmp_path / "out", family("llama").folder, model.without_lora(), {})
