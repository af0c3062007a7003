"""Look at a folder without loading its weights: every check that later work would make, all of them in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmalign.inspection.adapter import inspect_adapter
from vlmalign.inspection.records import Files, Inspection, Part
from vlmalign.inspection.text import one_line, read_images, read_text
from vlmalign.inspection.weights import check_weights, read_files
from vlmalign.models.config import ModelConfig
from vlmalign.weights.adapter import CONFIG as ADAPTER_CONFIG
from vlmalign.weights.checkpoint import parse_config, refusals
from vlmalign.weights.layout import read_json


def inspect(folder: Path) -> Inspection:
    """What a checkpoint or adapter folder holds, and every problem that is found; reads headers, never weights.

    Raises:
        ValueError: when there is no such folder, or it is neither; everything else is among the problems.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; fetch the model first and give the folder it is in")
    has_adapter = (folder / ADAPTER_CONFIG).exists()
    if not (folder / "config.json").exists():
        if has_adapter:
            return inspect_adapter(folder)
        raise ValueError(f"{folder} is neither a checkpoint (config.json) nor an adapter ({ADAPTER_CONFIG})")
    problems: list[str] = []
    notes: list[str] = []
    if has_adapter:
        notes.append(f"{ADAPTER_CONFIG} lies here too; an adapter is read from a folder of its own")
    settings, config = _config(folder, problems)
    if "float16" in _dtypes(settings):
        notes.append(
            "config.json asks for float16: weights are cast to bfloat16 or float32 as they load, and computing in "
            "float16 is refused, which activations of these models overflow"
        )
    files, parts = _weights(folder, config, problems)
    text = read_text(folder, config, problems, notes)
    images = read_images(folder, config, problems)
    model_type = settings.get("model_type")
    return Inspection(
        folder=folder,
        model_type=model_type if isinstance(model_type, str) else None,
        config=config,
        parts=parts,
        files=files,
        text=text,
        images=images,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _config(folder: Path, problems: list[str]) -> tuple[dict[str, Any], ModelConfig | None]:
    """config.json, and the model it describes: also one that is refused for its weights, none of an unknown family."""
    try:
        settings = read_json(folder / "config.json")
    except ValueError as error:
        problems.append(one_line(error, folder))
        return {}, None
    problems.extend(refusals(settings))
    try:
        return settings, parse_config(settings)
    except ValueError as error:
        problems.append(one_line(error, folder))
        return settings, None


def _dtypes(settings: dict[str, Any]) -> list[Any]:
    """What newer and older configs call the dtype of the weights, at the top and in the parts."""
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    return [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]


def _weights(folder: Path, config: ModelConfig | None, problems: list[str]) -> tuple[Files | None, tuple[Part, ...]]:
    files = None
    try:
        files = read_files(folder)
    except ValueError as error:
        problems.append(f"weights: {one_line(error, folder)}")
    if config is None:
        return files, ()
    parts, wrong = check_weights(folder, config, present=files is not None)
    problems.extend(wrong)
    return files, parts
