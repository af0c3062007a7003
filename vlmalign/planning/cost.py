"""What a pass costs by arithmetic: floating-point operations, and the bytes that must at least come from memory.

A product of m x k and k x n counts as 2 m k n operations. Attention counts every pair of the rectangle (P; K x C) that
is computed, masked ones too. Bytes are weights and caches, each read once per pass: activations are left out, which
matters where rows are few and nowhere else. On these two stands the roofline (Williams et al., 2009): no device is
faster than operations / its peak rate, or than bytes / its bandwidth.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from vlmalign.models.config import DecoderConfig
from vlmalign.models.model import Model
from vlmalign.models.sizes import cache_bytes, head_weights, layer_weights, siglip_flops
from vlmalign.planning.batches import base_of, split
from vlmalign.planning.devices import Device
from vlmalign.planning.workload import Sampled, Update
from vlmalign.rollout.completions import Generator
from vlmalign.types import Layout

#: forward passes through the layers that a backward pass makes again, by the policy in `models.decoder.REMAT`, in the
#: order of what they cost: of their linear maps, and of attention
FORWARD_AGAIN = {"none": 0, "dots": 0, "attention": 1, "full": 1}
ATTENTION_AGAIN = {"none": 0, "dots": 1, "attention": 1, "full": 1}
#: forward passes' worth of operations in a backward pass: inputs' gradients, and weights' where they are trained
BACKWARD_INPUT, BACKWARD_WEIGHT = 1, 1


class Cost(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, number: float) -> Cost:
        return Cost(self.flops * number, self.bytes * number)

    def bound(self, device: Device, dtype: str) -> str:
        """What it waits for: "operations" or "bandwidth"."""
        return "operations" if self.flops / device.flops[dtype] >= self.bytes / device.bandwidth else "bandwidth"


def roofline(cost: Cost, device: Device, dtype: str) -> float:
    """Seconds on one device below which nothing can come."""
    return max(cost.flops / device.flops[dtype], cost.bytes / device.bandwidth)


def adapter_weights(model: Model) -> int:
    """Numbers of what is trained: the adapter, or the whole decoder."""
    return sum(value.size for value in split(model).trained.values())


def encode(model: Model, images: float) -> Cost:
    """Images through the SigLIP tower and its projector."""
    return Cost(float(images * siglip_flops(model.config)), 0.0)


def forward(model: Model, layout: Layout, rows: float, *, head: bool) -> Cost:
    """Rows of this layout through the decoder; with `head`, log-probabilities of their continuation tokens."""
    config = model.config.decoder
    weights = layer_weights(config) + (adapter_weights(model) if model.lora is not None else 0)
    flops = 2 * weights * layout.row + _attention(config, layout)
    read = layer_weights(config) * _item(model)
    if head:
        flops += 2 * head_weights(config) * layout.group * layout.completion
        read += head_weights(config) * _item(model)
    return Cost(rows * flops, read)


def gradients(model: Model, update: Update, rows: float) -> Cost:
    """One micro-batch of `rows` rows, forward and backward. An output matrix that is frozen, beside an adapter, runs
    once forward and once for the gradient of its input; one that is trained runs forward twice."""
    config, layout = model.config.decoder, update.layout
    again, adapted = FORWARD_AGAIN[model.remat], model.lora is not None
    frozen = layer_weights(config) if adapted else 0
    trained = adapter_weights(model) if adapted else layer_weights(config)
    passes = 1 + again + BACKWARD_INPUT
    head = 1 + BACKWARD_INPUT + (0 if adapted else 1 + BACKWARD_WEIGHT)
    flops = layout.row * (2 * frozen * passes + 2 * trained * (passes + BACKWARD_WEIGHT))
    flops += _attention(config, layout) * (1 + ATTENTION_AGAIN[model.remat] + BACKWARD_INPUT + BACKWARD_WEIGHT)
    flops += 2 * head_weights(config) * layout.group * layout.completion * head
    read = ((frozen or trained) * passes + head_weights(config) * head) * _item(model)
    return Cost(rows * flops, read)


def rollout(model: Model, sampled: Sampled, generator: Generator, *, rows: float, length: float) -> tuple[Cost, Cost]:
    """(prefill, decode) of one batch of `rows` prompts on one device, completions of `length` tokens.

    A token of decoding reads all weights, the prompts' caches once each, and each completion's own cache in the
    length that it is allocated in then.
    """
    config, item, kv = model.config.decoder, _item(model), cache_bytes(model)
    weights = layer_weights(config) + head_weights(config)
    live = rows * sampled.group
    prefill = forward(base_of(model), Layout(sampled.prompt, 0, 0), rows, head=False)
    lengths = sorted({shape.length for shape in generator.shapes})
    own = sum(next(room for room in lengths if room > step) for step in range(int(length)))
    keys = length * sampled.prompt + own  # seen by each completion, summed over its tokens
    pairs = 4 * len(config.layers) * config.heads * config.head_dim * keys
    logits = 2 * 4 * config.vocab * live  # written and read once, float32
    decode = Cost(
        live * (2 * weights * length + pairs),
        length * (weights * item + logits) + rows * length * sampled.prompt * kv + live * own * kv,
    )
    return prefill, decode


def _attention(config: DecoderConfig, layout: Layout) -> int:
    """Scores and weighted values of one row in all layers."""
    prompt, group, completion = layout
    pairs = prompt**2 + group * completion * (prompt + completion)
    return 4 * len(config.layers) * config.heads * config.head_dim * pairs


def _item(model: Model) -> int:
    return jnp.dtype(model.dtype).itemsize
