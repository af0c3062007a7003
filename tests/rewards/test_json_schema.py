"""JSON answers are read strictly, and every keyword of the subset means what JSON Schema says."""

import pytest

from vlmalign.rewards.json_answer import JsonReward
from vlmalign.rewards.json_schema import check_schema, violations
from vlmalign.tasks.json_text import read_json

DOSE = {
    "type": "object",
    "properties": {
        "drug": {"type": "string", "enum": ["rFSH", "hMG"]},
        "units": {"type": "integer", "minimum": 75, "maximum": 450},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "note": {"type": ["string", "null"], "maxLength": 5},
    },
    "required": ["drug", "units"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"drug": "hMG", "units": 150}', []),
        ('{"drug": "hMG", "units": 150.0, "days": [1, 2], "note": null}', []),
        ('{"units": 150}', ["$.drug is missing"]),
        ('{"drug": "FSH", "units": 150}', ["$.drug is not one of the 2 values allowed"]),
        ('{"drug": 1, "units": 150}', ["$.drug is not string"]),
        ('{"drug": "hMG", "units": "150"}', ["$.units is not integer"]),
        ('{"drug": "hMG", "units": true}', ["$.units is not integer"]),
        ('{"drug": "hMG", "units": 150.5}', ["$.units is not integer"]),
        ('{"drug": "hMG", "units": 74}', ["$.units is below 75"]),
        ('{"drug": "hMG", "units": 451}', ["$.units is above 450"]),
        ('{"drug": "hMG", "units": 75, "days": []}', ["$.days violates minItems 1"]),
        ('{"drug": "hMG", "units": 75, "days": [1, "x", 3, 4]}', ["$.days violates maxItems 3", "$.days[1] is not integer"]),
        ('{"drug": "hMG", "units": 75, "note": "longer"}', ["$.note violates maxLength 5"]),
        ('{"drug": "hMG", "units": 75, "more": 1}', ["$ has a property that is not allowed"]),
        ("[]", ["$ is not object"]),
    ],
)  # fmt: skip
def test_violations_by_hand(text, wrong):
    assert violations(read_json(text), DOSE) == wrong
    assert JsonReward(DOSE).score(text) == float(not wrong)


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [(1, [1.0], True), (True, [1], False), (0, [False], False), ([1, {"a": True}], [[1, {"a": True}]], True),
     ([True], [[1]], False), ({"a": 1}, [{"a": True}], False), (None, [None], True)],
)  # fmt: skip
def test_true_is_not_one(value, options, allowed):
    assert (violations(value, {"enum": options}) == []) == allowed


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "-Infinity", "1e999", '{"a": 1, "a": 2}', "[" * 100_000, "1 2", "{'a': 1}", "1" * 10_000, "True"],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_not_json_scores_nothing(text):
    with pytest.raises(ValueError):
        read_json(text)
    assert JsonReward({}).score(text) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think><solution>{}</solution>", 1.0),
        ("<think>x</think> {}", 1.0),
        ("```json\n{}\n```", 1.0),
        ("```\n{}\n```", 1.0),
        ("Here it is: {}", 0.0),
        ("```json\n{}\n``` as asked", 0.0),
        ("```json\n{}\n```\n```json\n{}\n```", 0.0),
    ],
)
def test_where_the_answer_stands(text, expected):
    assert JsonReward({"type": "object"}).score(text) == expected


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"pattern": "a"}, r"schema: expected keywords among .* found \['pattern'\]; leave them out"),
        ({"properties": {"a": {"oneOf": []}}}, r"schema.a: .* found \['oneOf'\]"),
        ({"items": {"type": "text"}}, r"schema\[\]: type must be one of .* found 'text'"),
        ({"minimum": "3"}, "minimum must be a number, found '3'"),
        ({"required": "drug"}, "required must not be a str"),
        ({"additionalProperties": {}}, "additionalProperties must be true or false"),
    ],
)
def test_a_schema_that_would_not_be_checked_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        check_schema(schema)
    with pytest.raises(ValueError, match=message):
        JsonReward(schema)
