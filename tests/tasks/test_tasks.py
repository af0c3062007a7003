"""Every kind of task keeps the contract: what it writes it reads back as the truth; bad rows and configs are named."""

import doctest
import json
import pickle
from pathlib import Path

import pytest

from vlmalign.config import Config, ConfigError, dump_config, load_config
from vlmalign.rewards.choice import ChoiceReward
from vlmalign.rewards.constraints import ConstraintShare
from vlmalign.tasks import choice_letters, constraints, field_kinds, json_text, labels, prompts
from vlmalign.tasks.choice import ChoiceTask
from vlmalign.tasks.fields import FieldsTask
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.instructions import InstructionsTask
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.prompts import fill
from vlmalign.tasks.tasks import TASKS, AnyTask, taught
from vlmalign.types import Example

FILM = Example("f1", "p1", Path("/films/1.jpg"), ("Edema", "Fracture"), {"age": 61, "trace": "Wings of haze."})
QUESTION = Example(
    "q1", "q1", meta={"question": "Which?", "options": ["one", "two", "three"], "answer": "B", "level": 2}
)
RECORD = Example(
    "r1",
    "p1",
    meta={"text": "AMH 0.5", "strategy": "icsi", "reserve": "Low", "dose": "1.5 kIU", "diagnoses": ["PCOS", "tubal"]},
)
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "weight": 0.0},
    {"role": "user", "content": "Write."},
    {"role": "assistant", "content": "- one"},
]
REQUEST = Example(
    "i1", "i1", meta={"messages": TURNS, "constraints": [{"kind": "bullets"}, {"kind": "words", "high": 2}]}
)

FIELDS = {
    "strategy": {
        "kind": "single",
        "options": ("IVF", "ICSI", "PGT-M"),
        "synonyms": {"IVF": ("in vitro fertilisation",)},
    },
    "reserve": {"kind": "ordinal", "options": ("low", "normal", "high")},
    "dose": {
        "kind": "number",
        "unit": "IU",
        "units": {"kIU": 1000},
        "low": 0,
        "high": 10_000,
        "relative_tolerance": 0.1,
    },
    "diagnoses": {"kind": "list", "synonyms": {"polycystic ovary syndrome": ("PCOS",)}, "required": False},
}
BUILT = {
    "labels": (LabelsTask(prompt="Read this film of a {age}-year-old.", labels="chexpert"), FILM),
    "choice": (ChoiceTask(), QUESTION),
    "fields": (FieldsTask(prompt="{text}\nAnswer as JSON.", fields=FIELDS), RECORD),
    "instructions": (InstructionsTask(), REQUEST),
    "free": (FreeTask(), REQUEST),
}


class Study(Config):
    tasks: dict[str, AnyTask]


def study(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_config(Study, path)


def test_a_film_without_a_trace_is_named_where_others_have_one():
    task = LabelsTask(prompt="Read.", labels="chexpert")
    assert task.write(Example("f", "p", Path("f"), ("Edema",))).startswith("<think>I see edema.</think>")
    with pytest.raises(ValueError, match="f: there is no trace for it; write one, or leave it out with on_bad: skip"):
        task.write(Example("f", "p", Path("f"), ("Edema",), {"trace": None}))
    alone = LabelsTask(prompt="Read.", labels="chexpert", form="solution")
    assert alone.write(Example("f", "p", Path("f"), ("Edema",), {"trace": None})) == "<solution>Edema</solution>"


def test_examples_in_the_documentation_hold():
    for module in (choice_letters, constraints, field_kinds, json_text, labels, prompts):
        assert doctest.testmod(module).failed == 0


# The contract


def test_every_kind_is_under_contract():
    assert set(BUILT) == set(TASKS)
    assert all(type(BUILT[kind][0]) is TASKS[kind] and BUILT[kind][0].kind == kind for kind in TASKS)


@pytest.fixture(params=sorted(TASKS))
def kind(request):
    return request.param


def test_the_question_ends_with_a_users_turn_and_the_row_is_left_alone(kind):
    task, example = BUILT[kind]
    before = json.dumps(dict(example.meta))
    assert task.ask(example)[-1]["role"] == "user"
    assert taught(task, example)[-1]["role"] == "assistant"
    task.columns(example)
    assert json.dumps(dict(example.meta)) == before


def test_what_is_written_is_read_back_as_the_truth(kind):
    task, example = BUILT[kind]
    facts = task.read(task.write(example), task.columns(example))
    assert facts.valid
    assert (facts.unknown, facts.reason) == ((), None)
    json.dumps(facts.values)
    json.dumps(task.truth(example))
    if kind in ("labels", "choice", "fields"):
        assert facts.values == task.truth(example)


def test_an_answer_of_rubbish_is_facts_too(kind):
    task, example = BUILT[kind]
    for text in ("", "\x00 ﷽ </solution><think>" * 9, "{" * 5000, "[" * 5000, "I cannot tell."):
        facts = task.read(text, task.columns(example))
        assert (facts.reason is None) == facts.valid
        json.dumps([facts.values, list(facts.unknown), facts.reasoning, facts.reason])


def test_it_is_frozen_pickles_and_survives_its_yaml(kind, tmp_path):
    task, _ = BUILT[kind]
    assert pickle.loads(pickle.dumps(task)) == task
    with pytest.raises(Exception, match="frozen"):
        task.kind = "other"
    assert study(tmp_path, dump_config(Study(tasks={"mine": task}))).tasks["mine"] == task


def test_columns_give_the_rows_own_and_the_truth(kind):
    task, example = BUILT[kind]
    columns = task.columns(example)
    assert "messages" not in columns
    assert set(example.meta) - {"messages"} <= set(columns)
    if kind != "free":
        assert columns["truth"] == task.truth(example)


# Prompts


def test_a_prompt_is_filled_with_columns():
    columns = {"a": 1, "b": "x{a}", "c": ["y"], "d": None}
    assert fill("{a} {b} {c} {d}|", columns) == '1 x{a} ["y"] |'
    assert fill('{{a}} {"a": {"b": {a}}} { a }', columns) == '{a} {"a": {"b": 1}} { a }'
    with pytest.raises(
        ValueError, match=r"the prompt names the column 'e', found a, b, c, d; add it, or write \{\{e\}\}"
    ):
        fill("{e}", columns)


# Labels


def test_a_labels_question_states_names_and_separator():
    quickstart = "Read this chest film. Give your reasoning, then the labels."
    task = LabelsTask(prompt=quickstart, labels="chexpert", state_separator=False)
    assert task.ask(FILM) == [
        {
            "role": "user",
            "content": [{"type": "image", "image": "/films/1.jpg"}, {"type": "text", "text": quickstart}],
        }
    ]
    assert LabelsTask(prompt=quickstart, labels="chexpert").question == f"{quickstart} Separate the labels with commas."
    for stated in ("One of {labels}, separated by commas.", "One label per line: {labels}"):
        question = LabelsTask(prompt=stated, labels=("a", "b")).question
        assert question == stated.replace("{labels}", "a, b")
    own = LabelsTask(prompt="Name {labels}.", labels=("fluid, left", "fluid"))
    assert own.question == "Name fluid, left; fluid. Separate the labels with semicolons."
    assert LabelsTask(prompt="Name.", labels=("a, b", "c; d")).question == "Name. Write one label per line."


@pytest.mark.parametrize(
    ("form", "labels", "text"),
    [
        ("think", ("Edema", "Fracture"), "<think>Wings of haze.</think><solution>Edema, Fracture</solution>"),
        ("think", (), "<think>Wings of haze.</think><solution></solution>"),
        ("solution", ("Edema",), "<solution>Edema</solution>"),
        ("plain", ("Edema", "Fracture"), "Edema, Fracture"),
        ("plain", (), "none"),
    ],
)
def test_labels_are_written_and_read_in_every_form(form, labels, text):
    task = LabelsTask(prompt="?", labels="chexpert", form=form)
    example = Example("1", "p", FILM.image, labels, FILM.meta)
    assert task.write(example) == text
    assert task.read(text, {}).values == list(labels)


def test_a_film_without_a_trace_gets_one_that_names_its_labels():
    example = Example("1", "p", FILM.image, ("Edema",))
    assert BUILT["labels"][0].write(example) == "<think>I see edema.</think><solution>Edema</solution>"


def test_labels_are_read_with_synonyms_and_notes():
    task = LabelsTask(prompt="?", labels=("Edema", "Clear"), normal="Clear", synonyms={"Edema": ("oedema",)})
    facts = task.read("So: <think>x</think><solution>- Oedema\n- clear.\n- oedema\n- Flu</solution>", {})
    assert (facts.valid, facts.values, facts.unknown, facts.reasoning) == (True, ["Edema", "Clear"], ("Flu",), "x")
    assert facts.notes == {"duplicates": 1, "outside": "So:", "contradiction": True}
    assert not task.read("<think></think><solution>Clear</solution>", {}).notes["contradiction"]
    assert not task.read("Edema", {}).valid
    assert LabelsTask(prompt="?", labels="chexpert").excludes == "No Finding"
    assert LabelsTask(prompt="?", labels=("a", "b")).excludes is None


# Choice


@pytest.mark.parametrize(
    ("meta", "truth"),
    [
        ({"options": ["x", "y", "z"], "answer": "C"}, "C"),
        ({"options": ["x", "y", "z"], "answer": 1}, "B"),
        ({"options": {"A": "x", "B": "y", "C": "z"}, "answer": "c, a"}, "AC"),
        ({"options": ["x", "y"], "answer": None}, None),
        ({"options": ["x", "y"]}, None),
    ],
)
def test_options_and_answers_as_tables_have_them(meta, truth):
    task = ChoiceTask(prompt="{question} {options}")
    example = Example("q", "q", meta={"question": "Which?", **meta})
    assert task.truth(example) == truth
    assert task.ask(example)[0]["content"].startswith("Which? A. x\nB. y")
    columns = task.columns(example)
    assert columns["options"]["B"] == "y"
    if truth is None:
        with pytest.raises(ValueError, match="q has no answer in column 'answer'"):
            task.write(example)
    else:
        assert ChoiceReward()(["p"], [task.write(example)], **{k: [v] for k, v in columns.items()}) == [1.0]


@pytest.mark.parametrize(
    ("text", "values", "valid"),
    [
        ("The answer is B.", "B", True),
        ("<think>A or C</think>C", "C", True),
        ("Answer: D", None, False),  # not one of the three options
        ("A or B", None, False),
        ("", None, False),
    ],
)
def test_a_choice_is_read_among_the_rows_options(text, values, valid):
    task, example = BUILT["choice"]
    facts = task.read(text, task.columns(example))
    assert (facts.values, facts.valid) == (values, valid)
    assert facts.reasoning == ("A or C" if "think" in text else "")


def test_a_choice_with_reasoning():
    task = ChoiceTask(form="think")
    told = Example("q", "q", meta={**QUESTION.meta, "trace": "It is two."})
    assert task.write(told) == "<think>It is two.</think><solution>B</solution>"
    assert task.read("B", task.columns(told)).reason.startswith("expected one <think>")
    with pytest.raises(ValueError, match="q1 has no column 'trace', found answer, level, options, question"):
        task.write(QUESTION)


# Fields


def test_fields_are_written_in_both_layouts():
    task, _ = BUILT["fields"]
    truth = {"strategy": "ICSI", "reserve": "low", "dose": 1500.0, "diagnoses": ["polycystic ovary syndrome", "tubal"]}
    assert task.truth(RECORD) == truth
    told = '{"strategy": "ICSI", "reserve": "low", "dose": 1500, "diagnoses": ["polycystic ovary syndrome", "tubal"]}'
    assert task.write(RECORD) == told
    tagged = task.model_copy(update={"layout": "tags"})
    assert tagged.write(RECORD) == (
        "<strategy>ICSI</strategy><reserve>low</reserve><dose>1500</dose>"
        "<diagnoses>polycystic ovary syndrome, tubal</diagnoses>"
    )
    for each in (task, tagged):
        assert each.read(each.write(RECORD), {}).values == truth


def test_a_list_without_known_names_stands_as_it_is_written():
    task = FieldsTask(prompt="?", fields={"found": {"kind": "list"}}, columns_of={"found": "final"})
    example = Example("1", "1", meta={"final": "Tubal factor; AMH low"})
    assert task.truth(example) == {"found": ["tubal factor", "amh low"]}
    assert task.read('{"found": ["amh LOW.", "Tubal_factor"]}', {}).values == {"found": ["amh low", "tubal factor"]}


GIVEN = {"strategy": "ICSI", "reserve": "low", "dose": 1500.0, "diagnoses": None}
ANSWERS = [
    # (answer, values that differ from GIVEN, unknown, reason)
    ('{"strategy": "ICSI", "reserve": "low", "dose": 1500}', {}, (), None),
    ('```json\n{"Strategy": "icsi.", "RESERVE": "Low", "dose": "1,500 IU"}\n```', {}, (), None),
    ('The plan: {"strategy": "ICSI", "reserve": "low", "dose": "1.5 kIU"} as agreed.', {}, (), None),
    ('{"strategy": "In-Vitro", "reserve": "low", "dose": 1500}', {"strategy": None}, ('strategy: "In-Vitro"',), "the field strategy is not one of the options"),
    ('{"strategy": "ICSI or IVF", "reserve": "low", "dose": 1500}', {"strategy": None}, ('strategy: "ICSI or IVF"',), "the field strategy is not one of the options"),
    ('{"strategy": "in vitro fertilisation", "reserve": "low", "dose": 1500}', {"strategy": "IVF"}, (), None),
    ('{"strategy": "ICSI", "reserve": "low"}', {"dose": None}, (), "the field dose is missing"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": null}', {"dose": None}, (), "the field dose is missing"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": "5 mg"}', {"dose": None}, ('dose: "5 mg"',), "the field dose has an unknown unit"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": "150-225 IU"}', {"dose": None}, ('dose: "150-225 IU"',), "the field dose has an unknown unit"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": "1,5"}', {"dose": None}, ('dose: "1,5"',), "the field dose has an unknown unit"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": "many"}', {"dose": None}, ('dose: "many"',), "the field dose is not one number"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": -1}', {"dose": None}, ("dose: -1",), "the field dose is out of range"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": true}', {"dose": None}, ("dose: true",), "the field dose is neither a text nor a number"),
    ('{"strategy": "ICSI", "reserve": "low", "dose": 1500, "colour": "red"}', {}, ("colour",), None),
    ('{"strategy": "ICSI", "reserve": "low", "dose": 1500, "diagnoses": "PCOS and flu"}', {"diagnoses": ["polycystic ovary syndrome", "flu"]}, (), None),
    ("ICSI", dict.fromkeys(GIVEN), (), "expected one JSON object"),
    ('{"strategy": "ICSI"} {"strategy": "IVF"}', dict.fromkeys(GIVEN), (), "expected one JSON object"),
    ('{"strategy": "ICSI", "strategy": "IVF"}', dict.fromkeys(GIVEN), (), "expected one JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "differ", "unknown", "reason"), ANSWERS)
def test_fields_are_read_one_by_one(text, differ, unknown, reason):
    facts = BUILT["fields"][0].read(text, {})
    assert facts.values == GIVEN | differ
    assert (facts.unknown, facts.reason, facts.valid) == (unknown, reason, reason is None)


@pytest.mark.parametrize(
    ("text", "values", "reason"),
    [
        ("<a>x</a>", {"a": "x"}, None),
        ("so <a> X. </a> and so on", {"a": "x"}, None),
        ("", {"a": None}, "expected an answer, found no text"),
        ("x", {"a": None}, "the field a is missing"),
        ("<a>x</a><a>y</a>", {"a": None}, "expected one <a> and one </a>, found 2 and 2"),
        ("<a>x", {"a": None}, "expected one <a> and one </a>, found 1 and 0"),
        ("</a>x<a>", {"a": None}, "expected <a> before </a>, found them the other way round"),
    ],
)
def test_tagged_fields(text, values, reason):
    task = FieldsTask(prompt="?", fields={"a": {"kind": "single", "options": ("x", "y")}}, layout="tags")
    facts = task.read(text, {})
    assert (facts.values, facts.reason) == (values, reason)


# Instructions and free


def test_instructions_are_checked_in_the_answer():
    task, example = BUILT["instructions"]
    columns = task.columns(example)
    assert task.ask(example) == TURNS[:3]
    assert task.read("<think>a b c d</think>- one", columns).values == [True, True]
    assert task.read("one two three", columns).values == [False, False]
    assert ConstraintShare()(["p"], ["- one two"], constraints=[columns["constraints"]]) == [0.5]
    asked = InstructionsTask(prompt="Please: {prompt}")
    row = Example("i", "i", meta={"prompt": "List.", "constraints": [], "answer": "- a"})
    assert asked.ask(row) == [{"role": "user", "content": "Please: List."}]
    assert asked.write(row) == "- a"


def test_a_free_row_is_taught_with_its_own_weights():
    task, example = BUILT["free"]
    assert task.ask(example) == TURNS[:3]
    assert task.write(example) == "- one"
    assert taught(task, example) == TURNS
    parts = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert task.write(Example("1", "1", meta={"messages": parts})) == "a"
    facts = task.read("<think>x</think> y", {})
    assert (facts.values, facts.reasoning, facts.valid) == ("<think>x</think> y", "x", True)


# Mistakes


def example(**meta):
    return Example("row 7", "p", meta=meta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BUILT["labels"][0].ask(example()), "the prompt names the column 'age', found no columns"),
        (
            lambda: BUILT["labels"][0].write(Example("f", "p", None, ("Oedema",))),
            r"f: unknown label 'Oedema' in the labels of the task \(nearest known: Edema\)",
        ),
        (lambda: ChoiceTask().ask(example(options=["a", "b"])), "row 7 has no column 'question', found options"),
        (lambda: ChoiceTask().truth(example(options=["a"])), "must hold 2 to 26 options"),
        (lambda: ChoiceTask().truth(example(options={"1": "a", "2": "b"})), "capital letter and text, found dict"),
        (lambda: ChoiceTask().truth(example(options=["a", "b"], answer="E")), "row 7: column 'answer' must hold letters among AB"),
        (lambda: ChoiceTask().truth(example(options=["a", "b"], answer=2)), "letters among AB or the index"),
        (lambda: ChoiceTask().truth(example(options=["a", "b"], answer=True)), "letters among AB or the index"),
        (lambda: BUILT["fields"][0].truth(example(dose="SECRET")), "row 7: the true value of field 'dose' is not one number; correct"),
        (lambda: BUILT["fields"][0].write(example(dose=5)), "row 7 has no value for the field 'strategy'"),
        (lambda: InstructionsTask().truth(example()), "row 7 has no column 'constraints'"),
        (lambda: InstructionsTask().truth(example(constraints="json")), "must hold a list of objects"),
        (lambda: InstructionsTask().truth(example(constraints=[{"kind": "rhyme"}])), "found 'rhyme'"),
        (lambda: FreeTask().ask(example()), "row 7 has no column 'messages'"),
        (lambda: FreeTask().ask(example(messages=TURNS[1:2])), "found no turn"),
        (lambda: FreeTask().ask(example(messages=[{"role": "system", "content": "x"}])), "found system"),
        (lambda: taught(FreeTask(), example(messages=TURNS[:3])), "do not end with an answer"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked_or_taught_are_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{kind: labels, prompt: x, labels: chexprt}", "one of chexpert, nih14, chexpert9, found 'chexprt'"),
        ("{kind: labels, prompt: x, labels: [a, A]}", "found 'a' and 'A'; drop one"),
        ("{kind: labels, prompt: x, labels: [null, b]}", "tasks.t.labels"),
        ("{kind: labels, prompt: x, labels: [a, b], normal: c}", "unknown label 'c' in labels"),
        ("{kind: labels, prompt: x, labels: [a, b], synonyms: {c: [d]}}", "found 'c'; correct its spelling"),
        ("{kind: labels, prompt: x, labels: [a, b], form: free}", "expected 'think', 'solution' or 'plain'"),
        ("{kind: fields, prompt: x, fields: {}}", "at least one field, found none"),
        ("{kind: fields, prompt: x, fields: {think: {kind: list}}}", "found 'think'; rename it"),
        ("{kind: fields, prompt: x, fields: {a: {kind: list}, A: {kind: list}}}", "differ in more than case"),
        ("{kind: fields, prompt: x, fields: {a: {kind: list, closed: true}}}", "a closed list needs names"),
        ("{kind: fields, prompt: x, fields: {a: {kind: number, units: {g: 1}}}}", "set unit"),
        (
            "{kind: fields, prompt: x, fields: {a: {kind: list}}, columns_of: {b: c}}",
            "the field 'b', expected one of a",
        ),
        ("{kind: field, prompt: x}", "the nearest is 'fields'"),
    ],
)
def test_mistakes_in_a_config_are_told(section, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, f"tasks:\n  t: {section}\n")
