"""The files that stages read, and the limits on their rows. Paths are relative to the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vlmalign.config import Config
from vlmalign.studies.run_config import Positive


class Rows(Config):
    """A JSON Lines file. Images in it are paths relative to the file's folder, which they may not leave."""

    path: Path
    on_bad: Literal["error", "skip"] = "error"  #: a row that cannot be used stops the run, or is left out and listed


class Examples(Rows):
    """Conversations or preference pairs: a prompt with one answer, or two."""

    max_prompt: Positive | None = None  #: tokens, soft tokens included; None: no limit
    max_completion: Positive | None = None  #: tokens of the longest answer
    on_long: Literal["error", "skip", "truncate"] = "error"  #: truncate: an answer loses its end; prompts are never cut


class Prompts(Rows):
    """Prompts that wait for completions; whatever else a row holds becomes columns for the rewards."""

    max_prompt: Positive | None = None  #: tokens, soft tokens included; None: no limit
    on_long: Literal["error", "skip"] = "error"
