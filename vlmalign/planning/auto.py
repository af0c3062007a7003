"""Settings that a config leaves to the plan: rematerialisation, rows of micro-batches and of rollouts.

A config says "auto" for `model.remat`, a stage's `shapes.rows` or its `rollout.rows`; `choose` finds the fastest
values that fit the devices, and `settle` writes them into the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from vlmalign.config import Config
from vlmalign.models.decoder import REMAT
from vlmalign.planning.cost import FORWARD_AGAIN
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.search import Choice, changed, choose_rows
from vlmalign.planning.study import Study, workload_of
from vlmalign.planning.target import Target
from vlmalign.planning.this_device import unmeasured_device
from vlmalign.planning.workload import Workload
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.earlier import earlier_config

AUTO = "auto"

#: a stage's name ("sft", "grpo", "dpo") -> rows
Rows = Mapping[str, int]


class Settings(NamedTuple):
    """What was chosen, or what the config said where it said something."""

    remat: str
    rows: Rows  #: of a micro-batch, on all devices together
    rollout_rows: Rows  #: prompts at once
    tried: tuple[Choice, ...]  #: what was looked at, in order


def leaves_open(config: Study) -> bool:
    """Whether anything in the config is "auto"."""
    return config.model.remat == AUTO or any(
        stage.shapes.rows == AUTO or _rollout(stage) == AUTO for stage in _stages(config).values()
    )


def concrete(config: Study) -> Study:
    """The config with the most that "auto" can become: everything kept, the whole optimiser batch at once."""
    most = {name: _most(stage) for name, stage in _stages(config).items()}
    remat = "none" if config.model.remat == AUTO else config.model.remat
    return _with(config, Settings(remat, most, most, ()))


def choose(config: Study, workload: Workload, target: Target, say: Callable[[str], None]) -> Settings:
    """The fastest settings whose every phase fits the target; `workload` is that of `concrete(config)`.

    What the config states stands. Keeping activations comes before rows, as in `search`. Micro-batches are compiled
    where the target can be compiled for; rollouts are counted: their caches, which are nearly all of it, exactly.

    Raises:
        ValueError: when nothing fits.
    """
    stages = _stages(config)
    policies = [config.model.remat] if config.model.remat != AUTO else sorted(REMAT, key=FORWARD_AGAIN.__getitem__)
    tried: list[Choice] = []
    for remat in policies:
        found, rows = workload, {}
        for update in reversed(workload.stages):
            field = "sft" if update is workload.sft else "grpo"
            fixed = None if stages[update.name].shapes.rows == AUTO else update.rows
            choice = choose_rows(found, field, target, say, policies=(remat,), rows=fixed)
            tried.append(choice)
            if choice.taken is None:
                break
            found, rows[update.name] = changed(found, field, choice.taken), choice.taken.rows
        else:
            rollout = _rollout_rows(found, target, stages, say)
            return Settings(remat, rows, {found.grpo.name: rollout} if rollout else {}, tuple(tried))
    raise ValueError(
        f"nothing fits {target.count} x {target.device.title} with {usable(target.device.memory) / 2**30:.1f} GiB to plan "
        "with: neither one row on each device nor recomputing everything; take more or larger devices, a smaller group "
        "or shorter completions, or cut the parameters (mesh.fsdp)"
    )


def settle(config: Study, chosen: Settings) -> Study:
    """The config with these settings in place of every "auto"."""
    return _with(config, chosen)


def settled(config: Study, say: Callable[[str], None]) -> Study:
    """The config for the devices that JAX runs on here, with nothing left open; the same where nothing was.

    Raises:
        ValueError: when nothing fits, and as `study.workload_of`.
    """
    if not leaves_open(config):
        return config
    workload, target = workload_of(concrete(config), lambda dtype: unmeasured_device(), jax.device_count())
    return settle(config, choose(config, workload, target, say))


def as_before(config: Study, found: Study) -> Study:
    """What the run folder holds when an earlier start had the same config: with what that one chose for its devices.

    `found` is the config as it was settled for the devices of now, and the answer where the folder holds no run.
    """
    earlier = earlier_config(config) if leaves_open(config) else None
    if earlier is None or set(stages := _stages(earlier)) != set(_stages(config)):
        return found
    rows = {name: stage.shapes.rows for name, stage in stages.items()}
    rollout = {name: _rollout(stage) for name, stage in stages.items()}
    return settle(config, Settings(earlier.model.remat, rows, rollout, ()))


def _rollout_rows(workload: Workload, target: Target, stages: Mapping[str, Config], say: Callable[[str], None]) -> int:
    """Prompts at once: all of a rollout's, or a half, a quarter ... of them."""
    if workload.rollout is None:
        return 0
    fixed = _rollout(stages[workload.grpo.name]) != AUTO
    shares = target.sampling_shares
    rows, limit = -(-workload.rollout.rows // shares), usable(target.device.memory)
    while True:
        sampled = replace(workload, rollout=replace(workload.rollout, rows=rows * shares))
        peak = max(phase.peak for phase in phases(sampled, {}, target) if phase.name.startswith("rollout"))
        say(f"tried rollout, {rows * shares} rows: {peak / 2**30:.1f} GiB (arithmetic)")
        if peak <= limit or rows == 1 or fixed:
            break
        rows = -(-rows // 2)
    if peak > limit:
        raise ValueError(
            f"a rollout of {rows * shares} rows needs {peak / 2**30:.1f} GiB on each device, of which "
            f"{limit / 2**30:.1f} may be planned with; lower rollout.rows, rollout.group or rollout.completion"
        )
    return rows * shares


def _stages(config: Study) -> dict[str, Any]:
    """The trained stages by the names that a workload gives them."""
    if isinstance(config, AlignConfig):
        return {stage.kind: stage for stage in config.stages}
    return {"sft": config.sft, "grpo": config.grpo}


def _rollout(stage: Any) -> int | str | None:
    section = dict(stage).get("rollout")
    return None if section is None else section.rows


def _most(stage: Any) -> int:
    """Groups of an optimiser batch."""
    settings = dict(stage)
    return settings["batch"] if "batch" in settings else settings["prompts"]


def _with(config: Study, chosen: Settings) -> Study:
    def filled(name: str, stage: Any) -> Any:
        update: dict[str, Any] = {}
        if stage.shapes.rows == AUTO:
            update["shapes"] = stage.shapes.model_copy(update={"rows": chosen.rows[name]})
        if _rollout(stage) == AUTO:
            update["rollout"] = stage.rollout.model_copy(update={"rows": chosen.rollout_rows[name]})
        return stage.model_copy(update=update)

    stages = {name: filled(name, stage) for name, stage in _stages(config).items()}
    update: dict[str, Any] = stages
    if isinstance(config, AlignConfig):
        update = {"stages": tuple(stages[stage.kind] for stage in config.stages)}
    if config.model.remat == AUTO:
        update = update | {"model": config.model.model_copy(update={"remat": chosen.remat})}
    return config.model_copy(update=update)
