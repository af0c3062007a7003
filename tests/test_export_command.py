"""`vlmalign export`: runs and PEFT folders in, PEFT folders and merged models out, and plain words for what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_checkpoints import assert_close, random_adapter, scratch
from tiny_families import FRESH, decoder_only, family, peft_adapter, torch_logits
from transformers import Gemma3ForConditionalGeneration

from vlmalign import cli
from vlmalign.exporting.report import report
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.training.best import Best, BestSoFar
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.outcome import read_outcome
from vlmalign.training.step import TrainState
from vlmalign.weights.adapter import load_adapter
from vlmalign.weights.export import Exported, probe_logits

#: as in weights/test_export.py, whose programs it shares
SPEC = LoraSpec(2, 3.0, rank_stabilised=True, magnitude=True, dropout=0.2)
MODEL = """
model:
  path: {path}
  dtype: bfloat16
  lora: {{rank: 2, alpha: 3.0, rank_stabilised: true, magnitude: true, dropout: 0.2}}
"""


def state(seed: int, step: int, **more) -> TrainState:
    params = {**random_adapter(Model(family("gemma3").model.config, lora=SPEC), seed=seed), **more}
    return TrainState(params, optax.adamw(1e-3).init(params), jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module")
def finished() -> Path:
    """A run folder: an SFT stage saved after 3 and 5 updates, and a GRPO stage whose best evaluation was after 2."""
    folder = scratch() / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(MODEL.format(path=json.dumps(str(family("gemma3").folder))))
    with Checkpoints(folder / "sft" / "checkpoints") as kept:
        kept.save(state(3, 3), {"source": {}})
        kept.save(state(5, 5), {"source": {}})
    with Checkpoints(folder / "grpo" / "checkpoints") as kept, BestSoFar(folder / "grpo" / "best", Best()) as best:
        best.see(2, {"validation/loss": 1.0}, state(2, 2))
        kept.save(state(4, 4), {"source": {}})
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run that may be changed, in a folder of its own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def export(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_a_stage_becomes_a_peft_folder(run, capsys):
    before = sorted(path for path in run.rglob("*"))
    assert export("--adapter", run / "sft", "--out", run.parent / "out") == 0
    said = capsys.readouterr().out
    assert f"adapter  {run}/sft/checkpoints, step 5: rsDoRA of rank 2, alpha 3, on q_proj, k_proj" in said
    assert f"base     {family('gemma3').folder} (gemma3)" in said
    assert f"wrote    {run.parent}/out: 2 files, " in said
    assert "no logit differs by more than 0 of the largest" in said
    assert sorted(path for path in run.rglob("*")) == before, "the run is only read"
    found = load_adapter(run.parent / "out", family("gemma3").model.config)
    assert found.spec == SPEC
    assert found.base == str(family("gemma3").folder)
    assert all(np.array_equal(found.params[key], value) for key, value in state(5, 5).params.items())
    module = PeftModel.from_pretrained(FRESH["gemma3"](), run.parent / "out").eval()
    model = Model(family("gemma3").model.config, lora=SPEC)
    assert_close(torch_logits(module), probe_logits(model, {**family("gemma3").params, **found.params}), 1e-5)


def test_the_card_of_the_stage_goes_with_the_weights(run, capsys, monkeypatch):
    monkeypatch.setattr(
        "vlmalign.exporting.model_card.card_of", lambda adapter, merged: f"{adapter.name}, merged: {merged}"
    )
    assert export("--adapter", run / "sft", "--out", run.parent / "out") == 0
    assert (run.parent / "out" / "README.md").read_text() == "sft, merged: False"
    assert f"card     {run.parent}/out/README.md" in capsys.readouterr().out
    assert load_adapter(run.parent / "out", family("gemma3").model.config).params


def test_a_stage_becomes_a_merged_model_of_its_best_state(run, capsys):
    out = run.parent / "out"
    assert export("--adapter", run / "grpo", "--out", out, "--merge", "--max-shard-gb", 3e-5) == 0
    said = capsys.readouterr().out
    assert f"{run}/grpo/best, step 2: " in said
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(f"         {name} " in said for name in shards)
    gap = float(said.partition("differs by more than ")[2].split()[0])
    assert 0 < gap <= 1e-5
    module = Gemma3ForConditionalGeneration.from_pretrained(out, attn_implementation="eager").eval()
    model = Model(family("gemma3").model.config, lora=SPEC)
    expected = probe_logits(model, {**family("gemma3").params, **state(2, 2).params})
    assert_close(torch_logits(module), expected, 1e-5)


def test_a_peft_folder_becomes_a_merged_model_in_another_dtype(tmp_path, capsys):
    module = peft_adapter("llama", tmp_path / "peft", decoder_only("llama", ("q_proj", "up_proj")), use_rslora=True)
    arguments = ("--adapter", tmp_path / "peft", "--base", family("llama").folder, "--out", tmp_path / "out", "--merge")
    assert export(*arguments, "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "rsLoRA of rank 3, alpha 5, on q_proj, up_proj" in said
    assert "(allowed 0.1, float32 arithmetic; without the adapter it would be " in said
    assert {value.dtype.name for value in load_file(tmp_path / "out/model.safetensors").values()} == {"bfloat16"}
    again = type(family("llama").torch).from_pretrained(tmp_path / "out", dtype="float32").eval()
    gap = np.abs(torch_logits(again) - torch_logits(module)).max() / np.abs(torch_logits(module)).max()
    assert float(said.partition("differs by more than ")[2].split()[0]) == pytest.approx(gap, rel=0.05)


def test_the_base_that_an_adapter_names_is_found(run, capsys):
    assert export("--adapter", run / "sft", "--out", run.parent / "first") == 0
    assert export("--adapter", run.parent / "first", "--out", run.parent / "second") == 0
    first, second = (load_file(run.parent / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    path = run.parent / "first/adapter_config.json"
    path.write_text(path.read_text().replace(str(family("gemma3").folder), "google/medgemma-4b-it"))
    assert export("--adapter", run.parent / "first", "--out", run.parent / "third") == 2
    assert "names 'google/medgemma-4b-it' as its base, which is no folder here; give its" in capsys.readouterr().err


def test_what_is_no_part_of_an_adapter_is_named(run, capsys):
    shutil.rmtree(run / "sft")
    with Checkpoints(run / "sft" / "checkpoints") as kept:
        kept.save(state(1, 1, **{"value_head.weight": jnp.ones((1, 32))}), {"source": {}})
    assert export("--adapter", run / "sft", "--out", run.parent / "out") == 0
    assert "(left out, as no part of an adapter: value_head.weight)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "{run}/sft", "--out", "{run}"], "is not empty; choose a new folder"),
        (
            ["--adapter", "{run}", "--out", "{out}"],
            "is a run with several stages; give the folder of one: {run}/grpo, {run}/sft",
        ),
        (["--adapter", "{run}/none", "--out", "{out}"], "none is not a folder"),
        (
            ["--adapter", "{run}/sft/checkpoints", "--out", "{out}"],
            "neither a PEFT folder (no adapter_config.json) nor",
        ),
        (["--adapter", "{run}/sft", "--out", "{out}", "--dtype", "float32"], "for merged models; add --merge"),
        (["--adapter", "{run}/sft", "--out", "{out}", "--merge", "--max-shard-gb", "0"], "must be above 0, found 0"),
        (["--adapter", "{run}/sft", "--out", "{out}", "--base", "{run}"], "it has no config.json"),
        (
            ["--adapter", "{run}/sft", "--out", "{out}", "--base", "{llama}"],
            "is another model (their config.json differ)",
        ),
    ],
    ids=["full", "run", "absent", "no adapter", "dtype", "shards", "no base", "other base"],
)
def test_mistakes_are_said_in_plain_words(arguments, said, run, capsys):
    places = {"run": run, "out": run.parent / "out", "llama": family("llama").folder}
    assert export(*(part.format(**places) for part in arguments)) == 2
    assert said.format(**places) in capsys.readouterr().err
    assert not (run.parent / "out").exists()
    assert not (run.parent / "out.partial").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.yaml of a run of version 0.1 lies beside it"),
        ("stages: []", "needs a section `model` with `path` and a section `lora`; found None"),
        ("model: {path: x}", "needs a section `model` with `path` and a section `lora`; found {'path': 'x'}"),
        (
            "model: {path: BASE, lora: {rank: 2, alpha: 3, slope: 1}}",
            "sets model.lora.slope, which no adapter here has",
        ),
        ("model: {path: BASE, lora: {rank: 4, alpha: 3}}", "tensors differ, such as language_model.layers.0"),
        ("model: {path: BASE, lora: {rank: 2, alpha: 3, targets: [qkv]}}", "LoRA targets must be among"),
    ],
    ids=["none", "no model", "no lora", "unknown key", "another rank", "targets"],
)
def test_a_run_whose_config_does_not_say_what_was_trained(config, said, run, capsys):
    (run / "config.yaml").unlink()
    if config is not None:
        (run / "config.yaml").write_text(config.replace("BASE", json.dumps(str(family("gemma3").folder))))
    assert export("--adapter", run / "sft", "--out", run.parent / "out") == 2
    assert said in capsys.readouterr().err


def test_a_stage_that_has_saved_nothing(run, capsys):
    shutil.rmtree(run / "sft")
    (run / "sft" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        read_outcome(run / "sft")


def test_a_note_where_rounding_is_not_small():
    done = Exported({"model.safetensors": 10}, gap=0.01, effect=0.02, tolerance=0.1, rounded_to="bfloat16")
    assert "note     rounding the merged weights to bfloat16" in report(Path("out"), done, arithmetic="float32")
    for fine in (done._replace(effect=0.5), done._replace(rounded_to=None)):
        assert "note" not in report(Path("out"), fine, arithmetic="float32")
