"""The galleries: which films, by a rule that can be checked, found again by kind of error and label, and nothing a model's own."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from browser import Browser, find_browser
from run_folders import FORK, LABELS, write_json, write_lines, write_study
from test_report import Page

from vlmalign.reporting import filter_script, gallery
from vlmalign.reporting.gallery import KINDS, MOST, choose_films, kinds_of
from vlmalign.reporting.html import write_report
from vlmalign.reporting.run_folder import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("galleries") / "fork", films=60)
    study = folder / "study.yaml"
    study.write_text(
        study.read_text().replace("answers:\n  findings: {}", "answers:\n  findings: {task: labels}")
        + "tasks: {labels: {kind: labels, prompt: 'Which <findings>?'}, exam: {kind: choice, prompt: 'A or B?'}}\n"
    )
    write_report(folder)
    return folder


@pytest.fixture
def own(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "own"))


def rows_of(run: Path, dataset: str = "home") -> list[dict]:
    return [row for row in read_run(run).entries[0].predictions if row["dataset"] == dataset]


def answers(text: str) -> list[dict[str, str]]:
    return [dict(re.findall(r'data-(\w+)="(.*?)"', tag)) for tag in re.findall(r'<div class="answer" (.*?)>', text)]


@pytest.mark.parametrize(
    ("valid", "truth", "predicted", "unknown", "kinds"),
    [
        (True, ["a"], ["a"], [], ("exact",)),
        (True, [], [], [], ("exact",)),
        (True, ["a", "b"], ["b"], [], ("missed",)),
        (True, ["a"], ["b", "a"], [], ("alarm",)),
        (True, ["a"], ["b"], ["c"], ("missed", "alarm", "unknown")),
        (True, ["a"], ["a"], ["c"], ("exact", "unknown")),
        (True, [], [], ["c"], ("unknown",)),
        (False, ["a"], [], [], ("invalid",)),
    ],
)
def test_the_kinds_of_verdict(valid, truth, predicted, unknown, kinds):
    assert kinds_of({"valid": valid, "truth": truth, "predicted": predicted, "unknown": unknown}) == kinds


def test_films_are_chosen_evenly_over_verdicts_and_models_whatever_their_order(run):
    rows = rows_of(run)
    chosen = choose_films(rows, seed=0, most=20)
    assert len(chosen) == len(set(chosen)) == 20
    assert choose_films(rows[::-1], seed=0, most=20) == chosen
    assert choose_films(rows, seed=1, most=20) != chosen
    assert set(choose_films(rows, seed=0, most=1000)) == {row["id"] for row in rows}
    # after three rounds there are three films of every kind, or all that there are
    rows = [row for row in rows if row["stage"] == "sft"]
    all_kinds = Counter(kind for row in rows for kind in kinds_of(row))
    some = choose_films(rows, seed=0, most=3 * len(all_kinds))
    found = Counter(kind for row in rows if row["id"] in some for kind in kinds_of(row))
    assert len(all_kinds) == 4
    assert all(found[kind] >= min(3, count) for kind, count in all_kinds.items())


def test_a_page_shows_the_films_their_answers_and_the_question_once(run):
    text = (run / "galleries" / "findings" / "home.html").read_text()
    page = Page(text)
    assert f"{MOST} of 60 films, chosen by the study's seed (0) and a hash" in page.text
    assert page.text.count("Which <findings>?") == 1
    found = answers(text)
    assert len(found) == MOST * len(FORK)
    by_film = {(row["id"], list(FORK).index(row["stage"])): row for row in rows_of(run)}
    ids = re.findall(r'<p class="soft">(film-\d+)</p>', text)
    assert ids == choose_films(rows_of(run), seed=0)
    for place, answer in enumerate(found):
        row = by_film[ids[place // len(FORK)], int(answer["state"])]
        truth, named = set(row["truth"]), set(row["predicted"])
        assert tuple(answer["kinds"].split()) == kinds_of(row)
        for name, labels in (("true", truth), ("named", named), ("alarm", named - truth)):
            assert {LABELS[int(each)] for each in answer[name].split()} == labels
        assert {LABELS[int(each)] for each in answer["missed"].split()} == (truth - named if row["valid"] else set())
    counts = Counter(kind for row in rows_of(run) if row["stage"] == "sft" for kind in kinds_of(row))
    told = re.search(r"sft 60 (.*?) grpo-hard", page.text)[1].split(" % ")
    assert [int(each.split()[0]) for each in told] == [counts[kind] for kind in KINDS]


def test_the_report_links_to_every_gallery_and_old_ones_go(own):
    shutil.copy(own / "galleries" / "findings" / "home.html", own / "galleries" / "findings" / "gone.html")
    text = write_report(own).read_text()
    links = re.findall(r'href="(galleries/[^"]+)"', text)
    assert links == ["galleries/findings/home.html", "galleries/findings/away.html"], (
        "questions without films have none"
    )
    assert sorted(path.relative_to(own).as_posix() for path in own.glob("galleries/*/*")) == sorted(links)
    assert f"home</a> ({MOST} of 60)" in text
    assert {path.parent.name for path in own.glob("stages/*/model_card.md")} == set(FORK) - {"base"}


def test_a_page_needs_no_network_and_runs_our_script_alone(run):
    text = (run / "galleries" / "findings" / "home.html").read_text()
    page = Page(text)
    assert all(each.startswith("data:image/jpeg;base64,") or each == "../../report.html" for each in page.references)
    assert page.tags.count("script") == 1
    assert text.count(filter_script.SCRIPT) == 1
    assert f"script-src '{filter_script.ALLOWED}'" in text
    assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))


def test_what_a_model_wrote_cannot_become_markup_nor_a_path(own):
    attack = '</script><script>alert(1)</script>" onload="z \u202e'
    for path in (own / "answers" / "findings").rglob("predictions.jsonl"):
        rows = [json.loads(line) | {"dataset": "../../x" if "home" in str(path) else "away"} for line in path.open()]
        write_lines(path, [row | {"reasoning": attack, "reason": attack, "unknown": [attack]} for row in rows])
    scores = own / "scores" / "findings" / "results.json"
    write_json(
        scores, json.loads(scores.read_text().replace('"home"', '"../../x"').replace('"Edema"', json.dumps(attack)))
    )
    write_report(own)
    text = (own / "galleries" / "findings" / "set-1.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "</script><script>alert(1)</script>" in page.text
    assert "U+202E" in page.text
    assert not (own.parent / "x.html").exists()


def test_a_run_without_answers_has_no_gallery(own):
    shutil.rmtree(own / "answers")
    write_report(own)
    assert not list(own.glob("galleries/*/*.html"))
    assert gallery.question(read_run(own), "findings") == "Which <findings>?"


@pytest.mark.full
def test_the_filters_show_what_they_say(run):
    """In a real browser: an answer shows where its kind, its label and its model are those that were chosen."""
    find_browser()
    browser = Browser()
    try:
        page = browser.page()
        page.goto((run / "galleries" / "findings" / "home.html").as_uri())
        total = MOST * len(FORK)
        assert (
            page.script("document.getElementById('shown').textContent")
            == f"{total} of {total} answers shown, of {MOST} of {MOST} films."
        )
        found = answers((run / "galleries" / "findings" / "home.html").read_text())
        for kind, label, state in (
            ("missed", "2", ""),
            ("alarm", "1", "1"),
            ("invalid", "", ""),
            ("exact", "0", ""),
            ("", "2", "3"),
        ):
            chosen = json.dumps({"kind": kind, "label": label, "state": state})
            page.script(
                f"(() => {{ const form = document.getElementById('filter'), chosen = {chosen};"
                " for (const name in chosen) form.elements[name].value = chosen[name];"
                " form.dispatchEvent(new Event('change')); })()"
            )
            fits = [
                (not kind or kind in each["kinds"].split())
                and (not state or each["state"] == state)
                and (not label or label in each[kind if kind in ("missed", "alarm") else "true"].split()
                     or (kind not in ("missed", "alarm") and label in each["named"].split()))
                for each in found
            ]  # fmt: skip
            shown = page.script("[...document.querySelectorAll('.answer')].map((each) => each.offsetParent !== null)")
            assert shown == fits
            assert 0 < sum(fits) < total
        assert page.complaints() == []
    finally:
        browser.close()
