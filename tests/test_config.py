"""Configs: YAML plus overrides become frozen typed values, every mistake is named, and dumps read back exactly."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from vlmalign.config import Config, ConfigError, dump_config, load_config
from vlmalign.config_yaml import read_yaml, write_yaml


class Train(Config):
    steps: int = Field(ge=1)
    learning_rate: float = 1e-3
    clip: float = math.inf


class Sft(Config):
    kind: Literal["sft"] = "sft"
    smoothing: float = 0.0


class Grpo(Config):
    kind: Literal["grpo"] = "grpo"
    group_size: int = 4

    @field_validator("group_size")
    @classmethod
    def _enough_to_compare(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"group_size must be >= 2 to compare completions, found {value}")
        return value


Objective = Annotated[Sft | Grpo, Field(discriminator="kind")]


class Study(Config):
    seed: int
    root: Path = Path("data")
    shuffle: bool = True
    name: str | None = None
    view: Literal["frontal", "lateral"] = "frontal"
    sft: Train = Train(steps=400)
    objective: Sft | Grpo = Field(Grpo(group_size=8), discriminator="kind")
    stages: tuple[Objective, ...] = ()
    schedule: dict[str, Train] = Field({})
    sizes: tuple[int, int] = (64, 64)
    warmup: int | str = 0


def load(tmp_path: Path, text: str, *overrides: str) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Study, path, list(overrides))


def problems(tmp_path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value).count("\n") == len(caught.value.problems), "one line a problem, below the file's name"
    return caught.value.problems


def test_values_arrive_typed(tmp_path):
    study = load(
        tmp_path,
        "seed: 7\nroot: films/a\nname: 00012\nsizes: [32, 48]\nsft: {steps: 1_000, learning_rate: 1e-4}\n"
        "stages:\n- kind: sft\n- {kind: grpo, group_size: 2}\nschedule: {late: {steps: 3}}\n",
    )
    assert study == Study(
        seed=7,
        root=Path("films/a"),
        name="00012",
        sizes=(32, 48),
        sft=Train(steps=1000, learning_rate=1e-4),
        stages=(Sft(), Grpo(group_size=2)),
        schedule={"late": Train(steps=3)},
    )
    assert isinstance(study.root, Path)
    with pytest.raises(ValidationError):
        study.seed = 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("12", 12),
        ("1_000", 1000),
        ("0", 0),
        ("007", "007"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("On", "On"),
        ("2024-01-31", "2024-01-31"),
        ("'1e-4'", "1e-4"),
        ("true", True),
        ("~", None),
        ("", None),
        ("e4", "e4"),
        ("1e", "1e"),
    ],
)
def test_plain_words(text, value):
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_override_replaces_adds_and_indexes(tmp_path):
    text = "seed: 1\nstages: [{kind: sft}, {kind: grpo}]\n"
    study = load(
        tmp_path,
        text,
        "seed=2",
        "seed=3",
        "stages.1.group_size=16",
        "sft.learning_rate=2e-5",
        "schedule.late.steps=9",
        "name=",
        "sizes=[8, 9]",
    )
    assert (study.seed, study.stages[1], study.sizes, study.name) == (3, Grpo(group_size=16), (8, 9), None)
    assert study.schedule == {"late": Train(steps=9)}


def test_part_of_a_section_keeps_the_defaults_its_parent_states(tmp_path):
    assert load(tmp_path, "seed: 1\nsft: {learning_rate: 0.5}").sft == Train(steps=400, learning_rate=0.5)
    assert load(tmp_path, "seed: 1", "sft.learning_rate=0.5").sft.steps == 400
    assert load(tmp_path, "seed: 1\nobjective: {kind: grpo}").objective == Grpo(group_size=8)
    assert load(tmp_path, "seed: 1", "objective.group_size=6").objective == Grpo(group_size=6)
    assert load(tmp_path, "seed: 1", "objective.kind=sft").objective == Sft()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nshufle: true", "shufle: unknown key; the nearest known key is shuffle"),
        (
            "seed: 1\nsft: {learning_rat: 1}",
            "sft.learning_rat: unknown key; the nearest known key is sft.learning_rate",
        ),
        (
            "seed: 1\nobjective: {kind: grpo, groupsize: 2}",
            "objective.groupsize: unknown key; the nearest known key is objective.group_size",
        ),
        (
            "seed: 1\nobjective: {group_sizes: 2}",
            "objective.group_sizes: unknown key; the nearest known key is objective.group_size",
        ),
        (
            "seed: 1\nstages: [{kind: sft}, {kind: sft, smooth: 0}]",
            "stages.1.smooth: unknown key; the nearest known key is stages.1.smoothing",
        ),
        (
            "seed: 1\nschedule: {late: {steps: 1, clips: 1}}",
            "schedule.late.clips: unknown key; the nearest known key is schedule.late.clip",
        ),
        ("seed: one", "seed: expected an integer, found 'one' (text)"),
        ("seed: 1.0", "seed: expected an integer, found 1.0 (a number)"),
        ("seed: true", "seed: expected an integer, found True (true or false)"),
        ("seed:", "seed: expected an integer, found nothing (null)"),
        ("name: x", "seed: required, but not given"),
        ("seed: 1\nshuffle: no", "shuffle: expected true or false, found 'no' (text)"),
        ("seed: 1\nroot: 3", "root: expected text, found 3 (an integer)"),
        ("seed: 1\nsft: 3", "sft: expected a section, found 3 (an integer)"),
        ("seed: 1\nstages: 3", "stages: expected a list, found 3 (an integer)"),
        ("seed: 1\nsft: {steps: 0}", "sft.steps: expected greater than or equal to 1, found 0 (an integer)"),
        ("seed: 1\nschedule: {late: {}}", "schedule.late.steps: required, but not given"),
        (
            "seed: 1\nview: frontl",
            "view: expected 'frontal' or 'lateral', found 'frontl' (text); the nearest is 'frontal'",
        ),
        (
            "seed: 1\nobjective: {kind: grop}",
            "objective.kind: expected one of 'sft', 'grpo', found 'grop'; the nearest is 'grpo'",
        ),
        (
            "seed: 1\nstages: [{}]",
            "stages.0.kind: required, but not given: it says which kind of section this is",
        ),
        (
            "seed: 1\nobjective: {kind: grpo, group_size: 1}",
            "objective.group_size: group_size must be >= 2 to compare completions, found 1",
        ),
        ("seed: 1\nwarmup: [1]", "warmup: expected an integer or text, found [1] (a list)"),
        (
            "seed: 1\nsizes: [1, 2, 3]",
            "sizes: Tuple should have at most 2 items after validation, not 3",
        ),
        ("seed: 1\nseed: 2", "not valid YAML: key 'seed' is given twice, first on line 1 (line 2, column 1)"),
        (
            "seed: 1\nsft: {steps: 1, steps: 2}",
            "not valid YAML: key 'steps' is given twice, first on line 2 (line 2, column 17)",
        ),
        ("- 1", "expected keys and values at the top, found [1] (a list)"),
    ],
)
def test_each_mistake_is_named(tmp_path, text, expected):
    assert problems(tmp_path, text) == (expected,)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: expected path=value, such as sft.learning_rate=1e-4"),
        ("a..b=1", "--set a..b=1: expected path=value, such as sft.learning_rate=1e-4"),
        ("seed.x=1", "--set seed.x: seed is 1 in the file, not a section"),
        (
            "stages.2.kind=sft",
            "--set stages.2.kind: stages is a list of 1, so an index from 0 to 0 must follow, found '2'; "
            "to replace the whole list set stages=[...]",
        ),
        ("sft.step=3", "sft.step: unknown key; the nearest known key is sft.steps"),
        ("stft.steps=3", "stft: unknown key; the nearest known key is sft"),
        ("sft.steps=[3", "--set sft.steps=[3: the value is not valid YAML"),
    ],
)
def test_each_wrong_override_is_named(tmp_path, override, expected):
    (found,) = problems(tmp_path, "seed: 1\nstages: [{kind: sft}]", override)
    assert found.startswith(expected)


def test_all_problems_are_collected(tmp_path):
    text = "sead: 1\nsft: {steps: two, rate: 1}\nobjective: {kind: ppo}\n"
    found = problems(tmp_path, text, "view=up", "nothing")
    assert [line.split(":")[0] for line in found] == [
        "--set nothing",
        "sead",
        "sft.rate",
        "seed",
        "view",
        "sft.steps",
        "objective.kind",
    ]


def test_missing_file_and_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file; the working directory is"):
        load_config(Study, "study.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(Study, tmp_path)


def test_a_wrong_default_is_found(tmp_path):
    class Wrong(Config):
        rate: float = Field("fast", ge=0)

    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match="rate: expected a number, found 'fast'"):
        load_config(Wrong, tmp_path / "c.yaml")
    with pytest.raises(ValidationError):
        Wrong()


def test_merge_keys_and_unicode(tmp_path):
    text = "base: &base {steps: 2}\nmore: {<<: *base, clip: 1.5}\n"
    assert read_yaml(text)["more"] == {"steps": 2, "clip": 1.5}
    assert load(tmp_path, "seed: 1\nname: 胸部X线").name == "胸部X线"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "1e-4",
        "no",
        "null",
        "007",
        "1:30",
        "2024-01-01",
        "<<",
        "=",
        "",
        " a ",
        "a: b",
        "- x",
        ".inf",
        "0x10",
        "\x85",
    ]
)
numbers = st.floats(allow_nan=False)


@given(texts, numbers, numbers, st.integers(), st.lists(st.integers(1, 99).map(lambda n: Train(steps=n))))
def test_dump_reads_back_exactly(tmp_path_factory, name, rate, clip, seed, trains):
    study = Study(
        seed=seed,
        name=name,
        sft=Train(steps=1, learning_rate=rate, clip=clip),
        stages=(Grpo(), Sft(smoothing=rate)),
        schedule={f"{name}{index}": train for index, train in enumerate(trains)},
        warmup=name,
    )
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_config(study), encoding="utf-8", newline="")
    assert load_config(Study, path) == study


@given(st.dictionaries(texts, texts | numbers | st.integers() | st.booleans() | st.none() | st.lists(texts)))
def test_written_yaml_reads_back(data):
    assert read_yaml(write_yaml(data)) == data
