"""vlmalign: align medical vision-language and text models with SFT, DPO and GRPO in JAX.

The names below are the library (`docs/library.md`). They are imported when they are first used, so that importing
vlmalign takes no time and no JAX; a program that only reads a run folder never waits for either.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmalign.api import (
        Answer,
        ContinuationScores,
        Group,
        GroupBatch,
        LoadedModel,
        LoraSpec,
        LossParts,
        Objective,
        OptimiserSettings,
        Scores,
        Segment,
        Shapes,
        load,
        question,
        train,
    )

__version__ = "0.2.0"

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
    "__version__",
    "load",
    "question",
    "train",
]


def __getattr__(name: str) -> Any:
    """One of the library's names, imported now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    from vlmalign import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
