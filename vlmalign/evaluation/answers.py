"""Generated answers that end at a stop string, at a stop token or at a length limit.

Stop strings are looked for on the host, between rounds of decoding of 32, 64, 128, ... tokens: an answer of one line
does not run to the limit, and a long one reads its growing prompt again only a logarithmic number of times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax
from transformers import PreTrainedTokenizerBase

from vlmalign.evaluation.scoring import plan, text_segment
from vlmalign.models.model import Model, Params
from vlmalign.rollout.completions import Completion, Generator
from vlmalign.rollout.engine import BLOCK
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Key
from vlmalign.types import Group

#: tokens decoded before stop strings are first looked for
FIRST = 32

Tokens = tuple[int, ...]


def answer(
    model: Model,
    params: Params,
    prompts: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    key: Key[jax.Array, ""],
    *,
    until: Sequence[str],
    most: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    budget: int = 8192,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The text after each prompt, up to the first of `until`, a stop token or `most` tokens.

    Special tokens end an answer when `until` names them, and are no part of the text. Greedy answers of equal prompts
    are computed once; sampled ones share one prompt and differ by their place among them, and follow from `key`.
    `budget` (tokens) and `limit` (prompts) bound what runs at once. `advance(n)` is called as answers are done.
    """
    until = [term for term in until if term]
    written: list[Tokens] = [()] * len(prompts)
    texts: dict[int, str] = {}
    turn = done = 0
    while len(texts) < len(prompts):
        room = min(FIRST << turn, max(BLOCK, 1 << (most - done - 1).bit_length()))
        waiting: dict[Tokens, list[int]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            if number not in texts:
                waiting[prompt + written[number]].append(number)
        found = _decode_round(
            model, params, waiting, jax.random.fold_in(key, turn), room=room, stop_ids=stop_ids, sampling=sampling,
            budget=budget, limit=limit,
        )  # fmt: skip
        for number, completion in found.items():
            whole = written[number] + tuple(completion.tokens.tolist())
            # A stop token beyond `most` was not written, and the answer ends there all the same.
            written[number] = whole[:-1] if completion.stopped and len(whole) <= most else whole[:most]
            cut = first_stop(written[number], until, tokenizer)
            if cut is not None or completion.stopped or len(whole) >= most:
                texts[number] = _text(written[number][:cut], until, tokenizer)
                advance(1)
        done, turn = done + room, turn + 1
    return [texts[number] for number in range(len(prompts))]


def _decode_round(
    model: Model,
    params: Params,
    waiting: Mapping[Tokens, list[int]],
    key: Key[jax.Array, ""],
    *,
    room: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    budget: int,
    limit: int | None,
) -> dict[int, Completion]:
    """At most `room` more tokens of every answer; answers that stand at the same tokens share one prompt."""
    greedy = sampling.temperature == 0
    by_count: dict[int, list[Group]] = defaultdict(list)
    for tokens, numbers in waiting.items():
        by_count[1 if greedy else len(numbers)].append(Group(numbers[0], text_segment(tokens), (), ()))
    owners = {numbers[0]: numbers for numbers in waiting.values()}
    found: dict[int, Completion] = {}
    for count, groups in by_count.items():
        for batch in plan(groups, budget=budget, limit=limit, reserve=count * room):
            generator = Generator(
                model, None, stop_ids, rows=batch.rows, group=count, completion=room, sampling=sampling,
                multiple=batch.layout.prompt,
            )  # fmt: skip
            for group, completions in zip(batch.groups, generator.run(params, batch.groups, key), strict=True):
                numbers = owners[group.id]
                found.update(zip(numbers, completions * len(numbers) if greedy else completions, strict=True))
    return found


def first_stop(tokens: Tokens, until: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The least number of leading tokens whose text, special tokens included, holds one of `until`; None: none does."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        return any(term in text for term in until)

    if not holds(len(tokens)):
        return None
    return next(count for count in range(1, len(tokens) + 1) if holds(count))


def _text(tokens: Tokens, until: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for term in until:
        text = text.split(term)[0]
    return text
