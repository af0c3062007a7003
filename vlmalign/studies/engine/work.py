"""What every stage of training is run with, and the stretch of training that the loop is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlmalign.mesh import row_shares
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model, Params
from vlmalign.progress import Progress
from vlmalign.shapes import Array
from vlmalign.studies.engine.base import Base, State, most_images
from vlmalign.studies.engine.stage_config import Trains
from vlmalign.studies.engine.texts import Texts
from vlmalign.tasks.tasks import AnyTask
from vlmalign.training.best import Best
from vlmalign.training.loop import Stage as Stretch
from vlmalign.training.optimiser import learning_rate
from vlmalign.training.supervised import Shapes


class Watched(NamedTuple):
    """A set that is answered while a stage trains."""

    name: str
    questions: Texts
    labels: tuple[str, ...]  #: the names that its truth is told in; empty where it has no labels


@dataclass(frozen=True)
class StageTexts:
    """What a stage trains on and is validated by, as tokens."""

    train: Texts
    validation: Texts | None = None  #: in the form of `train`
    watched: Sequence[Watched] = ()  #: answered greedily; the first is the validation's own where that is answered
    beside: Texts | None = None  #: answers of an SFT loss beside a policy's

    @property
    def images(self) -> int:
        """Most distinct images of a group."""
        texts = [each for each in (self.train, self.validation, self.beside) if each is not None]
        return max(1, *(most_images(each.groups) for each in texts))


@dataclass(frozen=True)
class Work:
    """A stage about to be run."""

    name: str
    base: Base
    start: State  #: what it goes on from
    reference: State  #: what it is compared with
    spec: LoraSpec | None  #: of the adapter that it trains; None: the whole decoder
    texts: StageTexts
    task: AnyTask
    folder: Path
    seed: int  #: the stage's own
    adapter_seed: int  #: of an adapter's first values
    last_use: bool  #: of the base as it is
    progress: Progress
    check: Callable[[], None]  #: raises ValueError once the stage is another process's
    name_image: Callable[[str], str]  #: `image_names`

    @property
    def model(self) -> Model:
        return self.base.model(self.spec)

    @property
    def frozen(self) -> Mapping[str, Array]:
        return self.base.frozen(self.spec)

    def shapes(self, stage: Trains) -> Shapes:
        shares = row_shares(self.base.devices.mesh)
        return Shapes(**stage.shapes.model_dump(), images=self.texts.images, shares=shares)

    def first(self) -> Params:
        """The parameters that are trained, as they begin."""
        return self.base.start(self.start, self.spec, self.adapter_seed, last=self.last_use)

    def stretch(
        self, stage: Trains, steps: int, *, shown: tuple[str, ...] = ("loss",), rewards: tuple[str, ...] = ()
    ) -> Stretch:
        """The stage as the loop takes it; `rewards` are learnt from."""
        validation = stage.validation
        best = None
        if validation is not None and validation.best is not None:
            mode = "min" if validation.best == "loss" else "max"
            best = Best(f"validation/{validation.best}", mode, validation.patience)
        return Stretch(
            self.name,
            self.folder,
            steps,
            stage.checkpoint_every,
            learning_rate(stage.optimiser.settings, steps),
            shown=shown,
            evaluate_every=0 if validation is None else validation.every,
            best=best,
            check=self.check,
            rewards=rewards,
        )
