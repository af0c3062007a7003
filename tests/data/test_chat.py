"""Conversations become the tokens transformers' own processor makes; only assistant tokens and their stop count."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import IMAGE, SIDE, SOFT_TOKENS, chat_folder, processor

from vlmalign.data.chat import Chat, open_chat, read_stop_ids
from vlmalign.types import Group


@pytest.fixture(scope="module")
def chat() -> Chat:
    return open_chat(chat_folder(), family="gemma3", image_tokens=SOFT_TOKENS)


def user(*content) -> dict:
    """A user turn; an image is written ("image", key)."""
    parts = [
        {"type": "image", "image": part[1]} if isinstance(part, tuple) else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": "user", "content": parts}


def model(text: str) -> dict:
    return {"role": "assistant", "content": text}


FILM, OTHER = ("image", "film"), ("image", "other")
CONVERSATIONS = {
    "text": [user("Is the heart enlarged?"), model("Yes, the heart is large.")],
    "one image": [user(FILM, "Is the heart enlarged?"), model("Yes.")],
    "image last": [user("Is the heart enlarged?", FILM), model("Yes.")],
    "two images": [user(FILM, OTHER, "Is an effusion seen?"), model("No effusion is seen.")],
    "the same image twice": [user(FILM, "and", FILM), model("Yes.")],
    "later image": [user("Is the heart enlarged?"), model("No."), user(OTHER, "Yes?"), model("Yes, Yes.")],
    "three turns": [
        {"role": "system", "content": "No user is seen."},
        user(FILM, "Is it?"),
        model("Yes."),
        user("Is it large?"),
        model("No."),
        user(OTHER, "Is it seen?", FILM),
        model("Yes, it is."),
    ],
}


def tokens_of(group: Group) -> np.ndarray:
    return np.concatenate([group.prompt.tokens, *(c.tokens for c in group.continuations)])


def pixels_of(keys) -> list[Image.Image]:
    return [Image.new("RGB", (SIDE, SIDE), (len(key), 0, 0)) for key in keys]


def keys_of(messages) -> list[str]:
    return [p["image"] for m in messages if not isinstance(m["content"], str) for p in m["content"] if "image" in p]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_image_places_are_those_of_transformers(chat, name):
    messages = CONVERSATIONS[name]
    text = processor().apply_chat_template(messages, tokenize=False)
    keys = keys_of(messages)
    images = {"images": [pixels_of(keys)]} if keys else {}
    expected = processor()(text=[text], add_special_tokens=False, **images)
    group = chat.example(messages)
    found = tokens_of(group)
    # The template's line break after the last stop token belongs to no turn of ours.
    ids = expected["input_ids"][0]
    assert found.tolist() == ids[: len(found)]
    assert processor().tokenizer.decode(ids[len(found) :]) == "\n"
    image = np.concatenate([group.prompt.image, group.continuations[0].image])
    assert (image >= 0).astype(int).tolist() == expected["token_type_ids"][0][: len(found)]
    assert [group.images[i] for i in image[image >= 0]] == [key for key in keys for _ in range(SOFT_TOKENS)]
    assert len(set(group.images)) == len(group.images) == len(set(keys))
    assert found.dtype == np.int32


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_what_a_rollout_starts_from(chat, name):
    """The same tokens, whether an answer follows or is to be sampled."""
    messages = CONVERSATIONS[name]
    example = chat.example(messages, group_id=3)
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    prompt = chat.prompt(messages[:first], group_id=3)
    assert prompt.id == example.id == 3
    assert prompt.continuations == ()
    assert np.array_equal(prompt.prompt.tokens, example.prompt.tokens)
    assert not example.prompt.weight.any()
    text = processor().apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
    assert (
        processor()
        .tokenizer.decode(prompt.prompt.tokens, skip_special_tokens=False)
        .replace(IMAGE["image_token"], "")
        .replace(f"\n\n{IMAGE['boi_token']}{IMAGE['eoi_token']}\n\n", IMAGE["boi_token"])
        == text
    )


def drawn(chat: Chat, group: Group) -> list[tuple[str, int]]:
    """Runs of the continuation as (text, weight)."""
    piece, runs, start = group.continuations[0], [], 0
    for end in range(1, len(piece) + 1):
        if end == len(piece) or piece.weight[end] != piece.weight[start]:
            text = chat.tokenizer.decode(piece.tokens[start:end], skip_special_tokens=False)
            runs.append((text, int(piece.weight[start])))
            start = end
    return runs


def test_one_turn_by_hand(chat):
    assert drawn(chat, chat.example(CONVERSATIONS["text"])) == [("Yes, the heart is large.<end_of_turn>", 1)]


def test_several_turns_by_hand(chat):
    film = "\n\n<start_of_image>" + SOFT_TOKENS * "<image_soft_token>" + "<end_of_image>\n\n"
    assert drawn(chat, chat.example(CONVERSATIONS["three turns"])) == [
        ("Yes.<end_of_turn>", 1),
        ("\n<start_of_turn>user\nIs it large?<end_of_turn>\n<start_of_turn>model\n", 0),
        ("No.<end_of_turn>", 1),
        (
            f"\n<start_of_turn>user\n{film}Is it seen?{film}<end_of_turn>\n<start_of_turn>model\n",
            0,
        ),
        ("Yes, it is.<end_of_turn>", 1),
    ]


def test_an_image_in_an_answer_is_not_a_label(chat):
    """Soft tokens are never predicted, whoever shows the image."""
    answer = {"role": "assistant", "content": [{"type": "image", "image": "film"}, {"type": "text", "text": "Yes."}]}
    piece = chat.example([user("Is it?"), answer]).continuations[0]
    assert (piece.image >= 0).sum() == SOFT_TOKENS
    assert not piece.weight[piece.image >= 0].any()
    assert piece.weight[-1] == 1


def test_decode_leaves_out_the_stop_token(chat):
    assert chat.decode(chat.example(CONVERSATIONS["text"]).continuations[0].tokens) == "Yes, the heart is large."


@pytest.mark.parametrize(
    "messages",
    [
        [user("Is the <start_of_image> enlarged?"), model("Yes.")],
        [user(FILM, "Is the <start_of_image> enlarged?"), model("Yes.")],
        [user(FILM, "Is it?"), model("<start_of_image>")],
        [user(FILM, "Is <image_soft_token> it?"), model("Yes.")],
        [user("Is <image_soft_token> it?"), model("Yes.")],
        [user(FILM, "Is it?"), model("<image_soft_token>")],
    ],
    ids=["begin", "begin beside one", "begin in the answer", "soft beside one", "soft", "soft in the answer"],
)
def test_text_that_spells_image_tokens_is_an_error(chat, messages):
    """A report that happens to hold the placeholder must not shift images or make up one."""
    with pytest.raises(ValueError, match=r"image|soft tokens"):
        chat.example(messages)


def test_images_a_template_leaves_out_are_an_error(chat):
    text_only = replace(chat, image_text=None)
    with pytest.raises(ValueError, match="holds 1 images, its rendered text places for 0"):
        text_only.example(CONVERSATIONS["one image"])


def test_no_assistant_turn(chat):
    with pytest.raises(ValueError, match="needs an assistant turn, found user"):
        chat.example([user("Is it?")])


def test_an_answer_without_a_stop_token(chat):
    with pytest.raises(ValueError, match="without a stop token"):
        replace(chat, stop_ids=(1,)).example(CONVERSATIONS["text"])


def test_a_template_that_rewrites_earlier_turns(chat, monkeypatch):
    template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}<end_of_turn>{% endfor %}"
    monkeypatch.setattr(chat.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="changes earlier text when turn 1"):
        chat.example([{"role": "user", "content": "a"}, model("b"), {"role": "user", "content": "c"}, model("d")])


def with_eos(chat: Chat, eos: str | None):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.eos_token = eos
    return tokenizer


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        ({"eos_token_id": 5}, "<eos>", (1, 5)),
        ({"eos_token_id": [5, 1, 7]}, "<eos>", (1, 5, 7)),
        ({"eos_token_id": [5]}, None, (5,)),
        ({"eos_token_id": None}, "<eos>", (1,)),
        ({}, "<end_of_turn>", (5,)),
        (None, "<eos>", (1,)),
    ],
)
def test_stop_ids_come_from_generation_settings_and_tokenizer(tmp_path, chat, generation, eos, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_stop_ids(tmp_path, with_eos(chat, eos)) == expected


def test_no_stop_id_at_all(tmp_path, chat):
    with pytest.raises(ValueError, match="names a stop token"):
        read_stop_ids(tmp_path, with_eos(chat, None))


def test_a_folder_without_a_template(tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(chat_folder(), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        open_chat(folder, family="gemma3", image_tokens=SOFT_TOKENS)


def test_a_family_without_an_image_rule():
    with pytest.raises(ValueError, match="no image rule for family 'llama'"):
        open_chat(chat_folder(), family="llama", image_tokens=SOFT_TOKENS)
    assert open_chat(chat_folder(), family="llama", image_tokens=None).image_text is None
