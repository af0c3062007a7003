"""Settings that a study leaves to the plan: rematerialisation, rows of micro-batches and of rollouts.

A config says "auto" for `remat` of a model, `shapes.rows` of a stage or its `rollout.rows`; `choose` finds the fastest
values that fit the devices. The run folder keeps them (`chosen.json`), and a later start on the same devices takes them
again: it continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from vlmalign.exchange import from_first
from vlmalign.models.decoder import REMAT
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.read import AUTO
from vlmalign.planning.search import choose_all
from vlmalign.planning.study import workloads_of
from vlmalign.planning.target import Target
from vlmalign.planning.this_device import unmeasured_device
from vlmalign.planning.workload import Update, Workload
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import digest_of, read_json, write_json

CHOSEN = "chosen.json"

#: stage -> what was chosen for it: "remat" of a model, "rows" and "rollout_rows" of a stage that trains
Chosen = dict[str, dict[str, Any]]


class NothingFits(ValueError):
    """No settings fit the devices."""


def leaves_open(config: StudyConfig) -> bool:
    """Whether anything in the config is "auto"."""
    return any(_open(stage) for stage in config.stages.values())


def settled(config: StudyConfig, say: Callable[[str], None], *, keep: bool = True) -> StudyConfig:
    """The config for the devices that JAX runs on here, with nothing left open; the same where nothing was. All processes
    of a run call this. `keep`: what was chosen is written into the run folder.

    Raises:
        ValueError: when nothing fits, and as `study.workloads_of`.
    """
    if not leaves_open(config):
        return config
    here = f"{jax.device_count()} x {unmeasured_device().title}"
    kept = from_first(lambda: _kept(config, here))
    try:
        chosen = _chosen(filled(config, kept), say)
    except NothingFits:
        if not kept:
            raise
        say(f"nothing fits beside what {config.run / CHOSEN} says: everything is chosen anew")
        kept, chosen = {}, _chosen(config, say)
    stages = {name: kept.get(name, {}) | chosen.get(name, {}) for name in {**kept, **chosen}}
    marked = {name: {**each, "of": _mark(config, name)} for name, each in stages.items()}
    if chosen and keep:
        from_first(lambda: write_json(config.run / CHOSEN, {"devices": here, "stages": marked}))
    return filled(config, stages)


def choose(workload: Workload, target: Target, say: Callable[[str], None]) -> Workload:
    """With the fastest settings whose every phase fits the target.

    What the config states stands. Keeping activations comes before rows, as in `search`. Micro-batches are compiled
    where the target can be compiled for; rollouts are counted: their caches, which are nearly all of it, exactly.

    Raises:
        NothingFits: when nothing does.
    """
    policies = REMAT if workload.open_remat else (workload.model.remat,)
    found, _ = choose_all(workload, target, say, policies=policies, stated=True)
    if found is None:
        raise NothingFits(
            f"nothing fits {target.count} x {target.device.title} with {usable(target.device.memory) / 2**30:.1f} GiB to "
            "plan with: neither one row on each device nor recomputing everything; take more or larger devices, a smaller "
            "group or shorter completions, or cut the parameters (mesh.fsdp)"
        )
    for update in found.stages:
        found = found if update.rollout is None else _with_rollout(found, update, target, say)
    return found


def _with_rollout(workload: Workload, update: Update, target: Target, say: Callable[[str], None]) -> Workload:
    """Prompts at once: all of a rollout's, or a half, a quarter ... of them."""
    shares, limit = target.sampling_shares, usable(target.device.memory)
    rows, names = (
        -(-update.rollout.rows // shares),
        [f"{update.name} {part}" for part in ("merge", "prefill", "decode")],
    )
    while True:
        own = replace(update, rollout=replace(update.rollout, rows=rows * shares))
        found = replace(workload, stages=tuple(own if each is update else each for each in workload.stages))
        peak = max(phase.peak for phase in phases(found, {}, target) if phase.name in names)
        say(f"tried rollouts of {update.name}, {rows * shares} rows: {peak / 2**30:.1f} GiB (arithmetic)")
        if peak <= limit:
            return found
        if rows == 1 or not update.open_rollout:
            raise NothingFits(
                f"a rollout of {rows * shares} rows needs {peak / 2**30:.1f} GiB on each device, of which "
                f"{limit / 2**30:.1f} may be planned with; lower rollout.rows, rollout.group or rollout.completion of "
                f"stage {update.name}"
            )
        rows = -(-rows // 2)


def filled(config: StudyConfig, chosen: Chosen) -> StudyConfig:
    """The config with these settings in place of "auto"."""
    stages = dict(config.stages)
    for name, own in chosen.items():
        update: dict[str, Any] = {key: value for key, value in own.items() if key == "remat"}
        for key, section in (("rows", "shapes"), ("rollout_rows", "rollout")):
            if key in own:
                update[section] = getattr(stages[name], section).model_copy(update={"rows": own[key]})
        stages[name] = stages[name].model_copy(update=update)
    return config.model_copy(update={"stages": stages})


def _chosen(config: StudyConfig, say: Callable[[str], None]) -> Chosen:
    """For everything that is open in the config."""
    chosen: Chosen = {}
    if not leaves_open(config):
        return chosen
    for workload, target in workloads_of(config, lambda dtype: unmeasured_device(), jax.device_count()):
        for base in workload.bases:
            if base in chosen:  # planned before with another adapter
                model = replace(workload.model, remat=chosen[base]["remat"])
                workload = replace(workload, model=model, open_remat=False)
        if workload.open_remat or any(each.open_rows or each.open_rollout for each in workload.stages):
            found = choose(workload, target, say)
            chosen |= {base: {"remat": found.model.remat} for base in found.bases if found.open_remat}
            for update in found.stages:
                own = {"rows": update.rows} if update.open_rows else {}
                own |= {"rollout_rows": update.rollout.rows} if update.open_rollout else {}
                chosen |= {name: own for name in update.stages if own}
    return chosen


def _open(stage: Any) -> bool:
    sections = [getattr(stage, name, None) for name in ("shapes", "rollout")]
    return getattr(stage, "remat", None) == AUTO or any(each is not None and each.rows == AUTO for each in sections)


def _kept(config: StudyConfig, here: str) -> Chosen:
    """What an earlier start on these devices chose for stages that are as they were."""
    if not (config.run / CHOSEN).is_file():
        return {}
    found = read_json(config.run / CHOSEN, {"devices": str, "stages": dict})
    same = found["stages"].items() if found["devices"] == here else ()
    return {
        name: {key: value for key, value in each.items() if key != "of"}
        for name, each in same
        if name in config.stages and isinstance(each, dict) and each.get("of") == _mark(config, name)
    }


def _mark(config: StudyConfig, name: str) -> str:
    """Of what a choice for this stage depends on: its section, its model's, and the mesh."""
    sections = [config.stages[name], config.stages[config.base_of(name)], *filter(None, [config.mesh])]
    return digest_of([each.model_dump(mode="json", by_alias=True) for each in sections])
