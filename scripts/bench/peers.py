"""TRL's side of the training benchmarks: its own trainers on the same checkpoint, shapes and lengths, in a process of
its own, with whatever memory allocator and threads TRL's users have.

`PeerProcess` starts this file as a program and is given the seconds of a step each time it asks; between two steps the
program waits. (A trainer owns its loop: it waits in a callback.)
"""

# ruff: noqa: E402 - the environment must be set before torch is imported

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on the other side's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import sys

from vlmalign.host_memory import keep_freed_memory

if __name__ == "__main__" and json.loads(sys.argv[1])["same_heap"]:
    keep_freed_memory()

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import datasets
import numpy as np
import torch
import transformers
from child import Child
from datasets import Dataset
from peft import LoraConfig
from shapes import Sizes, picture, words
from transformers import AutoProcessor, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

datasets.disable_progress_bars()
TARGETS = r"^(?!.*vision_tower).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"


class Between(TrainerCallback):
    """Seconds of every step of the trainer: `wait` is called before the first, `told` with the seconds of each one."""

    def __init__(self, wait: Callable[[], None], told: Callable[[float], None]):
        self._wait, self._told, self._began = wait, told, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wait()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._told(time.perf_counter() - self._began)  # returns when the next step may begin
        self._began = time.perf_counter()


class Peer:
    """TRL on a checkpoint folder."""

    def __init__(self, folder: Path, kind: str, sizes: Sizes, *, spare: int, scratch: Path):
        self.folder, self.kind, self.sizes, self._spare, self._scratch = folder, kind, sizes, spare, scratch
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._rng = np.random.default_rng(1)

    def _model(self) -> torch.nn.Module:
        family = Gemma3ForCausalLM if self.kind == "text" else Gemma3ForConditionalGeneration
        return family.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="sdpa")

    def _settings(self, batch: int, steps: int) -> dict[str, Any]:
        return {
            "output_dir": str(self._scratch / "trl"), "per_device_train_batch_size": batch, "max_steps": steps,
            "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0, "disable_tqdm": True, "seed": 0,
        }  # fmt: skip

    def _lora(self) -> LoraConfig:
        rank = self.sizes.rank
        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=TARGETS)

    def _row(self, column: str = "images") -> dict[str, Any]:
        prompt = [{"role": "user", "content": words(self._rng, self.sizes.prompt - self._spare, self.sizes)}]
        if self.kind == "text":
            return {"prompt": prompt}
        image = picture(self._rng, self.sizes)
        return {"prompt": prompt, column: image if column == "image" else [image]}

    def _answer(self, length: int) -> list[dict[str, str]]:
        # The template adds the end of the turn.
        return [{"role": "assistant", "content": words(self._rng, length - 1, self.sizes)}]

    def sft(self, batch: int, steps: int, clock: Between) -> None:
        count = batch * steps
        if self.kind == "text":
            tokens = self._rng.integers(16, self.sizes.vocab, (count, self.sizes.row)).tolist()
            rows, limit = Dataset.from_dict({"input_ids": tokens}), self.sizes.row
        else:
            length = self.sizes.row - self.sizes.prompt
            rows = Dataset.from_list([{**self._row(), "completion": self._answer(length)} for _ in range(count)])
            limit = None
        settings = SFTConfig(**self._settings(batch, steps), max_length=limit)
        self._run(SFTTrainer, settings, rows, clock)

    def dpo(self, batch: int, steps: int, clock: Between) -> None:
        rows = [
            {**self._row(), "chosen": self._answer(self.sizes.answer), "rejected": self._answer(self.sizes.answer)}
            for _ in range(batch * steps)
        ]
        settings = DPOConfig(**self._settings(batch, steps), max_length=None if self.kind == "image" else 4096)
        self._run(DPOTrainer, settings, Dataset.from_list(rows), clock)

    def grpo(self, group: int, prompts: int, steps: int, clock: Between) -> None:
        rows = [self._row("image") for _ in range(prompts * steps)]

        def reward(completions: list[Any], **columns: Any) -> None:
            del columns
            texts = [c[0]["content"] for c in completions]
            return [sum(int(w[1:]) % 2 for w in t.split() if w[1:].isdigit()) / 16.0 for t in texts]

        settings = GRPOConfig(
            **self._settings(prompts * group, steps), num_generations=group, beta=0.04, loss_type="dapo",
            max_completion_length=self.sizes.completion, generation_kwargs={"min_new_tokens": self.sizes.completion},
            temperature=1.0,
        )  # fmt: skip
        self._run(GRPOTrainer, settings, Dataset.from_list(rows), clock, reward_funcs=reward)

    def _run(self, trainer: Any, settings: Any, rows: Dataset, clock: Between, **more: Any) -> None:
        made = trainer(
            model=self._model(), args=settings, train_dataset=rows, processing_class=self._processor,
            peft_config=self._lora(), callbacks=[clock], **more,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()


class PeerProcess(Child):
    """`Peer` in a process of its own."""

    def __init__(self, folder: Path, kind: str, sizes: Sizes, *, spare: int, same_heap: bool):
        opening = {"folder": str(folder), "kind": kind, "sizes": vars(sizes), "spare": spare, "same_heap": same_heap}
        super().__init__(__file__, json.dumps(opening))

    def steps(self, job: str, batch: int, count: int, group: int | None) -> Iterator[float]:
        """Seconds of each of `count` steps, made one by one as they are asked for."""
        self.say({"job": job, "batch": batch, "count": count, "group": group})
        for _ in range(count):
            self.say("go")
            yield self.read()
        assert self.read() == "end"


def serve(opening: dict[str, Any]) -> None:
    """Jobs from standard input, one JSON line each, until it ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what trainers print must not come between our lines
    say = lambda what: print(json.dumps(what), file=out, flush=True)  # noqa: E731
    transformers.utils.logging.set_verbosity_error()
    sizes = Sizes(**opening["sizes"])
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(Path(opening["folder"]), opening["kind"], sizes, spare=opening["spare"], scratch=Path(scratch))
        for line in sys.stdin:
            asked = json.loads(line)
            left = asked["count"]

            def wait() -> None:
                assert json.loads(sys.stdin.readline()) == "go"

            def told(seconds: float) -> None:
                nonlocal left
                left -= 1
                say(seconds)
                if left:
                    wait()

            job, group = asked["job"], asked["group"]
            more = (group,) if job == "grpo" else ()
            getattr(peer, job)(*more, asked["batch"], asked["count"], Between(wait, told))
            say("end")


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
