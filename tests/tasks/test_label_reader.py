"""Completions are read by one stated rule: every broken form is refused for the right reason, in linear time."""

import doctest
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmalign.tasks import blocks, label_reader
from vlmalign.tasks.blocks import TAGS, answer_of, in_blocks, read_blocks, reasoning_of
from vlmalign.tasks.label_reader import LabelReader, Parsed

LABELS = ("Enlarged Cardiomediastinum", "Edema", "Pleural Effusion", "No Finding")
READER = LabelReader(LABELS)
GOOD = "<think>Blunted angle.</think><solution>Pleural Effusion</solution>"


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(blocks).failed == 0
    assert doctest.testmod(label_reader).failed == 0


def test_a_valid_completion_field_by_field():
    parsed = READER.read("<think>\n a \n</think>\n<solution>\nEdema\n</solution>\n")
    assert parsed == Parsed(
        valid=True,
        reasoning="a",
        predicted=("Edema",),
        unknown=(),
        duplicates=0,
        outside="",
        reason=None,
    )


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        (GOOD, ""),
        (f" \n{GOOD}\n ", ""),
        (GOOD.replace("</think>", "</think>\n\n"), ""),
        (f"Sure! {GOOD}", "Sure!"),
        (f"{GOOD}<end_of_turn>", "<end_of_turn>"),
        (f"a {GOOD.replace('</think>', '</think> b ')} c", "a\nb\nc"),
    ],
)
def test_text_outside_the_blocks_is_kept_apart_and_does_not_invalidate(text, outside):
    parsed = READER.read(text)
    assert (parsed.valid, parsed.predicted, parsed.outside) == (True, ("Pleural Effusion",), outside)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            "",
            "expected one <think>, found 0; expected one </think>, found 0"
            "; expected one <solution>, found 0; expected one </solution>, found 0",
            id="empty",
        ),
        pytest.param(
            "<think>a, and then the tokens ran out",
            "expected one </think>, found 0; expected one <solution>, found 0; expected one </solution>, found 0",
            id="truncated in the reasoning",
        ),
        pytest.param(
            "<think>a</think><solution>Edema",
            "expected one </solution>, found 0",
            id="truncated in the solution",
        ),
        pytest.param(
            "<solution>Edema</solution>",
            "expected one <think>, found 0; expected one </think>, found 0",
            id="no reasoning block",
        ),
        pytest.param("<think>a<solution>Edema</solution>", "expected one </think>, found 0", id="think never closed"),
        pytest.param("a</think><solution>Edema</solution>", "expected one <think>, found 0", id="think never opened"),
        pytest.param(
            f"{GOOD}<solution>Edema</solution>",
            "expected one <solution>, found 2; expected one </solution>, found 2",
            id="two solutions",
        ),
        pytest.param(
            f"<think>b</think>{GOOD}",
            "expected one <think>, found 2; expected one </think>, found 2",
            id="two think blocks",
        ),
        pytest.param(
            "<think>a<think>b</think></think><solution>Edema</solution>",
            "expected one <think>, found 2; expected one </think>, found 2",
            id="think within think",
        ),
        pytest.param(
            "<think>the <solution> will be Edema</think><solution>Edema</solution>",
            "expected one <solution>, found 2",
            id="tag mentioned in the reasoning",
        ),
        pytest.param(
            "<think>a<solution>Edema</solution></think>",
            "expected the order <think> </think> <solution> </solution>, found <think> <solution> </solution> </think>",
            id="solution within think",
        ),
        pytest.param(
            "<solution>Edema</solution><think>a</think>",
            "expected the order <think> </think> <solution> </solution>, found <solution> </solution> <think> </think>",
            id="reversed blocks",
        ),
        pytest.param(
            "</think>a<think></solution>Edema<solution>",
            "expected the order <think> </think> <solution> </solution>, found </think> <think> </solution> <solution>",
            id="reversed tags",
        ),
        pytest.param(
            "<Think>a</Think><solution>Edema</solution>",
            "expected one <think>, found 0; expected one </think>, found 0",
            id="tag in another case",
        ),
        pytest.param(
            "< think >a</think><solution>Edema</solution>",
            "expected one <think>, found 0",
            id="spaces in a tag",
        ),
        pytest.param(
            "<think>a</think><solution>Edema<solution>",
            "expected one <solution>, found 2; expected one </solution>, found 0",
            id="slash forgotten",
        ),
    ],
)
def test_a_broken_completion_says_nothing_but_its_reason(text, reason):
    assert READER.read(text) == Parsed(
        valid=False, reasoning="", predicted=(), unknown=(), duplicates=0, outside="", reason=reason
    )


@pytest.mark.parametrize(
    "text",
    [
        "<" * 2_000_000,
        "<think" * 300_000,
        "<think>" * 300_000,
        "<think></think><solution>" * 80_000,
        f"<think>{' ' * 2_000_000}</think><solution>{' ' * 2_000_000}x</solution>",
        f"<think></think><solution>{'Edema,x;' * 250_000}</solution>",
    ],
    ids=["brackets", "half tags", "tags", "blocks", "spaces", "names"],
)
def test_two_million_characters_take_linear_time(text, cpu_seconds):
    # about 0.3 s; quadratic time would be hours
    assert cpu_seconds(lambda: READER.read(text)) < 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "Edema", ",", "x", "\n"]), max_size=8))
def test_valid_means_the_four_tags_in_order_and_nothing_else_matters(pieces):
    parsed = READER.read("".join(pieces))
    assert parsed.valid == ([piece for piece in pieces if piece in TAGS] == list(TAGS))
    assert parsed.valid == (parsed.reason is None)


FORMS = [
    # text                                       think  solution  plain: the answer read, None if the form is wrong
    ("<think>a</think><solution>B</solution>", "B", "B", "B"),
    ("<solution>B</solution>", None, "B", "B"),
    ("So: <solution>B</solution>", None, "B", "B"),
    ("<solution></solution>", None, "", ""),
    ("<think>a</think> B", None, None, "B"),
    ("B", None, None, "B"),
    ("", None, None, None),
    ("<think>a</think>", None, None, None),
    ("<think>a", None, None, None),
    ("a</think>B", None, None, None),
    ("<solution>B", None, None, None),
    ("<solution>B</solution><solution>B</solution>", None, None, None),
    ("<solution>B</solution><think>a</think>", None, None, None),
]


@pytest.mark.parametrize(("text", "think", "solution", "plain"), FORMS)
def test_each_form_takes_its_own_tags(text, think, solution, plain):
    for form, expected in (("think", think), ("solution", solution), ("plain", plain)):
        found = read_blocks(text, form)
        assert (found.solution if found.reason is None else None) == expected
        assert found.reason is None or (found.reasoning, found.solution, found.outside) == ("", "", "")


@pytest.mark.parametrize(
    ("form", "text", "reason"),
    [
        ("solution", "B", "expected one <solution>, found 0; expected one </solution>, found 0"),
        ("solution", "<think>a</think>B", "expected one <solution>, found 0; expected one </solution>, found 0"),
        ("plain", "<think>a", "expected one </think>, found 0"),
        ("plain", "B</solution>", "expected one <solution>, found 0"),
        ("plain", " \n", "expected an answer, found no text"),
        (
            "plain",
            "</think><think>",
            "expected the order <think> </think>, found </think> <think>",
        ),
    ],
)
def test_the_other_forms_say_what_is_wrong(form, text, reason):
    assert read_blocks(text, form).reason == reason


def test_what_is_written_in_a_form_is_read_in_it():
    for form in ("think", "solution", "plain"):
        found = read_blocks(in_blocks(form, "why", "B"), form)
        assert (found.solution, found.outside, found.reason) == ("B", "", None)
        assert found.reasoning == ("why" if form == "think" else "")


def test_where_the_answer_and_the_reasoning_stand():
    assert answer_of("<solution> B </solution> and so on") == "B"
    assert answer_of("<think>a</think>b</think> c") == "c"
    assert reasoning_of("<think>a</think> B") == "a"
    assert reasoning_of("<think>a") == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LABELS)), st.sampled_from([", ", ";", "\n", " and ", "\n- ", "|", "、"]))
def test_written_labels_are_read_back(mentions, separator):
    parsed = READER.read(f"<think></think><solution>{separator.join(mentions)}</solution>")
    assert parsed.predicted == tuple(label for label in LABELS if label in mentions)
    assert parsed.duplicates == len(mentions) - len(set(mentions))
    assert parsed.unknown == ()
    assert parsed.says_nothing == (not mentions)


def test_an_answer_of_unknown_names_says_something():
    assert not READER.read("<think></think><solution>flu</solution>").says_nothing
    assert not READER.read("flu").says_nothing


def test_a_reader_is_plain_data():
    reader = LabelReader(LABELS, (("Edema", ("oedema",)),), "solution")
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert reader.read("<solution>Oedema.</solution>").predicted == ("Edema",)
    assert label_reader.label_reader(reader) is reader
    assert label_reader.label_reader(LABELS) == READER
    with pytest.raises(ValueError, match=r"truth must hold labels of the schema .* found \['Flu'\]; map or drop"):
        reader.true_set(["Edema", "Flu"])
