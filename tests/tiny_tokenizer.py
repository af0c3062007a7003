"""A Gemma-like tokenizer, chat template and image processor in a folder, written by tokenizers and transformers."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ImageProcessorPil, Gemma3Processor, GenerationConfig, PreTrainedTokenizerFast

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


@functools.cache
def processor() -> Gemma3Processor:
    """transformers' own processor over the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["user\nmodel\nIs the heart enlarged? Yes, the heart is large. No effusion is seen.\n\n"] * 20,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=[*SPECIAL, *IMAGE.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
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


@functools.cache
def chat_folder() -> Path:
    """Tokenizer, template, processor settings and generation settings, as a checkpoint has them."""
    folder = Path(tempfile.mkdtemp(prefix="vlmalign-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    processor().save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 5], pad_token_id=0).save_pretrained(folder)
    return folder
