"""Protocol and material: what is read, what is refused and with which words, and how answers are made alike."""

import json

import pytest
from PIL import Image
from reader_studies import write_rows, write_study

from vlmalign.config import ConfigError
from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.review.protocol import Rendering, load_protocol
from vlmalign.review.reading import load_study
from vlmalign.review.rendering import form_counts, render


@pytest.mark.parametrize(
    ("rule", "text", "shown"),
    [
        ({}, "<think>Why.</think>\n<solution>Edema</solution>", "Why.\nEdema"),
        ({"hide": ["think"]}, "<think>Why.</think>\n<solution>Edema</solution>", "Edema"),
        ({"hide": ["think"]}, "Edema <think>cut off", "Edema"),
        ({}, "## Plan ##\nIVF", "Plan\nIVF"),
        ({"headings": "remove"}, "## Plan\n**Advice:**\nIVF", "IVF"),
        ({"headings": "keep"}, "## Plan\nIVF", "## Plan\nIVF"),
        ({}, "Plan\n====\nIVF", "Plan\nIVF"),
        ({}, "a **bold** and *it* `code`\n* one\n+ two\n• three", "a bold and it code\n- one\n- two\n- three"),
        ({"markdown": False}, "a **bold**", "a **bold**"),
        ({}, "```json\n{}\n```", "{}"),
        ({"remove": ["^As an AI.*$"]}, "As an AI, I think.\nIVF", "IVF"),
        ({}, "a\r\n\n\n\nb  \n", "a\n\nb"),
        ({}, "if a < b and c > d then <3", "if a < b and c > d then <3"),
        ({}, "2 * 3 * 4 and 5_000_000", "2 * 3 * 4 and 5_000_000"),
        ({}, "<script>alert(1)</script>", "alert(1)"),
    ],
)
def test_answers_are_made_alike(rule, text, shown):
    assert render(Rendering(**{key: tuple(v) if isinstance(v, list) else v for key, v in rule.items()}), text) == shown


def test_rendering_is_done_once_and_for_all():
    text = "# A\n- **b** `c`\n\n\n\n<x>d</x>"
    once = render(Rendering(), text)
    assert render(Rendering(), once) == once
    assert form_counts(once) == {"words": 4, "list_marks": 1, "headings": 0, "emphasis": 0}


def broken(tmp_path, **changes):
    with pytest.raises(ConfigError) as error:
        load_protocol(write_study(tmp_path, **changes))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"readers": ["R01", "R01"]}, "people need different names, found twice: R01"),
        ({"readers": ["R 01"]}, "readers.0"),
        ({"design": {"readers_per_case": 5}}, "design.readers_per_case is 5, but there are 2 readers"),
        ({"design": {"answers": 3}}, "design.answers is 3, but there are 2 arms"),
        ({"design": {"answers": 1}}, "a preference needs design.answers of at least 2"),
        ({"replacements": {"R03": "R77"}}, "replacements: expected readers, found R77"),
        ({"rendering": {"remove": ["("]}}, "not a regular expression"),
        ({"form": {"preference": False, "criteria": {}}}, "asks nothing"),
        ({"form": {"criteria": {"Bad Key": "x"}}}, "form.criteria"),
        ({"desing": {}}, "desing: unknown key; the nearest known key is design"),
    ],
)
def test_mistakes_in_a_protocol_are_named(tmp_path, changes, words):
    assert words in broken(tmp_path, **changes)


@pytest.mark.parametrize(
    ("guess", "words"),
    [
        ("", "`guess` is missing"),
        ("another model", "there is nothing to guess"),
        ("trained as Zebra-SFT was", "names the arm 'zebra-sft'"),
    ],
)
def test_guesses_must_be_guessable_and_name_no_arm(tmp_path, guess, words):
    path = write_study(tmp_path)
    sections = read_yaml(path.read_text())
    sections["arms"]["zebra-sft"]["guess"] = guess
    path.write_text(write_yaml(sections))
    with pytest.raises(ConfigError, match=words):
        load_protocol(path)


def change_answers(tmp_path, change, arm=0):
    path = tmp_path / f"secret-answers-{arm}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, change(rows))


def test_cases_without_an_answer_are_refused_or_counted(tmp_path):
    path = write_study(tmp_path)
    change_answers(tmp_path, lambda rows: rows[2:])
    with pytest.raises(
        ValueError, match=r"2 of 8 cases lack an answer \(2 no answer from zebra-sft\): secret-file-000.png, secret-f"
    ):
        load_study(path)
    path = write_study(tmp_path, design={"on_missing": "skip", "guesses": 1})
    change_answers(tmp_path, lambda rows: rows[2:])
    material = load_study(path).material
    assert len(material.cases) == 6
    assert material.left_out == (
        ("secret-file-000.png", "no answer from zebra-sft"),
        ("secret-file-001.png", "no answer from zebra-sft"),
    )
    assert "2 cases are left out, since an arm does not answer them" in material.notes


def test_arms_with_the_same_answers_are_refused_and_single_ones_counted(tmp_path):
    path = write_study(tmp_path)
    other = [json.loads(line) for line in (tmp_path / "secret-answers-1.jsonl").read_text().splitlines()]
    change_answers(tmp_path, lambda rows: other[:3] + rows[3:])
    assert any("give the same answer to 3 of 8 cases" in note for note in load_study(path).material.notes)
    change_answers(tmp_path, lambda rows: other)
    with pytest.raises(ValueError, match="give the same answer to every case"):
        load_study(path)


def test_answers_that_name_an_arm_are_counted(tmp_path):
    path = write_study(tmp_path, title="Zebra-SFT and others")
    change_answers(
        tmp_path,
        lambda rows: [{**row, "answer": "I am zebra-sft." if i < 2 else row["answer"]} for i, row in enumerate(rows)],
    )
    notes = load_study(path).material.notes
    assert "2 answers hold the word 'zebra-sft', the name of an arm; see rendering.remove if it tells" in notes
    assert "the title holds the word 'zebra-sft', the name of an arm" in notes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows, rows[0]], "'secret-file-000.png' is answered twice"),
        (lambda rows: [{"id": "a"}], "expected 'answer', found no such entry"),
        (lambda rows: [{**row, "id": "other" + row["id"]} for row in rows], "8 of 8 cases lack an answer"),
        (lambda rows: [], "holds no rows"),
    ],
)
def test_mistakes_in_answers_are_named(tmp_path, change, words):
    path = write_study(tmp_path)
    change_answers(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        load_study(path)


def test_films_cannot_leave_their_folder(tmp_path):
    path = write_study(tmp_path, films=True)
    Image.new("L", (4, 4)).save(tmp_path / "outside.png")
    text = (tmp_path / "cases.jsonl").read_text()
    (tmp_path / "cases.jsonl").write_text(text.replace("secret-film-3.png", "../outside.png"))
    with pytest.raises(ValueError, match="lies outside"):
        load_study(path)


def test_a_run_folder_gives_answers_and_films(tmp_path):
    run = tmp_path / "run"
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    (run / "films").mkdir(parents=True)
    Image.new("L", (8, 8), 50).save(run / "films" / "b.png")
    (tmp_path / "scans").mkdir()
    Image.new("L", (8, 8), 10).save(tmp_path / "scans" / "c.png")
    source = {"kind": "table", "path": "films.csv", "images": str(tmp_path / "scans")}
    (run / "study.yaml").write_text(write_yaml({"sources": {"mine": source}}))
    for stage in ("base", "sft"):
        rows = [
            {"stage": stage, "id": case, "completion": f"{case} by {stage}", "image": image, "sample": sample}
            for case, image in (("a", str(tmp_path / "a.png")), ("b", "films/b.png"), ("c", "sources.mine/c.png"))
            for sample in (0, 1)
        ]
        write_rows(run / "answers" / "test" / stage / "near" / "predictions.jsonl", rows)
    arms = {
        name: {"kind": "run", "run": str(run), "answers": "test", "stage": name, "set": "near", "sample": 1}
        for name in ("base", "sft")
    }
    path = tmp_path / "study.yaml"
    protocol = {"title": "t", "folder": str(tmp_path / "r"), "arms": arms, "readers": ["R1"]}
    path.write_text(write_yaml(protocol | {"design": {"readers_per_case": 1, "guesses": 0}}))
    material = load_study(path).material
    films = {case: material.cases[case].films[0].path.name for case in material.cases}
    assert films == {"a": "a.png", "b": "b.png", "c": "c.png"}
    assert sorted(slot.answers["a"].text for slot in material.slots) == ["a by base", "a by sft"]
    path.write_text(path.read_text().replace("stage: sft", "stage: dpo"))
    with pytest.raises(ValueError, match=r"expected answers in .*dpo.*vlmalign status"):
        load_study(path)


def test_records_may_be_of_many_columns(tmp_path):
    path = write_study(tmp_path, cases=2)
    rows = [
        {"id": f"secret-file-{i:03}.png", "age": 30 + i, "history": ["a", {"b": "c"}], "note": None} for i in range(2)
    ]
    write_rows(tmp_path / "cases.jsonl", rows)
    sections = read_yaml(path.read_text())
    sections["cases"]["show"] = ["age", "history", "note"]
    path.write_text(write_yaml(sections))
    record = load_study(path).material.cases["secret-file-001.png"].record
    assert record == (("Age", "31"), ("History", "- a\n-\n  b: c"))
    sections["cases"]["show"] = ["age", "weight"]
    path.write_text(write_yaml(sections))
    with pytest.raises(ValueError, match="line 1: expected 'weight'"):
        load_study(path)
