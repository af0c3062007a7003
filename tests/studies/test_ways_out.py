"""Ways out of the paradox: what docs/ways_out.md shows runs, learns from what it says, and goes on after a stop to the
same bytes; configs/chexreason/paradox.yaml holds every one of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from test_chain import metrics, rows, same_files, stage_of
from tiny_models import checkpoint, gemma3_vision
from tiny_tokenizer import chat_folder

from vlmalign import stopping
from vlmalign.config import ConfigError
from vlmalign.data.sources.formats import SOURCES
from vlmalign.data.sources.schema import CHEXPERT, CHEXPERT9
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.graph import Edge, build_graph
from vlmalign.studies.engine.opened import _together
from vlmalign.studies.engine.overlaps import _pairs
from vlmalign.studies.engine.run import Asked, run
from vlmalign.studies.engine.sets import Cases
from vlmalign.tasks.labels import LabelsTask

ARMS = ("mixed", "robust", "sft-beside", "dropout", "strong-kl", "composite")
STUDY = """
run: RUN
sources:
  home: {kind: mimic-cxr-jpg, root: "{run}/sources/home", split: train,
         phantom: {films: {train: 30, validate: 2, test: 2}, seed: 1, size: 32}}
  away: {kind: nih-cxr14, root: "{run}/sources/away", split: train_val, label_map: nih14-to-chexpert9,
         phantom: {films: {train_val: 10, test: 4}, seed: 3, size: 32}}
  away-held: {kind: nih-cxr14, root: "{run}/sources/away", split: test, label_map: nih14-to-chexpert9}
sets:
  train: {from: home, draw: patients, size: 8}
  rl: {from: home, draw: patients, size: 4, apart: [train]}
  held: {from: home, draw: patients, size: 4, apart: [train, rl], role: validation}
  rl-away: {from: away, draw: patients, size: 8}
  held-away: {from: away-held, role: watch}
tasks:
  findings: {kind: labels, labels: chexpert, prompt: "Which of {labels}?"}
stages:
  base: {kind: model, path: MODEL, lora: {rank: 2, alpha: 4.0, targets: [q_proj, v_proj]}}
  hard: &hard
    kind: grpo
    from: base
    data: rl
    steps: 2
    prompts: 4
    rollout: {rows: 4, group: 2, completion: 16}
    rewards: {hard: {kind: hard, options: {min_tokens: 4}}}
    objective: {beta: 0.1}
    shapes: {rows: 2, prompt_multiple: 64, completion_multiple: 16}
    optimiser: {learning_rate: 1.0e-2}
    scoring: {workers: 0}
    validation: {data: held, every: 2, watch: [held-away]}
"""


def shown(repository: Path) -> str:
    """The arms of the page, as they stand there."""
    page = (repository / "docs" / "ways_out.md").read_text(encoding="utf-8")
    return "".join(block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "<<: *hard" in block)


@pytest.fixture(scope="module")
def config_file(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ways-out")
    model = checkpoint(folder / "model", chat_folder(), gemma3_vision(chat_folder()))
    path = folder / "study.yaml"
    path.write_text(STUDY.replace("RUN", str(folder / "run")).replace("MODEL", str(model)) + shown(repository))
    return path


@pytest.fixture(scope="module")
def finished(config_file) -> Path:
    return run(load_study(config_file), config_file)


# ---------------------------------------------------------------- configs


def test_the_ablation_holds_every_way_out_as_a_fork_of_one_sft(repository):
    config = load_study(repository / "configs" / "chexreason" / "paradox.yaml")
    forks = {name for name, stage in config.trained.items() if stage.from_ == "sft"}
    assert forks == {"hard", "nuanced", "mixed-no-shift", *ARMS}
    assert set(config.answers["test"].stages) == {"base", "sft", *forks}
    plain = config.stages["hard"].model_dump()
    changed = {
        name: {key for key, value in config.stages[name].model_dump().items() if value != plain[key]} for name in forks
    }
    assert changed == {
        "hard": set(), "nuanced": {"rewards"}, "mixed": {"data"}, "mixed-no-shift": {"data"}, "robust": {"rewards"},
        "sft-beside": {"sft"}, "dropout": {"label_dropout"}, "strong-kl": {"objective"}, "composite": {"data", "rewards"},
    }  # fmt: skip


def test_the_page_shows_every_way_out(config_file):
    config = load_study(config_file)
    assert set(config.trained) == {"hard", *ARMS}
    parents = build_graph(config)["stages/mixed"].parents
    assert (parents["data rl"], parents["data rl-away"]) == (Edge("sets/rl"), Edge("sets/rl-away"))
    assert build_graph(config)["stages/sft-beside"].parents["sft"] == Edge("sets/train")
    assert set(_pairs(config, ["mixed", "sft-beside"])) == {
        (learnt, held) for learnt in ("rl", "rl-away", "train") for held in ("held", "held-away")
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.hard.data=[rl, rl]", "expected one set, or several that differ"),
        ("stages.hard.data=[]", "expected one set, or several that differ"),
        ("stages.hard.data={set: [rl, train], traces: a.jsonl}", "traces go with one set"),
        ("stages.hard.data=[rl, nowhere]", "no set is called 'nowhere'"),
        ("stages.hard.validation.data=[held, held-away]", "expected one set, found sets held [+] held-away"),
        ("stages.hard.sft={data: nowhere, batch: 2}", "stages.hard.sft.data: no set is called 'nowhere'"),
        ("stages.hard.sft={data: train, batch: 2, weight: 0}", "stages.hard.sft.weight"),
        ("stages.hard.label_dropout=1.0", "stages.hard.label_dropout"),
        ("sources.away.phantom.convention=mimic-like", "mimic-like labels in chexpert, and this format holds nih"),
    ],
)
def test_mistakes_are_named(config_file, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_study(config_file, [override])


# ---------------------------------------------------------------- several sets


def drawn(folder: Path, kind: str, places: list[int], **settings) -> Cases:
    """Cases of an invented archive of six films."""
    files = {"chexpert": {"train": 6}, "nih-cxr14": {"train_val": 6}}[kind]
    SOURCES[kind].write(folder / kind, films=files, seed=1, size=16)
    source = SOURCES[kind](kind=kind, root=folder / kind, split=next(iter(files)), **settings).open(Path)
    return Cases(kind, source, np.array(places), [])


def test_cases_of_several_sets_have_numbers_and_labels_of_their_own(tmp_path):
    one = drawn(tmp_path, "chexpert", [0, 3])
    other = drawn(tmp_path, "nih-cxr14", [0, 5], label_map="nih14-to-chexpert9")
    found = list(_together([one, other]))
    assert [number for number, _ in found] == [0, 3, 6, 11]
    assert [case.labels for _, case in found] == [each[i].labels for each in (one, other) for i in (0, 1)]
    task = LabelsTask(prompt="Which of {labels}?", labels="chexpert")
    asked = [task.ask(case)[0]["content"][1]["text"] for _, case in found]
    assert all(label in asked[0] for label in CHEXPERT.labels)
    assert [label for label in CHEXPERT.labels if label in asked[3]] == list(CHEXPERT9.labels)
    assert task.columns(found[3][1])["asked"] == list(CHEXPERT9.labels)
    assert [case.meta for _, case in _together([one])] == [one[0].meta, one[1].meta], "one set is asked as ever"


# ---------------------------------------------------------------- a run


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_way_out_learns_from_what_it_says(finished):
    found = {name: metrics(stage_of(finished, name)) for name in ("hard", *ARMS)}
    logged = {name: rows(stage_of(finished, name) / "completions.jsonl") for name in ("hard", *ARMS)}
    for name, lines in found.items():
        assert list(lines) == [1, 2]
        assert all(line["skipped"] == 0 for line in lines.values()), name
        for place in ("validation", "held-away"):
            tracked = {key.partition("/")[2] for key in lines[2] if key.startswith(f"{place}/")}
            assert {"macro_f1", "micro_f1", "valid", "length", "reasoning_named", "reasoning_kept"} <= tracked
        assert {"kl", "entropy", "reward"} <= lines[2].keys()
    # One start, one seed, and where nothing else differs the same completions at first.
    first = {name: [row["completion"] for row in lines if row["step"] == 1] for name, lines in logged.items()}
    for name in ("robust", "sft-beside", "dropout", "strong-kl"):
        assert first[name] == first["hard"]
    sources = {row["images"][0].split("/")[1] for row in logged["mixed"]}
    assert sources == {"home", "away"}
    assert {(row["images"][0].split("/")[1], len(row["columns"]["asked"])) for row in logged["mixed"]} == {
        ("home", 14), ("away", 9),
    }  # fmt: skip
    mixed = found["sft-beside"][1]
    assert mixed["sft/loss"] > 1
    assert mixed["objective"] == pytest.approx(found["hard"][1]["objective"] + 0.1 * mixed["sft/loss"], abs=1e-4)
    assert "sft/loss" not in found["hard"][1]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["mixed", "sft-beside", "dropout"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bytes(finished, config_file, tmp_path, monkeypatch, name):
    overrides = [f"run={tmp_path / 'run'}", f"stages.{name}.checkpoint_every=1"]
    asked = Asked(only=(f"stages/{name}",))
    begun = stage_of(tmp_path / "run", name) / "begun.json"
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "requested", begun.exists)  # told to end once the stage is under way
        with pytest.raises(stopping.Stopped, match="after update 1 of 2"):
            run(load_study(config_file, overrides), config_file, asked)
    folder = run(load_study(config_file, overrides), config_file, asked)
    # The record of the whole has the free setting that differs.
    assert set(same_files(stage_of(folder, name), stage_of(finished, name))) <= {"made.json"}
