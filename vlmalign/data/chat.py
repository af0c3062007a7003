"""Conversations -> segments of tokens through the checkpoint's own chat template.

A conversation is cut at its assistant turns and the pieces are tokenised apart: the prompt's tokens are then the very
ones a rollout starts from, whatever the answer begins with. Assistant text and the stop token that ends the turn carry
weight 1; everything else carries 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmalign.types import Group, Segment

#: one message: {"role": ..., "content": text or [{"type": "text", "text": ...} | {"type": "image", "image": key}]}
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ImageText:
    """How an image is written: the template's `placeholder` becomes `expansion`, which holds `count` soft tokens."""

    placeholder: str
    expansion: str
    soft_id: int
    count: int


def gemma3_image_text(tokenizer: PreTrainedTokenizerBase, count: int) -> ImageText:
    """Gemma 3: begin, `count` soft tokens, end, set off by blank lines."""
    begin, soft, end = (tokenizer.special_tokens_map[k] for k in ("boi_token", "image_token", "eoi_token"))
    return ImageText(
        placeholder=begin,
        expansion=f"\n\n{begin}{soft * count}{end}\n\n",
        soft_id=tokenizer.convert_tokens_to_ids(soft),
        count=count,
    )


#: family -> how it writes images
IMAGE_TEXT: dict[str, Callable[[PreTrainedTokenizerBase, int], ImageText]] = {"gemma3": gemma3_image_text}


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer, template, image rule and stop ids."""

    tokenizer: PreTrainedTokenizerBase
    image_text: ImageText | None
    stop_ids: tuple[int, ...]

    def prompt(self, messages: Sequence[Message], *, group_id: int = 0) -> Group:
        """The conversation so far with the header of the next assistant turn, as a group without continuations."""
        text = self._render(messages, continues=True)
        images = _image_keys(messages)
        segment, used = self._segment(text, weight=0.0, first_image=0, images=images)
        self._check_images(used, images)
        return Group(group_id, segment, (), _distinct(images))

    def example(self, messages: Sequence[Message], *, group_id: int = 0) -> Group:
        """A whole conversation: prompt up to the first assistant turn, one continuation with the rest.

        Raises:
            ValueError: when no assistant turn is there, when the template rewrites earlier turns as later ones come
                (no prefix is stable then), or when a turn does not end in a stop token.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError(
                "a training example needs an assistant turn, found " + ", ".join(m["role"] for m in messages)
            )
        whole = self._render(messages, continues=False)
        cuts = []
        for i in turns:
            before = self._render(messages[:i], continues=True)
            after = self._render(messages[: i + 1], continues=False)
            if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template changes earlier text when turn {i} is added; turns cannot be masked"
                )
            cuts.append((len(before), len(after)))
        images = _image_keys(messages)
        prompt, used = self._segment(whole[: cuts[0][0]], weight=0.0, first_image=0, images=images)
        pieces: list[Segment] = []
        at = cuts[0][0]
        for start, end in cuts:
            if start > at:
                piece, used = self._segment(whole[at:start], weight=0.0, first_image=used, images=images)
                pieces.append(piece)
            piece, used = self._segment(whole[start:end], weight=1.0, first_image=used, images=images)
            pieces.append(self._end_at_stop(piece))
            # What the template writes after the stop token (a line break) opens the next turn, if there is one.
            pieces.append(_slice(piece, len(pieces[-1]), weight=0.0))
            at = end
        self._check_images(used, images)
        last = max(i for i, piece in enumerate(pieces) if piece.weight.any())
        return Group(group_id, prompt, (_join(pieces[: last + 1]),), _distinct(images))

    def decode(self, tokens: np.ndarray) -> str:
        """Text of a completion without its stop token and other special tokens."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def _render(self, messages: Sequence[Message], *, continues: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=continues)

    def _segment(self, text: str, *, weight: float, first_image: int, images: Sequence[str]) -> tuple[Segment, int]:
        """Tokens of a piece of rendered text, and the number of image occurrences seen so far."""
        rule, count = self.image_text, 0
        if rule is not None:
            count = text.count(rule.placeholder)
            text = text.replace(rule.placeholder, rule.expansion)
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        image = np.full(tokens.shape, -1, np.int32)
        if rule is not None:
            distinct = _distinct(images)
            soft = np.flatnonzero(tokens == rule.soft_id)
            if len(soft) != count * rule.count or first_image + count > len(images):
                raise ValueError(
                    f"{count} images need {count * rule.count} soft tokens and {len(images)} were given; "
                    f"the text holds {len(soft)} soft tokens"
                )
            for i in range(count):
                key = images[first_image + i]
                image[soft[i * rule.count : (i + 1) * rule.count]] = distinct.index(key)
        # A soft token is never a label, whoever shows the image.
        weights = np.where(image >= 0, 0.0, weight).astype(np.float32)
        return Segment(tokens, image, weights), first_image + count

    def _end_at_stop(self, piece: Segment) -> Segment:
        stops = np.flatnonzero(np.isin(piece.tokens, self.stop_ids))
        if len(stops) == 0:
            raise ValueError("an assistant turn renders without a stop token: the model would never learn to stop")
        return Segment(*(x[: stops[-1] + 1] for x in (piece.tokens, piece.image, piece.weight)))

    def _check_images(self, used: int, images: Sequence[str]) -> None:
        if used != len(images):
            raise ValueError(f"the conversation holds {len(images)} images, its rendered text places for {used}")


def _image_keys(messages: Sequence[Message]) -> list[str]:
    return [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _distinct(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(keys))


def _slice(piece: Segment, start: int, *, weight: float) -> Segment:
    tokens = piece.tokens[start:]
    return Segment(tokens, piece.image[start:], np.full(tokens.shape, weight, np.float32))


def _join(pieces: Sequence[Segment]) -> Segment:
    return Segment(*(np.concatenate([getattr(p, name) for p in pieces]) for name in ("tokens", "image", "weight")))


def read_stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: generation_config.json's eos_token_id (one or several) and the tokenizer's own.

    Raises:
        ValueError: when neither names one.
    """
    ids: set[int] = set()
    path = folder / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(f"{folder}: neither generation_config.json nor the tokenizer names a stop token")
    return tuple(sorted(ids))


def open_chat(folder: Path, *, family: str, image_tokens: int | None) -> Chat:
    """The chat side of a checkpoint folder; `image_tokens` is the number of soft tokens per image (None: text only).

    Raises:
        ValueError: when the folder has no chat template, or is a vision model of a family without an image rule.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template (chat_template.jinja or in tokenizer_config.json)")
    image_text = None
    if image_tokens is not None:
        if family not in IMAGE_TEXT:
            raise ValueError(f"no image rule for family {family!r}; known: {', '.join(IMAGE_TEXT)}")
        image_text = IMAGE_TEXT[family](tokenizer, image_tokens)
    return Chat(tokenizer, image_text, read_stop_ids(folder, tokenizer))
