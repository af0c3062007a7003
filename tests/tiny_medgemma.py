"""The repository's tiny-medgemma with fewer layers: what the tests of the library and of `vlmalign answer` compile."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax  # also so that NumPy knows bfloat16
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file


def shortened(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint `source` with the first layer of its decoder and of its tower."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    for name, value in load_file(source / "model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer is None or layer[1] == "0":
            kept[name] = value
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def film(path: Path, *, seed: int = 0) -> Path:
    """A grey film of noise."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    return path


@contextmanager
def quick() -> Iterator[None]:
    """XLA optimises little: compiling is what tests on sizes like these pay for."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
