"""Run by test_chain_mesh.py in a process with eight devices: every config named, and what it refuses."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (the tests' settings and shape checks)
import jax

from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.run import run


def main() -> None:
    assert jax.device_count() == 8
    folder, refused = Path(sys.argv[1]), {}
    for name in ("lora", "whole"):
        path = folder / f"{name}-eight.yaml"
        run(load_study(path), path)
    for override in ("stages.0.shapes.rows=4", "stages.2.rollout.rows=12", "mesh.data=3", "stages.2.rollout.tensor=3"):
        path, fresh = folder / "lora-eight.yaml", folder / "refused"
        try:
            run(load_study(path, [f"run={fresh}", override]), path)
        except ValueError as error:
            refused[override] = str(error)
        assert not fresh.exists(), "refused before anything was written"
    print(json.dumps(refused))


if __name__ == "__main__":
    main()
