"""The weights of a folder from file headers alone: sizes by part of the network, and every tensor that does not fit."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from vlmalign.inspection.records import Files, Part
from vlmalign.models.config import ModelConfig
from vlmalign.models.model import Model
from vlmalign.weights.layout import FLOATS, Account, account, describe, stored_tensors, tensor_files

#: how the names of a part's parameters begin; the first that fits decides
PARTS = (
    ("language_model.embed_tokens.", "embedding"),
    ("language_model.", "decoder"),
    ("lm_head.", "output head"),
    ("visual.merger.", "projector"),
    ("visual.", "vision tower"),
    ("vision_tower.", "vision tower"),
    ("multi_modal_projector.", "projector"),
)


def part_of(name: str) -> str:
    """The part of the network that a parameter belongs to.

    >>> part_of("language_model.layers.0.mlp.up_proj.weight"), part_of("visual.merger.mlp.0.weight")
    ('decoder', 'projector')
    """
    return next(part for prefix, part in PARTS if name.startswith(prefix))


def read_files(folder: Path) -> Files:
    """Raises ValueError when files are missing or damaged."""
    files = tensor_files(folder)
    tensors = Counter(stored.dtype for stored in stored_tensors(files))
    return Files(tuple(file.name for file in files), sum(file.stat().st_size for file in files), dict(tensors))


def check_weights(folder: Path, config: ModelConfig, *, present: bool) -> tuple[tuple[Part, ...], list[str]]:
    """Sizes by part, and what does not fit; only the config's sizes where the weights are not `present`."""
    model = Model(config)
    found = account(folder, model) if present else Account({}, {})
    parts: dict[str, list[str]] = {part: [] for _, part in PARTS}
    for name in model.shapes:
        parts[part_of(name)].append(name)
    sizes = tuple(
        Part(
            name=part,
            parameters=sum(math.prod(model.shapes[name].shape) for name in names),
            stored=sum(
                found.sources[name].nbytes
                for name in names
                if name in found.sources and found.sources[name].dtype in FLOATS
            ),
            dtypes=tuple(sorted({found.sources[name].dtype for name in names if name in found.sources})),
        )
        for part, names in parts.items()
        if names
    )
    problems = [f"tensors {line}" for line in describe(found.problems)]
    if problems:
        problems.append("files and config.json are not of one model: fetch both again from one place and revision")
    return sizes, problems
