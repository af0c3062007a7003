"""The records that cross rooms: a film, a prompt with its continuations, a batch of groups, scores, loss parts.

Everything the toolkit computes on is a *group*: one prompt (text and images) with K continuations. Host-side
records hold numpy arrays; `GroupBatch` and `Scores` are pytrees (named tuples), so this module needs no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Example:
    """One case of a source as its reader found it on disk: a film, a record, a question, a row of turns."""

    id: str  #: unique within the data set (MIMIC: dicom id; CheXpert: relative path; NIH: image index)
    patient: str  #: unique within the data set; splits and bootstraps are by patient
    image: Path | None = None  #: checked to lie inside the data root; None: no film
    labels: tuple[str, ...] = ()  #: positive labels, in the order of the data set's schema
    meta: Mapping[str, Any] = field(default_factory=dict)  #: study, view, sex, age, ... or the columns of a row


class Grid(NamedTuple):
    """How the soft tokens of one image lie, in raster order: `rows` x `columns` of them."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


class Patches(NamedTuple):
    """One image cut into patches by its processor, for towers that take images of any size."""

    values: np.ndarray  #: [rows * columns, numbers] float32, in the processor's order
    rows: int  #: of patches
    columns: int


@dataclass(frozen=True)
class Segment:
    """A run of tokens: a prompt, or one continuation of it.

    `image` holds, for every token, -1 or the index into the group's images whose soft token stands here; the
    soft tokens of one occurrence of an image are contiguous. `weight` is the loss weight (0 in prompts).
    """

    tokens: np.ndarray  #: [n] int32
    image: np.ndarray  #: [n] int32
    weight: np.ndarray  #: [n] float32

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Group:
    """One prompt with its K continuations (K = 0 for a prompt that waits for its rollout)."""

    id: int  #: unique within the data set; keys for sampling are derived from it
    prompt: Segment
    continuations: tuple[Segment, ...]
    images: tuple[str, ...]  #: identity of each image, in order of first use; equal keys are encoded once


class Layout(NamedTuple):
    """The static rectangle of a batch: `prompt` columns, then `group` continuations of `completion` columns."""

    prompt: int
    group: int
    completion: int

    @property
    def row(self) -> int:
        return self.prompt + self.group * self.completion


class GroupBatch(NamedTuple):
    """N rows of one prompt segment and K continuation segments, laid end to end: T = P + K x C.

    Token t sees token s iff segment(s) is 0 or t's own, and order(s) <= order(t) or both lie in one image block,
    and, in a layer with a window, order(t) - order(s) < window.
    """

    tokens: Any  #: [N, T] int32
    segment: Any  #: [N, T] int32: 0 prompt, 1..K own continuation, -1 padding
    order: Any  #: [N, T] int32: index along the path prompt -> continuation, counted in real tokens
    position: Any  #: [N, T] or [N, T, 3] int32: rotary positions only
    image: Any  #: [N, T] int32: -1, or the row of `features` that stands for this token
    block: Any  #: [N, T] int32: -1, or which image occurrence of the row the token lies in
    weight: Any  #: [N, K, C] float32: loss weight of each continuation token (0 on padding); prompts carry none
    group_id: Any  #: [N] int32: the group a row belongs to
    features: Any = None  #: [F, d]: soft tokens of the distinct images, end to end
    pixels: Any = None  #: the distinct images as `towers.arrange` lays them out, when the tower is trained
    advantage: Any = None  #: [N, K] float32: one advantage per continuation, computed over whole groups
    truncated: Any = None  #: [N, K] bool: sampling stopped at the length limit, not at a stop token
    entropy_mask: Any = None  #: [N, K, C] bool: tokens whose policy term is kept, chosen over the whole optimiser batch

    @property
    def layout(self) -> Layout:
        _, group, completion = self.weight.shape
        return Layout(self.tokens.shape[1] - group * completion, group, completion)


class Scores(NamedTuple):
    """What an objective sees of the model, per continuation token: [N, K, C] float32, natural logarithms."""

    logp: Any  #: log-probability under the parameters being trained
    entropy: Any = None  #: entropy of the (tempered) distribution, nat
    collision: Any = None  #: log sum_v p(v)^2 of that distribution, for WPO
    values: Any = None  #: value head, for PPO
    ref_logp: Any = None  #: under the reference (adapter off, or a frozen adapter)
    old_logp: Any = None  #: under the policy at the start of this optimiser batch
    rollout_logp: Any = None  #: as recorded while sampling
    kept_logp: Any = None  #: as `rollout_logp`, over the tokens that top-p and top-k kept: what was sampled from
    old_values: Any = None  #: value head at the start of this optimiser batch, for PPO
    returns: Any = None  #: what the value head should predict, for PPO
    advantage: Any = None  #: per token, for PPO


class LossParts(NamedTuple):
    """Sums to be divided once, by counts taken over the whole optimiser batch."""

    sums: dict[str, Any]  #: part -> differentiable sum over this micro-batch
    metrics: dict[str, tuple[Any, Any]]  #: name -> (sum, count), not differentiated
    maxima: dict[str, Any] = {}  #: name -> largest value of this micro-batch, not differentiated  # noqa: RUF012
