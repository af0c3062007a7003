"""The tiny bases by family: tokenizer, chat template, processor and config, each as the family's own checkpoints have it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tiny_bases import films, ward
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3Processor,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlmalign.types import Layout

VOCAB = 1024
SOFT_TOKENS = 16  #: of a film

GEMMA_IMAGE = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *GEMMA_IMAGE.values()]
LLAMA_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>",
]  # fmt: skip
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_IMAGE = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

#: system text joins the first user turn, an image part becomes the begin-of-image token
GEMMA = """{{ bos_token }}\
{%- set system = namespace(text='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system.text = (messages[0]['content'] if messages[0]['content'] is string \
else messages[0]['content'][0]['text']) + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant/user/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{%- if loop.first -%}{{ system.text }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
{%- else -%}{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

#: headers, contents trimmed, nothing after the stop token
LLAMA = """{{ bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

#: a default system turn, contents as they are or by part, a line break after each turn
QWEN = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

#: how Llama 3 and Qwen2.5 cut text into words; of digits, Llama 3 keeps up to three together
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(texts: list[str], special: list[str], *, words: str | None = None) -> Tokenizer:
    """Byte-level BPE within words (None: as GPT-2 cuts them); the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    if words is not None:
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- Gemma 3


def _gemma_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts, GEMMA_TOKENS),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=GEMMA_IMAGE,
        chat_template=GEMMA,
        clean_up_tokenization_spaces=False,
    )


def _gemma_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """MedGemma's shape in small: three local layers and a global one, grouped-query attention, pooled patches."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_IMAGE.items()}
    return Gemma3Config(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
            "sliding_window": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "max_position_embeddings": 1024,
        },
        vision_config={
            "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": films.SIDE, "patch_size": 8, "vision_use_head": False,
        },
        mm_tokens_per_image=SOFT_TOKENS,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        architectures=["Gemma3ForConditionalGeneration"],
        dtype="bfloat16",
    )  # fmt: skip


def _gemma_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    images = Gemma3ImageProcessorPil(size={"height": films.SIDE, "width": films.SIDE})
    Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=SOFT_TOKENS).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ Llama 3, Qwen2.5


def _plain_tokenizer(texts: list[str], special: list[str], template: str, digits: int) -> PreTrainedTokenizerFast:
    """The first special token is both the padding and, of Llama 3, the beginning of a text; the third ends a turn."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts, special, words=WORDS % digits),
        bos_token=special[0] if special is LLAMA_TOKENS else None,
        pad_token=special[1] if special is LLAMA_TOKENS else special[0],
        eos_token=special[2],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


#: four layers, 128 wide
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """OpenBioLLM-8B's shape in small: an untied head, grouped-query attention, no biases."""
    return LlamaConfig(
        **DECODER,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    )


def _qwen_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Qwen2.5's shape in small: a tied head, biases on queries, keys and values."""
    return Qwen2Config(
        **DECODER,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen2ForCausalLM"],
    )


def _qwen_vl_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Qwen2.5-VL-3B's shape in small: M-RoPE, one block of the tower within windows, two over the whole film."""
    ids = {
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={
            **DECODER, "intermediate_size": 320, "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 128, "window_size": 32, "fullatt_block_indexes": [1, 2],
        },
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )  # fmt: skip


def _text_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(folder)


def _qwen_vl_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(folder)
    # A film of any shape becomes about as many soft tokens as a square one.
    Qwen2VLImageProcessorPil(patch_size=8, min_pixels=films.SIDE**2, max_pixels=films.SIDE**2).save_pretrained(folder)


class TinyBase(NamedTuple):
    """What a tiny base is made of."""

    material: ModuleType  #: what it is taught: `films` or `ward`
    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]
    config: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    write: Callable[[Path, PreTrainedTokenizerFast], None]  #: tokenizer, template and processor into a folder
    stops: tuple[str, ...]  #: generation_config.json's
    steps: int  #: of its training
    repeat: int  #: steps until the same films come again
    system: int = 0  #: tokens of the system turn that the template writes before a question

    def layout(self, task: str) -> Layout:
        found = self.material.LAYOUTS[task]
        return found._replace(prompt=found.prompt + self.system)

    def write_text_side(self, folder: Path, seed: int) -> PreTrainedConfig:
        """Everything of the checkpoint but its weights and config.json; returns the config."""
        tokenizer = self.tokenizer(self.material.words(seed))
        self.write(folder, tokenizer)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.convert_tokens_to_ids(stop) for stop in self.stops],
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)
        return self.config(tokenizer)


_llama = functools.partial(_plain_tokenizer, special=LLAMA_TOKENS, template=LLAMA, digits=3)
_qwen = functools.partial(_plain_tokenizer, special=QWEN_TOKENS, template=QWEN, digits=1)
_QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")


def _qwen_vl(texts: list[str]) -> PreTrainedTokenizerFast:
    texts = texts + 200 * ["system\n", "assistant\n", "You are a helpful assistant."]
    return _plain_tokenizer(texts, [*QWEN_TOKENS, *QWEN_IMAGE], QWEN, 1)


TINY_BASES = {
    "gemma3": TinyBase(films, _gemma_tokenizer, _gemma_config, _gemma_folder, ("<eos>", "<end_of_turn>"), 1600, 800),
    "qwen2_5_vl": TinyBase(films, _qwen_vl, _qwen_vl_config, _qwen_vl_folder, _QWEN_STOPS, 600, 300, 16),
    "llama": TinyBase(
        ward, _llama, _llama_config, _text_folder, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), 700, 700
    ),
    "qwen2_5": TinyBase(ward, _qwen, _qwen_config, _text_folder, _QWEN_STOPS, 700, 700, 16),
}
