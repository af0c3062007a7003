"""ChexReason (arXiv 2512.23090): SFT and GRPO of a medical vision-language model on a few thousand chest films."""

from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.run import run

__all__ = ["ChexReasonConfig", "run"]
