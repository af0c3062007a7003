"""`seeds: [0, 1, 2]`: every stage that trains becomes siblings, one for each seed.

A sibling is called NAME-sSEED, has its seed, and goes on from the sibling of the same seed; an answers entry that names a
stage answers with all its siblings. Sets are drawn once, for all. A stage that is called so and has this seed is a sibling
also where it was written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from vlmalign.config import ConfigError
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.config import StudyConfig, stage_ref
from vlmalign.studies.engine.probe_config import OfStates
from vlmalign.studies.engine.stage_config import Stage

Asking = TypeVar("Asking", Answers, OfStates)


def spread(config: StudyConfig, where: str) -> StudyConfig:
    """The study with the siblings in place of each stage that trains; itself, where it has no `seeds`. `where`: its file.

    Raises:
        ConfigError: where a seed is named twice, a stage has a seed already, or a sibling's name is taken.
    """
    seeds = config.seeds
    if not seeds:
        return config
    problems = [f"seeds: each once, found {list(seeds)}"] if len(set(seeds)) < len(seeds) else []
    stages: dict[str, Any] = {}
    for name, stage in config.stages.items():
        if not isinstance(stage, Stage):
            stages[name] = stage
            continue
        if stage.seed is not None:
            problems.append(
                f"stages.{name}.seed: the study has seeds, which give every stage its own; remove one of both"
            )
        for seed in seeds:
            own = sibling(name, seed)
            if own in config.stages:
                problems.append(
                    f"stages.{own}: seeds makes a stage of this name from {name}; call one of them otherwise"
                )
            refs = {key: getattr(stage, key, None) for key in ("from_", "reference")}
            named = {key: _of_seed(config, ref, seed) for key, ref in refs.items() if ref is not None}
            stages[own] = stage.model_copy(update={**named, "seed": seed})
    if problems:
        raise ConfigError(where, problems)
    answers = {name: _of_siblings(config, entry) for name, entry in config.answers.items()}
    probes = {
        name: _of_siblings(config, probe) if isinstance(probe, OfStates) else probe
        for name, probe in config.probes.items()
    }
    fields = {name: getattr(config, name) for name in StudyConfig.model_fields}
    report = config.report.model_copy(update={"rows": _beside(config)})
    changed = {"seeds": (), "stages": stages, "answers": answers, "probes": probes, "report": report}
    return StudyConfig(**{**fields, **changed})


def sibling(name: str, seed: int) -> str:
    """
    >>> sibling("sft", 2)
    'sft-s2'
    """
    return f"{name}-s{seed}"


def family_of(config: StudyConfig, ref: str) -> tuple[str, int] | None:
    """The state of which a state is one seed's sibling, and its seed; None for one that is nobody's sibling."""
    name, which = stage_ref(ref)
    seed = getattr(config.stages[name], "seed", None)
    if seed is None or not name.endswith(sibling("", seed)):
        return None
    return name.removesuffix(sibling("", seed)) + ("" if which is None else f"@{which}"), seed


def families(config: StudyConfig, refs: tuple[str, ...]) -> Mapping[str, Mapping[int, str]]:
    """State -> seed -> its sibling, of those states that have siblings."""
    found: dict[str, dict[int, str]] = {}
    for ref in refs:
        if (member := family_of(config, ref)) is not None:
            found.setdefault(member[0], {})[member[1]] = ref
    return found


def _of_seed(config: StudyConfig, ref: str, seed: int) -> str:
    name, which = stage_ref(ref)
    own = sibling(name, seed) if isinstance(config.stages[name], Stage) else name
    return own if which is None else f"{own}@{which}"


def _beside(config: StudyConfig) -> dict[str, dict[str, str]]:
    """What stands beside a paper's systems: of siblings that of the first seed, a point as the printed one is."""

    def first(ref: str) -> str:
        entry, state, each = ref.split("/")
        return f"{entry}/{_of_seed(config, state, config.seeds[0])}/{each}"

    return {table: {system: first(ref) for system, ref in rows.items()} for table, rows in config.report.rows.items()}


def _of_siblings(config: StudyConfig, entry: Asking) -> Asking:
    """An answers entry, or a probe of states, that asks all siblings of the stages it names."""
    refs = [_of_seed(config, ref, seed) for ref in entry.stages for seed in config.seeds]
    return entry.model_copy(update={"stages": tuple(dict.fromkeys(refs))})
