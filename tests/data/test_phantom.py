"""The phantom: same seed, same bytes; each finding changes the film where it should; traces tell the labels."""

import re
from time import process_time

import numpy as np
import pytest

from vlmalign.data.phantoms.cases import ALLOWED, KINDS, PREVALENCE, SIZES, ZONES, Case, Finding, draw_case
from vlmalign.data.phantoms.institutions import INSTITUTIONS, MIMIC_LIKE
from vlmalign.data.phantoms.looks import Look
from vlmalign.data.phantoms.phantom import render, render_lateral
from vlmalign.data.phantoms.synthetic import plan_studies, truth_row
from vlmalign.data.phantoms.traces import PLAIN, WORDINGS, read_traces, reason, spoken, write_traces

CLEAN = Look(noise=0.0)


def _film(*findings, heart=0.45, mediastinum=0.22, seed=0, size=128, look=CLEAN):
    return render(Case(heart, mediastinum, findings), look, np.random.default_rng(seed), size).astype(int)


def _box(film, x, y, half=0.08):
    """Mean grey about (x, y) in film units."""
    n = film.shape[0]
    left, right, top, bottom = (int((v + 1) / 2 * n) for v in (x - half, x + half, y - half, y + half))
    return film[top:bottom, left:right].mean()


def _finding(kind, side="right", zone=None, style="line"):
    zone = zone or ALLOWED.get(kind, ("",))[0]
    x, y = ZONES.get((side, zone), (0.0, 0.0))
    return Finding(kind, side, zone, x, y, sum(SIZES[kind]) / 2, style)


def test_same_seed_same_film_and_any_size():
    case = draw_case(np.random.default_rng(3))
    assert case == draw_case(np.random.default_rng(3))
    for size in (64, 128, 200):
        first = render(case, MIMIC_LIKE.look, np.random.default_rng(5), size)
        assert first.dtype == np.uint8
        assert first.shape == (size, size)
        assert (first == render(case, MIMIC_LIKE.look, np.random.default_rng(5), size)).all()
        assert (first != render(case, MIMIC_LIKE.look, np.random.default_rng(6), size)).any()
    assert render_lateral(MIMIC_LIKE.look, np.random.default_rng(0), 64).shape == (64, 64)


@pytest.mark.parametrize(
    ("finding", "x", "y", "change"),
    [
        (_finding("effusion"), -0.45, 0.30, "brighter"),
        (_finding("pneumothorax"), -0.52, -0.42, "darker"),
        (_finding("opacity"), -0.38, -0.36, "brighter"),
        (_finding("consolidation", zone="middle"), -0.44, -0.06, "brighter"),
        (_finding("lesion", "left", "middle"), 0.48, -0.06, "brighter"),
        (_finding("atelectasis", "left", "middle"), 0.48, -0.06, "brighter"),
        (_finding("edema", "both"), -0.32, 0.0, "brighter"),
        (_finding("rind"), -0.72, 0.05, "brighter"),
        (_finding("emphysema", "both"), 0.50, -0.10, "darker"),
        (_finding("device", "left", style="pacemaker"), 0.56, -0.55, "brighter"),
        (_finding("device", "both", style="tube"), 0.02, -0.70, "brighter"),
        (_finding("hernia", "both"), 0.06, 0.36, "darker"),
    ],
)
def test_a_finding_changes_its_own_place(finding, x, y, change):
    differences = [_box(_film(finding, seed=s), x, y) - _box(_film(seed=s), x, y) for s in range(5)]
    sign = 1 if change == "brighter" else -1
    assert min(sign * difference for difference in differences) > 20  # of 255
    if finding.side in ("right", "left") and finding.kind != "device":
        other = [_box(_film(finding, seed=s), -x, y, 0.05) - _box(_film(seed=s), -x, y, 0.05) for s in range(5)]
        assert max(map(abs, other)) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_on_the_film(kind):
    for side in ("right", "left"):
        for zone in ALLOWED.get(kind, ("",)):
            changed = np.abs(_film(_finding(kind, side, zone), size=64) - _film(size=64)) > 25
            assert changed.sum() >= 12  # pixels of 64 x 64


def test_ratios_widen_heart_and_mediastinum():
    assert _box(_film(heart=0.66), 0.60, 0.32, 0.05) - _box(_film(), 0.60, 0.32, 0.05) > 60
    assert _box(_film(mediastinum=0.45), 0.28, -0.30, 0.04) - _box(_film(), 0.28, -0.30, 0.04) > 60


def test_looks_differ_but_mildly():
    case = Case(0.45, 0.22)
    means = {
        name: render(case, place.look, np.random.default_rng(1), 64).mean() for name, place in INSTITUTIONS.items()
    }
    assert len({round(mean) for mean in means.values()}) == 4
    assert max(means.values()) - min(means.values()) < 70


def test_cases_follow_the_prevalence():
    rng = np.random.default_rng(0)
    cases = [draw_case(rng) for _ in range(6000)]
    for kind in ("effusion", "atelectasis", "edema", "opacity", "device", "fracture"):
        share = sum(case.has(kind) for case in cases) / len(cases)
        assert share == pytest.approx(PREVALENCE[kind], abs=0.02)
    normal = sum("No Finding" in MIMIC_LIKE.convention.positives(case) for case in cases) / len(cases)
    assert normal == pytest.approx(74_019 / 222_750, abs=0.03)
    assert not any(case.has("hernia") for case in cases)
    with pytest.raises(ValueError, match="effussion"):
        draw_case(rng, {"effussion": 0.5})


def test_rendering_is_cheap():
    rng = np.random.default_rng(0)
    cases = [draw_case(rng) for _ in range(40)]
    best = np.inf
    for _ in range(3):
        start = process_time()
        for case in cases:
            render(case, MIMIC_LIKE.look, rng, 128)
        best = min(best, (process_time() - start) / len(cases))
    assert best < 0.010  # seconds; about 0.001 on an idle core


@pytest.mark.parametrize("place", INSTITUTIONS.values(), ids=lambda place: place.name)
def test_traces_tell_the_labels_and_deny_nothing_present(place):
    studies = plan_studies({"": 400}, place, place.convention.schema, seed=1, laterals=False)
    wording = WORDINGS[place.name]
    for i, study in enumerate(studies):
        row = truth_row(str(i), study, place)
        sentences = reason(row)
        text = " ".join(sentences).lower()
        assert 20 <= len(text.split()) <= 65
        assert all(spoken(label) in text for label in row["labels"])
        for finding in study.case.findings:
            assert wording.absent.get(finding.kind) not in sentences
        unnamed = {f["label"] for f in row["findings"] if f["label"] and f["label"] not in row["labels"]}
        assert not any(f"{spoken(label)}." in text for label in unnamed - {None})
    assert sentences == reason(row)


def test_traces_use_few_words_and_the_base_speaks_otherwise():
    words, texts = set(), {}
    for place in INSTITUTIONS.values():
        studies = plan_studies({"": 600}, place, place.convention.schema, seed=2, laterals=False)
        for i, study in enumerate(studies):
            texts[place.name] = " ".join(reason(truth_row(str(i), study, place)))
            words |= set(re.findall(r"[a-z]+", texts[place.name].lower()))
    assert len(words) < 250
    assert texts["base"].startswith(WORDINGS["base"].opening)
    assert texts["mimic-like"].startswith(PLAIN.opening)
    assert not set(PLAIN.evidence.values()) & set(WORDINGS["base"].evidence.values())
    assert PLAIN.evidence.keys() == WORDINGS["base"].evidence.keys()


def test_trace_files_round_trip_and_bad_lines_are_named(tmp_path):
    studies = plan_studies({"": 20}, MIMIC_LIKE, MIMIC_LIKE.convention.schema, seed=1, laterals=False)
    rows = [truth_row(f"film{i}", study, MIMIC_LIKE) for i, study in enumerate(studies)]
    path = tmp_path / "traces.jsonl"
    write_traces(path, rows)
    traces = read_traces(path)
    assert traces == {row["id"]: " ".join(reason(row)) for row in rows}
    write_traces(path, rows, telling="steps")
    assert {id: re.sub(r"(^| )\d+\. ", r"\1", text) for id, text in read_traces(path).items()} == traces
    write_traces(path, rows, telling="short")
    for row in rows:
        told = read_traces(path)[row["id"]]
        assert told in traces[row["id"]] or len(told) < len(traces[row["id"]])
        assert all(spoken(label) in told for label in row["labels"])
    for line, message in [
        ('{"id": "film0", "trace": "again"}', r"line 2.*'film0' is repeated"),
        ('{"id": "x"}', r"line 2: missing field 'trace'"),
        ('{"id": "x", "trace": " "}', r"line 2: field 'trace' must be"),
        ('{"id": 3, "trace": "t"}', r"line 2: field 'id' must be"),
        ("[1]", r"line 2: expected an object, found list"),
        ("{", r"line 2: not a line of JSON"),
    ]:
        path.write_text('{"id": "film0", "trace": "seen"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            read_traces(path)
