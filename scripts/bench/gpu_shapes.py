"""What both sides of the GPU benchmark share: full-size models by name, the shapes of a ChexReason step, the clock."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIZES = ROOT / "vlmalign" / "planning" / "known_models"
MODELS = {"medgemma-4b": "medgemma-4b.json", "llama-3-8b": "openbiollm-8b.json", "qwen2.5-7b": "qwen2.5-7b.json"}


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens; of a film's prompt 256 are the image's."""

    prompts: int = 8
    group: int = 4
    prompt: int = 456
    completion: int = 512
    rank: int = 16
    temperature: float = 0.8
    top_p: float = 0.95

    @property
    def tokens(self) -> int:
        """Of the update's rows, each prompt counted once."""
        return self.prompts * (self.prompt + self.group * self.completion)


def read_sizes(model: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a model of `MODELS`, or of a file; with `layers`, so many of the decoder and of the tower."""
    file = SIZES / MODELS[model] if model in MODELS else Path(model)
    found = json.loads(file.read_text(encoding="utf-8"))
    for part in (found, found.get("text_config", {}), found.get("vision_config", {})):
        if layers is not None and "num_hidden_layers" in part:
            part["num_hidden_layers"] = layers
    if layers is not None and "text_config" in found:
        found["text_config"].setdefault("num_hidden_layers", layers)
    return found


def seconds(run: Callable[[], Any], *, warm: int, repeats: int) -> dict[str, Any]:
    """`run` must wait for the device. Of `warm` calls that are not timed, the first one is reported apart."""
    first, taken = None, []
    for number in range(warm):
        began = time.perf_counter()
        run()
        first = round(time.perf_counter() - began, 1) if number == 0 else first
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return {"seconds": statistics.median(taken), "all": [round(t, 4) for t in taken], "first_call": first}


class Record:
    """One JSON file that is written again after every part: an interrupted run keeps what it measured."""

    def __init__(self, out: Path | None, head: dict[str, Any]):
        self._out, self.found = out, head | {"parts": []}

    def add(self, part: str, **values: Any) -> None:
        row = {"part": part, **values}
        self.found["parts"].append(row)
        print(json.dumps(row), flush=True)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
