"""A loaded model: conversations into groups, and what the model computes of them. Never changed in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vlmalign.data.chat.chat import Chat, Message
from vlmalign.evaluation.scoring import ContinuationScores, score_groups
from vlmalign.models.model import Model, Params
from vlmalign.randomness import key_for
from vlmalign.rollout.compaction import MOST_PROGRAMS
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Watch
from vlmalign.shapes import Array
from vlmalign.training.merged import merge_program
from vlmalign.types import Group, Segment
from vlmalign.weights.adapter import save_adapter
from vlmalign.weights.whole import export_whole

#: completions at once whose caches cost nothing beside the weights that a token reads: growing them step by step would
#: only be more programs to compile
FEW = 8


class Answer(NamedTuple):
    """One sampled completion. What ended it, a stop token, is among the tokens and not in the text."""

    text: str
    tokens: np.ndarray  #: [length] int32
    logp: np.ndarray  #: [length] float32: natural logarithms, over the whole vocabulary at the sampling temperature
    stopped: bool  #: False: cut off at `max_tokens`


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A checkpoint with its tokenizer, on JAX's default device; made by `load` and by `train`."""

    folder: Path  #: of the checkpoint
    model: Model  #: configuration, dtype and adapter settings; holds no weights
    frozen: Mapping[str, Array]  #: parameters of the checkpoint, by the names of its files
    trained: Mapping[str, Array]  #: parameters in their place or beside them: an adapter's, or the whole decoder's
    chat: Chat
    features: FeatureStore | None  #: encodes images, each once; None for a text model

    def __repr__(self) -> str:
        lora = self.model.lora
        adapter = "" if lora is None else f", adapter of rank {lora.rank}"
        return f"<LoadedModel {self.folder} ({self.model.config.family}, {self.model.dtype}{adapter})>"

    @property
    def params(self) -> dict[str, Array]:
        """All parameters that `model` computes with, in its dtypes."""
        shapes = self.model.shapes
        return {**self.frozen, **{name: value.astype(shapes[name].dtype) for name, value in self.trained.items()}}

    def prompt(self, messages: Sequence[Message]) -> Group:
        """The conversation as the chat template writes it, up to where the next answer begins; no continuations.

        Raises:
            ValueError: when the template refuses the conversation, or an image has no place in it.
        """
        return self.chat.prompt(messages)

    def group(
        self,
        messages: Sequence[Message],
        answers: Sequence[str | Answer],
        *,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> Group:
        """The conversation with its possible next answers: one prompt, a continuation for each of them.

        An answer given as text is written by the chat template and ends with its stop token; a sampled one keeps its
        tokens. Each answer's tokens weigh `weights[k]` in a loss (by default 1; numbers below 0 are allowed).

        Raises:
            ValueError: as `prompt`; when there is not one weight for every answer.
        """
        weights = [1.0] * len(answers) if weights is None else weights
        if len(weights) != len(answers):
            raise ValueError(f"weights must be one number for each of the {len(answers)} answers, found {len(weights)}")
        prompt = self.prompt(messages)
        return replace(
            prompt,
            continuations=tuple(
                self._continuation(messages, answer, weight) for answer, weight in zip(answers, weights, strict=True)
            ),
        )

    def _continuation(self, messages: Sequence[Message], answer: str | Answer, weight: float) -> Segment:
        if isinstance(answer, Answer):
            size = len(answer.tokens)
            return Segment(answer.tokens, np.full(size, -1, np.int32), np.full(size, weight, np.float32))
        # Earlier answers are context: the prompt ends where the last one begins.
        context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in messages]
        (own,) = self.chat.example([*context, {"role": "assistant", "content": answer}]).continuations
        return replace(own, weight=(own.weight * weight).astype(np.float32))

    def score(self, groups: Sequence[Group], *, batch_tokens: int = 8192) -> list[list[ContinuationScores]]:
        """Log-probabilities of every token of every group's continuations; each prompt is computed once.

        At most `batch_tokens` tokens run at once, padding included; a longer group runs alone. Memory grows with it.
        """
        return score_groups(self.model, self.params, groups, features=self.features, budget=batch_tokens)

    def sample(
        self,
        prompts: Sequence[Group],
        *,
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        rows: int = 16,
        watch: Watch | None = None,
    ) -> list[list[Answer]]:
        """`n` answers to every prompt, each of which is computed once.

        Draws follow from `seed`, the prompt's place in `prompts` and the sample's number, whatever runs beside them.

        Args:
            prompts: groups; their continuations are not looked at.
            n: answers to a prompt.
            max_tokens: longest answer.
            temperature: 0 takes the most likely token at every place.
            top_p: share of the probability that the tokens drawn from have together, in (0, 1].
            top_k: how many tokens are drawn from; 0: all.
            min_p: probability, as a share of the most likely token's, below which a token is not drawn.
            seed: a whole number.
            rows: prompts that are decoded at once; memory grows with `rows` x `n` x `max_tokens`.
            watch: called as `watch(prompt, sample, tokens)` after every block of decoding (at most 16 tokens) with the
                tokens so far of each answer that it went on with.

        Raises:
            ValueError: for a number out of range.
        """
        if n < 1 or max_tokens < 1 or rows < 1:
            raise ValueError(f"n, max_tokens and rows must be >= 1, found {n}, {max_tokens} and {rows}")
        rows = min(rows, max(1, len(prompts)))
        generator = Generator(
            model=self.model.without_lora(),
            features=self.features,
            stop_ids=self.chat.stop_ids,
            rows=rows,
            group=n,
            completion=max_tokens,
            sampling=Sampling(temperature, top_p, top_k, min_p, self.chat.never_drawn(self.model.config.decoder.vocab)),
            images=max((len(prompt.images) for prompt in prompts), default=0),
            programs=1 if rows * n <= FEW else MOST_PROGRAMS,
        )
        numbered = [replace(prompt, id=number, continuations=()) for number, prompt in enumerate(prompts)]
        found = generator.run(self._policy, numbered, key_for(seed, 0, "rollout"), watch=watch)
        return [[Answer(self.chat.decode(c.tokens), c.tokens, c.logp, c.stopped) for c in own] for own in found]

    @cached_property
    def _policy(self) -> Params:
        """What is sampled from: the adapter merged into a copy of the matrices that it is on."""
        return _merger(self.model)(self.frozen, self.trained) if self.trained else self.frozen

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a PEFT folder of the adapter; of a decoder trained whole, a checkpoint folder like the one loaded.

        Raises:
            ValueError: when `folder` is not empty, or nothing was trained.
        """
        if not self.trained:
            raise ValueError(f"nothing was trained here, and the checkpoint is in {self.folder} already")
        if self.model.lora is None:
            export_whole(Path(folder), self.folder, self.model, self.trained)
        else:
            save_adapter(Path(folder), self.trained, self.model, base=str(self.folder))

    def with_trained(self, trained: Mapping[str, Array]) -> LoadedModel:
        """The same model with other trained parameters; those it was frozen with are shared."""
        return replace(self, trained=trained, frozen={n: v for n, v in self.frozen.items() if n not in trained})


@cache
def _merger(model: Model) -> Callable[[Params, Params], dict[str, Array]]:
    """One program for a model's every state."""
    return merge_program(model, None, None)


def copied(params: Mapping[str, Array]) -> dict[str, Array]:
    """In buffers of their own and in float32: training gives those that it starts from back as it goes."""
    return {name: jnp.array(value, jnp.float32) for name, value in params.items()}
