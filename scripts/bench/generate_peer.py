"""transformers' side of `rollout.py`: `generate` in a process of its own, one call for every line on standard input."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on the other side's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3ForCausalLM


class GeneratePeer:
    """A context manager; `call()` returns the seconds of one call of `generate`."""

    def __init__(self, folder: Path, ids: np.ndarray, *, group: int, completion: int, never: int):
        """`ids` [prompts, tokens]; `never`: a stop id under which nothing stops."""
        opening = {"folder": str(folder), "ids": ids.tolist(), "group": group, "completion": completion, "never": never}
        self._child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(opening)

    def __enter__(self) -> GeneratePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def call(self) -> float:
        self._say("go")
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers' process ended with exit code {self._child.wait()}; see its error above")
        return float(json.loads(line))

    def _say(self, what: object) -> None:
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()


def main() -> None:
    opening = json.loads(sys.stdin.readline())
    module = Gemma3ForCausalLM.from_pretrained(
        opening["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    inputs, completion = torch.tensor(opening["ids"]), opening["completion"]
    for _ in sys.stdin:
        began = time.perf_counter()
        with torch.no_grad():
            found = module.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0, top_k=0,
                num_return_sequences=opening["group"], max_new_tokens=completion, min_new_tokens=completion,
                eos_token_id=opening["never"], pad_token_id=0,
            )  # fmt: skip
        assert found.shape == (len(inputs) * opening["group"], inputs.shape[1] + completion)
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
