"""Tiny Gemma 3 checkpoints that transformers itself wrote, the same weights as our parameters, and groups to run on.

Everything is made once per test run. Sizes are chosen to catch confusions: head_dim is not embed / heads, the query
scale is not head_dim ** -0.5, there are fewer key-value heads than heads, norm weights are not zero.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

from vlmalign.data.groups import collate
from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.rollout.engine import output_logits
from vlmalign.training.step import token_scores
from vlmalign.types import Grid, Group, GroupBatch, Layout, Segment
from vlmalign.weights.checkpoint import load_config, load_params

BEGIN, END, SOFT = 90, 91, 92  #: ids around and inside an image
SOFT_TOKENS = 4  #: per image
VOCAB = 96

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
#: two layers; a window that binds inside an image of four tokens and across every prompt's end
VLM_TEXT = {
    **TEXT,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder, the torch model that wrote it and our reading of it."""

    folder: Path
    torch: PreTrainedModel
    model: Model
    params: Mapping[str, jax.Array]


@functools.cache
def scratch() -> Path:
    """A folder that lasts as long as the test run."""
    folder = Path(tempfile.mkdtemp(prefix="vlmalign-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def randomise(module: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights under which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                # Gemma's norms are stored around 0, the tower's around 1.
                tower_norm = "vision_tower" in name and "norm" in name and name.endswith("weight")
                shift, spread = float(tower_norm), 0.3
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    shift = 0.7  # sharper attention: what stands where matters
                elif name.endswith(("language_model.norm.weight", "model.norm.weight")):
                    # Of both signs: under a tied head every token would otherwise predict itself.
                    shift, spread = -1.0, 3.0
                value.copy_(shift + spread * noise)
            elif "embed" in name or "lm_head" in name:
                value.copy_(0.15 * noise)
            else:
                value.copy_(noise * 1.3 / float(np.sqrt(np.prod(value.shape[1:]))))
    return module.float().eval()


def write(module: PreTrainedModel, name: str, **options: Any) -> Path:
    """The folder that transformers writes for this model."""
    folder = scratch() / name
    module.save_pretrained(folder, **options)
    return folder


def read(folder: Path, module: PreTrainedModel, **options: Any) -> Checkpoint:
    """Our model and parameters of a folder."""
    model = Model(load_config(folder), **options)
    return Checkpoint(folder, module, model, load_params(folder, model))


def text_model(seed: int = 0, **changes: Any) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**{**TEXT, **changes}, attn_implementation="eager")
    return randomise(Gemma3ForCausalLM(config), seed)


def vlm_model(seed: int = 11, *, top: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None):
    config = Gemma3Config(
        text_config=VLM_TEXT,
        vision_config={**VISION, **(vision or {})},
        mm_tokens_per_image=SOFT_TOKENS,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=SOFT,
        attn_implementation="eager",
        **(top or {}),
    )
    return randomise(Gemma3ForConditionalGeneration(config), seed)


@functools.cache
def text() -> Checkpoint:
    """Gemma 3 text: three layers, one key-value head, window 6."""
    module = text_model()
    return read(write(module, "text"), module)


@functools.cache
def vlm() -> Checkpoint:
    """Gemma 3 with a tower: two layers, window 3."""
    module = vlm_model()
    return read(write(module, "vlm"), module)


def random_adapter(model: Model, *, seed: int) -> dict[str, jax.Array]:
    """An adapter whose B is not zero, drawn by NumPy: JAX would compile a program for every shape."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.3 * rng.normal(size=shape.shape).astype(np.float32))
        for name, shape in model.shapes.items()
        if is_adapter(name)
    }


@functools.cache
def adapted() -> Checkpoint:
    """`vlm` with an adapter whose B is not zero; the torch model holds the merged weights."""
    base = vlm()
    spec = LoraSpec(rank=2, alpha=3.0)
    model = Model(base.model.config, lora=spec)
    adapter = random_adapter(model, seed=1)
    module = vlm_model()
    state = module.state_dict()
    for name, a in adapter.items():
        if ".lora_A." in name:
            delta = spec.scale * np.asarray(adapter[name.replace("lora_A", "lora_B")]) @ np.asarray(a)
            state["model." + name.replace(".lora_A.", ".")].add_(torch.from_numpy(delta))
    module.load_state_dict(state)
    return Checkpoint(base.folder, module, model, {**base.params, **adapter})


def edit_config(source: Path, name: str, change: Any) -> Path:
    """A copy of a folder whose config.json went through `change(config) -> None`."""
    folder = scratch() / name
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- groups


@functools.cache
def picture(key: str) -> np.ndarray:
    """The pixels of an image of this name."""
    return np.random.default_rng([ord(c) for c in key]).normal(size=(3, 16, 16)).astype(np.float32)


def pictures(keys: Sequence[str]) -> np.ndarray:
    return np.stack([picture(key) for key in keys])


def segment(parts: Sequence[int | str], images: Sequence[str]) -> Segment:
    """Tokens, with a whole image (begin, soft tokens, end) for every name among `parts`."""
    tokens, image = [], []
    for part in parts:
        if isinstance(part, str):
            tokens += [BEGIN] + [SOFT] * SOFT_TOKENS + [END]
            image += [-1] + [images.index(part)] * SOFT_TOKENS + [-1]
        else:
            tokens.append(part)
            image.append(-1)
    return Segment(np.asarray(tokens, np.int32), np.asarray(image, np.int32), np.ones(len(tokens), np.float32))


def group(number: int, prompt: Sequence[int | str], *continuations: Sequence[int | str]) -> Group:
    every = [part for piece in (prompt, *continuations) for part in piece if isinstance(part, str)]
    images = tuple(dict.fromkeys(every))
    return Group(number, segment(prompt, images), tuple(segment(c, images) for c in continuations), images)


def occurrences(item: Group, k: int | None = None) -> list[str]:
    """Images in the order in which prompt and continuation `k` show them."""
    pieces = [item.prompt] + ([] if k is None else [item.continuations[k]])
    found = []
    for piece in pieces:
        soft = np.flatnonzero(piece.image >= 0)
        found += [item.images[piece.image[i]] for i in soft[::SOFT_TOKENS]]
    return found


def put(groups: Sequence[Group], layout: Layout, *, rows: int | None = None, images: int | None = 3) -> GroupBatch:
    """A batch with the pixels of its images, padded to `images` of them (None: no pixels)."""
    batch, keys = collate(
        groups, layout, rows=len(groups) if rows is None else rows, grid=lambda key: Grid(1, SOFT_TOKENS)
    )
    if images is None:
        assert not keys
        return batch
    pixels = np.zeros((images, 3, 16, 16), np.float32)
    if keys:
        pixels[: len(keys)] = pictures(keys)
    return batch._replace(pixels=pixels)


# ---------------------------------------------------------------- programs shared by the tests

#: compiling is what these tests pay for; LLVM's optimisations would take longer than they save on sizes like these
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def logits(model: Model, params: Mapping[str, jax.Array], batch: GroupBatch) -> jax.Array:
    """[n, t, vocab]"""
    return output_logits(model, model.bind(params), model.hidden(params, batch))


@partial(jax.jit, static_argnames=("model", "temperature"), compiler_options=QUICK)
def scores(model: Model, params: Mapping[str, jax.Array], batch: GroupBatch, temperature: float = 1.0):
    return token_scores(model, params, batch, temperature)


@partial(jax.jit, static_argnames="model", compiler_options=QUICK)
def scores_and_gradients(
    model: Model, params: Mapping[str, jax.Array], batch: GroupBatch, weight: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log-probabilities, and the gradient of their sum weighted by `weight` with respect to every parameter."""

    def total(params):
        logp = token_scores(model, params, batch, 1.0).logp
        return jnp.sum(weight * logp), logp

    (_, logp), gradients = jax.value_and_grad(total, has_aux=True)(dict(params))
    return logp, gradients


def torch_logits(module: PreTrainedModel, tokens: np.ndarray, images: Sequence[str] = ()) -> np.ndarray:
    """transformers' logits of one sequence [t, vocab]."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
    options = {}
    if isinstance(module, Gemma3ForConditionalGeneration):
        options["token_type_ids"] = (ids == SOFT).long()
        if images:
            options["pixel_values"] = torch.from_numpy(pictures(images))
    with torch.no_grad():
        return module(input_ids=ids, **options).logits[0].numpy()


def assert_close(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """NUMERICS' meaning of a tolerance: max|a - b| <= tolerance x max(1, max|b|)."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    assert np.isfinite(found).all(), what
    assert np.isfinite(expected).all(), what
    gap = np.max(np.abs(found - expected), initial=0.0)
    assert gap <= tolerance * max(1.0, np.max(np.abs(expected), initial=0.0)), f"{what}: differs by {gap}"
