"""What both sides of a benchmark share: sizes, random checkpoints that `transformers` writes, prompts of exact lengths.

The defaults are the shapes on which TRL and others are compared: a Gemma 3 decoder of 19 M parameters, with a tower of
4 M for images, prompts of 300 tokens, of which 256 are one 448 px image, and 64 new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

KINDS = ("text", "image")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn> ' + ('model' if message['role'] == 'assistant' else message['role']) + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<start_of_image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ ' <end_of_turn> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn> model ' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, sides in pixels."""

    vocab: int = 16_384
    embed: int = 384
    ffn: int = 1536
    layers: int = 6
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 96
    window: int = 512
    tower_embed: int = 256
    tower_ffn: int = 1024
    tower_layers: int = 4
    tower_heads: int = 4
    image: int = 448
    patch: int = 14
    soft_tokens: int = 256
    rank: int = 16
    prompt: int = 300  #: image tokens included
    completion: int = 64  #: of a sampled answer
    answer: int = 128  #: of a preference pair
    row: int = 512  #: of a supervised example


def make_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """One word, one token: lengths are exact."""
    words = [*SPECIAL, *IMAGE.values(), "user", "model", "system"]
    words += [f"w{i}" for i in range(sizes.vocab - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end_of_turn>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<eos>"], extra_special_tokens=IMAGE, padding_side="left",
        model_max_length=8192,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_checkpoint(folder: Path, kind: str, sizes: Sizes, *, seed: int) -> PreTrainedTokenizerFast | Gemma3Processor:
    """A random checkpoint of this kind in `folder`; returns the tokenizer or processor that lies beside it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(sizes)
    text = Gemma3TextConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.embed, intermediate_size=sizes.ffn, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        query_pre_attn_scalar=sizes.head_dim, sliding_window=sizes.window, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=2, eos_token_id=5, tie_word_embeddings=True,
    )  # fmt: skip
    if kind == "text":
        model, processor = Gemma3ForCausalLM(text), tokenizer
    else:
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE.items()}
        tower = SiglipVisionConfig(
            hidden_size=sizes.tower_embed, intermediate_size=sizes.tower_ffn, num_hidden_layers=sizes.tower_layers,
            num_attention_heads=sizes.tower_heads, image_size=sizes.image, patch_size=sizes.patch,
            vision_use_head=False,
        )  # fmt: skip
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text.to_dict(), vision_config=tower.to_dict(), mm_tokens_per_image=sizes.soft_tokens,
                boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"], image_token_index=ids["image_token"],
                pad_token_id=0, bos_token_id=2, eos_token_id=5, tie_word_embeddings=True,
            )
        )  # fmt: skip
        pictures = Gemma3ImageProcessorPil(size={"height": sizes.image, "width": sizes.image})
        processor = Gemma3Processor(pictures, tokenizer, chat_template=TEMPLATE, image_seq_length=sizes.soft_tokens)
    model.generation_config.update(pad_token_id=0, eos_token_id=5, bos_token_id=2)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def words(rng: np.random.Generator, count: int, sizes: Sizes) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, sizes.vocab - 64, count))


def picture(rng: np.random.Generator, sizes: Sizes) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (sizes.image, sizes.image, 3), dtype=np.uint8))


def prompt_tokens(processor: PreTrainedTokenizerFast | Gemma3Processor, kind: str, text: str, sizes: Sizes) -> int:
    """Tokens of the rendered prompt, the image's included."""
    content = [{"type": "text", "text": text}]
    if kind == "image":
        content.insert(0, {"type": "image", "image": picture(np.random.default_rng(0), sizes)})
    message = {"role": "user", "content": content if kind == "image" else text}
    found = processor.apply_chat_template([[message]], add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(found["input_ids"][0])
