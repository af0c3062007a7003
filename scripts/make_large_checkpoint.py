"""Write a checkpoint folder of some gigabytes with cheap values, to measure loading on.

    python scripts/make_large_checkpoint.py --out runs/large

A Llama with the sizes of Llama 3.2 1B and an output head of its own: 3.0 GB in bfloat16, in six files with an index.
Values repeat one block of small random numbers, shifted from tensor to tensor; memory stays near the size of one file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlmalign.models.families import FAMILIES, read_config
from vlmalign.models.model import Model
from vlmalign.weights.layout import FLOATS, INDEX

#: random numbers that the values of all tensors are taken from
BLOCK = 1 << 20


def plan(shapes: dict[str, tuple[int, ...]], itemsize: int, file_bytes: int) -> list[list[str]]:
    """Tensors in their order, dealt to files of at most `file_bytes`; a larger tensor has a file of its own.

    >>> plan({"a": (4,), "b": (2,), "c": (2,), "d": (9,)}, 1, 6)
    [['a', 'b'], ['c'], ['d']]
    """
    files: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if size > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    return files


def write_checkpoint(folder: Path, config: dict[str, Any], *, dtype: str, file_bytes: int) -> int:
    """Write config.json, the files and their index; returns the bytes of all tensors."""
    model = Model(read_config(config), dtype="bfloat16")
    rename = FAMILIES[model.config.family].file_name
    shapes = {rename(name, model.config): shape.shape for name, shape in model.shapes.items()}
    block = (0.02 * np.random.default_rng(0).standard_normal(BLOCK)).astype(dtype)
    files = plan(shapes, block.itemsize, file_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        # A shift by an odd number: no two tensors of a checkpoint hold the same values.
        tensors = {n: np.resize(np.roll(block, 997 * (len(weight_map) + i)), shapes[n]) for i, n in enumerate(names)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * block.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=FLOATS.values(), default="bfloat16")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--embed", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--file-bytes", type=int, default=500_000_000)
    asked = parser.parse_args()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": asked.vocab,
        "hidden_size": asked.embed,
        "intermediate_size": asked.ffn,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": asked.embed // 64,
        "num_key_value_heads": max(1, asked.embed // 256),
        "head_dim": 64,
        "tie_word_embeddings": False,
        "rope_theta": 500_000.0,
    }
    total = write_checkpoint(asked.out, config, dtype=asked.dtype, file_bytes=asked.file_bytes)
    print(f"{asked.out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
