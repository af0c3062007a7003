"""The report of whole, partial, hostile and damaged run folders: one self-contained page, or an error that names the line."""

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmalign.evaluation.bootstrap import paired_difference
from vlmalign.evaluation.f1 import label_matrix
from vlmalign.evaluation.results import evaluate_predictions
from vlmalign.reporting import curves
from vlmalign.reporting.examples import choose_examples
from vlmalign.reporting.html import write_report
from vlmalign.reporting.run_folder import read_run

LABELS = ("No Finding", "Cardiomegaly", "Edema", "Pneumonia", "Hernia & Co")
SHARED = ("No Finding", "Edema", "Pneumonia")
DATASETS = {"home": ("in-schema", LABELS), "away": ("cross-schema", SHARED)}
SKILL = {"base": 0.3, "sft": 0.75, "grpo": 0.85}


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(rng, stage: str, dataset: str, labels: tuple[str, ...], truths, images) -> list[dict]:
    """Prediction rows of one stage: each label is told right with the stage's skill; the last label never occurs."""
    rows = []
    for film, truth in enumerate(truths):
        told = [label for label in labels[:-1] if (label in truth) == (rng.random() < SKILL[stage] or label in truth)]
        valid = bool(rng.random() < 0.95)
        text = f"The {'heart is large' if film % 2 else 'lungs are clear'} on film {film}."
        rows.append(
            {
                "stage": stage,
                "dataset": dataset,
                "id": f"film-{film:04d}",
                "patient": f"p{film // 2}",
                "truth": truth,
                "predicted": told if valid else [],
                "valid": valid,
                "reason": None if valid else "expected one solution block, found none",
                "reasoning": text if valid else "",
                "completion": f"<think>{text}</think><solution>{', '.join(told)}</solution>" if valid else text,
                "tokens": 30,
                "stopped": True,
                "image": str(images[film % len(images)]),
            }
        )
    return rows


def write_run(run: Path, *, films: int = 40, steps: int = 30, labels=None, draws: int = 50, images=None) -> Path:
    """A run folder as a finished run leaves it. `labels`: data set -> (role, labels)."""
    datasets = labels or DATASETS
    home = next(iter(datasets.values()))[1]
    rng = np.random.default_rng(0)
    if images is None:
        (run / "images").mkdir(parents=True)
        images = []
        for number in range(2):
            path = run / "images" / f"{number}.png"
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
            images.append(path.relative_to(run))
    (run / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("seed: 0\ngrpo:\n  beta: 0.15  # KL\n", encoding="utf-8")
    write_json(
        run / "environment.json",
        {"python": "3.12", "packages": {"jax": "0.11.0", "grain": None}, "cpu_count": 2, "matmul_gflops": 91.25},
    )
    write_lines(
        run / "timing.jsonl",
        [{"stage": "sft", "seconds": 40.5}, {"stage": "grpo", "seconds": 60.0}, {"stage": "sft", "seconds": 20.0}],
    )
    sizes = {"pool": (3000, 2100), "sft": (600, 540), "rl": (300, 280), "validation": (200, 190)}
    common = rng.dirichlet(np.full(len(home), 0.8))
    balanced = 0.06 + 0.5 * common
    sets = {
        name: {
            "films": size,
            "patients": patients,
            "counts": {
                label: int(size * (balanced if name in ("sft", "rl") else common)[place])
                for place, label in enumerate(home)
            },
        }
        for name, (size, patients) in sizes.items()
    }
    write_json(run / "data" / "coverage.json", {"labels": list(home), "floor": 0.05, "sets": sets})
    write_lines(
        run / "data" / "skipped.jsonl",
        [{"dataset": "home", "id": "film-9", "path": "films/9.jpg", "reason": "truncated image"}],
    )
    line = np.linspace(0, 1, steps)
    write_lines(
        run / "sft" / "metrics.jsonl",
        [
            {"step": step + 1, "loss": 0.4 + 2.5 * np.exp(-5 * x) + 0.05 * rng.normal(), "grad_norm": 1.0}
            for step, x in enumerate(line)
        ],
    )
    write_lines(
        run / "grpo" / "metrics.jsonl",
        [
            {
                "step": step + 1,
                "reward": 0.45 + 0.12 * x + 0.06 * rng.normal(),
                "valid": min(1.0, 0.93 + 0.06 * x + 0.01 * rng.normal()),
                "jaccard": None if step == 3 else 0.5,
                "length": 34 + 6 * x + rng.normal(),
                "kl": 0.03 * x + 0.002 * abs(rng.normal()),
                "entropy": 0.6 - 0.15 * x + 0.02 * rng.normal(),
            }
            for step, x in enumerate(line)
        ],
    )
    predictions, results, baselines, differences = [], [], [], []
    for name, (_role, labels_) in datasets.items():
        truths = [sorted(set(rng.choice(labels_[:-1], size=1 + film % 2)), key=labels_.index) for film in range(films)]
        subsets = {"all": labels_} if labels_ != home else {"all": labels_, "shared": datasets[list(datasets)[-1]][1]}
        told = {}
        for stage in SKILL:
            told[stage] = answers(rng, stage, name, labels_, truths, images)
            scores = evaluate_predictions(told[stage], labels_, subsets=subsets, draws=draws)
            results.append({"stage": stage, "dataset": name, "results": scores})
            predictions += told[stage]
        for trivial, answer in (("all positive", list(labels_)), ("most frequent set", [labels_[0]])):
            rows = [row | {"predicted": answer, "valid": True} for row in told["base"]]
            scores = evaluate_predictions(rows, labels_, subsets=subsets, draws=draws)
            baselines.append({"name": trivial, "dataset": name, "results": scores})
        matrices = [label_matrix([row["predicted"] for row in told[stage]], labels_) for stage in ("sft", "grpo")]
        paired = paired_difference(
            label_matrix(truths, labels_), *matrices, [row["patient"] for row in told["sft"]], draws=draws
        )
        differences.append(
            {"dataset": name, "from": "sft", "to": "grpo", "subset": "all"}
            | {"macro": paired.macro._asdict(), "micro": paired.micro._asdict()}
        )
    write_lines(run / "evaluation" / "predictions.jsonl", predictions)
    write_json(
        run / "evaluation" / "results.json",
        {
            "datasets": [
                {"name": name, "role": role, "labels": list(labels_), "n": films, "patients": -(-films // 2)}
                for name, (role, labels_) in datasets.items()
            ],
            "results": results,
            "baselines": baselines,
            "differences": differences,
            "reward": {
                "first": {"mean": 0.461, "standard_error": 0.011, "steps": steps // 5},
                "last": {"mean": 0.563, "standard_error": 0.012, "steps": steps // 5},
                "gain": 0.102,
                "gain_in_standard_errors": 6.3,
            },
        },
    )
    return run


VOID = {"meta", "img", "br", "link", "input", "hr"}  # elements that have no end tag


class Page(html.parser.HTMLParser):
    """A page's elements, identifiers, references and visible text; complains about tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("reports") / "first-light")


@pytest.fixture(scope="module")
def text(run) -> str:
    return read(run)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def copy_run(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file() and path.name != "report.html":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the run folder that a test may damage."""
    return copy_run(run, tmp_path / "own")


def test_a_finished_run_has_every_section(page):
    assert "Not there yet" not in page.text
    assert "not there yet" not in page.text
    # coverage, overview, six curves, F1 per label of two data sets
    figures = [tag for tag in page.tags if tag == "figure"]
    assert len(figures) == 2 + 6 + 2
    for section in ("Headline", "Label coverage", "Training curves", "F1 per label", "Paired", "Trivial", "Example"):
        assert section in page.text
    assert "Mean reward was 0.461 (standard error 0.011)" in page.text
    assert "vlmalign chexreason first-light/config.yaml" in page.text
    assert "1 min 0 s" in page.text, "the two parts of SFT are added up: 40.5 s + 20 s"
    assert "2 min 0 s" in page.text, "all stages: 120.5 s"
    assert "91.25" in page.text
    assert "beta: 0.15 # KL" in page.text
    assert "truncated image" in page.text


def test_the_page_needs_nothing_else(text, page):
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith("data:image/jpeg;base64,") or reference.removeprefix("#") in page.ids, reference
    for name in re.findall(r"url\(([^)]*)\)", text):
        assert name.removeprefix("#") in page.ids
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in text


def test_the_same_folder_gives_the_same_page(run, text, tmp_path):
    assert read(copy_run(run, tmp_path / "first-light")) == text


def test_scores_are_those_of_the_results_file(run, page):
    results = json.loads((run / "evaluation" / "results.json").read_text())["results"]
    for row in results:
        for block in row["results"]["blocks"].values():
            for name in ("macro", "macro_all", "micro"):
                score = block[name]
                assert f"{score['value']:.3f} {score['low']:.3f} to {score['high']:.3f}" in page.text
    # both averages of the in-schema set: over all its labels, and over those that the data sets share
    assert "all: 5 labels" in page.text
    assert "shared: 3 labels" in page.text


def test_undefined_is_a_word_and_never_zero(run, text):
    results = json.loads((run / "evaluation" / "results.json").read_text())["results"]
    never = results[0]["results"]["blocks"]["all"]["per_label"][-1]
    assert never["support"] == 0
    assert never["f1"]["value"] is None
    row = re.search(r"<tr><th scope=\"row\">Hernia &amp; Co</th><td class=\"num\">0</td>(.*?)</tr>", text, re.S)
    assert row
    assert row[1].count("undefined</span>") == 3
    assert "0.0" not in row[1]
    figure = text[text.index('aria-label="F1 per label on home') :]
    assert figure[: figure.index("</svg>")].count(">undefined<") == 1, "one word for all stages"


def test_model_text_cannot_become_markup(own):
    path = own / "evaluation" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    attack = '<script>alert(1)</script><img src=http://x.test/a onerror=y>" onload="z {{ 7 * 7 }} \ud800'
    for row in rows:
        row |= {"id": row["id"] + attack, "reasoning": attack, "completion": attack, "reason": attack}
    write_lines(path, rows)
    (own / "evaluation" / "results.json").unlink()
    write_lines(own / "data" / "skipped.jsonl", [dict.fromkeys(("dataset", "id", "path", "reason"), attack)])
    text = read(own)
    hostile = Page(text)
    assert "script" not in hostile.tags
    assert not any("x.test" in reference for reference in hostile.references)
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{ 7 * 7 }} ?" in hostile.text


def test_names_in_figures_cannot_become_markup(own):
    (own / "sft" / "metrics.jsonl").unlink()
    (own / "grpo" / "metrics.jsonl").unlink()
    name = '<script>"$x_1$'
    for path in (own / "evaluation" / "results.json", own / "data" / "coverage.json"):
        path.write_text(path.read_text().replace('"Edema"', json.dumps(name)).replace('"home"', json.dumps(name)))
    hostile = Page(read(own))
    assert "script" not in hostile.tags
    assert name in hostile.text


PARTS = {
    "config.yaml": ["configuration has not been written"],
    "environment.json": ["machine has not been recorded"],
    "timing.jsonl": ["no stage has ended"],
    "data/coverage.json": ["training sets have not been drawn"],
    "sft/metrics.jsonl": ["SFT has recorded no step"],
    "grpo/metrics.jsonl": ["GRPO has recorded no step"],
    "evaluation/predictions.jsonl": ["no film has been answered"],
    "evaluation/results.json": ["no model has been evaluated", "no two stages", "no baseline"],
}


def test_an_empty_folder_says_that_nothing_is_there_yet(tmp_path):
    text = Page(read(tmp_path)).text
    for sentences in PARTS.values():
        assert all(sentence in text for sentence in sentences)
    assert "no film has been read" in text


@pytest.mark.parametrize("part", ["data/coverage.json", "evaluation/results.json"])
def test_a_part_that_is_empty_or_absent_is_said_to_be_missing_and_nothing_else_is(own, part):
    (own / part).write_text("")
    empty = read_run(own)
    (own / part).unlink()
    assert read_run(own) == empty
    text = Page(read(own)).text
    found = {file for file, sentences in PARTS.items() if sentences[0] in text}
    assert found == {part}


def test_a_run_that_stopped_before_grpo(own):
    (own / "grpo" / "metrics.jsonl").unlink()
    (own / "data" / "skipped.jsonl").unlink()
    path = own / "evaluation" / "results.json"
    content = json.loads(path.read_text())
    results = [row for row in content["results"] if row["stage"] != "grpo"]
    write_json(path, {"datasets": content["datasets"], "results": results[::-1], "reward": None})
    text = Page(read(own)).text
    assert re.search(r"[0-9] base model → 0\.[0-9]{3} after SFT (?!→)", text)
    assert "after GRPO" not in text[: text.index("Paired differences")]
    assert "Best trivial baseline" not in text
    assert "no baseline has been scored" in text
    assert "None: every film that was asked for could be read." in text


def test_films_that_cannot_be_shown_are_said_to_be_so(own):
    for file in ("evaluation/results.json", "sft/metrics.jsonl", "grpo/metrics.jsonl"):
        (own / file).unlink()
    (own / "images" / "0.png").write_bytes(b"no image")
    (own / "images" / "1.png").unlink()
    page = Page(read(own))
    assert "img" not in page.tags
    assert "film not readable" in page.text
    assert "film not found" in page.text


def broken_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("grpo/metrics.jsonl", 3, b'{"step": 3, "rew', "line 3: expected JSON, found Unterminated string"),
        ("grpo/metrics.jsonl", 4, b"", "line 4: expected JSON, found Expecting value"),
        ("sft/metrics.jsonl", 2, b'{"step": 2, "loss": NaN}', "line 2: expected JSON, found NaN"),
        ("sft/metrics.jsonl", 2, b'{"loss": 1}', "line 2: expected 'step', found no such entry"),
        ("timing.jsonl", 1, b'{"stage": "\xff"}', "line 1: expected JSON, found bytes that are not UTF-8"),
        ("timing.jsonl", 2, b'{"stage": "sft", "seconds": true}', "line 2, seconds: expected a number, found true"),
        ("data/skipped.jsonl", 1, b"[]", "line 1: expected an object, found a list"),
        ("data/coverage.json", 1, b'{"labels": ["a"], "floor": 0.05}', "expected 'sets', found no such entry"),
        ("evaluation/results.json", 1, b'{"datasets": [],\n"results": [}', "line 2: expected JSON"),
        ("config.yaml", 2, b"grpo: }", "line 2: not YAML"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(run, tmp_path, file, number, line, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes((run / file).read_bytes())
    broken_line(tmp_path / file, number, line)
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path)
    assert f"{tmp_path / file}" in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["results"][0].update(stage="ppo"), "expected the stage to be one of"),
        (lambda c: c["results"][0].update(dataset="moon"), "found 'moon'"),
        (lambda c: c["results"].append(c["results"][0]), "found it twice"),
        (lambda c: c["datasets"][0].update(role="test"), "expected the role to be one of"),
        (lambda c: c["baselines"][0].pop("results"), "baselines, item 1: expected 'results'"),
        (
            lambda c: c["results"][1]["results"]["blocks"]["all"]["macro"].update(value="high"),
            "results, item 2, results, blocks, all, macro, value: expected a number, found text",
        ),
    ],
)
def test_results_that_do_not_fit_are_named(run, tmp_path, change, message):
    content = json.loads((run / "evaluation" / "results.json").read_text())
    change(content)
    write_json(tmp_path / "evaluation" / "results.json", content)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path)


def test_an_error_does_not_quote_a_patients_text(own):
    broken_line(own / "evaluation" / "predictions.jsonl", 2, b'{"stage": "sft", "reasoning": "Mrs Example has')
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2") as caught:
        write_report(own)
    assert "Example" not in str(caught.value)


def test_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder, found none at"):
        write_report(tmp_path / "nowhere")


def test_a_run_of_many_steps_is_thinned_and_keeps_its_mean():
    line = curves.Curve(np.arange(60_000.0), np.where(np.arange(60_000) % 3 == 0, np.nan, 0.25))
    thinned = curves.thin(line)
    assert len(thinned.values) <= curves.MOST_POINTS
    np.testing.assert_allclose(thinned.values, 0.25)
    assert thinned.steps[0] == 0


def test_examples_are_right_then_wrong_with_new_truths_first_in_any_order_of_rows(run):
    rows = [json.loads(line) for line in (run / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    chosen = choose_examples(rows, "home", run, per_kind=2)
    assert [film.right for film in chosen] == [True, True, False, False]
    assert {film.stage for film in chosen} == {"grpo"}
    assert all(set(film.others) == {"base", "sft"} for film in chosen)
    truths = [sorted(film.hits + film.missed) for film in chosen]
    assert truths[0] != truths[1]
    assert truths[2] != truths[3]
    assert choose_examples(rows[::-1], "home", run, per_kind=2) == chosen
