"""`vlmalign review analyse` on the record of a whole study: what is counted, what is left out, and what the page says."""

import csv
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from reader_studies import ARMS, begin, write_rows, write_study

from vlmalign import cli
from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.review import access, votes
from vlmalign.review.analysis.accuracy import read_accuracy
from vlmalign.review.analysis.ballots import gather
from vlmalign.review.analysis.results import analyse
from vlmalign.review.outcomes import votes as all_votes
from vlmalign.review.protocol import load_protocol

pytestmark = pytest.mark.full  # whole studies, and statsmodels imported under the checks of types

STRENGTH = dict(zip(ARMS, (0.0, 2.5, -2.5), strict=True))
KEYS = (f"analysis-{number:08}" for number in itertools.count())


def read(study, record, *, seed=0, pages=None):
    """Everyone reads all pages, or the first `pages` of them, with the tastes of STRENGTH."""
    chance = np.random.default_rng(seed)
    names = [slot.name for slot in study.material.slots]
    for reader in study.protocol.readers:
        access.begin(record, reader)
        for _ in itertools.count() if pages is None else range(pages):
            page = votes.current(record, reader)
            if page is None:
                break
            place = page.place
            if place.purpose == "guess":
                entry = {"answers": {letter: {"guess": int(chance.integers(-1, 2))} for letter in place.letters}}
            else:
                worth = [
                    chance.logistic() + (STRENGTH[names[slot]] if place.purpose != "attention" else 9.0 * (slot == 1))
                    for slot in place.shown
                ]
                choice = place.letters[int(np.argmax(worth))]
                if place.purpose != "attention" and chance.random() < 0.25:
                    choice = ("tie", "none")[chance.integers(2)]
                answers = {
                    letter: {
                        "criteria": {
                            key: int(np.clip(round(2 + each + chance.normal(0, 0.5)), 0, 4))
                            for key in study.protocol.form.criteria
                        },
                        "harm_extent": int(each < -1),
                        "harm_likelihood": int(chance.integers(3)),
                    }
                    for letter, each in zip(place.letters, worth, strict=True)
                }
                entry = {"preference": choice, "confidence": 1, "answers": answers}
            votes.close(
                record,
                study,
                reader,
                votes.Change(
                    position=place.position, revision=page.revision, key=next(KEYS), active_ms=900, entry=entry
                ),
            )


def results_file(folder):
    """Accuracy of two arms, as scoring writes it."""
    path = folder / "results.json"
    scores = {ARMS[0]: (0.8, 0.7, 0.9), ARMS[1]: (0.6, 0.5, 0.7)}
    rows = [
        {"stage": arm, "dataset": "held-out", "results": {"n": 90, "accuracy": dict(zip(("value", "low", "high"), each, strict=True))}}
        for arm, each in scores.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"datasets": [{"name": "held-out", "role": "test", "n": 90}], "results": rows}))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(protocol's path, study, record, folder of an analysis by the command, folder of the export)"""
    folder = tmp_path_factory.mktemp("analysis")
    known = [{"id": f"known-{i}", "record": "Clear.", "answers": ["wait", "treat"], "expected": 1} for i in range(2)]
    write_rows(folder / "known.jsonl", known)
    design = {
        "readers_per_case": 5,
        "repeats": 3,
        "guesses": 2,
        "attention": {"path": str(folder / "known.jsonl"), "each": 1},
    }
    path = write_study(
        folder,
        cases=9,
        arms=3,
        simulated=True,
        form={"criteria": {"clarity": "Logical clarity"}},
        readers=[f"R{i:02}" for i in range(1, 6)],
        design=design,
    )
    study, record, _ = begin(path)
    read(study, record)
    scores = results_file(folder)
    out = folder / "analysis"
    arguments = ["--out", str(out), "--scores", str(scores), "--draws", "200"]
    assert cli.main(["review", "analyse", str(path), *arguments]) == 0
    assert cli.main(["review", "export", str(path), "--out", str(folder / "export")]) == 0
    return path, study, record, out, folder / "export"


def rows(folder, name):
    return list(csv.DictReader((folder / name).open(encoding="utf-8")))


def test_counts_are_those_of_the_export(whole):
    *_, out, export = whole
    found = json.loads((out / "simulated-analysis.json").read_text())
    pages = rows(export, "simulated-comparisons.csv")
    main = [row for row in pages if row["purpose"] == "case"]
    assert found["ballots"] == found["pages"]["analysed"] == len(main) == 45
    for share in found["shares"]:
        shown = [row for row in main if share["arm"] in (row["arm_A"], row["arm_B"])]
        assert share["shown"] == len(shown)
        assert share["preferred"] == sum(row["preferred"] == share["arm"] for row in shown)
        assert share["none"] == sum(row["preferred"] == "none" for row in shown)
        assert share["share"]["value"] == pytest.approx(share["preferred"] / share["shown"])
        assert share["share"]["low"] <= share["share"]["value"] <= share["share"]["high"]
    again = [row for row in pages if row["purpose"] == "repeat"]
    first = {(row["person"], row["case"]): row["preferred"] for row in main}
    everyone = found["consistency"]["preference"][-1]
    assert (everyone["reader"], everyone["repeats"]) == ("all", len(again))
    assert everyone["same"] == sum(first[row["person"], row["case"]] == row["preferred"] for row in again)
    ratings = [row for row in rows(export, "simulated-ratings.csv") if row["purpose"] == "case"]
    assert found["ratings"] == len(ratings) == 90
    assert set(found["attention"]) == {f"R{i:02}" for i in range(1, 6)}
    assert all(row == {"read": 1, "right": 1} for row in found["attention"].values())
    exported = json.loads((export / "simulated-study.json").read_text())
    assert (found["flow"], found["blinding"], found["hash"]) == tuple(
        exported[key] for key in ("flow", "blinding", "hash")
    )


def test_the_known_ranking_is_found(whole):
    found = json.loads((whole[3] / "simulated-analysis.json").read_text())
    points = {row["arm"]: row["points"]["value"] for row in found["shares"]}
    assert points[ARMS[1]] > points[ARMS[0]] > points[ARMS[2]]
    (unadjusted, *others) = found["preference"]
    assert unadjusted["problem"] is None
    best = next(row for row in unadjusted["arms"] if {row["arm"], row["other"]} == {ARMS[1], ARMS[2]})
    assert best["value"] > 0
    assert best["p"] <= best["p_holm"] <= 1
    names = [model["name"] for model in others]
    assert "without pages on which none is acceptable" in names
    # Arm 3 holds plans of R01 and R02 themselves.
    assert "without pages that show the reader's own answer" in names
    clarity = next(row for row in found["ordinal"] if row["key"] == "clarity")
    effect = next(row for row in clarity["arms"] if {row["arm"], row["other"]} == {ARMS[1], ARMS[2]})
    assert effect["low"] > 0


class Page(HTMLParser):
    """Fails on anything that a page on its own does not have; keeps its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "img")
        assert not any(
            name in ("src", "onload") or (value or "").startswith("http")
            for name, value in attributes
            if name != "xmlns"
        )
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_says_that_votes_are_simulated(whole):
    path, study, _, out, _ = whole
    assert sorted(file.name for file in out.iterdir()) == ["simulated-analysis.html", "simulated-analysis.json"]
    text = (out / "simulated-analysis.html").read_text(encoding="utf-8")
    assert re.search(r"<title>Simulated: Infertility care", text)
    said = re.sub(r"\s+", " ", Page(text).text)
    assert "The votes of this study are simulated" in said
    assert "no interval over readers can be trusted" not in said  # 5 readers
    assert (
        "5 simulated people began the study; 5 readers judged 9 cases, each assigned to 5 readers, on pages of 2 answers"
        in said
    )
    assert study.hash[:16] in said
    assert "accuracy and share of points of each arm, with intervals on both axes" in text
    # The same votes give the same bytes.
    again = out.parent / "again"
    arguments = ["--out", str(again), "--scores", str(out.parent / "results.json"), "--draws", "200"]
    assert cli.main(["review", "analyse", str(path), *arguments]) == 0
    for file in out.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_few_readers_an_interim_state_and_identical_answers_are_said(tmp_path, capsys):
    path = write_study(tmp_path, cases=4)
    answers = [json.loads(line) for line in (tmp_path / "secret-answers-1.jsonl").read_text().splitlines()]
    same = json.loads((tmp_path / "secret-answers-0.jsonl").read_text().splitlines()[2])
    answers[2] = same
    write_rows(tmp_path / "secret-answers-1.jsonl", answers)
    study, record, _ = begin(path)
    out = ["review", "analyse", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(out) == 2
    assert "expected closed pages to analyse, found none" in capsys.readouterr().err
    read(study, record, pages=4)
    votes.current(record, "R01")
    assert cli.main([*out, "--draws", "200"]) == 0
    page = Page((tmp_path / "out" / "analysis.html").read_text(encoding="utf-8")).text
    assert "2 readers: below 5 readers no interval over readers can be trusted" in page
    assert "2 of 10 pages are not closed: this is an interim analysis" in page
    assert "Simulated" not in page
    counts = json.loads((tmp_path / "out" / "analysis.json").read_text())["pages"]
    assert counts == {"analysed": 8, "identical answers, no ballot": 2, "opened, not closed": 1}


def test_votes_left_out_with_a_reader_are_counted_and_not_analysed(tmp_path):
    path = write_study(tmp_path, cases=4)
    study, record, _ = begin(path)
    read(study, record)
    access.withdraw(record, "R02", "left", keep_votes=False)
    found = gather(study, all_votes(record))
    assert found.readers == ["R01"]
    assert found.counts["left out with a withdrawn person"] == 5
    # One reader: described, without any interval.
    said = analyse(record, study, draws=200)
    assert all(row["share"]["low"] is None for row in said["shares"])
    assert all(effect["p"] is None for model in said["preference"] for effect in model["arms"])


def test_a_form_without_preferences_and_ratings_is_refused(tmp_path):
    form = {"preference": False, "criteria": {}, "harm": False, "verdict": True}
    study, record, _ = begin(write_study(tmp_path, cases=2, form=form, design={"readers_per_case": 2, "guesses": 0}))
    access.begin(record, "R01")
    page = votes.current(record, "R01")
    entry = {"answers": {letter: {"verdict": "accept"} for letter in page.place.letters}}
    change = votes.Change(
        position=page.place.position, revision=page.revision, key=next(KEYS), active_ms=900, entry=entry
    )
    votes.close(record, study, "R01", change)
    with pytest.raises(ValueError, match="expected preferences, criteria or harm to analyse, found none"):
        gather(study, all_votes(record))


def test_a_protocol_that_is_not_the_frozen_one_is_refused(tmp_path, capsys):
    path = write_study(tmp_path, cases=4)
    study, record, _ = begin(path)
    read(study, record, pages=1)
    path.write_text(write_yaml(read_yaml(path.read_text()) | {"seed": 4}))
    assert cli.main(["review", "analyse", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "is not what the votes were given on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_accuracy_is_found_by_stage_and_set_or_refused(tmp_path):
    protocol = load_protocol(write_study(tmp_path, cases=2, arms=3))
    scores = results_file(tmp_path)
    found = read_accuracy(scores, protocol)
    assert (found.name, list(found.arms)) == ("accuracy", list(ARMS[:2]))
    assert found.arms[ARMS[0]]["value"] == 0.8
    with pytest.raises(ValueError, match="expected a score 'kappa', found accuracy"):
        read_accuracy(scores, protocol, "kappa")
    with pytest.raises(ValueError, match="found no file"):
        read_accuracy(tmp_path / "none.json", protocol)
    scores.write_text(scores.read_text().replace(ARMS[0], "other").replace(ARMS[1], "another"))
    with pytest.raises(ValueError, match="found none of them"):
        read_accuracy(scores, protocol)
