"""Training with a loss and a source of examples of the user's own, by the same loop as every stage of a study.

A folder holds the metrics and the checkpoints: the same call again goes on where it was interrupted, bit for bit, and
returns at once when it had come to its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlmalign.api.loaded import LoadedModel, copied
from vlmalign.data.sources.json_lines import parse
from vlmalign.models.model import Params
from vlmalign.models.network import DECODER
from vlmalign.progress import Progress
from vlmalign.training import loop
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser, learning_rate
from vlmalign.training.outcome import NEWEST
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource, micro_batches
from vlmalign.types import Group

#: what a training was begun with
RECORD = "training.json"


@runtime_checkable
class Examples(Protocol):
    """Groups by number; making one may take its time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Group: ...


#: (number of the update, from 0; the model as it is then) -> the groups to learn from
Draw = Callable[[int, LoadedModel], Sequence[Group]]


def train(
    model: LoadedModel,
    objective: Objective,
    examples: Examples | Draw,
    *,
    folder: str | PathLike[str],
    steps: int,
    optimiser: OptimiserSettings,
    batch: int = 8,
    shapes: Shapes = Shapes(rows=8),
    seed: int = 0,
    checkpoint_every: int | None = None,
    quiet: bool = False,
) -> LoadedModel:
    """The model after `steps` updates; `model` itself stands as it was.

    What is trained is the model's adapter, or its whole decoder where it has none.

    Args:
        model: what training starts from; and, frozen, the reference of an objective that needs one.
        objective: the loss, and the counts by which its parts are divided.
        examples: anything with `len` and `[i]` that gives groups, all with the same number of continuations, shuffled
            anew in every pass; or a function of the update's number and the model as it is then, which makes the groups
            of that update (it may sample from that model, which is valid during the call only).
        folder: of `metrics.jsonl` (a line per update) and `checkpoints/`; new, or of this very training.
        steps: optimiser updates.
        optimiser: learning rate, schedule and clipping.
        batch: examples per update; a function returns as many as it likes.
        shapes: rows of a micro-batch and the multiples (tokens) that lengths are rounded up to.
        seed: of the shuffle, and of dropout.
        checkpoint_every: updates; None: ten times in all.
        quiet: show no progress.

    Raises:
        ValueError: when `folder` holds another training or other files; for an example that is no group or has no
            continuation; when an update has nothing to learn from; when gradients are not finite, ten times in a row.
    """
    folder, drawn = Path(folder), callable(examples)
    if steps < 1 or batch < 1 or not (drawn or len(examples)):
        raise ValueError(
            f"steps, batch and the number of examples must be >= 1, found {steps}, {batch} and {'any' if drawn else len(examples)}"
        )
    settings = {
        "checkpoint": str(model.folder.absolute()),
        "lora": None if model.model.lora is None else asdict(model.model.lora),
        "dtype": model.model.dtype,
        "objective": objective.name,
        "examples": None if drawn else len(examples),
        "steps": steps,
        "optimiser": asdict(optimiser),
        "batch": None if drawn else batch,
        "shapes": asdict(shapes),
        "seed": seed,
    }
    start, frozen = model.trained, model.frozen
    if model.model.lora is None:
        start = start or {name: value for name, value in frozen.items() if name.startswith(DECODER)}
        frozen = {name: value for name, value in frozen.items() if name not in start}
    reference = None
    if objective.needs_reference:
        reference = model.model, {name: value.astype(model.model.shapes[name].dtype) for name, value in start.items()}
    source: loop.Source
    if drawn:
        source = _Drawn(model.with_trained, examples, shapes, model.features)
    else:
        numbered = _Numbered(examples)
        _ = numbered[0]  # a source of something else is found out before anything is begun
        source = SupervisedSource(numbered, batch=batch, shapes=shapes, features=model.features, seed=seed)
    stage = loop.Stage(
        name=folder.name,
        folder=folder,
        steps=steps,
        checkpoint_every=checkpoint_every or max(1, steps // 10),
        learning_rate=learning_rate(optimiser, steps),
        shown=("objective",),
    )
    trainer = Trainer(model.model, objective, build_optimiser(optimiser, steps), reference=reference, seed=seed)
    _record(folder, settings)  # last of all: what was refused above leaves no folder
    with Progress(quiet=quiet) as progress:
        return model.with_trained(loop.train(stage, trainer, copied(start), frozen, source, progress))


def _record(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down what a training is begun with; ValueError where the folder is another's.

    A training that has saved nothing may be begun again with other settings.
    """
    settings = json.loads(json.dumps(settings))  # as a file gives it back: tuples become lists
    path = folder / RECORD
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {RECORD} of a training; give a new folder")
    try:
        before = parse(path.read_bytes()) if path.exists() else settings
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore it, or give a new folder") from None
    differ = [name for name, value in settings.items() if before.get(name) != value]
    saved = any(found.name.isdigit() for found in (folder / NEWEST).glob("*"))
    if differ and saved:
        name = differ[0]
        raise ValueError(
            f"{folder} holds a training with other settings ({', '.join(differ)}; {name} was {before.get(name)!r} and is "
            f"{settings[name]!r}); give a folder of its own, or remove this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _checked(group: Any, name: str) -> Group:
    if not isinstance(group, Group) or not group.continuations:
        found = "a group without continuations" if isinstance(group, Group) else type(group).__name__
        raise ValueError(f"{name} must be a group with answers, as LoadedModel.group makes them, found {found}")
    return group


class _Numbered(Sequence):
    """The user's examples, checked, each with its place as its id, from which dropout is derived."""

    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Group:
        return replace(_checked(self._examples[index], f"examples[{index}]"), id=index)


class _Drawn:
    """Groups that a function of the user's makes for every update."""

    waits = True

    def __init__(self, at: Callable[[Params], LoadedModel], draw: Draw, shapes: Shapes, features: Any):
        self._at, self._draw, self._shapes, self._features = at, draw, shapes, features

    def work(self, step: int, params: Params) -> loop.Work:
        found = self._draw(step, self._at(params))
        groups = [replace(_checked(group, f"group {i} of update {step}"), id=i) for i, group in enumerate(found)]
        if not groups:
            raise ValueError(f"update {step} was given no groups to learn from")
        return loop.Work([MicroBatch(b, {}) for b in micro_batches(groups, self._shapes, self._features)], {})

    def observe(self, line: Mapping[str, Any]) -> None:
        del line

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state  # what is drawn follows from the update's number and the model
