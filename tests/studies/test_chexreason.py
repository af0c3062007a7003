"""The whole pipeline in a minute: from films on disk to a report, killed and continued by two processes, on bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vlmalign.config import load_config
from vlmalign.data.films.images import BadImage
from vlmalign.progress import Progress
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.films import open_films
from vlmalign.studies.chexreason.prepare import prepare
from vlmalign.studies.chexreason.run import run

STAGES, SETS = ("base", "sft", "grpo"), ("mimic-like test", "chexpert-like test", "nih-like test")

SMALL = [
    "data.train.phantom={films: {train: 120, validate: 2, test: 10}, seed: 1, size: 64}",
    "data.sample={sft: 16, rl: 8, validation: 4, floor: 0.0}",
    "data.reading={workers: 1, ahead: 16}",
    "sft.epochs=3", "sft.batch=8", "sft.shapes.rows=8", "sft.checkpoint_every=2",
    "grpo.steps=3", "grpo.prompts=4", "grpo.rollout={rows: 4, group: 2, completion: 32}",
    "grpo.shapes={rows: 4, prompt_multiple: 16, completion_multiple: 32}", "grpo.checkpoint_every=2",
    "sft.validation={every: 3, answers: true, best: validation/loss}",
    "evaluation.rows=8", "evaluation.completion=16", "evaluation.draws=50",
    "evaluation.sets.1.films.phantom={films: {train: 2, valid: 2, test: 6}, seed: 2, size: 64}",
    "evaluation.sets.2.films.phantom={films: {train_val: 2, test: 6}, seed: 3, size: 64}",
]  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(repository) -> Path:
    return repository / "configs" / "chexreason" / "quickstart.yaml"


@pytest.fixture
def in_repository(repository, monkeypatch):
    """Paths in configs are relative to the working directory."""
    monkeypatch.chdir(repository)


def small(quickstart: Path, folder: Path, *overrides: str) -> ChexReasonConfig:
    return load_config(ChexReasonConfig, quickstart, [*SMALL, f"run={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quickstart, repository) -> Path:
    folder = tmp_path_factory.mktemp("chexreason") / "whole"
    before = Path.cwd()
    os.chdir(repository)
    try:
        run(small(quickstart, folder))
    finally:
        os.chdir(before)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_folder_holds_everything(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["sft"]["batch"] == 8
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["matmul_gflops"] > 0
    assert environment["packages"]["jax"]
    assert [r["step"] for r in rows(finished / "sft" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows(finished / "grpo" / "metrics.jsonl")] == [1, 2, 3]
    assert {r["stage"] for r in rows(finished / "timing.jsonl")} == {
        "films", "load model", "sft", "grpo", "evaluation", "report",
    }  # fmt: skip
    for name in ("sft", "grpo"):
        assert any((finished / name / "checkpoints").iterdir())


def test_validation_while_training(finished):
    """Every third step and the last; the adapter that GRPO starts from is that of the lowest loss."""
    found = {r["step"]: r for r in rows(finished / "sft" / "metrics.jsonl")}
    measured = {step: r["validation/loss"] for step, r in found.items() if "validation/loss" in r}
    assert list(measured) == [3, 6]
    assert all(0 <= found[step]["validation/macro_f1"] <= 1 and found[step]["validation/n"] == 4 for step in measured)
    assert [p.name for p in (finished / "sft" / "best").iterdir() if p.name.isdigit()] == [
        str(min(measured, key=measured.get))
    ]


def test_every_completion_is_logged(finished):
    found = rows(finished / "grpo" / "completions.jsonl")
    assert [(r["step"], r["sample"]) for r in found] == [(s, k) for s in (1, 2, 3) for _ in range(4) for k in range(2)]
    metrics = rows(finished / "grpo" / "metrics.jsonl")
    for step in metrics:
        own = [r["reward"] for r in found if r["step"] == step["step"]]
        assert sum(own) / len(own) == pytest.approx(step["reward"])
    assert {"valid", "jaccard", "length_penalty"} == set(found[0]["parts"])


def test_every_film_is_answered_by_every_stage(finished):
    found = rows(finished / "evaluation" / "predictions.jsonl")
    assert [(r["stage"], r["dataset"]) for r in found] == [
        (stage, name) for stage in STAGES for name, n in zip(SETS, (10, 6, 6), strict=True) for _ in range(n)
    ]
    assert all((finished / r["image"]).is_file() for r in found)


def test_sets_share_no_patient(finished):
    patients = [
        {r["patient"] for r in rows(finished / "data" / f"{name}.jsonl")} for name in ("sft", "rl", "validation")
    ]
    assert [len(rows(finished / "data" / f"{name}.jsonl")) for name in ("sft", "rl", "validation")] == [16, 8, 4]
    assert len(set.union(*patients)) == sum(map(len, patients))


def test_results_name_schema_and_both_averages(finished):
    results = json.loads((finished / "evaluation" / "results.json").read_text())
    assert [(d["name"], d["role"], len(d["labels"])) for d in results["datasets"]] == [
        (SETS[0], "in-schema", 14), (SETS[1], "in-schema", 14), (SETS[2], "cross-schema", 9),
    ]  # fmt: skip
    blocks = {r["dataset"]: list(r["results"]["blocks"]) for r in results["results"]}
    assert blocks == {SETS[0]: ["all 14", "shared 9"], SETS[1]: ["all 14", "shared 9"], SETS[2]: ["all 9"]}
    assert len({b["name"] for b in results["baselines"]}) == 4
    assert {(d["from"], d["to"]) for d in results["differences"]} == {("base", "sft"), ("sft", "grpo")}
    assert results["reward"]["first"]["steps"] == 2


def test_report_is_one_page_with_figures(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "data:image/" in page
    for name in SETS:
        assert name in page


def until_killed(command: list[str], metrics: Path, lines: int, repository: Path) -> None:
    """Runs the command and kills it as soon as its stage has written so many lines."""
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)


def test_killed_run_continues_with_the_same_command(finished, tmp_path, quickstart, repository):
    """Kill -9 in SFT, then in GRPO; the same command ends with the same metrics, answers and scores, to the byte."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vlmalign.cli", "chexreason", str(quickstart)]
    command += ["--run", str(folder), "--set", *SMALL]
    until_killed(command, folder / "sft" / "metrics.jsonl", 3, repository)
    until_killed(command, folder / "grpo" / "metrics.jsonl", 1, repository)
    assert not (folder / "evaluation").exists()
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "report:" in done.stdout
    for name in ("sft/metrics.jsonl", "grpo/metrics.jsonl", "evaluation/predictions.jsonl", "evaluation/results.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_killed_run_goes_on_in_two_processes(finished, tmp_path, quickstart, repository):
    """Kill -9 in the midst of SFT; two processes end the run with the same metrics, answers and scores."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vlmalign.cli", "chexreason", str(quickstart)]
    command += ["--run", str(folder), "--set", *SMALL]
    metrics = folder / "sft" / "metrics.jsonl"
    until_killed(command, metrics, 3, repository)
    launcher = [sys.executable, str(repository / "scripts" / "launch_ssh.py"), "--transport", "local"]
    launcher += ["--hosts", "localhost", "--per-host", "2", "--", *command]
    # Compiling is most of what two processes cost here.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": quick}
    done = subprocess.run(
        launcher, cwd=repository, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "[0] report: " in done.stdout
    assert "[1] report: " not in done.stdout, "one process speaks and writes"
    ours, theirs = rows(metrics), rows(finished / "sft" / "metrics.jsonl")
    assert ours[:2] == theirs[:2], "of the killed process, whose checkpoint was after the second"
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    ours, theirs = (rows(run / "grpo" / "completions.jsonl") for run in (folder, finished))
    assert len(ours) == len(theirs)
    for one, other in zip(ours[:8], theirs[:8], strict=True):  # the first step's; later policies differ by rounding
        assert one["completion"] == other["completion"]
        assert one["parts"] == other["parts"]
    ours, theirs = (rows(run / "evaluation" / "predictions.jsonl") for run in (folder, finished))
    assert [(row["stage"], row["id"]) for row in ours] == [(row["stage"], row["id"]) for row in theirs]
    assert [row for row in ours if row["stage"] != "grpo"] == [row for row in theirs if row["stage"] != "grpo"]
    ours, theirs = (json.loads((run / "evaluation" / "results.json").read_text()) for run in (folder, finished))
    assert [row for row in ours["results"] if row["stage"] != "grpo"] == [
        row for row in theirs["results"] if row["stage"] != "grpo"
    ]
    assert ours["baselines"] == theirs["baselines"]


def test_finished_run_only_writes_its_report_again(finished, quickstart, in_repository):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("metrics.jsonl")}
    trained = {p: p.read_bytes() for p in before}
    run(small(quickstart, finished))
    assert {p: p.read_bytes() for p in before} == trained


def test_run_folder_of_another_config_is_refused(finished, quickstart, in_repository):
    with pytest.raises(ValueError, match="holds a run of another config"):
        run(small(quickstart, finished, "seed=1"))


@pytest.fixture
def films_with_one_torn(finished, tmp_path, quickstart, in_repository):
    """The finished run's data set, with one film of the SFT set cut in half."""
    chosen = rows(finished / "data" / "sft.jsonl")[0]["id"]
    copy = tmp_path / "films"
    subprocess.run(["cp", "-r", str(finished / "films" / "mimic"), str(copy)], check=True)
    (torn,) = copy.rglob(f"{chosen}.jpg")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    return copy, chosen


def test_torn_film_stops_the_run_by_default(films_with_one_torn, tmp_path, quickstart):
    root, chosen = films_with_one_torn
    config = small(quickstart, tmp_path / "run", f"data.train.root={root}", "data.train.phantom=null")
    with pytest.raises(BadImage, match=chosen), Progress() as progress:
        prepare(config, open_films(config.data.train, config), progress)


def test_torn_film_is_skipped_and_listed_when_allowed(films_with_one_torn, tmp_path, quickstart):
    root, chosen = films_with_one_torn
    config = small(
        quickstart, tmp_path / "run", f"data.train.root={root}", "data.train.phantom=null", "data.on_bad=skip"
    )
    with Progress() as progress:
        films = open_films(config.data.train, config)
        sets = prepare(config, films, progress)
        again = prepare(config, films, progress)
    skipped = rows(config.run / "data" / "skipped.jsonl")
    assert [row["id"] for row in skipped if "unreadable" in row["reason"]] == [chosen]
    drawn = {r["id"] for name in sets.rows for r in rows(config.run / "data" / f"{name}.jsonl")}
    assert chosen not in drawn
    assert len(sets.rows["sft"]) == 16
    assert all((sets.rows[name] == again.rows[name]).all() for name in sets.rows)


def test_missing_trace_is_named(finished, tmp_path, quickstart, in_repository):
    traces = tmp_path / "traces.jsonl"
    traces.write_text('{"id": "nobody", "trace": "Nothing."}\n')
    config = small(
        quickstart, tmp_path / "run", f"data.traces={traces}", "evaluation.sets=[]",
        f"data.train.root={finished / 'films' / 'mimic'}", "data.train.phantom=null",
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no trace for film"):
        run(config)
