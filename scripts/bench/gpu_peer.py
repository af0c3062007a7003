"""transformers and torch at full size on one GPU, with random weights: the peer's side of `gpu.py`.

    python scripts/bench/gpu_peer.py --model medgemma-4b --out scripts/bench/results/gpu_peer_medgemma_4b.json

A GRPO step as TRL makes it: `generate` with `num_return_sequences`, the reference's log-probabilities with the adapter
off, then forward and backward of whole sequences, prompt and film once per completion, in micro-batches without
gradient checkpointing where they fit. bfloat16 weights, SDPA attention, LoRA from peft on the decoder's matrices. Only
the completions' states go through the output matrix.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_shapes import MODELS, Record, Shape, read_sizes, seconds
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

PARTS = ("rates", "step", "decode", "update")
#: tokens generated to warm up
WARM = 8
TARGETS = r"^(?!.*vision_tower).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"


class Peer:
    """One model with random weights on the GPU."""

    def __init__(self, sizes: dict[str, Any], shape: Shape, record: Record, repeats: int, micro: int):
        self.shape, self._record, self._repeats, self._micro = shape, record, repeats, micro
        self.config = AutoConfig.for_model(**sizes)
        self.vision = getattr(self.config, "vision_config", None)
        family = AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(self.device):
            model = family.from_config(self.config, dtype=torch.bfloat16, attn_implementation="sdpa")
        lora = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=TARGETS, lora_dropout=0.0)
        self.model = get_peft_model(model, lora)
        self.vocab = self.config.get_text_config().vocab_size
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-6)
        self._rng = np.random.default_rng(0)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device == "cuda" else None

    def rates(self) -> None:
        side = 8192 if self.device == "cuda" else 512
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)

        def run() -> None:
            torch.matmul(a, a)
            self._wait()

        took = seconds(run, warm=3, repeats=10)
        self._record.add("rates", matmul_tflop_s=2 * side**3 / took["seconds"] / 1e12)

    def prompts(self, count: int) -> dict[str, torch.Tensor]:
        """Random prompts; each shows a film of its own where there is a tower."""
        shape = self.shape
        tokens = torch.from_numpy(self._rng.integers(16, self.vocab - 64, (count, shape.prompt)))
        found = {"attention_mask": torch.ones(count, shape.prompt, dtype=torch.long)}
        if self.vision is not None:
            span = slice(8, 8 + self.config.mm_tokens_per_image)
            tokens[:, span] = self.config.image_token_id
            side = self.vision.image_size
            pixels = self._rng.random((count, 3, side, side), np.float32) * 2 - 1
            found["pixel_values"] = torch.from_numpy(pixels).to(torch.bfloat16)
            kinds = torch.zeros_like(tokens)
            kinds[:, span] = 1
            found["token_type_ids"] = kinds
        return {name: value.to(self.device) for name, value in (found | {"input_ids": tokens}).items()}

    def generate(self, prompts: dict[str, torch.Tensor], top_p: float, length: int | None = None) -> torch.Tensor:
        """Prompts and `length` new tokens of each completion; by default those of the benchmark."""
        shape = self.shape
        length = shape.completion if length is None else length
        self.model.eval()
        with torch.no_grad():
            found = self.model.generate(
                **prompts, do_sample=True, temperature=shape.temperature, top_p=top_p, top_k=0,
                num_return_sequences=shape.group, max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
        self._wait()
        return found

    def decode(self) -> None:
        """Prefill and decoding; the prefill is what one new token takes."""
        prompts = self.prompts(self.shape.prompts)
        for top_p in (1.0, self.shape.top_p):
            self.generate(prompts, top_p, WARM)
            took = seconds(lambda: self.generate(prompts, top_p), warm=0, repeats=self._repeats)  # noqa: B023
            tokens = self.shape.prompts * self.shape.group * self.shape.completion
            self._record.add(
                "decode", rows=self.shape.prompts, group=self.shape.group, top_p=top_p, **took,
                tokens_per_s=tokens / took["seconds"], peak_gib=self._peak(),
            )  # fmt: skip

    def _rows(self, prompts: dict[str, torch.Tensor], answers: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of whole sequences, the prompt repeated for each of its completions."""
        repeat = {name: value.repeat_interleave(self.shape.group, 0) for name, value in prompts.items()}
        more = torch.ones_like(answers)
        repeat["input_ids"] = torch.cat([repeat["input_ids"], answers], 1)
        repeat["attention_mask"] = torch.cat([repeat["attention_mask"], more], 1)
        if "token_type_ids" in repeat:
            repeat["token_type_ids"] = torch.cat([repeat["token_type_ids"], 0 * more], 1)
        count = len(answers)
        return [{n: v[i : i + self._micro] for n, v in repeat.items()} for i in range(0, count, self._micro)]

    def _logp(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        length = self.shape.completion
        logits = self.model(**rows, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        logits = logits / self.shape.temperature
        wanted = rows["input_ids"][:, -length:, None]
        # Row by row, as TRL does in bfloat16: log-softmax of all rows at once would not be held.
        found = [torch.log_softmax(z, -1).gather(-1, i)[..., 0] for z, i in zip(logits, wanted, strict=True)]
        return torch.stack(found).float()

    def train(self, rows: list[dict[str, torch.Tensor]], reference: list[torch.Tensor | None]) -> None:
        self.model.train()
        for part, ref in zip(rows, reference, strict=True):
            logp = self._logp(part)
            advantage = torch.linspace(-1, 1, len(logp), device=self.device)[:, None]
            loss = -(torch.exp(logp - logp.detach()) * advantage)
            if ref is not None:
                loss = loss + 0.15 * (torch.exp(ref - logp) - (ref - logp) - 1)
            (loss.mean() / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._wait()

    def update(self) -> None:
        shape = self.shape
        prompts = self.prompts(shape.prompts)
        answers = torch.from_numpy(
            self._rng.integers(16, self.vocab - 64, (shape.prompts * shape.group, shape.completion))
        ).to(self.device)
        rows = self._rows(prompts, answers)
        took = seconds(lambda: self.train(rows, [None] * len(rows)), warm=2, repeats=self._repeats)
        self._record.add("update", micro=self._micro, **took, peak_gib=self._peak())

    def _warm_up(self) -> None:
        """A few tokens, and an update of the benchmark's shape."""
        prompts = self.prompts(self.shape.prompts)
        self.generate(prompts, self.shape.top_p, WARM)
        size = (self.shape.prompts * self.shape.group, self.shape.completion)
        rows = self._rows(prompts, torch.randint(16, self.vocab - 64, size, device=self.device))
        self.train(rows, [None] * len(rows))

    def step(self) -> None:
        """Whole GRPO steps on new films: sample, reference, update."""
        shape, parts = self.shape, []

        def run() -> None:
            began = time.perf_counter()
            prompts = self.prompts(shape.prompts)
            answers = self.generate(prompts, shape.top_p)[:, shape.prompt :]
            if self.vision is not None:  # random weights may draw the token that stands for an image
                answers = torch.where(answers == self.config.image_token_id, 16, answers)
            sampled = time.perf_counter()
            rows = self._rows(prompts, answers)
            with torch.no_grad(), self.model.disable_adapter():
                reference = [self._logp(part) for part in rows]
            self._wait()
            scored = time.perf_counter()
            self.train(rows, reference)
            parts.append((sampled - began, scored - sampled, time.perf_counter() - scored))
            # At once: a run that is ended early keeps what it measured.
            self._record.add("one step", rollout_s=parts[-1][0], reference_s=parts[-1][1], update_s=parts[-1][2])

        self._warm_up()
        took = seconds(run, warm=0, repeats=self._repeats)
        rollout, reference, update = np.median(parts, axis=0).tolist()
        self._record.add(
            "step", prompts=shape.prompts, group=shape.group, micro=self._micro, **took, rollout_s=rollout,
            reference_s=reference, update_s=update, peak_gib=self._peak(),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medgemma-4b", help=f"{', '.join(MODELS)}, or a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers, for a trial")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--prompt", type=int, default=Shape.prompt)
    parser.add_argument("--completion", type=int, default=Shape.completion)
    parser.add_argument("--micro", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    shape = Shape(prompt=asked.prompt, completion=asked.completion)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    record = Record(
        asked.out,
        {
            "model": asked.model, "layers": asked.layers, "dtype": "bfloat16", "shape": vars(shape),
            "versions": versions | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    )  # fmt: skip
    peer = Peer(read_sizes(asked.model, asked.layers), shape, record, asked.repeats, asked.micro)
    for part in asked.parts.split(","):
        getattr(peer, part)()


if __name__ == "__main__":
    main()
