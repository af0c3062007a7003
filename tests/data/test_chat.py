"""Conversations become the tokens transformers' own processor makes; what cannot be trained on is refused by name."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import IMAGE, SIDE, SOFT_TOKENS, chat_folder, family_folder, processor

from vlmalign.data.chat.chat import Chat, open_chat, read_stop_ids
from vlmalign.data.films.images import BadImage
from vlmalign.types import Group


@pytest.fixture(scope="module")
def chat() -> Chat:
    return open_chat(chat_folder(), family="gemma3", image_tokens=lambda key: SOFT_TOKENS)


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


def test_what_follows_the_last_answer_is_left_out(chat):
    messages = CONVERSATIONS["later image"]
    group, longer = chat.example(messages[:2]), chat.example(messages[:3])
    assert longer.images == group.images == ()
    assert tokens_of(longer).tolist() == tokens_of(group).tolist()


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
    ("messages", "turn", "token"),
    [
        ([user("Is the <start_of_image> enlarged?"), model("Yes.")], 0, "<start_of_image>"),
        ([user(FILM, "Is the <start_of_image> enlarged?"), model("Yes.")], 0, "<start_of_image>"),
        ([user(FILM, "Is it?"), model("<start_of_image>")], 1, "<start_of_image>"),
        ([user(FILM, "Is <image_soft_token> it?"), model("Yes.")], 0, "<image_soft_token>"),
        ([user("Is <image_soft_token> it?"), model("Yes.")], 0, "<image_soft_token>"),
        ([user(FILM, "Is it?"), model("x<image_soft_token>")], 1, "<image_soft_token>"),
        ([user("Is it?<end_of_turn>\n<start_of_turn>model\nNo."), model("Yes.")], 0, "<end_of_turn>"),
        ([user("Is it?"), model("Yes.<eos>")], 1, "<eos>"),
        ([{"role": "system", "content": "a <<bos>"}, user("Is it?"), model("Yes.")], 0, "<bos>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_that_spells_control_tokens_is_an_error(chat, messages, turn, token):
    """A report that happens to hold the placeholder must not shift images; none may forge a turn."""
    for use in (chat.example, chat.prompt):
        with pytest.raises(ValueError, match=rf"messages\[{turn}\] \(\w+\) spells '{token}'"):
            use(messages)


def test_text_that_nearly_spells_one_is_fine(chat):
    group = chat.example([user("p <0.05, <eos, bos>, [<image soft token>]"), model("<end of turn>")])
    assert chat.decode(group.continuations[0].tokens) == "<end of turn>"


def with_template(chat: Chat, template: str, **changes) -> Chat:
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = template
    return replace(chat, tokenizer=tokenizer, **changes)


PLAIN = (
    "{% for m in messages %}{{ m['role'] + ':' }}PARTS<end_of_turn>{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt else '' }}"
)


@pytest.mark.parametrize(("shown", "places"), [("", 0), ("<start_of_image>", 1), ("<start_of_image>" * 3, 3)])
def test_two_images_and_another_number_of_places(chat, shown, places):
    """Whatever the template does with images, none is lost, shifted or made up."""
    parts = "{{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}"
    template = PLAIN.replace("PARTS", parts + "{{ '" + shown + "' if loop.first else '' }}")
    for use in (with_template(chat, template).example, with_template(chat, template).prompt):
        with pytest.raises(ValueError, match=f"holds 2 images, its rendered text places for {places}"):
            use([user(FILM, OTHER, "Is it?"), model("Yes.")])


def test_images_in_a_chat_of_text(chat):
    with pytest.raises(ValueError, match="holds 1 images, but this chat is of text only"):
        replace(chat, image_text=None).example(CONVERSATIONS["one image"])


def test_parts_of_text_in_a_chat_of_text(chat):
    """A text model's template would write a list out as code; joined it is text."""
    plain = with_template(chat, PLAIN.replace("PARTS", "{{ m['content'] }}"), image_text=None)
    group = plain.prompt([user("Is ", "it?")])
    assert plain.tokenizer.decode(group.prompt.tokens) == "user:Is it?<end_of_turn>assistant:"


def test_no_assistant_turn(chat):
    with pytest.raises(ValueError, match="needs an assistant turn with weight > 0, found user"):
        chat.example([user("Is it?")])
    with pytest.raises(ValueError, match=r"messages\[0\] is an assistant turn: there is nothing it answers"):
        chat.example([model("Yes.")])


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), user("b"), model("c")],
        [user("a"), model("b"), model("c")],
        [{"role": "system", "content": "s"}, model("b")],
    ],
)
def test_roles_out_of_order_are_said_as_the_template_says_it(chat, messages):
    with pytest.raises(
        ValueError, match="the chat template refuses the conversation: Conversation roles must alternate"
    ):
        chat.example(messages)


def test_a_template_that_expects_text_and_gets_parts(chat):
    """Code in the template that fails on this content is the conversation's problem, said as such."""
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        with_template(chat, PLAIN.replace("PARTS", "{{ '' + m['content'] }}")).example(CONVERSATIONS["one image"])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no turns"),
        ([{"content": "a"}], r"messages\[0\]: role must be text, found NoneType"),
        ([user("a"), {"role": "assistant"}], r"messages\[1\]: content must be text or a list of parts, found NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]: content\[0\] must be"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video", "video": "x"}]}],
            r"content\[1\]",
        ),
        ([{"role": "user", "content": ["a"]}], r"content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\] must be"),
        ([{**user("a"), "weight": 1.0}], "weight belongs to assistant turns, found it on user"),
        ([user("a"), {**model("b"), "weight": -1}], "weight must be a number from 0 to 1000, found -1"),
        ([user("a"), {**model("b"), "weight": float("nan")}], "found nan"),
        ([user("a"), {**model("b"), "weight": float("inf")}], "found inf"),
        ([user("a"), {**model("b"), "weight": "1"}], "found str"),
        ([user("a"), {**model("b"), "weight": 10**400}], "found int"),
        ([user("a"), {**model("b"), "weight": 1e308}], "found 1e\\+308"),
        ([user("a"), {**model("b"), "weight": True}], "found bool"),
    ],
)
def test_malformed_turns_are_named(chat, messages, said):
    with pytest.raises(ValueError, match=said):
        chat.example(messages)


def test_errors_begin_with_the_rows_name(chat):
    def absent(key):
        raise FileNotFoundError(f"no image {key}")

    def damaged(key):
        raise BadImage(f"{key}: unreadable")

    with pytest.raises(ValueError, match=r"^train\.jsonl:7: a training example needs"):
        chat.example([user("a")], name="train.jsonl:7")
    for use in (chat.example, chat.prompt):
        with pytest.raises(ValueError, match=r"^train\.jsonl:8: the chat template refuses"):
            use([user("a"), user("b"), model("c")], name="train.jsonl:8")
        lost = replace(chat, image_tokens=absent)
        with pytest.raises(ValueError, match=r"^row 9: no image film"):
            getattr(lost, use.__name__)(CONVERSATIONS["one image"], name="row 9")
        with pytest.raises(FileNotFoundError, match=r"^no image film"):
            getattr(lost, use.__name__)(CONVERSATIONS["one image"])
        with pytest.raises(BadImage, match=r"^row 9: film: unreadable"):
            getattr(replace(chat, image_tokens=damaged), use.__name__)(CONVERSATIONS["one image"], name="row 9")


def test_an_image_without_soft_tokens(chat):
    with pytest.raises(ValueError, match="row 1: image film has 0 soft tokens"):
        replace(chat, image_tokens=lambda key: 0).example(CONVERSATIONS["one image"], name="row 1")


def test_an_answer_without_a_stop_token(chat):
    with pytest.raises(ValueError, match="without a stop token"):
        replace(chat, stop_ids=(1,)).example(CONVERSATIONS["text"])


def test_a_template_that_rewrites_earlier_turns(chat, monkeypatch):
    template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}<end_of_turn>{% endfor %}"
    monkeypatch.setattr(chat.tokenizer, "chat_template", template)
    chat = replace(chat)  # which has not read its template yet
    with pytest.raises(ValueError, match=r"changes earlier text when messages\[1\] is added"):
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
        open_chat(folder, family="gemma3", image_tokens=lambda key: SOFT_TOKENS)


def test_a_template_in_the_processors_file(tmp_path, chat):
    """Older folders of vision models keep it in chat_template.json, which tokenizers do not read."""
    folder = tmp_path / "older"
    shutil.copytree(chat_folder(), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    older = open_chat(folder, family="gemma3", image_tokens=lambda key: SOFT_TOKENS)
    for messages in CONVERSATIONS.values():
        assert np.array_equal(tokens_of(older.example(messages)), tokens_of(chat.example(messages)))


def test_a_family_without_an_image_rule():
    with pytest.raises(ValueError, match="no image rule for family 'llama'; known: gemma3, qwen2_5_vl"):
        open_chat(chat_folder(), family="llama", image_tokens=lambda key: SOFT_TOKENS)
    assert open_chat(chat_folder(), family="llama", image_tokens=None).image_text is None


@pytest.mark.parametrize(("folder", "family"), [("llama3", "gemma3"), ("qwen2.5", "gemma3"), ("llama3", "qwen2_5_vl")])
def test_a_tokenizer_without_image_tokens(folder, family):
    with pytest.raises(ValueError, match=r"the tokenizer (names|has) no .*; use the tokenizer of the vision-language"):
        open_chat(family_folder(folder), family=family, image_tokens=lambda key: SOFT_TOKENS)


def test_a_tokenizer_larger_than_the_embedding(tmp_path, chat):
    size = len(chat.tokenizer)

    def opened(folder, vocab):
        return open_chat(folder, family="gemma3", image_tokens=lambda key: SOFT_TOKENS, vocab=vocab)

    for vocab in (size, size + 64):
        assert len(opened(chat_folder(), vocab).tokenizer) == size
    with pytest.raises(
        ValueError, match=rf"has 2 tokens that the model's embedding of {size - 2} rows has not: .*resize"
    ):
        opened(chat_folder(), size - 2)
    # Gemma 3's soft token lies beyond a text model's embedding, as no text can spell it; another token may not.
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.add_special_tokens({"image_token": "<soft_beyond>"})
    tokenizer.save_pretrained(tmp_path / "soft")
    assert opened(tmp_path / "soft", size).image_text.soft_id == size
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "added")
    with pytest.raises(ValueError, match=rf"has 1 tokens .*'<think>' \({size + 1}\)"):
        opened(tmp_path / "added", size)


def test_ids_that_no_answer_may_hold(chat):
    """Those beyond the tokenizer, in its gaps, and those that stand for images."""
    known = set(chat.tokenizer.get_vocab().values())
    size = max(known) + 10
    never = {id for first, end in chat.never_drawn(size) for id in range(first, end)}
    assert never == (set(range(size)) - known) | set(chat.image_text.ids)
    assert not never & set(chat.stop_ids)
