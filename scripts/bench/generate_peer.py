"""transformers' side of `rollout.py`: `generate` in a process of its own, one call for every line on standard input."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on the other side's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from child import Child
from transformers import Gemma3ForCausalLM


class GeneratePeer(Child):
    """`call()` returns the seconds of one call of `generate`; `versions` are those of its process."""

    def __init__(self, folder: Path, ids: np.ndarray, *, group: int, completion: int, never: int, python: str):
        """`ids` [prompts, tokens]; `never`: a stop id under which nothing stops; `python` runs it."""
        super().__init__(__file__, python=python)
        self.say({"folder": str(folder), "ids": ids.tolist(), "group": group, "completion": completion, "never": never})
        self.versions: dict[str, str] = self.read()

    def call(self) -> float:
        self.say("go")
        return self.read()


def main() -> None:
    opening = json.loads(sys.stdin.readline())
    module = Gemma3ForCausalLM.from_pretrained(
        opening["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    inputs, completion = torch.tensor(opening["ids"]), opening["completion"]
    own = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    print(json.dumps(own), flush=True)
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
