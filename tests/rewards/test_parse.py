"""Completions are read by one stated rule: every broken form is refused for the right reason, in linear time."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmalign.rewards import parse
from vlmalign.rewards.parse import TAGS, label_index, parse_completion

LABELS = ("Enlarged Cardiomediastinum", "Edema", "Pleural Effusion", "No Finding")
GOOD = "<think>Blunted angle.</think><solution>Pleural Effusion</solution>"


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(parse).failed == 0


def test_a_valid_completion_field_by_field():
    parsed = parse_completion("<think>\n a \n</think>\n<solution>\nEdema\n</solution>\n", LABELS)
    assert parsed == parse.Parsed(
        valid=True,
        reasoning="a",
        predicted=("Edema",),
        unknown=(),
        duplicates=0,
        outside="",
        reason=None,
    )


@pytest.mark.parametrize(
    ("solution", "predicted", "unknown", "duplicates"),
    [
        ("", (), (), 0),
        (" \n ,; ", (), (), 0),
        ("Edema", ("Edema",), (), 0),
        ("Pleural Effusion, Edema", ("Edema", "Pleural Effusion"), (), 0),  # order of the schema
        ("Edema;Pleural Effusion\r\nNo Finding,", ("Edema", "Pleural Effusion", "No Finding"), (), 0),
        ("  eDEMA  ", ("Edema",), (), 0),
        ("pleural \t EFFUSION", ("Pleural Effusion",), (), 0),
        ("Pleural\nEffusion", (), ("Pleural", "Effusion"), 0),  # a line break separates
        ("Edema, edema\nEDEMA", ("Edema",), (), 2),
        ("Flu, Edema, Cold, Flu", ("Edema",), ("Flu", "Cold", "Flu"), 0),  # every mention is kept
        ("Flu", (), ("Flu",), 0),
        ("- Edema", (), ("- Edema",), 0),
        ("1. Edema", (), ("1. Edema",), 0),
        ("Edema.", (), ("Edema.",), 0),
        ("No Edema", (), ("No Edema",), 0),  # a name is matched whole, never searched for
        ("Edema and Pleural Effusion", (), ("Edema and Pleural Effusion",), 0),
    ],
)
def test_the_solution_is_split_matched_and_filtered(solution, predicted, unknown, duplicates):
    parsed = parse_completion(f"<think>x</think><solution>{solution}</solution>", LABELS)
    assert parsed.valid
    assert (parsed.predicted, parsed.unknown, parsed.duplicates) == (predicted, unknown, duplicates)


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
    parsed = parse_completion(text, LABELS)
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
    assert parse_completion(text, LABELS) == parse.Parsed(
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
    assert cpu_seconds(lambda: parse_completion(text, LABELS)) < 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "Edema", ",", "x", "\n"]), max_size=8))
def test_valid_means_the_four_tags_in_order_and_nothing_else_matters(pieces):
    parsed = parse_completion("".join(pieces), LABELS)
    assert parsed.valid == ([piece for piece in pieces if piece in TAGS] == list(TAGS))
    assert parsed.valid == (parsed.reason is None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LABELS)), st.sampled_from([", ", ";", "\n"]))
def test_written_labels_are_read_back(mentions, separator):
    parsed = parse_completion(f"<think></think><solution>{separator.join(mentions)}</solution>", LABELS)
    assert parsed.predicted == tuple(label for label in LABELS if label in mentions)
    assert parsed.duplicates == len(mentions) - len(set(mentions))
    assert parsed.unknown == ()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "at least one name, found none"),
        (("Edema", " "), "without comma, semicolon or line break, found ' '"),
        (("Effusion, left",), "found 'Effusion, left'; rename it"),
        (("Edema", "EDEMA"), "found 'Edema' and 'EDEMA'; drop one"),
        (("No Finding", "No  Finding"), "found 'No Finding' and 'No  Finding'"),
    ],
)
def test_labels_that_could_not_be_read_back_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_index(labels)
