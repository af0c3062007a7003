"""The public names of the library, as `import vlmalign` offers them; `docs/library.md` shows them at work.

Importing this room imports JAX. `vlmalign` itself imports it when one of the names is first used.
"""

from vlmalign.api.checkpoint import load
from vlmalign.api.loaded import Answer, LoadedModel
from vlmalign.api.question import question
from vlmalign.api.train import train
from vlmalign.evaluation.scoring import ContinuationScores
from vlmalign.models.lora import LoraSpec
from vlmalign.training.optimiser import OptimiserSettings
from vlmalign.training.step import Objective
from vlmalign.training.supervised import Shapes
from vlmalign.types import Group, GroupBatch, LossParts, Scores, Segment

__all__ = [
    "Answer",
    "ContinuationScores",
    "Group",
    "GroupBatch",
    "LoadedModel",
    "LoraSpec",
    "LossParts",
    "Objective",
    "OptimiserSettings",
    "Scores",
    "Segment",
    "Shapes",
    "load",
    "question",
    "train",
]
