"""The records of an inspection. What could not be found out is None; why not is among the problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlmalign.models.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One part of the network."""

    name: str
    parameters: int  #: as config.json says
    stored: int  #: bytes on disk of its tensors that were found
    dtypes: tuple[str, ...]  #: of those, in safetensors' words


@dataclass(frozen=True)
class Files:
    """The safetensors files of a folder, from their headers."""

    names: tuple[str, ...]
    bytes: int
    tensors: Mapping[str, int]  #: dtype -> how many tensors have it


@dataclass(frozen=True)
class Text:
    """The tokenizer and how it writes conversations."""

    tokens: int  #: how many the tokenizer knows
    stops: tuple[tuple[int, str], ...] = ()  #: ids that end a completion, with their text
    template: str | None = None
    marked: bool = False  #: the template marks what the assistant says ({% generation %})


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter's settings and size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None  #: the model it belongs to, as written by whoever made it
    magnitude: bool  #: DoRA
    rank_stabilised: bool  #: rsLoRA
    layers: int
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """Everything found out about a folder. With no `problems`, it can be trained and sampled from."""

    folder: Path
    model_type: str | None = None
    config: ModelConfig | None = None
    parts: tuple[Part, ...] = ()
    files: Files | None = None
    text: Text | None = None
    images: str | None = None  #: how many soft tokens an image has
    adapter: Adapter | None = None  #: of an adapter folder, which has none of the above but files
    problems: tuple[str, ...] = ()  #: one line each: what is wrong, and what to do
    notes: tuple[str, ...] = field(default=())  #: worth knowing, not wrong
