"""Small tokenizers with the families' own chat formats and image processors, in folders as checkpoints have them.

The templates are written anew; what they write is what the families' own templates write. In them a comment
`{#- generation -#}` ... `{#- endgeneration -#}` stands around an answer with its stop token: `family_folder(marked=True)`
makes it the marker of that name.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

SOFT_TOKENS = 4
SIDE = 16  #: pixels
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}

#: Gemma 3's own: the first system message joins the first user turn, contents are trimmed
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


#: text that merges are learnt from; runs of line breaks merge, as they do in the families' own tokenizers
CORPUS = ["user\nmodel\nIs the heart enlarged? Yes, the heart is large. No effusion is seen.\n\n"] * 20 + ["\n\n"] * 40


#: how Llama 3 and Qwen2.5 split text into words: line breaks stay together
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(special: list[str], *, words: str | None = None) -> Tokenizer:
    """Byte-level BPE within words (None: as GPT-2 splits them); the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    if words is not None:
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@functools.cache
def processor() -> Gemma3Processor:
    """transformers' own processor over the same tokenizer."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level([*SPECIAL, *IMAGE.values()]),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=IMAGE,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(images, fast, chat_template=TEMPLATE, image_seq_length=SOFT_TOKENS)


def new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vlmalign-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def chat_folder() -> Path:
    """Gemma-like: tokenizer, template, processor settings and generation settings, as a checkpoint has them."""
    folder = new_folder()
    processor().save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 5], pad_token_id=0).save_pretrained(folder)
    return folder


class TinyFamily(NamedTuple):
    """What `family_folder` writes."""

    template: str
    special: list[str]
    bos: str | None  #: the tokenizer adds it to every text it is given without being told not to
    eos: str  #: the tokenizer's
    stops: list[str]  #: generation_config.json's


#: Gemma 3's contents by part, in markers where an answer stands
GEMMA3 = """{{ bos_token }}
{%- set offset = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages[offset:] -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
    {%- set words = namespace(text='') -%}
    {%- for part in parts -%}
        {%- set words.text = words.text + ('<start_of_image>' if part['type'] == 'image' else part['text'] | trim) -%}
    {%- endfor -%}
    {%- if message['role'] == 'assistant' -%}
        {{ '<start_of_turn>model\n' }}
        {#- generation -#}{{ words.text + '<end_of_turn>' }}{#- endgeneration -#}
    {%- else -%}
        {{ '<start_of_turn>' + message['role'] + '\n' }}
        {%- if loop.first and offset -%}
            {%- set first = messages[0]['content'] -%}
            {{ (first if first is string else first[0]['text']) + '\n\n' }}
        {%- endif -%}
        {{ words.text + '<end_of_turn>' }}
    {%- endif -%}
    {{ '\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"""

#: Llama 3: headers, contents trimmed, nothing after the stop token
LLAMA3 = """{{ bos_token }}
{%- for message in messages -%}
    {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' -%}
        {#- generation -#}{{ message['content'] | trim + '<|eot_id|>' }}{#- endgeneration -#}
    {%- else -%}
        {{ message['content'] | trim + '<|eot_id|>' }}
    {%- endif -%}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"""

#: Llama 3.1: always a system turn, which begins with two dates
LLAMA31 = LLAMA3.replace(
    "{%- for message in messages -%}",
    """{%- set given = messages[0]['role'] == 'system' -%}
{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\n\n' }}
{{- (messages[0]['content'] | trim if given else '') + '<|eot_id|>' }}
{%- for message in (messages[1:] if given else messages) -%}""",
)

#: Qwen2.5: a default system turn, contents as they are, a line break after each turn
QWEN2_5 = """{%- if messages[0]['role'] != 'system' -%}
    {{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{ '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' -%}
        {#- generation -#}{{ message['content'] + '<|im_end|>' }}{#- endgeneration -#}
    {%- else -%}
        {{ message['content'] + '<|im_end|>' }}
    {%- endif -%}
    {{ '\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

#: Qwen2.5-VL: another default, contents by part
QWEN2_5_VL = """{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif -%}
    {%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
    {%- set words = namespace(text='') -%}
    {%- for part in parts -%}
        {%- set shown = '<|vision_start|><|image_pad|><|vision_end|>' -%}
        {%- set words.text = words.text + (shown if part['type'] == 'image' else part['text']) -%}
    {%- endfor -%}
    {{ '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' -%}
        {#- generation -#}{{ words.text + '<|im_end|>' }}{#- endgeneration -#}
    {%- else -%}
        {{ words.text + '<|im_end|>' }}
    {%- endif -%}
    {{ '\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

_LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"]
_LLAMA_TOKENS += ["<|end_header_id|>"]
_LLAMA = (_LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
_QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_QWEN = (_QWEN_TOKENS, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"])

FAMILIES = {
    "gemma3": TinyFamily(GEMMA3, [*SPECIAL, *IMAGE.values()], "<bos>", "<eos>", ["<eos>", "<end_of_turn>"]),
    "llama3": TinyFamily(LLAMA3, *_LLAMA),
    "llama3.1": TinyFamily(LLAMA31, *_LLAMA),
    "qwen2.5": TinyFamily(QWEN2_5, *_QWEN),
    "qwen2_5_vl": TinyFamily(QWEN2_5_VL, *_QWEN),
}

#: pixels of a film in `family_folder("qwen2_5_vl")`: at least 4 soft tokens of 28 x 28, at most 24
LEAST, MOST = 4 * 28**2, 24 * 28**2


@functools.cache
def family_folder(name: str, *, marked: bool = False) -> Path:
    """A folder with one of FAMILIES; `marked` puts generation markers around answers."""
    family, folder = FAMILIES[name], new_folder()
    tokenizer = byte_level(family.special, words=WORDS)
    if family.bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    template = family.template
    if marked:
        for word in ("generation", "endgeneration"):
            template = template.replace(f"{{#- {word} -#}}", f"{{%- {word} -%}}")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.special[0],
        extra_special_tokens=IMAGE if name == "gemma3" else {},
        chat_template=template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    stops = [tokenizer.token_to_id(token) for token in family.stops]
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    if name == "qwen2_5_vl":
        Qwen2VLImageProcessorPil(min_pixels=LEAST, max_pixels=MOST).save_pretrained(folder)
    return folder
