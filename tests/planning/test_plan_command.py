"""`vlmalign plan` as it is typed: what it prints and writes, and what it says of mistakes."""

import json

import jax
import pytest
from rich.console import Console
from small_plan import CONFIG, OVERRIDES, SMALL

from vlmalign.cli import main
from vlmalign.planning.report import show


@pytest.fixture
def model_config(tmp_path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def no_plug_in(monkeypatch):
    monkeypatch.setattr("vlmalign.planning.target.PLUG_INS", (("no-such-wheel",),))


def plan(*arguments: str) -> int:
    return main(["plan", str(CONFIG), "--set", *OVERRIDES, *map(str, arguments)])


def test_a_plan_in_json_and_words(no_plug_in, model_config, tmp_path, capsys):
    out = tmp_path / "out" / "plan.json"
    assert plan("--device", "a100-80", "--count", "2", "--model-config", model_config, "--json", out) == 0
    said = capsys.readouterr().out
    written = json.loads(out.read_text())
    (found,) = written["plans"]
    assert written["planned_in"]["cpu_seconds"] > 0
    assert found["device"]["count"] == 2
    assert found["method"] == "arithmetic"
    assert found["versions"]["jax"] == jax.__version__
    assert "pip install no-such-wheel" in found["refusal"]
    assert found["lengths"][0]["known"]["prompt"].startswith("image tokens")
    settings = found["as_configured"]
    assert settings["fits"] is True
    assert settings["peak_bytes"] == max(phase["peak"] for phase in settings["memory_per_device"])
    assert settings["time"]["gpu_hours"] == pytest.approx(2 * settings["time"]["roofline_gpu_hours"])
    assert found["proposed"]["remat"] == "none"
    for text in ("2 x NVIDIA A100-SXM4-80GB", "Nothing was compiled", "Fits:", "GPU-hours:", "left out: validation"):
        assert text in said


def test_what_the_tables_say(no_plug_in, model_config, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert plan("--device", "a100-80", "--count", "2", "--model-config", model_config, "--json", out) == 0
    said = capsys.readouterr().out
    for head in ("parameters", "trained", "optimiser", "cache", "activations", "peak", "sft epoch", "grpo epoch"):
        assert head in said
    (found,) = json.loads(out.read_text())["plans"]
    program = {
        "name": "grpo gradients",
        "collectives": [{"kind": "all-reduce", "count": 4, "loop": "x3", "bytes": 2**20}],
    }
    program |= {"copies_in_loops": [], "sorts": 0, "calls_per_step": 4}
    alone = program | {"name": "encode", "collectives": [], "calls_per_step": None}
    # Rollouts that do not fit, whatever the updates do; what one estimated is not promised.
    now = found["proposed"] | {"fits": False}
    high = max(now["memory_per_device"], key=lambda phase: phase["peak"])
    high["how"] = "drawn out from 2 and 4 layers"
    found |= {"as_configured": now, "proposed": now, "programs": [program, alone], "gathered_for_rollout_bytes": 2**30}
    show(found, Console(width=200))
    said = capsys.readouterr().out
    assert "grpo gradients: 4 all-reduce in a loop x3, 1.0 MiB per call, 4 calls a step" in said
    assert "no collectives: encode" in said
    assert "1.00 GiB on each device" in said
    assert "Nothing faster fits" not in said
    assert f"{high['name']} needs the most" in said
    show(found | {"proposed": now | {"fits": True, "remat": "dots"}}, Console(width=200))
    assert "Fits by an estimate (drawn out from 2 and 4 layers)" in capsys.readouterr().out


def test_the_folder_of_the_model_may_hold_its_config_alone(no_plug_in, model_config, capsys):
    path = f"stages.base.path={model_config.parent}"
    assert main(["plan", str(CONFIG), "--set", *OVERRIDES, path, "--device", "h200", "--no-search"]) == 0
    assert "Fits:" in capsys.readouterr().out


def test_medgemma_on_every_device(no_plug_in, capsys):
    """The arithmetic says of the paper's run that it fits an A100-80, and a 24 GB card not as it is configured."""
    arguments = ["--model-config", "medgemma-4b", "--no-search"]
    assert main(["plan", str(CONFIG), "--device", "a100-80", *arguments]) == 0
    assert "Fits:" in capsys.readouterr().out
    assert main(["plan", str(CONFIG), "--device", "rtx4090-24", *arguments]) == 0
    assert "Does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "a100-81"], "unknown device 'a100-81'; known: a100-40"),
        (["--device", "h100", "--count", "0"], "--count must be >= 1, found 0"),
        (["--device", "h100", "--share", "1.5"], "--share must be above 0 and at most 1, found 1.5"),
        (["--device", "h100"], "put its config.json there, or give --model-config FILE or NAME (known: llama-3-8b"),
        (["--device", "h100", "--model-config", "nowhere.json"], "nowhere.json does not exist"),
        (["--device", "h100", "--model-config", "sft=medgemma-4b", "--stage", "spo"], "no stage is called 'spo'"),
        (["--device", "h100", "--prompt-tokens", "0"], "--prompt-tokens must be >= 1, found 0"),
    ],
)
def test_mistakes_in_plain_words(arguments, message, capsys):
    assert plan(*arguments) == 2
    assert message in capsys.readouterr().err


def test_lengths_out_of_range(model_config, capsys):
    assert plan("--device", "h100", "--model-config", model_config, "--completion-tokens", "99") == 2
    assert "completions have 1 to 16 tokens (stages.grpo.rollout.completion), found 99" in capsys.readouterr().err


def test_several_models_are_several_plans(no_plug_in, model_config, tmp_path, capsys):
    """A chain and a study of two bases by one command, each with what it was given."""
    out = tmp_path / "plan.json"
    second = json.dumps({"kind": "model", "path": "elsewhere"})
    more = ["--set", f"stages.other={second}", "answers.test.stages=[base, other]", "--stage", "base", "other"]
    names = ["--model-config", str(model_config), "other=medgemma-4b"]
    assert plan("--device", "h100", *names, *more, "--json", out) == 0
    small, large = json.loads(out.read_text())["plans"]
    assert (small["model"]["stages"], large["model"]["stages"]) == (["base"], ["other"])
    assert (small["model"]["layers"], large["model"]["layers"]) == (3, 34)
    assert small["model"]["trained_parameters"] == 0
    assert capsys.readouterr().out.count("GPU-hours:") == 2
