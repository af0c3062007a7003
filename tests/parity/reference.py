"""transformers' side: the model that a drawn config.json describes, its files, logits, gradients and greedy answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from configurations import Json, Rng, between, chance, pick
from hub_names import hub_name
from prompts import Prompts
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlmalign.types import Group, Patches, Segment

#: beyond every vocabulary drawn here: greedy answers run to their full length
NEVER = 10_000


def build(folder: Path, rng: Rng) -> PreTrainedModel:
    """The model of `folder/config.json` with weights under which every part shows in the logits, float32."""
    config = AutoConfig.from_pretrained(folder)
    maker = AutoModelForImageTextToText if "vision_config" in config.to_dict() else AutoModelForCausalLM
    module = maker.from_config(config, attn_implementation="eager").float().eval()
    gemma = config.model_type.startswith("gemma3")
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.from_numpy(rng.normal(size=tuple(value.shape)).astype(np.float32))
            value.copy_(weight(name, noise, gemma=gemma))
    return module


def weight(name: str, noise: torch.Tensor, *, gemma: bool) -> torch.Tensor:
    """`noise` shifted and scaled as the tensor of this name needs it."""
    if "norm" in name or "ln_q" in name:
        if name.endswith(("language_model.norm.weight", "model.norm.weight")):
            # Of both signs: under a tied head every token would otherwise predict itself.
            return 3.0 * noise - float(gemma)
        # Gemma stores what is added to 1, others the factor itself; biases lie around 0.
        stored_around_zero = name.endswith("bias") or (gemma and "vision_tower" not in name)
        sharper = 0.7 * name.endswith(("q_norm.weight", "k_norm.weight"))  # where something stands should matter
        return 0.3 * noise + (0.0 if stored_around_zero else 1.0) + sharper
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name or "lm_head" in name or "position_embedding" in name:
        return (0.15 if gemma else 0.4) * noise
    return 1.3 * noise / float(np.prod(noise.shape[1:])) ** 0.5


@dataclass(frozen=True)
class Files:
    """How a checkpoint lies on disk."""

    names: str  #: "saved": as transformers writes it; "hub": as the hub's files; "present": as held in memory
    shards: int
    bfloat16: bool
    leftovers: bool  #: tensors that some tools write although they follow from others

    @staticmethod
    def draw(rng: Rng) -> Files:
        return Files(pick(rng, "saved", "hub", "present"), between(rng, 1, 3), chance(rng, 0.3), chance(rng, 0.3))


def write(module: PreTrainedModel, config: Json, folder: Path, files: Files) -> None:
    """The checkpoint of `module`, whose weights are first rounded where the files are bfloat16."""
    if files.bfloat16:
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(value.bfloat16())
        config = {**config, "torch_dtype": "bfloat16"}
    dtype = torch.bfloat16 if files.bfloat16 else torch.float32
    if files.names == "saved":
        state = {name: value.to(dtype) for name, value in module.state_dict().items()}
        size = 1 + sum(value.nbytes for value in state.values()) // files.shards
        module.save_pretrained(folder, state_dict=state, max_shard_size=size)
    else:
        kind = config["model_type"]
        state = {name: value.detach().to(dtype) for name, value in module.named_parameters()}
        if files.leftovers and "lm_head.weight" not in state:
            state["lm_head.weight"] = module.get_input_embeddings().weight.detach().to(dtype)
        if files.leftovers and kind == "llama":
            state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if files.names == "hub":
            state = {hub_name(name, kind): value for name, value in state.items()}
        write_shards(state, folder, files.shards)
    # The drawn spelling, not the one that transformers would write.
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_shards(state: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    state = {name: value.clone().contiguous() for name, value in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: value for i, (name, value) in enumerate(state.items()) if i % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


# ---------------------------------------------------------------- running it


def inputs(
    module: PreTrainedModel, texts: Sequence[tuple[Group, Sequence[Segment]]], prompts: Prompts, side: str
) -> tuple[dict[str, Any], list[int]]:
    """transformers' inputs for texts padded on `side`, and where each text begins."""
    tokens = [np.concatenate([segment.tokens for segment in segments]) for _, segments in texts]
    width = max(map(len, tokens))
    ids, mask = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), np.int64)
    start = [width - len(row) if side == "left" else 0 for row in tokens]
    for i, row in enumerate(tokens):
        ids[i, start[i] : start[i] + len(row)] = row
        mask[i, start[i] : start[i] + len(row)] = 1
    found: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if prompts.images is None:
        return found, start
    soft = found["input_ids"] == module.config.image_token_id
    keys = [key for group, segments in texts for key in prompts.occurrences(*segments, group=group)]
    pictures = prompts.images.read(keys)
    if module.config.model_type == "gemma3":
        found["token_type_ids"] = soft.long()
        if keys:
            found["pixel_values"] = torch.from_numpy(np.stack(pictures)).to(module.dtype)
    else:
        found["mm_token_type_ids"] = soft.int()
        if keys:
            assert all(isinstance(picture, Patches) for picture in pictures)
            found["pixel_values"] = torch.from_numpy(np.concatenate([p.values for p in pictures])).to(module.dtype)
            found["image_grid_thw"] = torch.tensor([[1, p.rows, p.columns] for p in pictures])
    return found, start


def batches(texts: list, side: str) -> list[list]:
    """All texts together, or each alone."""
    return [[text] for text in texts] if side == "alone" else [texts]


class Scored(NamedTuple):
    """`logits` of every real token of each (group, continuation); the loss and its gradients by present name."""

    logits: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]


def score(module: PreTrainedModel, prompts: Prompts, side: str) -> Scored:
    """Mean negative log-likelihood of the weighted tokens, each continuation after its own copy of the prompt."""
    texts = [(g, (g.prompt, c)) for g in prompts.groups for c in g.continuations]
    count = sum(c.weight.sum() for _, (_, c) in texts)
    module.zero_grad()
    logits, total = [], 0.0
    for part in batches(texts, side):
        given, start = inputs(module, part, prompts, side)
        out = module(**given, use_cache=False).logits
        loss = torch.zeros(())
        for row, begin, (_, (prompt, own)) in zip(out, start, part, strict=True):
            first = begin + len(prompt)
            table = torch.log_softmax(row[first - 1 : first - 1 + len(own)], dim=-1)
            at = np.flatnonzero(own.weight)
            loss = loss - table[at, own.tokens[at]].sum() / count
            logits.append(row[begin : first + len(own)].detach().numpy())
        loss.backward()
        total += loss.item()
    gradients = {
        name: np.zeros(tuple(value.shape)) if value.grad is None else value.grad.numpy().copy()
        for name, value in module.named_parameters()
    }
    return Scored(logits, total, gradients)


class Greedy(NamedTuple):
    """The most likely continuation of each prompt, and the logits [tokens, vocab] each token was taken from."""

    tokens: list[np.ndarray]
    logits: list[np.ndarray]


def greedy(module: PreTrainedModel, prompts: Prompts, side: str, length: int) -> Greedy:
    """`generate` with every prompt alone, or all of them padded on the left."""
    texts = [(g, (g.prompt,)) for g in prompts.groups]
    tokens, logits = [], []
    for part in batches(texts, side):
        given, _ = inputs(module, part, prompts, "left")
        with torch.no_grad():
            out = module.generate(
                **given, do_sample=False, max_new_tokens=length, eos_token_id=NEVER, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        tokens += list(out.sequences[:, given["input_ids"].shape[1] :].numpy())
        logits += list(torch.stack(out.logits, dim=1).float().numpy())
    return Greedy(tokens, logits)
