"""TRL's side of the training benchmarks: its own trainers on the same checkpoint, shapes and lengths.

A trainer owns its loop, so the other side's steps are run from a callback between two of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from shapes import Sizes, picture, words
from transformers import AutoProcessor, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

datasets.disable_progress_bars()
TARGETS = r"^(?!.*vision_tower).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"


class Between(TrainerCallback):
    """Seconds of every step of the trainer; `other` runs between two of them and is not counted."""

    def __init__(self, other: Callable[[], None]):
        self.seconds: list[float] = []
        self._other, self._began = other, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self._other()
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

    def sft(self, batch: int, steps: int, between: Callable[[], None]) -> list[float]:
        count = batch * steps
        if self.kind == "text":
            tokens = self._rng.integers(16, self.sizes.vocab, (count, self.sizes.row)).tolist()
            rows, limit = Dataset.from_dict({"input_ids": tokens}), self.sizes.row
        else:
            length = self.sizes.row - self.sizes.prompt
            rows = Dataset.from_list([{**self._row(), "completion": self._answer(length)} for _ in range(count)])
            limit = None
        settings = SFTConfig(**self._settings(batch, steps), max_length=limit)
        return self._run(SFTTrainer, settings, rows, between)

    def dpo(self, batch: int, steps: int, between: Callable[[], None]) -> list[float]:
        rows = [
            {**self._row(), "chosen": self._answer(self.sizes.answer), "rejected": self._answer(self.sizes.answer)}
            for _ in range(batch * steps)
        ]
        settings = DPOConfig(**self._settings(batch, steps), max_length=None if self.kind == "image" else 4096)
        return self._run(DPOTrainer, settings, Dataset.from_list(rows), between)

    def grpo(self, group: int, prompts: int, steps: int, between: Callable[[], None]) -> list[float]:
        rows = [self._row("image") for _ in range(prompts * steps)]

        def reward(completions: list[Any], **columns: Any) -> list[float]:
            del columns
            texts = [c[0]["content"] for c in completions]
            return [sum(int(w[1:]) % 2 for w in t.split() if w[1:].isdigit()) / 16.0 for t in texts]

        settings = GRPOConfig(
            **self._settings(prompts * group, steps), num_generations=group, beta=0.04, loss_type="dapo",
            max_completion_length=self.sizes.completion, generation_kwargs={"min_new_tokens": self.sizes.completion},
            temperature=1.0,
        )  # fmt: skip
        return self._run(GRPOTrainer, settings, Dataset.from_list(rows), between, reward_funcs=reward)

    def _run(self, trainer: Any, settings: Any, rows: Dataset, between: Callable[[], None], **more: Any) -> list[float]:
        clock = Between(between)
        made = trainer(
            model=self._model(), args=settings, train_dataset=rows, processing_class=self._processor,
            peft_config=self._lora(), callbacks=[clock], **more,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()
        return clock.seconds
