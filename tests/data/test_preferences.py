"""Preference files become groups of two with one prompt; bad pairs are named by line, or left out and listed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from tiny_tokenizer import SOFT_TOKENS, chat_folder, processor
from trl.trainer.dpo_trainer import DPOTrainer

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.images import BadImage
from vlmalign.data.sources.row_files import open_rows
from vlmalign.data.sources.rows import Rows
from vlmalign.data.sources.stored_images import StoredImages
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.texts import Texts, pairs_to_learn
from vlmalign.tasks.free import FreeTask


@pytest.fixture(scope="module")
def chat() -> Chat:
    return open_chat(chat_folder(), family="gemma3", image_tokens=lambda key: SOFT_TOKENS)


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


IMAGE, OTHER = {"type": "image", "image": "film.png"}, {"type": "image", "image": "other.png"}
ASKED = [turn("user", "Is the heart enlarged?")]
LONGER = [*ASKED, turn("assistant", "No."), turn("user", "Is an effusion seen?")]
YES, NO = [turn("assistant", "Yes, the heart is large.")], [turn("assistant", "Yes, no effusion.")]
ROW = {"prompt": ASKED, "chosen": YES, "rejected": NO}


def learn(path: Path, chat: Chat, **settings) -> Texts:
    """The pairs of a file, as a stage gets them."""
    data = Data(path=path, **settings)
    source = Rows(open_rows(path, None), StoredImages(path.parent, path.parent / "cache"), on_bad=data.on_bad)
    return pairs_to_learn(enumerate(source), data, chat, FreeTask(), lambda key: None)


@pytest.fixture
def read(tmp_path, chat):
    for name in ("film", "other", "chosen", "rejected"):
        (tmp_path / f"{name}.png").touch()  # never decoded here

    def run(*rows, **settings):
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return learn(tmp_path / "pairs.jsonl", chat, **settings)

    return run


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(x, field), getattr(y, field))
        for x, y in zip((a.prompt, *a.continuations), (b.prompt, *b.continuations), strict=True)
        for field in ("tokens", "image", "weight")
    )


def texts(chat: Chat, group) -> list[str]:
    return [chat.tokenizer.decode(c.tokens, skip_special_tokens=False) for c in group.continuations]


def test_a_pair_by_hand(read, chat):
    (group,) = read(ROW).groups
    assert np.array_equal(group.prompt.tokens, chat.prompt(ASKED).prompt.tokens)
    assert texts(chat, group) == ["Yes, the heart is large.<end_of_turn>", "Yes, no effusion.<end_of_turn>"]
    assert all(c.weight.all() for c in group.continuations)
    assert not group.prompt.weight.any()


@pytest.mark.parametrize("prompt", [ASKED, LONGER], ids=["one turn", "three turns"])
def test_tokens_are_trls(read, prompt):
    """TRL's own tokenising of a conversational pair; it keeps the line break that the template writes after the stop."""
    row = {"prompt": prompt, "chosen": YES, "rejected": NO}
    tokenizer = processor().tokenizer
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    (expected,) = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, "train")
    (group,) = read(row).groups
    assert group.prompt.tokens.tolist() == expected["prompt_ids"]
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for side, piece in zip(("chosen_ids", "rejected_ids"), group.continuations, strict=True):
        assert piece.tokens.tolist() + line_break == expected[side]


def test_layouts_of_the_same_pair(read):
    """Turns, texts, a mixture, no prompt of its own."""
    groups = read(
        ROW,
        {"prompt": ASKED[0]["content"], "chosen": YES[0]["content"], "rejected": NO[0]["content"]},
        {"prompt": ASKED, "chosen": YES[0]["content"], "rejected": NO, "id": 7},
        {"chosen": ASKED + YES, "rejected": ASKED + NO},
        {"prompt": [turn("user", [{"type": "text", "text": ASKED[0]["content"]}])], "chosen": YES, "rejected": NO},
    ).groups
    assert all(same(group, groups[0]) for group in groups)
    assert [group.id for group in groups] == [0, 1, 2, 3, 4]


def test_earlier_answers_are_context(read, chat):
    (group,) = read({**ROW, "prompt": LONGER}).groups
    assert np.array_equal(group.prompt.tokens, chat.prompt(LONGER).prompt.tokens)
    assert not group.prompt.weight.any()


def test_later_turns_of_an_answer_that_are_not_its_own_weigh_nothing(read, chat):
    (group,) = read({**ROW, "chosen": [*YES, turn("user", "Is it?"), turn("assistant", "Yes.")]}).groups
    kept = group.continuations[0]
    assert chat.tokenizer.decode(kept.tokens[kept.weight > 0]) == (
        "Yes, the heart is large.<end_of_turn>Yes.<end_of_turn>"
    )


def test_images_are_numbered_over_both_answers(read, tmp_path):
    """In prompts and answers; paths in the parts, or in a list beside them."""
    asked = [turn("user", [IMAGE, {"type": "text", "text": "Is it?"}])]
    chosen = [turn("assistant", [{"type": "text", "text": "Yes."}])]
    rejected = [turn("assistant", [OTHER, IMAGE, {"type": "text", "text": "No."}])]
    row = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    bare = json.loads(json.dumps(row).replace(', "image": "film.png"', "").replace(', "image": "other.png"', ""))
    films = ["film.png", "other.png", "film.png"]
    groups = read(
        row,
        {**bare, "images": films},
        {"chosen": bare["prompt"] + bare["chosen"], "rejected": bare["prompt"] + bare["rejected"], "images": films},
    ).groups
    assert all(same(group, groups[0]) for group in groups)
    paths = [str((tmp_path / name).resolve()) for name in ("film.png", "other.png")]
    assert [list(group.images) for group in groups] == [paths] * 3
    group = groups[0]
    assert group.prompt.image[group.prompt.image >= 0].tolist() == [0] * SOFT_TOKENS
    second = group.continuations[1]
    assert second.image[second.image >= 0].tolist() == [1] * SOFT_TOKENS + [0] * SOFT_TOKENS
    assert not second.weight[second.image >= 0].any()


def test_each_answer_may_show_images_of_its_own(read):
    sides = {
        side: [turn("assistant", [{"type": "image", "image": f"{side}.png"}, {"type": "text", "text": "Yes."}])]
        for side in ("chosen", "rejected")
    }
    (group,) = read({"prompt": [turn("user", [IMAGE])], **sides}).groups
    assert [Path(key).name for key in group.images] == ["film.png", "chosen.png", "rejected.png"]
    found = [set(piece.image.tolist()) for piece in (group.prompt, *group.continuations)]
    assert found == [{-1, 0}, {-1, 1}, {-1, 2}]


LONG = [turn("assistant", "Yes. " * 50)]
BAD = {
    "answer with its question": ({**ROW, "chosen": ASKED + YES}, "must begin with an assistant turn"),
    "unweighted": ({**ROW, "chosen": [{**YES[0], "weight": 0}]}, "weight 0"),
    "empty": ({**ROW, "rejected": [turn("assistant", "  ")]}, '"rejected" is empty'),
    "equal": ({**ROW, "rejected": YES}, "same tokens"),
    "equal but for spaces": ({**ROW, "rejected": [turn("assistant", YES[0]["content"] + " ")]}, "same tokens"),
    "a forged turn": ({**ROW, "chosen": [turn("assistant", "Yes.<end_of_turn>")]}, "spells '<end_of_turn>'"),
    "roles": ({**ROW, "prompt": ASKED + ASKED}, "template refuses"),
    "long prompt": ({**ROW, "prompt": [turn("user", "Is it? " * 50)]}, "more than 40"),
    "long answer": ({**ROW, "rejected": LONG}, "more than 30"),
}
LIMITS = {"max_prompt": 40, "max_completion": 30}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named(read, name):
    row, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(ROW, row, **LIMITS)
    assert str(caught.value).startswith("pairs.jsonl:2: ")


def test_pairs_left_out_are_listed(read):
    rows = [row for row, _ in BAD.values()]
    found = read(ROW, *rows, ROW, **LIMITS, on_bad="skip", on_long="skip")
    assert [group.id for group in found.groups] == [0, len(rows) + 1]
    assert [one.name for one in found.left_out] == [f"pairs.jsonl:{i + 2}" for i in range(len(rows))]
    assert all(re.search(message, one.reason) for one, (_, message) in zip(found.left_out, BAD.values(), strict=True))


def test_an_image_that_cannot_be_read_is_the_pairs_fault(read, tmp_path, chat):
    """Families whose images differ in size look at the file before the text is made."""

    def unreadable(key: str) -> int:
        raise (BadImage if "film" in key else FileNotFoundError)(f"no image {key}")

    rows = [{**ROW, "prompt": [turn("user", [part])]} for part in (IMAGE, OTHER)]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, [*rows, ROW])))
    found = learn(tmp_path / "two.jsonl", replace(chat, image_tokens=unreadable), on_bad="skip")
    assert [one.name for one in found.left_out] == ["two.jsonl:1", "two.jsonl:2"]
    assert len(found.groups) == 1
