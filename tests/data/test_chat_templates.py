"""Every family's chat format, turn by turn: the answers and their stop tokens are labels, and nothing else is."""

import json
import re
import shutil
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import FAMILIES, LEAST, MOST, family_folder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.chat.messages import for_template
from vlmalign.data.films.pixels import open_pixels
from vlmalign.types import Group

WITH_IMAGES = {"gemma3", "qwen2_5_vl"}
#: soft tokens by image key: they differ from film to film
COUNTS = {"film": 4, "other": 6}


def user(*content) -> dict:
    """A user turn; an image is written ("image", key)."""
    parts = [
        {"type": "image", "image": part[1]} if isinstance(part, tuple) else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": "user", "content": parts}


def model(text: str, **weight) -> dict:
    return {"role": "assistant", "content": text, **weight}


SYSTEM = {"role": "system", "content": "No user is seen."}
CONVERSATIONS = {
    "one turn": [user("Is the heart enlarged?"), model("Yes.")],
    "three turns": [SYSTEM, user("Is it?"), model("Yes."), user("Large?"), model("No."), user("Seen?"), model("Yes.")],
    "white space": [user(" Is it?\n"), model(" \nYes.\n\n No. \n"), user("\n\nLarge? "), model("\n\nNo")],
    "an empty answer": [user("Is it?"), model(""), user("Large?"), model("No.")],
}


def chat_of(family: str, *, marked: bool = False) -> Chat:
    tokens = COUNTS.__getitem__ if family in WITH_IMAGES else None
    return open_chat(family_folder(family, marked=marked), family=family, image_tokens=tokens)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def chat(family) -> Chat:
    return chat_of(family)


def whole(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights from the prompt's first to the continuation's last."""
    pieces = [group.prompt, *group.continuations]
    return np.concatenate([p.tokens for p in pieces]), np.concatenate([p.weight for p in pieces])


def drawn(chat: Chat, group: Group) -> str:
    """The whole text, labels between « and », runs of soft tokens counted."""
    tokens, weight = whole(group)
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or weight[end] != weight[start]:
            run = chat.tokenizer.decode(tokens[start:end])
            text += f"«{run}»" if weight[start] else run
            start = end
    return re.sub(r"(<image_soft_token>|<\|image_pad\|>)+", lambda m: f"[{len(m[0]) // len(m[1])}]", text)


ONE, THREE = "one turn", "three turns"
BY_HAND = {
    ("gemma3", ONE): (
        "<bos><start_of_turn>user\nIs the heart enlarged?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»"
    ),
    ("gemma3", THREE): (
        "<bos><start_of_turn>user\nNo user is seen.\n\nIs it?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
        "<start_of_turn>user\nLarge?<end_of_turn>\n<start_of_turn>model\n«No.<end_of_turn>»\n"
        "<start_of_turn>user\nSeen?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»"
    ),
    ("llama3", ONE): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs the heart enlarged?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
    ),
    ("llama3", THREE): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nNo user is seen.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nLarge?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«No.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSeen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
    ),
    ("llama3.1", ONE): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs the heart enlarged?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
    ),
    ("llama3.1", THREE): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nNo user is seen.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nLarge?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«No.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSeen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
    ),
    ("qwen2.5", ONE): (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs the heart enlarged?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»"
    ),
    ("qwen2_5_vl", ONE): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs the heart enlarged?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»"
    ),
    **{
        (name, THREE): (
            "<|im_start|>system\nNo user is seen.<|im_end|>\n"
            "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
            "<|im_start|>user\nLarge?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»\n"
            "<|im_start|>user\nSeen?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»"
        )
        for name in ("qwen2.5", "qwen2_5_vl")
    },
}


@pytest.mark.parametrize(("name", "conversation"), BY_HAND)
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
def test_text_and_labels_by_hand(name, conversation, marked):
    chat = chat_of(name, marked=marked)
    assert drawn(chat, chat.example(CONVERSATIONS[conversation])) == BY_HAND[name, conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_markers_and_prefixes_say_the_same(family, conversation):
    plain, marked = chat_of(family), chat_of(family, marked=True)
    assert "{%- generation" in marked.tokenizer.chat_template
    assert "{%- generation" not in plain.tokenizer.chat_template
    for a, b in zip(
        whole(plain.example(CONVERSATIONS[conversation])),
        whole(marked.example(CONVERSATIONS[conversation])),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("conversation", [ONE, THREE])
def test_tokens_and_labels_are_those_of_transformers(family, conversation):
    """`assistant_masks` of the marked template, where no answer begins or ends in white space."""
    chat = chat_of(family, marked=True)
    turns = for_template(CONVERSATIONS[conversation], parts=False)
    expected = chat.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    tokens, weight = whole(chat.example(CONVERSATIONS[conversation]))
    assert tokens.tolist() == expected["input_ids"][: len(tokens)]
    assert weight.tolist() == expected["assistant_masks"][: len(tokens)]
    # What the template writes after the last stop token belongs to no turn of ours.
    assert chat.tokenizer.decode(expected["input_ids"][len(tokens) :]).strip() == ""
    assert sum(expected["assistant_masks"][len(tokens) :]) == 0


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_answer_follows_the_tokens_its_rollout_starts_from(chat, conversation):
    """Whatever white space the answers begin or end with, and however long the history."""
    messages = CONVERSATIONS[conversation]
    tokens, weight = whole(chat.example(messages))
    starts = [t for t in range(1, len(tokens)) if weight[t] and not weight[t - 1]]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        prompt = chat.prompt(messages[:turn])
        assert prompt.prompt.tokens.tolist() == tokens[:start].tolist()
        assert not prompt.prompt.weight.any()


def test_pieces_tokenised_together_would_differ():
    """What the test above guards against: header and answer merge when tokenised as one text."""
    chat = chat_of("qwen2.5")
    turns = for_template(CONVERSATIONS["white space"][:2], parts=False)
    together = chat.tokenizer.apply_chat_template([turns[0], model("\nYes.")], return_dict=True)["input_ids"]
    tokens, _ = whole(chat.example([turns[0], model("\nYes.")]))
    assert tokens.tolist() != together[: len(tokens)]
    assert chat.tokenizer.decode(tokens) == chat.tokenizer.decode(together).removesuffix("\n")


def test_each_stop_token_is_a_label_and_ends_its_answer(chat):
    for messages in CONVERSATIONS.values():
        tokens, weight = whole(chat.example(messages))
        last = [t for t in range(len(tokens)) if weight[t] and (t + 1 == len(tokens) or not weight[t + 1])]
        assert len(last) == sum(message["role"] == "assistant" for message in messages)
        assert all(tokens[t] in chat.stop_ids for t in last)
        # In one answer there is one stop token; those of other turns are no labels.
        assert np.isin(tokens[weight > 0], chat.stop_ids).sum() == len(last)


def test_bos_comes_once(family, chat):
    """Templates write it and tokenizers add it: together it would stand there twice."""
    bos = FAMILIES[family].bos
    tokens, _ = whole(chat.example(CONVERSATIONS[ONE]))
    if bos is None:
        assert chat.tokenizer.bos_token is None
        assert tokens[0] == chat.tokenizer.convert_tokens_to_ids("<|im_start|>")
        return
    bos_id = chat.tokenizer.convert_tokens_to_ids(bos)
    text = chat.tokenizer.apply_chat_template(CONVERSATIONS["one turn"][:1], tokenize=False)
    assert chat.tokenizer(text)["input_ids"][:2] == [bos_id, bos_id], "the tokenizer adds one by itself"
    assert (tokens == bos_id).tolist() == [True] + [False] * (len(tokens) - 1)
    assert (chat.prompt(CONVERSATIONS[ONE][:1]).prompt.tokens == bos_id).sum() == 1


def test_turns_carry_their_own_weight(chat):
    messages = [*CONVERSATIONS[THREE]]
    messages[2], messages[4] = model("Yes.", weight=0.5), model("No.", weight=0)
    tokens, weight = whole(chat.example(messages))
    plain_tokens, plain = whole(chat.example(CONVERSATIONS[THREE]))
    assert np.array_equal(tokens, plain_tokens)
    first, second, third = np.split(np.flatnonzero(plain), np.flatnonzero(np.diff(np.flatnonzero(plain)) > 1) + 1)
    assert set(weight[first]) == {0.5}
    assert set(weight[second]) == {0.0}
    assert set(weight[third]) == {1.0}
    assert not np.delete(weight, np.concatenate([first, second, third])).any()


def test_answers_without_weight_are_prompt_or_left_out(chat):
    """As history they belong to the prompt; after the last label nothing changes the loss."""
    messages = [*CONVERSATIONS[THREE]]
    messages[2] = model("Yes.", weight=0)
    messages[6] = model("Yes.", weight=0.0)
    group = chat.example(messages)
    assert group.prompt.tokens.tolist() == chat.prompt(messages[:4]).prompt.tokens.tolist()
    assert group.continuations[0].tokens.tolist() == chat.example(messages[:5]).continuations[0].tokens.tolist()
    assert chat.decode(group.continuations[0].tokens) == "No."
    for rows in ([messages[0], messages[1], messages[2]], [messages[1]]):
        with pytest.raises(ValueError, match="needs an assistant turn with weight > 0"):
            chat.example(rows)


FILM, OTHER = ("image", "film"), ("image", "other")


@pytest.mark.parametrize("name", sorted(WITH_IMAGES))
def test_images_of_different_sizes(name):
    """Each image has its own count, in the prompt and in later turns; the same image twice is one image."""
    chat = chat_of(name)
    messages = [user(FILM, "and", OTHER, "?"), model("Yes."), user("So", FILM), model("No.")]
    group = chat.example(messages)
    film, other = (
        ("\n\n<start_of_image>[4]<end_of_image>\n\n", "\n\n<start_of_image>[6]<end_of_image>\n\n")
        if name == "gemma3"
        else ("<|vision_start|>[4]<|vision_end|>", "<|vision_start|>[6]<|vision_end|>")
    )
    text = drawn(chat, group)
    assert f"{film}and{other}?" in text
    assert f"So{film}<" in text
    assert text.count("[") == 3
    assert group.images == ("film", "other")
    image = np.concatenate([group.prompt.image, group.continuations[0].image])
    assert image[image >= 0].tolist() == [0] * 4 + [1] * 6 + [0] * 4
    assert (group.continuations[0].image >= 0).sum() == 4
    _, weight = whole(group)
    assert not weight[image >= 0].any()


@pytest.mark.parametrize("name", sorted(WITH_IMAGES))
def test_an_image_in_an_answer_brings_no_label(name):
    """Neither its soft tokens nor those that begin and end it: no model writes them."""
    chat = chat_of(name)
    parts = [{"type": "image", "image": "film"}, {"type": "text", "text": "Yes."}]
    piece = chat.example([user("Is it?"), {"role": "assistant", "content": parts}]).continuations[0]
    labels = chat.tokenizer.decode(piece.tokens[piece.weight > 0])
    stop = "<end_of_turn>" if name == "gemma3" else "<|im_end|>"
    assert labels.strip().startswith("Yes.")
    assert labels.endswith(stop)
    assert (piece.image >= 0).sum() == 4
    assert not piece.weight[piece.image >= 0].any()


def test_qwen_text_and_grids_are_those_of_transformers(tmp_path):
    """Films of several sizes: the count in the text is what transformers derives from the pixels themselves."""
    folder = family_folder("qwen2_5_vl")
    pixels = open_pixels(folder, family="qwen2_5_vl", image_tokens=None)
    chat = open_chat(folder, family="qwen2_5_vl", image_tokens=lambda key: pixels.grid(key).tokens)
    keys = []
    for i, size in enumerate([(150, 60), (33, 170), (400, 310), (20, 9)]):
        keys.append(str(tmp_path / f"{i}.png"))
        Image.new("L", size, 40 * i).save(keys[-1])
    messages = [user(("image", keys[0]), "and", ("image", keys[1])), model("Yes.")]
    messages += [user(("image", keys[2]), ("image", keys[3]), ("image", keys[0])), model("No.")]
    shown = [*keys, keys[0]]
    processor = Qwen2VLImageProcessorPil(min_pixels=LEAST, max_pixels=MOST)
    inputs = processor([Image.open(key) for key in shown], return_tensors="np")
    reference = SimpleNamespace(image_processor=processor, image_token="<|image_pad|>")
    text = chat.tokenizer.apply_chat_template(for_template(messages, parts=True), tokenize=False)
    first, *rest = text.split("<|image_pad|>")
    for i, part in enumerate(rest):
        first += Qwen2_5_VLProcessor.replace_image_token(reference, inputs, i) + part
    group = chat.example(messages)
    tokens, _ = whole(group)
    assert tokens.tolist() == chat.tokenizer(first)["input_ids"][: len(tokens)]
    image = np.concatenate([group.prompt.image, group.continuations[0].image])
    counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    assert len(set(counts)) > 2
    assert image[image >= 0].tolist() == np.repeat([0, 1, 2, 3, 0], counts).tolist()


def with_template(chat: Chat, template: str) -> Chat:
    tokenizer = AutoTokenizer.from_pretrained(chat.tokenizer.name_or_path)
    tokenizer.chat_template = template
    return Chat(tokenizer, chat.image_text, chat.stop_ids, chat.image_tokens)


def marking(answer: str, other: str = "{{ m['content'] + '<|im_end|>' }}", *, header: str = "") -> str:
    """A template of Qwen2.5's format with this code where an answer stands (and before its header), where another
    turn's content stands."""
    return (
        "{%- for m in messages %}{%- if m['role'] == 'assistant' %}" + header + "{{ '<|im_start|>assistant\n' }}" + answer
        + "{%- else %}{{ '<|im_start|>' + m['role'] + '\n' }}" + other + "{{ '\n' }}{%- endif %}{%- endfor %}"
        + "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
    )  # fmt: skip


BEGIN, END = "{%- generation %}", "{%- endgeneration %}"
CONTENT, STOP, BREAK = "{{ m['content'] }}", "{{ '<|im_end|>' }}", "{{ '\n' }}"
MARKED = BEGIN + CONTENT + STOP + END + BREAK
PLAIN = CONTENT + STOP + BREAK


@pytest.mark.parametrize(
    "template",
    [
        marking(MARKED),
        marking(BEGIN + CONTENT + END + STOP + BREAK),
        marking(BEGIN + CONTENT + END + BEGIN + STOP + END + BREAK),
        marking(BEGIN + CONTENT + STOP + BREAK + END),
    ],
    ids=["with stop", "without stop", "in two", "with the line break"],
)
def test_markers_that_agree(template):
    chat = with_template(chat_of("qwen2.5"), template)
    for messages in CONVERSATIONS.values():
        plain = with_template(chat, marking(PLAIN))
        for a, b in zip(whole(chat.example(messages)), whole(plain.example(messages)), strict=True):
            assert np.array_equal(a, b)


FIRST, REST = "{{ m['content'][:1] }}", "{{ m['content'][1:] }}"


@pytest.mark.parametrize(
    "template",
    [
        marking(FIRST + BEGIN + REST + STOP + END + BREAK),
        marking(BEGIN + FIRST + END + REST + STOP + BREAK),
        marking(BEGIN + FIRST + END + REST + BEGIN + STOP + END + BREAK),
        marking(CONTENT + STOP + BREAK + END, header=BEGIN),
        marking("{%- if loop.last %}" + MARKED + "{%- else %}" + PLAIN + "{%- endif %}"),
        marking(PLAIN, BEGIN + CONTENT + STOP + END),
    ],
    ids=["late", "early", "with a gap", "header", "last only", "user only"],
)
def test_markers_that_disagree_name_the_turn(template):
    chat = with_template(chat_of("qwen2.5"), template)
    messages = [user("Is it?"), model("Yes."), user("Large?"), model("No.")]
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template marks .* as generated, but"):
        chat.example(messages)


def test_markers_outside_answers():
    chat = with_template(chat_of("qwen2.5"), marking(MARKED, BEGIN + CONTENT + STOP + END))
    with pytest.raises(ValueError, match="which are in no assistant turn"):
        chat.example([user("Is it?"), model("Yes.")])


def test_a_header_that_is_only_written_with_the_answer():
    """It would become a label; formats without any header are in order."""
    template = marking(PLAIN).removesuffix("{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}")
    chat = with_template(chat_of("qwen2.5"), template)
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template writes a header before the answer"):
        chat.example([user("Is it?"), model("Yes.")])
    none = (
        "{%- for m in messages %}{{ m['content'] + ('<|im_end|>' if m['role'] == 'assistant' else '\n') }}{%- endfor %}"
    )
    chat = with_template(chat, none)
    assert drawn(chat, chat.example([user("Is it?"), model("Yes.")])) == "Is it?\n«Yes.<|im_end|>»"


def test_a_second_stop_token_at_the_end_of_the_text_is_no_label():
    """The model has stopped before it; some templates end every conversation by one."""
    chat = with_template(
        chat_of("qwen2.5"), marking(PLAIN) + "{{ '<|endoftext|>' if not add_generation_prompt else '' }}"
    )
    assert drawn(chat, chat.example([user("Is it?"), model("Yes.")])).endswith("assistant\n«Yes.<|im_end|>»")


THINKING = "{{ m['content'].split('</think>')[-1] }}"


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (marking(THINKING + STOP + BREAK), "messages[3] (assistant)"),
        (marking(PLAIN).replace("in messages", "in messages if m['role'] != 'system'"), "messages[0] (system)"),
        (marking(PLAIN, "{{ m['content'][:4] + '<|im_end|>' }}"), "messages[0] (system)"),
    ],
    ids=["reasoning", "a role", "a long text"],
)
def test_text_that_a_template_leaves_out(template, turn):
    """Without a word; the labels or the question would not be those of the data."""
    chat = with_template(chat_of("qwen2.5"), template)
    messages = [SYSTEM, user(" Is it large? "), model("", weight=0), model("<think>It is.</think>Yes.\n")]
    with pytest.raises(ValueError, match=re.escape(turn) + ": the chat template leaves out text of this turn"):
        chat.example(messages)


@pytest.mark.parametrize("prefix", ["first", "always", "normaliser"])
def test_a_tokenizer_that_writes_a_space_before_every_text(prefix, tmp_path):
    """As those of Llama 2 and Mistral do: it belongs before the conversation, not before each answer and question."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if prefix == "normaliser":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    letters = sorted({*"▁[INST]/.?isYelarg\n"})
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters)
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
        "' ' + m['content'] + eos_token }}{% endfor %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    ).save_pretrained(tmp_path)
    chat = open_chat(tmp_path, family="mistral", image_tokens=None)
    messages = [user("Is it?"), model("Yes."), user("Is it large?"), model("Yes.")]
    tokens, weight = whole(chat.example(messages))
    # Each letter is a token here, so that pieces and the whole are cut alike.
    together = chat.tokenizer.apply_chat_template(for_template(messages, parts=False), return_dict=True)["input_ids"]
    assert tokens.tolist() == together
    assert "".join(chat.tokenizer.convert_ids_to_tokens(tokens[weight > 0])) == "▁Yes.</s>▁Yes.</s>"
    assert chat.prompt(messages[:1]).prompt.tokens.tolist() == tokens[: int(np.argmax(weight))].tolist()


def real(name: str) -> str:
    """A template as the family's checkpoints have it, from an installed trl."""
    spec = find_spec("trl")
    if spec is None:
        pytest.skip("trl, which carries these templates, is not installed")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


REAL = {
    "gemma3": "gemma3",
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "qwen2.5": "qwen2_5",
    "qwen2_5_vl": "qwen2_5_vl",
}


def test_the_real_template_gives_the_same_groups(family, chat):
    """The small templates above write what the published ones write."""
    published = with_template(chat, real(REAL[family]))
    conversations = list(CONVERSATIONS.values())
    if family in WITH_IMAGES:
        conversations.append([SYSTEM, user(FILM, "Is it?", OTHER), model("Yes."), user("So", FILM), model("No.")])
    for messages in conversations:
        for a, b in zip(whole(chat.example(messages)), whole(published.example(messages)), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen2.5", "qwen2_5_vl"])
def test_trl_training_templates(name):
    """Published templates with markers: the same labels; Qwen's mark the line breaks around the answer as well."""
    chat = chat_of(name)
    training = with_template(chat, real(f"{REAL[name]}_training"))
    for messages in CONVERSATIONS.values():
        for a, b in zip(whole(chat.example(messages)), whole(training.example(messages)), strict=True):
            assert np.array_equal(a, b)
    turns = for_template(CONVERSATIONS[THREE], parts=False)
    out = training.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    tokens, weight = whole(chat.example(CONVERSATIONS[THREE]))
    marked = np.array(out["assistant_masks"][: len(tokens)])
    extra = tokens[(marked == 1) & (weight == 0)]
    assert not weight[marked == 0].any()
    assert set(training.tokenizer.decode(extra)) <= {"\n"}
    assert (len(extra) > 0) == (name != "llama3")


def test_gemma_template_of_the_hub(shared_data):
    """The 27B's own file, in the place where such folders keep it: chat_template.json."""
    path = shared_data / "tokenizers" / "chat_templates" / "gemma-3-27b-chat_template.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    chat = chat_of("gemma3")
    published = with_template(chat, json.loads(path.read_text())["chat_template"])
    messages = [SYSTEM, user(FILM, "Is it?", OTHER), model(" Yes."), user("So", FILM), model("No.\n")]
    for rows in (*CONVERSATIONS.values(), messages):
        assert drawn(published, published.example(rows)) == drawn(chat, chat.example(rows))


def templated(tmp_path: Path, template: str, **more) -> Chat:
    """A chat of text whose template is this one."""
    shutil.copytree(family_folder("gemma3"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    return open_chat(tmp_path, family="gemma3", image_tokens=None, **more)


DATED = (
    "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_a_template_that_writes_the_date_is_told_the_same_one_for_ever(tmp_path):
    turns = [{"role": "user", "content": "Is it?"}, model("Yes.")]
    first, again, later = (
        templated(tmp_path, DATED, now=datetime(2026, 3, day)).example(turns).prompt.tokens for day in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    assert "01 Mar 2026" in templated(tmp_path, DATED).decode(first)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"tool_calls": [{"type": "function", "function": {"name": "measure", "arguments": "{}"}}]}, "tool_calls"),
        ({"reasoning_content": "The heart is large."}, "reasoning_content"),
    ],
)
def test_text_of_any_field_that_the_template_does_not_write_is_refused(more, key):
    """An empty answer would be taught in place of the call."""
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "", **more}]
    with pytest.raises(ValueError, match=rf"messages\[1\] \(assistant\): the chat template writes nothing of '{key}'"):
        chat_of("gemma3").example(turns)


DOUBLED = "{%% set n = namespace(x='xxxxxxxx') %%}{%% for i in range(40) %%}{%% set n.x = %s %%}{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ 'x' * 10**10 }}", "no operation of a template may make more than"),
        ("{{ [1, 2] * 10**9 }}", "no operation of a template may make more than"),
        ("{{ 2 ** (10**9) }}", "numbers have a bound"),
        ("{{ '%1000000000d' % 1 }}", "formats have a bound"),
        ("{{ '{:1000000000}'.format(1) }}", "formats have a bound"),
        ("{{ '%1000000000d' | format(1) }}", "formats have a bound"),
        ("{{ 'x'.ljust(10**10) }}", "no operation of a template may make more than"),
        ("{{ 'x' | center(10**10) }}", "no operation of a template may make more than"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "no more than 200000 steps"),
        ("{% for i in range(9999) %}{{ loop(range(9999)) }}{% endfor %}", "refuses the conversation"),
        pytest.param(
            "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
            "200000 steps",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}",
            "200000 steps",
            marks=pytest.mark.full,
        ),
        (DOUBLED % "n.x ~ n.x", "no operation of a template may make more than"),
        (DOUBLED % "n.x + n.x", "no operation of a template may make more than"),
        (DOUBLED % "n.x.replace('x', n.x)", "no operation of a template may make more than"),
        (DOUBLED % "n.x | replace('x', n.x)", "no operation of a template may make more than"),
        (DOUBLED % "[n.x, n.x] | join", "no operation of a template may make more than"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% set n = namespace() %}{% set n.__init_subclass__ = 1 %}", "may not set"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "no Jinja template that can be read"),
    ],
)
def test_what_a_template_may_not_do(tmp_path, template, found):
    chat = templated(tmp_path, template)
    with pytest.raises(ValueError, match=found):
        chat.prompt([{"role": "user", "content": "Is it?"}])


@pytest.mark.full
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}{% set x = ('x' * 9999999) | upper %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(400) %}{% set n.x = n.x + [i ~ 'x' * 9999990] %}{% endfor %}",
    ],
    ids=["time", "memory"],
)
def test_a_template_that_does_not_end_is_refused_before_it_is_used(tmp_path, template, monkeypatch):
    monkeypatch.setattr("vlmalign.data.chat.template.TRIAL_S", 5.0)
    chat = templated(tmp_path, template)
    with pytest.raises(
        ValueError, match=r"the chat template (does not end within 5 s|takes more than 10 s or 1024 MiB)"
    ):
        chat.prompt([{"role": "user", "content": "Is it?"}])


def test_a_template_that_does_not_end_on_a_certain_row_is_refused_there(tmp_path):
    loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    chat = templated(
        tmp_path, "{% if 'Why?' == messages[0].content %}" + loops + "{% endif %}{{ messages[0].content }}"
    )
    assert chat.decode(chat.prompt([{"role": "user", "content": "Is it?"}]).prompt.tokens) == "Is it?"
    with pytest.raises(ValueError, match="no more than 200000 steps for a conversation"):
        chat.prompt([{"role": "user", "content": "Why?"}])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_templates_are_written_as_transformers_writes_them(family, name):
    chat = chat_of(family, marked=True)
    turns = for_template(CONVERSATIONS[name], parts=family in WITH_IMAGES)
    if family == "gemma3" and turns[0]["role"] == "system":
        turns = turns[1:]
    for continues in (False, True):
        expected = chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=continues)
        assert chat._template.render(turns, continues=continues) == expected
