"""What a checkpoint folder holds, told from its JSON files and the headers of its safetensors: no tensor is read here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from vlmalign.models.families import FAMILIES
from vlmalign.models.model import Model
from vlmalign.quoting import shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

#: dtypes of weights that are read, as safetensors writes them -> NumPy's name (bfloat16 comes with JAX)
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

#: suffixes of pickled weights, and the files of these suffixes that trainers leave beside a checkpoint
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin")

#: problems of one kind named in an error before it says "and N more"
SHOWN = 8


class Stored(NamedTuple):
    """One tensor of a checkpoint, as the header of its file describes it."""

    name: str  #: the checkpoint's own
    file: Path
    shape: tuple[int, ...]
    dtype: str  #: safetensors' word: "BF16", "F32", "I8", ...

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of a tensor whose dtype is read."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Account(NamedTuple):
    """Every tensor of a checkpoint against every parameter of a model."""

    sources: dict[str, Stored]  #: parameter -> the tensor it is read from, those that fit and those that do not
    problems: dict[str, list[str]]  #: kind -> one entry per tensor; no kind without entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file when it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a checkpoint folder: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> file name, as the folder's index says; None for a folder without one.

    Raises:
        ValueError: when the index is no such map, leads out of the folder, or stands beside a file it does not list.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensor names to file names")
    names = set(weight_map.values())
    if any(name in ("", ".", "..") or "/" in name or "\\" in name for name in names):
        raise ValueError(f"{path} names a file outside its folder")
    if (folder / SINGLE).exists() and SINGLE not in names:
        raise ValueError(
            f"{folder} holds two sets of weights: {SINGLE}, and the files that {INDEX} lists; remove one of them"
        )
    return weight_map


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the single file.

    Raises:
        ValueError: when one is missing (pickled weights are never read), or the index is broken.
    """
    index = read_index(folder)
    files = [folder / name for name in (sorted(set(index.values())) if index is not None else [SINGLE])]
    missing = [file.name for file in files if not file.exists()]
    if not missing:
        return files
    hint = ""
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES and p.name not in NOT_WEIGHTS)
    if pickled:
        hint = (
            f" (found {_some(pickled)}: pickled weights are never read, they can run code; convert them to safetensors "
            "where they came from, in transformers with save_pretrained)"
        )
    elif index is None and (parts := sorted(p.name for p in folder.glob("model-*.safetensors"))):
        hint = f" (found {_some(parts)} without {INDEX}; fetch the folder again)"
    raise ValueError(f"{folder} lacks {_some(missing)}{hint}")


def stored_tensors(files: list[Path]) -> Iterator[Stored]:
    """Every tensor of the files; ValueError naming a file that is cut short or no safetensors file at all."""
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    piece = opened.get_slice(name)
                    yield Stored(name, file, tuple(piece.get_shape()), piece.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def account(folder: Path, model: Model) -> Account:
    """Which tensor each base parameter of `model` comes from, and everything that does not fit.

    Raises:
        ValueError: when the files themselves are missing or damaged.
    """
    expected = model.without_lora().shapes
    rename = FAMILIES[model.config.family].parameter_name
    index = read_index(folder)
    sources: dict[str, Stored] = {}
    problems: dict[str, list[str]] = {kind: [] for kind in (
        "unknown", "doubled", "misshaped", "of a dtype that is not read", "not in the index", "not in the file", "missing"
    )}  # fmt: skip
    present = set()
    for tensor in stored_tensors(tensor_files(folder)):
        name = tensor.name
        present.add((name, tensor.file.name))
        ours = rename(name, model.config)
        if ours is None:
            continue
        if ours not in expected:
            problems["unknown"].append(name)
            continue
        if ours in sources:
            problems["doubled"].append(f"{name} (already read as {sources[ours].name})")
            continue
        sources[ours] = tensor
        if index is not None and name not in index:
            problems["not in the index"].append(f"{name} of {tensor.file.name}")
        if tensor.dtype not in FLOATS:
            problems["of a dtype that is not read"].append(f"{name} is {tensor.dtype}")
        elif tensor.shape != expected[ours].shape:
            problems["misshaped"].append(
                f"{name} is {list(tensor.shape)}, config.json says {list(expected[ours].shape)}"
            )
    problems["not in the file"] = [
        f"{name}, which {INDEX} places in {file}" for name, file in (index or {}).items() if (name, file) not in present
    ]
    problems["missing"] = [name for name in expected if name not in sources]
    return Account(sources, {kind: names for kind, names in problems.items() if names})


#: kinds of problems with a word on what to do about them
ADVICE = {
    "of a dtype that is not read": f"weights are read as {', '.join(FLOATS)}; dequantise them where they were made",
}


def describe(problems: Mapping[str, list[str]]) -> list[str]:
    """One line per kind of problem, with the first names of each."""
    return [
        f"{kind} ({len(names)}): {_some(names)}" + (f" ({ADVICE[kind]})" if kind in ADVICE else "")
        for kind, names in problems.items()
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name, 300) for name in names[:SHOWN]) + more
