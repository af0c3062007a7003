"""How each family writes an image into the text: what the chat template puts there, and the soft tokens that replace it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ImageText:
    """The template writes `placeholder`; in its place stand `before`, as many `soft` as the image has, `after`."""

    placeholder: str
    before: str
    soft: str
    after: str
    soft_id: int
    ids: tuple[int, ...]  #: tokens that come with images only: the soft token, and those that begin and end an image

    def expansion(self, count: int) -> str:
        """The text of an image of `count` soft tokens."""
        return f"{self.before}{self.soft * count}{self.after}"


def gemma3_image_text(tokenizer: PreTrainedTokenizerBase) -> ImageText:
    """Gemma 3: the template writes the begin token; begin, soft tokens and end are set off by blank lines."""
    begin, soft, end = (_named(tokenizer, name) for name in ("boi_token", "image_token", "eoi_token"))
    ids = tuple(_id(tokenizer, token) for token in (soft, begin, end))
    return ImageText(begin, f"\n\n{begin}", soft, f"{end}\n\n", ids[0], ids)


def qwen2_5_vl_image_text(tokenizer: PreTrainedTokenizerBase) -> ImageText:
    """Qwen2.5-VL: the template writes begin, one soft token and end; the soft token is repeated."""
    soft = "<|image_pad|>"
    ids = tuple(_id(tokenizer, token) for token in (soft, "<|vision_start|>", "<|vision_end|>"))
    return ImageText(soft, "", soft, "", ids[0], ids)


#: family -> how it writes images
IMAGE_TEXT: dict[str, Callable[[PreTrainedTokenizerBase], ImageText]] = {
    "gemma3": gemma3_image_text,
    "qwen2_5_vl": qwen2_5_vl_image_text,
}


def _named(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    token = tokenizer.special_tokens_map.get(name)
    if token is None:
        raise ValueError(f"the tokenizer names no {name}; use the tokenizer of the vision-language checkpoint")
    return token


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}; use the tokenizer of the vision-language checkpoint")
    return found
