"""Run by test_align_mesh.py in a process with eight devices: `vlmalign align` for every config named, and what it refuses."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (the tests' settings and shape checks)
import jax

from vlmalign.config import load_config
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.run import run


def main() -> None:
    assert jax.device_count() == 8
    folder, refused = Path(sys.argv[1]), {}
    for name in ("lora", "whole"):
        path = folder / f"{name}-eight.yaml"
        run(load_config(AlignConfig, path), path)
    for override in ("stages.0.shapes.rows=4", "stages.2.rollout.rows=12", "mesh.data=3", "stages.2.rollout.tensor=3"):
        path, fresh = folder / "lora-eight.yaml", folder / "refused"
        try:
            run(load_config(AlignConfig, path, [f"run={fresh}", override]), path)
        except ValueError as error:
            refused[override] = str(error)
        assert not fresh.exists(), "refused before anything was written"
    print(json.dumps(refused))


if __name__ == "__main__":
    main()
