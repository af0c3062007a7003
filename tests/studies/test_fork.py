"""A fork on films from one YAML: base -> SFT -> {GRPO hard, GRPO nuanced, DPO} with two answer sets, killed at random
moments and continued to the same bytes; an arm added afterwards runs alone; damage is named before any work."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_chain import SHAPES, made, metrics, rows, same_files, stage_of
from test_owner import HOLDER
from tiny_models import checkpoint, gemma3_vision
from tiny_tokenizer import chat_folder

from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.data.films.images import BadImage
from vlmalign.data.sources.schema import NIH_TO_CHEXPERT9
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import Asked, run
from vlmalign.studies.engine.status import status

TRAIN = {"shapes": SHAPES, "optimiser": {"learning_rate": 1e-2}, "checkpoint_every": 2}
ROLLOUT = {"rows": 2, "group": 2, "completion": 16}
ARMS = ("hard", "nuanced", "dpo")


def policy(reward: dict) -> dict:
    own = {"kind": "grpo", "from": "sft", "data": "train.rl", "steps": 2, "prompts": 2, "rollout": ROLLOUT}
    return {**own, **TRAIN, "rewards": {"r": reward}, "objective": {"beta": 0.1}, "scoring": {"workers": 0}}


def study(folder: Path, model: Path) -> dict:
    root = "{run}/sources/mimic"
    pairs = [
        {"prompt": f"Is film {i} clear?", "chosen": "Yes, it is.", "rejected": f"The heart {i} is large."}
        for i in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "run": str(folder / "run"),
        "sources": {
            "mimic": {
                "kind": "mimic-cxr-jpg", "root": root, "split": "train", "traces": f"{root}/traces.jsonl",
                "phantom": {"films": {"train": 60, "validate": 2, "test": 4}, "seed": 1, "size": 32},
            },
            "mimic-test": {"kind": "mimic-cxr-jpg", "root": root, "split": "test"},
            "nih": {
                "kind": "nih-cxr14", "root": "{run}/sources/nih", "split": "test", "label_map": "nih14-to-chexpert9",
                "phantom": {"films": {"train_val": 2, "test": 4}, "seed": 3, "size": 32},
            },
        },
        "sets": {
            "held": {"from": "mimic", "draw": "patients", "size": 4, "role": "validation"},
            "train": {"from": "mimic", "draw": "balanced", "parts": {"sft": 8, "rl": 4}, "floor": 0.0, "apart": ["held"]},
            "near": {"from": "mimic-test", "role": "test"},
            "far": {"from": "nih", "role": "test"},
        },
        "tasks": {"findings": {"kind": "labels", "labels": "chexpert", "prompt": "Findings?", "state_separator": False}},
        "stages": {
            "base": {"kind": "model", "path": str(model), "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}},
            "sft": {
                "kind": "sft", "from": "base", "data": "train.sft", "steps": 3, "batch": 4, **TRAIN,
                "validation": {"data": "held", "every": 1, "best": "loss", "answers": True, "completion": 16},
            },
            "hard": policy({"kind": "hard", "options": {"min_tokens": 4}}),
            "nuanced": policy({"kind": "chexreason_nuanced", "options": {"everyone": False}}),
            "dpo": {
                "kind": "dpo", "from": "sft@last", "data": {"path": str(folder / "pairs.jsonl")}, "steps": 2, "batch": 2,
                **TRAIN,
            },
        },
        "answers": {"test": {
            "stages": ["base", "sft", "hard", "dpo"], "sets": ["near", "far"], "completion": 16, "rows": 4, "draws": 20,
            "prompt_multiple": 64,
        }},
    }  # fmt: skip


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    model = checkpoint(folder / "model", chat_folder(), gemma3_vision(chat_folder()))
    path = folder / "study.yaml"
    path.write_text(write_yaml(study(folder, model)))
    return path


def start(path: Path, *overrides: str, asked: Asked = Asked()) -> Path:
    return run(load_study(path, overrides), path, asked)


@pytest.fixture(scope="module")
def finished(config_file) -> Path:
    return start(config_file)


def test_every_artefact_is_there_and_whole(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".hashes.json", "answers", "environment.json", "galleries", "report.html", "scores", "sets", "sources", "stages",
        "study.yaml", "timing.jsonl",
    }  # fmt: skip
    assert {path.name for path in (finished / "stages").iterdir()} == {"sft", *ARMS}
    assert not list(finished.rglob("begun.json"))
    assert not list(finished.rglob("*.partial"))
    assert {line.state for line in status(finished)} == {"given", "done"}
    seconds = [row["stage"] for row in rows(finished / "timing.jsonl")]
    assert seconds.count("load model") == 1, "the base is loaded once"


def test_arms_go_on_from_the_states_that_they_name(finished):
    sft = made(stage_of(finished, "sft"))["content"]
    parents = {name: made(stage_of(finished, name))["parents"]["from"] for name in ARMS}
    assert {name: (each["which"], each["id"]) for name, each in parents.items()} == {
        "hard": ("best", sft["best"]), "nuanced": ("best", sft["best"]), "dpo": ("last", sft["last"]),
    }  # fmt: skip
    assert abs(metrics(stage_of(finished, "dpo"))[1]["rewards/margins"]) < 1e-5
    assert abs(metrics(stage_of(finished, "nuanced"))[1]["kl"]) < 1e-9


def test_sets_share_no_patient(finished):
    parts = [rows(finished / "sets" / name) for name in ("train/sft.jsonl", "train/rl.jsonl", "held/cases.jsonl")]
    assert [len(part) for part in parts] == [8, 4, 4]
    patients = [{row["patient"] for row in part} for part in parts]
    assert len(set.union(*patients)) == sum(map(len, patients))


def test_validation_reads_answers_through_the_task(finished):
    for line in metrics(stage_of(finished, "sft")).values():
        assert 0 <= line["validation/valid"] <= 1
        tracked = ("macro_f1", "micro_f1", "reasoning_named", "reasoning_kept", "length")
        assert {f"validation/{name}" for name in tracked} <= line.keys()
        assert line["entropy"] > 0
        assert line["validation/n"] == 4


def test_rewards_of_films_go_through_the_runner_and_are_recorded(finished):
    for name in ("hard", "nuanced"):
        found = [row for row in rows(stage_of(finished, name) / "rewards.jsonl") if "reward" in row]
        assert len(found) == 2 * 2 * 2
        logged = rows(stage_of(finished, name) / "completions.jsonl")
        assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in logged])
        assert {tuple(row["parts"]) for row in logged} == {("r",) if name == "hard" else ("r_nuanced", "r_collapse")}


def test_one_record_of_predictions_for_every_state_and_set(finished):
    for state in ("base", "sft", "hard", "dpo"):
        for name in ("near", "far"):
            found = rows(finished / "answers" / "test" / state / name / "predictions.jsonl")
            assert len(found) == 4
            assert {row["stage"] for row in found} == {state}
            assert all((finished / row["image"]).is_file() for row in found)
    results = json.loads((finished / "scores" / "test" / "results.json").read_text())
    assert [(d["name"], d["role"], len(d["labels"])) for d in results["datasets"]] == [
        ("near", "in-schema", 14), ("far", "cross-schema", 9),
    ]  # fmt: skip
    far = results["datasets"][1]
    ids = {row["id"] for row in rows(finished / "sets" / "far" / "cases.jsonl")}
    with (finished / "sources" / "nih" / "Data_Entry_2017_v2020.csv").open() as file:
        findings = [row["Finding Labels"].split("|") for row in csv.DictReader(file) if row["Image Index"] in ids]
    counts = Counter(name for names in findings for name in names if name in NIH_TO_CHEXPERT9.unmapped)
    assert far["unmapped"] == counts
    assert far["only_unmapped"] == sum(set(names) <= set(NIH_TO_CHEXPERT9.unmapped) for names in findings)
    assert "unmapped" not in results["datasets"][0]
    assert {(d["from"], d["to"]) for d in results["differences"]} == {("base", "sft"), ("sft", "hard"), ("sft", "dpo")}
    blocks = {row["dataset"]: list(row["results"]["blocks"]) for row in results["results"]}
    assert blocks == {"near": ["all 14", "shared 9"], "far": ["all 9"]}
    assert set(results["rewards"]) == {"hard", "nuanced"}


def test_a_finished_study_has_nothing_to_do(finished, config_file, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.jsonl") if path.name != "timing.jsonl"}
    start(config_file)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    start(config_file, asked=Asked(dry=True))
    assert "to make" not in capfd.readouterr().out


@pytest.fixture
def copied(finished, config_file, tmp_path) -> Path:
    """A copy of the study whose run is a copy of the finished one."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "study.yaml"
    path.write_text(config_file.read_text().replace(str(finished), str(tmp_path / "run")))
    return path


@pytest.mark.full
def test_a_fourth_arm_runs_alone(finished, copied):
    data = read_yaml(copied.read_text())
    data["stages"]["f1"] = policy({"kind": "labels", "options": {"measure": "f1"}})
    copied.write_text(write_yaml(data))
    folder = start(copied)
    seconds = [row["stage"] for row in rows(folder / "timing.jsonl")][len(rows(finished / "timing.jsonl")) :]
    assert seconds == ["load model", "stages/f1", "report"]
    assert {name.split("/")[1] for name in same_files(folder, finished)} == {"f1"}


@pytest.mark.full
def test_a_changed_setting_is_refused_by_name_and_redo_makes_exactly_what_follows(finished, copied):
    rate = "stages.sft.optimiser.learning_rate=0.02"
    with pytest.raises(
        ValueError, match=r"stages/sft was made from something else: optimiser.learning_rate: 0.01 then, 0.02"
    ):
        start(copied, rate)
    folder = start(copied, rate, asked=Asked(redo=("sft",)))
    changed = {
        "/".join(name.split("/")[:2]) for name in same_files(folder, finished) if not name.startswith("set-aside")
    }
    assert changed == {"stages/sft", *(f"stages/{name}" for name in ARMS), "answers/test", "scores/test"}
    base = "answers/test/base/near/predictions.jsonl"
    assert (folder / base).read_bytes() == (finished / base).read_bytes()
    assert {line.state for line in status(folder)} == {"given", "done"}


def test_a_part_of_the_graph_can_be_asked_for(config_file, tmp_path):
    folder = start(config_file, f"run={tmp_path / 'run'}", asked=Asked(only=("answers/test/base/far",)))
    states = {line.name: line.state for line in status(folder)}
    assert states["answers/test/base/far"] == "done"
    assert {states[name] for name in ("sets/train", "stages/sft", "answers/test/base/near", "scores/test")} == {
        "waiting"
    }


@pytest.mark.full
def test_a_torn_film_stops_the_run_or_is_left_out_and_listed(finished, copied, tmp_path):
    chosen = rows(finished / "sets" / "train" / "sft.jsonl")[0]["id"]
    (torn,) = (tmp_path / "run").rglob(f"{chosen}.jpg")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    shutil.rmtree(tmp_path / "run" / "sets" / "train")
    only = Asked(only=("sets/train",))
    with pytest.raises(BadImage, match=chosen):
        start(copied, asked=only)
    shutil.rmtree(tmp_path / "run" / "sets" / "train")
    folder = start(copied, "sets.train.on_bad=skip", asked=only)
    skipped = rows(folder / "sets" / "train" / "skipped.jsonl")
    assert [row["id"] for row in skipped if "image" in row["reason"]] == [chosen]
    assert chosen not in {
        row["id"] for part in ("sft", "rl") for row in rows(folder / "sets" / "train" / f"{part}.jsonl")
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("override", "kind"),
    [("sets.near.from=mimic", "patient"), ("sources.mimic-test.root='{run}/sources/copy'", "content")],
)
def test_sets_that_overlap_are_refused_before_training(config_file, tmp_path, finished, override, kind):
    """The training films as a test set; and the same films under another root, which only their content tells."""
    shutil.copytree(finished / "sources", tmp_path / "run" / "sources")
    if kind == "content":
        shutil.copytree(finished / "sources" / "mimic", tmp_path / "run" / "sources" / "copy")
        override = f"{override} ; sources.mimic-test.split=train".split(" ; ")
    overrides = [override] if isinstance(override, str) else override
    with pytest.raises(
        ValueError, match=rf"(?s)training set 'train.sft' overlaps the evaluation set 'near':.* {kind}: "
    ):
        start(config_file, f"run={tmp_path / 'run'}", *overrides)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "tasks.findings.labels=[Cardiomegaly, Edema]",
            r"stages.sft.task: set train.sft has labels that task findings does not",
        ),
        ("sources.mimic.traces=nowhere.jsonl", r"sources.mimic: .*nowhere.jsonl"),
        ("stages.base.path=nowhere", r"stages.base.path: there is no folder nowhere"),
        ("stages.hard.rewards.r.options={min_tokens: -1}", r"stages.hard.rewards.r: min_tokens must be >= 0"),
    ],
)
def test_mistakes_are_named_before_any_work(finished, copied, override, expected):
    before = (copied.parent / "run" / "timing.jsonl").read_bytes()
    with pytest.raises((ValueError, OSError), match=expected):
        start(copied, override)
    assert (copied.parent / "run" / "timing.jsonl").read_bytes() == before


# ----------------------------------------------------------------------------------------------- what lies in the folder


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "stages/hard/adapter/adapter_model.safetensors",
        "stages/sft/states/best.safetensors",
        "answers/test/base/near/predictions.jsonl",
        "sets/train/sft.jsonl",
    ],
)
def test_damage_to_what_was_made_is_named_before_any_work(copied, name, gone):
    path = copied.parent / "run" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()
    if not gone:
        path.write_bytes(content)
    artefact = "/".join(name.split("/")[: 4 if name.startswith("answers") else 2])
    found = "is missing" if gone else "is not as it was written"
    with pytest.raises(
        ValueError, match=rf"{path} {found}\. Restore it, or make {artefact} .* again with --redo {artefact}"
    ):
        start(copied)
    path.write_bytes(content)  # of the same size: the content is what counts
    with pytest.raises(ValueError, match=rf"{path} is not as it was written"):
        start(copied)


@pytest.mark.full
def test_damaged_scores_are_made_again(finished, copied):
    results = copied.parent / "run" / "scores" / "test" / "results.json"
    results.write_text(results.read_text().replace("0.", "1."))
    assert same_files(start(copied), finished) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stages/sft/made.json", r"stages/sft has files, and neither begun.json nor made.json"),
        ("sets/near/made.json", r"sets/near has files, and neither"),
        ("environment.json", r"environment.json is missing, which says when and where"),
    ],
)
def test_a_record_that_is_gone_is_an_error(copied, name, expected):
    """Without it anything would be taken for what the study asks for."""
    (copied.parent / "run" / name).unlink()
    with pytest.raises(ValueError, match=expected):
        start(copied)


def test_what_a_run_writes_is_for_its_owner(finished):
    assert [path for path in (finished, *finished.rglob("*")) if path.stat().st_mode & 0o077] == []


def test_what_a_run_writes_may_be_opened_to_a_group(config_file, tmp_path):
    folder = start(
        config_file, f"run={tmp_path / 'run'}", "readable_by=group", asked=Asked(only=("sets/near", "sets/far"))
    )
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == {True: 0o750, False: 0o640}


def test_a_finished_study_on_a_read_only_disk_is_finished(copied, capfd, monkeypatch):
    monkeypatch.setattr("vlmalign.studies.engine.folder.os.access", lambda path, mode: False)
    start(copied)
    assert "cannot be written to; all of the study is there" in capfd.readouterr().out
    with_arms(copied, "f1")
    with pytest.raises(ValueError, match=r"cannot be written to, and not all of the study is there"):
        start(copied)


def with_arms(study_file: Path, *names: str) -> None:
    data = read_yaml(study_file.read_text())
    for name in names:
        data["stages"][name] = policy({"kind": "labels", "options": {"measure": "f1"}})
    study_file.write_text(write_yaml(data))


@pytest.mark.full
def test_films_that_are_others_than_a_set_was_drawn_with_are_refused(finished, copied):
    run_folder = copied.parent / "run"
    first, second = (row["id"] for row in rows(finished / "sets" / "near" / "cases.jsonl")[:2])
    (changed,), (other,) = (list((run_folder / "sources").rglob(f"{each}.jpg")) for each in (first, second))
    changed.write_bytes(other.read_bytes())
    start(copied)  # nothing is made of them any more
    with_arms(copied, "f1")
    with pytest.raises(ValueError, match=rf"{changed} is not the image that set near was drawn with"):
        start(copied)
    assert not (run_folder / "stages" / "f1").exists()


@pytest.mark.full
def test_what_another_start_is_at_work_on_is_left_to_it(copied):
    run_folder = copied.parent / "run"
    with_arms(copied, "f1", "f2")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_folder), "stages/f1"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"None\n"
        lines = {line.name: line for line in status(run_folder)}
        report = (run_folder / "report.html").stat().st_mtime_ns
        with pytest.raises(
            ValueError, match=rf"at work on all that is left: stages/f1 \(process {other.pid} on .*--take-over"
        ):
            start(copied)
        lines = {line.name: line for line in status(run_folder)}
        assert lines["stages/f2"].state == "done", "the other arm was made"
        assert lines["stages/f1"].owner.startswith(f"process {other.pid} on ")
        assert (run_folder / "report.html").stat().st_mtime_ns == report, "the report waits for all"
        (run_folder / "stages" / "f1").mkdir()
        with pytest.raises(ValueError, match=r"--redo would set aside what others are at work on: stages/f1"):
            start(copied, asked=Asked(redo=("f1",)))
        (run_folder / "stages" / "f1").rmdir()
        start(copied, asked=Asked(take_over=True))
        other.kill()
    assert made(stage_of(run_folder, "f1"))["content"] == made(stage_of(run_folder, "f2"))["content"]


def count(folder: Path) -> int:
    """Files and folders in a folder that is being written: some are gone before they are looked into."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def kill_and_go_on(config_file: Path, folder: Path, kills: int, seed: int) -> None:
    """Kill -9 at `kills` random moments, then let the same command end."""
    chance = random.Random(seed)
    command = [sys.executable, "-m", "vlmalign.cli", "run", str(config_file), "--run", str(folder)]
    for _ in range(kills):
        known = count(folder)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 240
            # The moment is counted in files that came since this start, so that a slow machine changes nothing.
            wanted = known + chance.randrange(1, 60)
            while process.poll() is None and count(folder) < wanted:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(chance.random())
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_killed_study_goes_on_to_the_same_bytes(finished, config_file, tmp_path):
    kill_and_go_on(config_file, tmp_path / "run", kills=2, seed=0)
    assert same_files(tmp_path / "run", finished) == []


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_study_killed_often_goes_on_to_the_same_bytes(finished, config_file, tmp_path):
    kill_and_go_on(config_file, tmp_path / "run", kills=6, seed=1)
    assert same_files(tmp_path / "run", finished) == []


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_killed_study_goes_on_in_two_processes(finished, config_file, tmp_path, repository):
    """Kill -9 in the midst of SFT; two processes end the study with the same metrics, answers and scores."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vlmalign.cli", "run", str(config_file), "--run", str(folder)]
    lines = stage_of(folder, "sft") / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    launcher = [sys.executable, str(repository / "scripts" / "launch_ssh.py"), "--transport", "local"]
    launcher += ["--hosts", "localhost", "--per-host", "2", "--", *command]
    done = subprocess.run(launcher, cwd=repository, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "[0] report: " in done.stdout
    assert "[1] report: " not in done.stdout, "one process speaks and writes"
    for name in ("sft", *ARMS):
        ours, theirs = (rows(stage_of(run, name) / "metrics.jsonl") for run in (folder, finished))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert ours[0]["objective"] == pytest.approx(theirs[0]["objective"], abs=1e-5)
    for name in ("near", "far"):
        for state in ("base", "sft"):
            place = f"answers/test/{state}/{name}/predictions.jsonl"
            assert rows(folder / place) == rows(finished / place)
    assert {line.state for line in status(folder)} == {"given", "done"}


def run_command(config_file: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "vlmalign.cli", "run", str(config_file), "--run", str(folder)]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pause", [0.0, 25.0])
def test_two_starts_at_once_make_the_same_bytes_as_one(finished, config_file, tmp_path, pause):
    """Whoever finds everything else taken ends with 2 and says who has it; nothing is written by both."""
    folder = tmp_path / "run"
    both = []
    for _ in range(2):
        both.append(
            subprocess.Popen(
                run_command(config_file, folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
        time.sleep(pause)
    said = [process.communicate(timeout=800)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) in ([0, 0], [0, 2]), said
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "others are at work on all that is left: " in text
    assert same_files(folder, finished) == []
    assert {line.state for line in status(folder)} == {"given", "done"}


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_study_that_is_told_to_end_has_saved(finished, config_file, tmp_path, name):
    folder = tmp_path / "run"
    lines = stage_of(folder, "sft") / "metrics.jsonl"
    with subprocess.Popen(
        run_command(config_file, folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 240
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 1):
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 85, said
    assert f"vlmalign run: told to end by {name}: " in said
    assert "; the same command goes on" in said
    done = subprocess.run(run_command(config_file, folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same_files(folder, finished) == []


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_processes_that_are_told_to_end_save_at_one_step(config_file, tmp_path, repository):
    folder = tmp_path / "run"
    launcher = [sys.executable, str(repository / "scripts" / "launch_ssh.py"), "--transport", "local"]
    launcher += ["--hosts", "localhost", "--per-host", "2", "--", *run_command(config_file, folder)]
    longer = ["--set", "stages.sft.steps=40", "--only", "stages/sft"]
    lines = stage_of(folder, "sft") / "metrics.jsonl"
    with subprocess.Popen(
        [*launcher, *longer], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 400
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=400)[0]
    assert process.returncode == 85, said[-3000:]
    (told,) = set(re.findall(r"sft was saved after update (\d+) of 40", said))
    assert (stage_of(folder, "sft") / "checkpoints" / told).is_dir()
    assert len(rows(lines)) == int(told)
    done = subprocess.run(
        [*launcher, *longer], cwd=repository, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"sft: continuing after update {told} of 40" in done.stdout
    assert [row["step"] for row in rows(lines)] == list(range(1, 41))
