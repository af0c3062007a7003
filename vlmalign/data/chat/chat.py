"""Conversations -> segments of tokens through the checkpoint's own chat template.

A conversation is cut at its answers and the pieces are tokenised apart: the tokens before an answer are then the very
ones a rollout starts from, whatever the answer begins with. Assistant text and the stop token that ends the turn are
labels (they carry the turn's weight); everything else carries 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmalign.data.chat.image_text import IMAGE_TEXT, ImageText
from vlmalign.data.chat.messages import ControlTokens, Message, check_messages, for_template, image_keys, label_weight
from vlmalign.data.chat.template import Template, check_template
from vlmalign.data.chat.turns import write
from vlmalign.data.films.images import BadImage
from vlmalign.data.sources.json_lines import parse
from vlmalign.quoting import MOST_OF_LINE, quoted, shown
from vlmalign.types import Group, Segment

__all__ = ["Chat", "Message", "open_chat", "open_tokenizer", "read_stop_ids"]


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer, template, image rule and stop ids; `image_tokens(key)` counts an image's soft tokens."""

    tokenizer: PreTrainedTokenizerBase
    image_text: ImageText | None
    stop_ids: tuple[int, ...]
    image_tokens: Callable[[str], int] | None
    now: datetime = field(default_factory=datetime.now)  #: what a template that writes the date is told

    def prompt(self, messages: Sequence[Message], *, group_id: int = 0, name: str | None = None) -> Group:
        """The conversation so far with the header of the next answer, as a group without continuations.

        Raises:
            ValueError: as `example` does, beginning with the row's `name`.
        """
        with _naming(name):
            check_messages(messages)
            pieces = self._pieces(messages, [0.0] * len(messages), continues=True)
            return Group(group_id, _join(pieces), (), _distinct(image_keys(messages)))

    def example(self, messages: Sequence[Message], *, group_id: int = 0, name: str | None = None) -> Group:
        """A whole conversation: prompt up to the first answer with weight, one continuation with the rest.

        What follows the last answer with weight changes no loss and is left out.

        Raises:
            ValueError: beginning with the row's `name`, when no answer carries weight, when a turn is malformed or
                spells a control token, when the template refuses the conversation or its answers cannot be told
                apart (see `turns`), or when images and their places in the text do not match.
        """
        with _naming(name):
            check_messages(messages)
            weights = [label_weight(message) for message in messages]
            labelled = [i for i, weight in enumerate(weights) if weight > 0]
            if not labelled:
                known = ("system", "user", "assistant", "model", "tool")  # another may be a patient's text
                roles = ", ".join(m["role"] if m["role"] in known else "another role" for m in messages)
                raise ValueError(f"a training example needs an assistant turn with weight > 0, found {roles}")
            kept = messages[: labelled[-1] + 1]
            pieces = self._pieces(kept, weights, continues=False)
            first = next(i for i, piece in enumerate(pieces) if piece.weight.any())
            continuation = _join(pieces[first:])
            return Group(group_id, _join(pieces[:first]), (continuation,), _distinct(image_keys(kept)))

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of the beginning of an answer, to stand behind a prompt; no stop token ends it."""
        return self._ids(text, "\n")

    def never_drawn(self, vocab: int) -> tuple[tuple[int, int], ...]:
        """Ranges [first, end) of the model's `vocab` ids that no answer may hold: those that the tokenizer does not know, and
        those that stand for images."""
        known = np.zeros(vocab, bool)
        ids = np.fromiter(self.tokenizer.get_vocab().values(), int)
        known[ids[ids < vocab]] = True
        if self.image_text is not None:
            known[[id for id in self.image_text.ids if id < vocab]] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[1], known, [1]]).astype(np.int8)))
        return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))

    def decode(self, tokens: np.ndarray) -> str:
        """Text of a completion without its stop token and other special tokens."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def _pieces(self, messages: Sequence[Message], weights: Sequence[float], *, continues: bool) -> list[Segment]:
        """Context and answers in turn, each tokenised for itself; what follows the last answer only if it continues."""
        self._control.refuse(messages)
        keys = image_keys(messages)
        if keys and self.image_text is None:
            raise ValueError(f"the conversation holds {len(keys)} images, but this chat is of text only")
        turns = for_template(messages, parts=self.image_text is not None)
        text, answers = write(self._template, turns, stops=self._stops, continues=continues)
        pieces, at, used, before = [], 0, 0, ""
        for answer in answers:
            for start, end, weight in (
                (at, answer.start, 0.0),
                (answer.start, answer.stop, weights[answer.message]),
            ):
                piece, used = self._segment(text[start:end], before, weight=weight, used=used, keys=keys)
                pieces.append(piece)
                before = text[:end]
            if pieces[-1].tokens[-1] not in self.stop_ids:
                raise ValueError(
                    f"messages[{answer.message}] ends in {text[answer.words : answer.stop]!r}, which is not one token"
                )
            at = answer.stop
        if continues:
            piece, used = self._segment(text[at:], before, weight=0.0, used=used, keys=keys)
            pieces.append(piece)
        if used != len(keys):
            raise ValueError(f"the conversation holds {len(keys)} images, its rendered text places for {used}")
        return pieces

    def _segment(self, text: str, before: str, *, weight: float, used: int, keys: Sequence[str]) -> tuple[Segment, int]:
        """Tokens of a piece of rendered text that follows `before`, and the number of image occurrences up to its end
        (`used` before)."""
        rule, here, counts = self.image_text, (), []
        if rule is not None:
            first, *rest = text.split(rule.placeholder)
            here = keys[used : used + len(rest)]
            if len(here) != len(rest):
                raise ValueError(
                    f"the conversation holds {len(keys)} images, its rendered text places for {used + len(rest)}"
                )
            counts = [self._count(key) for key in here]
            text = first + "".join(rule.expansion(n) + part for n, part in zip(counts, rest, strict=True))
        tokens = np.asarray(self._ids(text, before), np.int32)
        image = np.full(tokens.shape, -1, np.int32)
        weights = np.full(tokens.shape, weight, np.float32)
        if rule is not None:
            distinct = _distinct(keys)
            for key, places in zip(here, _runs(np.flatnonzero(tokens == rule.soft_id), counts), strict=True):
                image[places] = distinct.index(key)
            # Not labels, whoever shows the image: the model cannot write one.
            weights[np.isin(tokens, rule.ids)] = 0.0
        return Segment(tokens, image, weights), used + len(here)

    def _ids(self, text: str, before: str) -> list[int]:
        """Token ids of a piece of text that follows `before`.

        Tokenizers of Llama 2's kind write a space before every text they are given, which belongs at the beginning of
        the conversation alone: later pieces are tokenised behind something that no token reaches over.
        """
        if not before or not self._writes_a_space:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        anchor = max((token for token in self._control.tokens if before.endswith(token)), key=len, default="\n")
        first, both = (self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in (anchor, anchor + text))
        if both[: len(first)] != first:
            raise ValueError(f"the tokenizer joins {anchor!r} with what follows it; answers cannot be cut out here")
        return both[len(first) :]

    def _count(self, key: str) -> int:
        assert self.image_tokens is not None
        count = self.image_tokens(key)
        if count < 1:
            raise ValueError(f"image {key} has {count} soft tokens; it needs at least one")
        return count

    @cached_property
    def _template(self) -> Template:
        try:
            source = self.tokenizer.get_chat_template()
            check_template(source)
            return Template(source, self.tokenizer.special_tokens_map, self.now)
        except TemplateError as error:
            raise ValueError(f"the chat template is no Jinja template that can be read: {error}") from error

    @cached_property
    def _stops(self) -> list[str]:
        known = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        return [token for token in known if token is not None]

    @cached_property
    def _writes_a_space(self) -> bool:
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        # SentencePiece's mark of a space.
        return "".join(self.tokenizer.convert_ids_to_tokens(ids)).startswith("\u2581")

    @cached_property
    def _control(self) -> ControlTokens:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {*self._stops, *self.tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
        if self.image_text is not None:
            tokens |= set(self.tokenizer.convert_ids_to_tokens(list(self.image_text.ids)))
        return ControlTokens(tokens)


def _runs(soft: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """The places of soft tokens, cut into one contiguous run per image."""
    if len(soft) != sum(counts):
        raise ValueError(f"{len(counts)} images need {sum(counts)} soft tokens; the text holds {len(soft)}")
    runs = np.split(soft, np.cumsum(counts)[:-1]) if counts else []
    if any(run[-1] - run[0] != len(run) - 1 for run in runs):
        raise ValueError("the soft tokens of an image are not in one run; the tokenizer does not fit the family")
    return runs


def _distinct(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(keys))


def _join(pieces: Sequence[Segment]) -> Segment:
    return Segment(*(np.concatenate([getattr(p, name) for p in pieces]) for name in ("tokens", "image", "weight")))


@contextmanager
def _naming(name: str | None) -> Iterator[None]:
    """Puts the row's name before what is said about it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if name is None:
            raise
        kind = BadImage if isinstance(error, BadImage) else ValueError
        raise kind(f"{name}: {error}") from error


def read_stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: generation_config.json's eos_token_id (one or several) and the tokenizer's own.

    Raises:
        ValueError: when neither names one.
    """
    ids: set[int] = set()
    path = folder / "generation_config.json"
    if path.exists():
        eos = _settings(path).get("eos_token_id")
        found = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(id) is int for id in found):
            raise ValueError(f"{path}: eos_token_id must be the id of a token or a list of ids, found {quoted(eos)}")
        ids.update(found)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(f"{folder}: neither generation_config.json nor the tokenizer names a stop token")
    return tuple(sorted(ids))


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; ValueError naming the folder where its files cannot be used."""
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found.decode(found("a")["input_ids"])  # settings of another kind show only where they are used
        return found
    except Exception as error:  # of whatever type: libraries take the files for what they have written
        why = f"{type(error).__name__}: {shown(' '.join(str(error).split()), MOST_OF_LINE)}"
        raise ValueError(
            f"{folder}: the tokenizer cannot be opened ({why}); copy its files from the original"
        ) from error


def open_chat(
    folder: Path, *, family: str, image_tokens: Callable[[str], int] | None, vocab: int | None = None,
    now: datetime | None = None,
) -> Chat:  # fmt: skip
    """The chat side of a checkpoint folder.

    `image_tokens(key)` is the number of soft tokens of an image (None: text only); `vocab` the number of rows of the
    model's embedding, if the tokenizer is to be checked against it; `now` the time that the template is told (None: that of
    this call).

    Raises:
        ValueError: when the folder has no chat template, is a vision model of a family without an image rule, or has
            a tokenizer that writes tokens which the model does not have.
    """
    tokenizer = open_tokenizer(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(folder)
    if vocab is not None:
        _check_vocab(folder, tokenizer, vocab)
    image_text = None
    if image_tokens is not None:
        if family not in IMAGE_TEXT:
            raise ValueError(f"no image rule for family {family!r}; known: {', '.join(IMAGE_TEXT)}")
        image_text = IMAGE_TEXT[family](tokenizer)
    return Chat(tokenizer, image_text, read_stop_ids(folder, tokenizer), image_tokens, now or datetime.now())


def _settings(path: Path) -> dict[str, Any]:
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _processor_template(folder: Path) -> str:
    """The template of a vision model's processor, which older folders keep in a file that tokenizers do not read."""
    path = folder / "chat_template.json"
    template = _settings(path).get("chat_template") if path.exists() else None
    if template and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template must be text, found {type(template).__name__}")
    if not template:
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json); "
            "a base model has none: copy that of the model whose format you want"
        )
    return template


def _check_vocab(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Embeddings are often larger than the tokenizer, never smaller; only soft tokens need no row of their own."""
    soft = tokenizer.special_tokens_map.get("image_token")
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= vocab and token != soft)
    if beyond:
        named = ", ".join(f"{token!r} ({id})" for id, token in beyond[:5]) + (", ..." if len(beyond) > 5 else "")
        raise ValueError(
            f"{folder}: the tokenizer has {len(beyond)} tokens that the model's embedding of {vocab} rows has not: "
            f"{named}; use the tokenizer that the checkpoint came with, or resize the embedding before training"
        )
