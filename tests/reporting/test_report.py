"""The report of whole, partial, hostile and damaged run folders: one self-contained page, or an error that names the line."""

import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_folders import (
    FORK,
    LABELS,
    metrics,
    write_align,
    write_chexreason,
    write_json,
    write_lines,
    write_stage,
    write_study,
)

from vlmalign.evaluation import comparison
from vlmalign.evaluation.over_seeds import over_seeds
from vlmalign.evaluation.results import evaluate_predictions
from vlmalign.evaluation.samples import score_samples
from vlmalign.reporting import curves, training
from vlmalign.reporting.boards import FEWEST, boards, verdict
from vlmalign.reporting.examples import choose_examples
from vlmalign.reporting.html import write_report
from vlmalign.reporting.record import Stage
from vlmalign.reporting.run_folder import read_run
from vlmalign.reporting.score_file import numbers
from vlmalign.reporting.styles import set_styles, stage_styles
from vlmalign.reporting.words import number, p_value

SCORES = "scores/findings/results.json"
ANSWERS = "answers/findings/grpo-hard/home/predictions.jsonl"


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


def visible(run: Path) -> str:
    return Page(read(run)).text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("reports") / "fork")


@pytest.fixture(scope="module")
def text(run) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        return read(Path(run.name))


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of the run folder that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "own", ignore=shutil.ignore_patterns("*.html")))


def sections(page: Page) -> list[str]:
    """The headings of the sections, as the navigation lists them."""
    return [name for name in page.ids if f"#{name}" in page.references and re.fullmatch("[a-z-]+", name)]


# ---------------------------------------------------------------- a study: a fork with two answers entries


def test_a_finished_study_has_every_section(page):
    assert sections(page) == [
        *("headline", "scores", "reading", "coverage", "training", "labels", "differences", "baselines", "cases"),
        *("left-out", "provenance"),
    ]
    assert "Time 3 min 2 s" in page.text, "four stages of 40.5 s, one of them continued for 20 s"
    assert "91.25" in page.text
    assert "from: sft} # note" in page.text
    assert "also used to choose or to watch (peek): away." in page.text
    assert "truncated image" in page.text


def test_stages_stand_in_graph_order_with_the_stage_they_go_on_from(run, page, tmp_path):
    assert re.search(
        r"base model sft SFT from base .* grpo-hard GRPO from sft .* grpo-nuanced GRPO from sft .* dpo DPO from sft",
        page.text,
    )
    # Neither the order of the YAML nor that of the names puts a child before its parent.
    (tmp_path / "study.yaml").write_text(
        "stages: {a: {kind: grpo}, b: {kind: sft}, p: {kind: adapter, from: z}, z: {kind: model}}"
    )
    for name, kind, parent in (("a", "grpo", "b"), ("b", "sft", "p")):
        write_stage(tmp_path / "stages" / name, kind, parent, np.random.default_rng(0), 2)
    assert [(stage.name, stage.parent) for stage in read_run(tmp_path).stages] == [
        ("z", None),
        ("p", "z"),
        ("b", "p"),
        ("a", "b"),
    ]


def test_the_headline_says_what_happened_good_or_bad(run, text):
    results = json.loads((run / SCORES).read_text())
    fell = [
        f"{row['dataset']}: macro-F1 fell by {-row['macro']['value']:.3f} against {row['from']}"
        for row in results["differences"]
        if row["macro"]["value"] < 0 and row["macro"]["p_holm"] <= 0.05
    ]
    assert fell, "a stage of the fork makes the scores worse"
    headline = text[text.index('id="headline"') : text.index("<details")]
    bad = re.findall(r'<p class="bad">(.*?)</p>', headline[: headline.index("</ul>")])
    assert [line[: len(said)] for line, said in zip(bad, fell, strict=True)] == fell
    rewards = [row["reward"] for row in read_run(run).stages[2].metrics]
    first, last = rewards[:6], rewards[-6:]
    gain = (np.mean(last) - np.mean(first)) / np.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / 6)
    assert f"over 30 updates (+{gain:.1f} standard errors)." in headline
    assert re.search(r"grpo-nuanced</strong>.*?over 30 updates: no clear change \(", headline, re.S)
    assert "The chosen answer had the higher reward in 53 % of pairs at first, in 77 % in the end" in headline


def test_differences_have_adjusted_p_values_and_name_their_families(run, page):
    results = json.loads((run / SCORES).read_text())
    assert "adjusted by Holm's method" in page.text
    assert "(findings: 16 tests)" in page.text  # four steps, two data sets, macro and micro
    for row in results["differences"]:
        for gap in (row["macro"], row["micro"]):
            assert f"p {p_value(gap['p'])}, adjusted {p_value(gap['p_holm'])}" in page.text
    labels = [label for row in results["differences"] for label in row["labels"]]
    tested = sum(label["f1"]["p"] is not None for label in labels)
    assert 0 < tested < len(labels)
    assert f"(findings: {tested} tests). Grey: fewer than 10 cases, never tested" in page.text
    assert FEWEST == comparison.FEWEST


def test_an_interval_without_0_is_no_difference_once_the_family_is_too_large():
    gap = {"value": 0.2, "low": 0.1, "high": 0.3}
    assert verdict(gap) == "higher"
    assert verdict({**gap, "p": 0.01, "p_holm": 0.04}) == "higher"
    assert verdict({**gap, "p": 0.02, "p_holm": 0.08}) == "no difference shown"
    assert verdict({"value": -0.2, "low": -0.3, "high": -0.1, "p_holm": 0.01}) == "lower"
    assert verdict({"value": 0.2, "low": None, "high": None, "p": None}) == "not determined"


def test_too_few_draws_for_the_family_are_said(own):
    results = json.loads((own / SCORES).read_text())
    results["tests"]["smallest_p"] = 0.02
    write_json(own / SCORES, results)
    assert (
        "In findings no test can reach that: 16 tests of p >= 0.020 are 0.320 at best; raise draws"
        in Page(read(own)).text
    )


def test_precision_recall_and_rare_labels_stand_in_the_table_of_labels(run, page, text):
    block = json.loads((run / SCORES).read_text())["results"][0]["results"]["blocks"]["all"]
    for label in block["per_label"][:-1]:  # the last one's F1 is undefined
        assert f"P {number(label['precision'])}, R {number(label['recall'])}" in page.text
        row = re.search(
            rf'<tr(.*?)><th scope="row">{re.escape(label["label"].replace("&", "&amp;"))}</th><td class="num">',
            text[text.index('id="labels"') :],
        )
        assert (row[1] == ' class="few"') == (label["support"] < 10)


def test_subgroups_stand_with_their_cases_and_how_many_labels_they_have(own):
    results = json.loads((own / SCORES).read_text())
    rows = [row for row in read_run(own).entries[0].predictions if row["dataset"] == "home"]
    expected = []
    for stage in ("base", "sft"):
        for group, places in (("below 60", range(12)), ("60 and above", range(12, 40))):
            part = [row for row in rows if row["stage"] == stage and int(row["id"][5:]) in places]
            scores = evaluate_predictions(part, LABELS, subsets={"all": LABELS}, draws=20)
            place = {"stage": stage, "dataset": "home", "column": "age", "group": group}
            results.setdefault("subgroups", []).append({**place, "results": scores})
            macro = scores["blocks"]["all"]["macro"]
            expected.append(f"{macro['value']:.3f} {macro['low']:.3f} to {macro['high']:.3f}")
    write_json(own / SCORES, results)
    page = Page(read(own))
    assert "subgroups" in sections(page)
    assert all(text in page.text for text in expected)
    assert re.search(r"age: below 60 12 6 patients 0\.\d+ .* age: 60 and above 28 14 patients", page.text)
    assert "labels; micro" in page.text
    results["subgroups"][0]["results"]["blocks"]["all"]["macro"] = 0.5
    write_json(own / SCORES, results)
    with pytest.raises(ValueError, match="subgroups, age below 60, blocks, all, macro: expected an object"):
        read_run(own)


def test_numbers_over_seeds_stand_with_interval_and_every_seeds_value(own):
    results = json.loads((own / SCORES).read_text())
    numbers = {"macro": over_seeds({0: 0.25, 5: 0.75}), "not valid": over_seeds({0: 0.0, 5: None})}
    place = {"dataset": "home", "subset": "all"}
    results["seeds"] = {
        "results": [{"stage": "sft", **place, "numbers": numbers}],
        "differences": [{"from": "base", "to": "sft", **place, "numbers": {"macro": over_seeds({0: 0.1, 5: 0.3})}}],
    }
    write_json(own / SCORES, results)
    page = Page(read(own))
    assert "seeds" in sections(page)
    assert "sft all 0.500 -2.677 to 3.677 0.250 0.750 0.000 no interval 0.000" in page.text.replace("−", "-")
    assert "sft - base all +0.200 -1.071 to +1.471 +0.100 +0.300" in page.text.replace("−", "-")
    del results["seeds"]["results"][0]["numbers"]["macro"]["n"]
    write_json(own / SCORES, results)
    with pytest.raises(ValueError, match="seeds"):
        read_run(own)


def test_several_samples_have_their_own_section_with_a_reliability_plot(own):
    results = json.loads((own / SCORES).read_text())
    rng = np.random.default_rng(0)
    for row in results["results"]:
        labels = tuple(row["results"]["blocks"]["all"]["labels"])
        answers = [
            {
                "id": str(film), "patient": str(film // 2), "truth": [labels[film % 2]], "valid": True, "sample": k,
                "predicted": [label for label in labels if rng.random() < (0.7 if label == labels[film % 2] else 0.2)],
            }
            for film in range(24)
            for k in range(4)
        ]  # fmt: skip
        subsets = {name: tuple(block["labels"]) for name, block in row["results"]["blocks"].items()}
        row["results"]["samples"] = score_samples(answers, labels, subsets=subsets, draws=20)
    write_json(own / SCORES, results)
    path = own / ANSWERS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**line, "sample": k} for line in lines for k in range(2)])
    page = Page(read(own))
    assert "samples" in sections(page)
    found = results["results"][0]["results"]["samples"]
    assert [each["k"] for each in found["pass_at_k"]] == [1, 2, 4]
    for score in (*found["pass_at_k"], found["blocks"]["all"]["macro_auroc"], found["blocks"]["shared"]["macro_auroc"]):
        assert f"{score['value']:.3f} {score['low']:.3f} to {score['high']:.3f}" in page.text
    assert f"ECE {found['blocks']['all']['per_label'][0]['ece']:.3f}" in page.text
    assert "share of the samples that name the label" in page.text
    assert re.search(
        r"Reliability on home, probability and share by bin\. base: 0\.", (own / "report.html").read_text()
    )
    (home,) = [board for board in boards(read_run(own)) if board.dataset == "home"]
    assert len(home.samples) == len(FORK)


def test_labels_without_a_counterpart_are_stated(own):
    results = json.loads((own / SCORES).read_text())
    results["datasets"][1] |= {"unmapped": {"Infiltration": 7, "Hernia": 1}, "only_unmapped": 3}
    write_json(own / SCORES, results)
    said = "without a counterpart here, with their cases: Infiltration 7, Hernia 1. 3 cases have nothing else, and an empty"
    assert said in Page(read(own)).text


def test_updates_with_nothing_to_compare_are_said():
    rows = [{"step": step, "reward": 0.0, "flat_groups": 1.0 if step > 2 else 0.5} for step in range(1, 31)]
    said = training.sentences(Stage("rl", "grpo", "sft", "stages/rl", rows), [])
    assert [tone for _, tone in said] == ["", "bad"]
    assert said[1].text == "28 of 30 updates had nothing to compare: in every group all rewards were equal."
    (alone,) = training.sentences(Stage("rl", "grpo", "sft", "stages/rl", rows[:2]), [])
    assert alone.text == "Mean reward 0 → 0 over 2 updates."


def test_scores_are_those_of_the_results_file(run, page):
    for row in json.loads((run / SCORES).read_text())["results"]:
        for block in row["results"]["blocks"].values():
            for name in ("macro", "macro_all", "micro"):
                score = block[name]
                assert f"{score['value']:.3f} {score['low']:.3f} to {score['high']:.3f}" in page.text
    # both averages of the in-schema set: over all its labels, and over those that the data sets share
    assert "all, 5 labels" in page.text
    assert "shared, 3 labels" in page.text


def test_unknown_names_stand_beside_the_answers_that_are_not_valid(page):
    assert "Not valid Unknown names" in page.text
    assert page.text.count("20.0 % 8 oedema 4 wet lung") == 2, "the base model, on both data sets"


def test_scores_of_other_tasks_are_a_table_of_their_numbers(page):
    assert (
        "medqa 12 cases of 12 patients Score sft grpo-hard accuracy 0.417 0.170 to 0.670 0.667 0.420 to 0.920 "
        "not valid 0.0 % 0.0 % with unknown names 0.0 % 0.0 %"
    ) in page.text
    assert "Truth: B" in page.text
    assert "Answer: C" in page.text
    assert "image not found" not in page.text, "a question has no film"


def test_every_kind_of_task_gives_its_numbers():
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    common = {
        "kind": "x",
        "n": 9,
        "patients": 9,
        "fail_rate": 0.0,
        "unknown_rate": 0.0,
        "unknown_names": [],
        "draws": 9,
    }
    fields = {"accuracy": score, "fields": {"grade": {"kind": "ordinal", "n": 9, "macro_f1": score, "per_option": []}}}
    checks = {"prompts": score, "by_kind": {"words": {"n": 4, "share": 0.25}}}
    assert list(numbers(common | fields)) == ["accuracy", "grade: macro f1"]
    assert numbers(common | checks) == {
        "prompts": score,
        "words: share": {"value": 0.25, "low": None, "high": None},
    }
    assert list(numbers(common | {"tokens": score, "stopped": score})) == ["tokens", "stopped"]


def test_stages_of_one_kind_look_different(run):
    styles = stage_styles(read_run(run))
    assert list(styles) == list(FORK)
    assert styles["grpo-hard"].colour == styles["grpo-nuanced"].colour != styles["dpo"].colour
    assert len({style.mark for style in styles.values()}) == len(styles)
    many = set_styles((f"arm {number}", "grpo") for number in range(14))
    assert len({style.mark for style in many.values()}) == 14


def test_sets_of_one_source_stand_beside_its_pool_and_one_without_films_is_no_column(run):
    (source, coverage), *others = read_run(run).coverage.items()
    assert (source, others) == ("films", [])
    assert list(coverage["sets"]) == ["pool", "train.sft", "train.rl", "home"]
    assert "test" in json.loads((run / "sets" / "train" / "coverage.json").read_text())["sets"]
    assert set(coverage["floors"].values()) == {0.05}
    assert set(coverage["caps"].values()) == {1}


def test_labels_have_floors_and_caps_of_their_own(run, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(run, own)
    path = own / "sets" / "train" / "coverage.json"
    first, second, *_ = (record := json.loads(path.read_text()))["labels"]
    path.write_text(json.dumps(record | {"floors": {first: 0.9}, "caps": {second: 0.4}}))
    (coverage,) = read_run(own).coverage.values()
    assert (coverage["floors"][first], coverage["floors"][second], coverage["caps"][second]) == (0.9, 0.05, 0.4)
    text = write_report(own).read_text()
    assert "below the set's floor</caption>" in text
    (row,) = re.findall(rf'<tr><th scope="row">{first}</th>(.*?)</tr>', text[text.index('id="coverage"') :], re.S)[:1]
    home = coverage["sets"]["home"]
    below = home["counts"][first] / home["films"] < 0.05
    # The pool has no floor, train.sft and train.rl are far below theirs, and home has one of its own.
    assert [" low" in cell for cell in re.findall("<td.*?</td>", row, re.S)] == [False, True, True, below]


def test_every_stage_has_its_curves(text):
    drawn = re.findall(r'aria-label="([\w-]+): ([\w/]+) over 30 steps', text)
    found = {stage: [column for name, column in drawn if name == stage] for stage in FORK}
    assert found["base"] == []
    assert found["sft"] == ["loss", "validation/loss", "grad_norm"], "with one loss the objective is that loss"
    assert found["dpo"] == ["objective", "rewards/accuracies", "rewards/margins", "validation/loss", "grad_norm"]
    reward = ["reward", "validation/reward", "valid", "length", "kl", "entropy", "flat_groups"]
    assert found["grpo-hard"] == found["grpo-nuanced"] == [*reward, "jaccard", "stopped", "grad_norm"]


def test_the_page_needs_nothing_else(text, page):
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert (
            reference.startswith("data:image/jpeg;base64,")
            or reference.removeprefix("#") in page.ids
            or reference.endswith("/completions.html")
            or reference in ("galleries/findings/home.html", "galleries/findings/away.html")
        ), reference
    for name in re.findall(r"url\(([^)]*)\)", text):
        assert name.removeprefix("#") in page.ids
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in text


def test_the_same_folder_by_the_same_path_gives_the_same_page(own, text, monkeypatch):
    monkeypatch.chdir(own.parent)
    own.rename("fork")
    assert read(Path("fork")) == text


@pytest.mark.parametrize("path", ["runs/my run", "fork", "."])
def test_the_command_to_repeat_names_the_folder_as_it_was_given(run, tmp_path, monkeypatch, path):
    folder = tmp_path / path
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "study.yaml", folder)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"<pre>(vlmalign .*)</pre>", read(Path(path)))
    words = shlex.split(command.replace("&#39;", "'"))
    assert words[:2] == ["vlmalign", "run"]
    assert Path(words[2]).read_text() == (run / "study.yaml").read_text(), "it can be pasted"
    assert words[3] == "--run"
    assert not Path(words[4]).exists()
    assert Path(words[4]).resolve().parent == folder.resolve().parent


def test_undefined_is_a_word_and_never_zero(run, text):
    results = json.loads((run / SCORES).read_text())["results"]
    never = results[0]["results"]["blocks"]["all"]["per_label"][-1]
    assert never["support"] == 0
    assert never["f1"]["value"] is None
    row = re.search(
        r"<tr class=\"few\"><th scope=\"row\">Hernia &amp; Co</th><td class=\"num\">0</td>(.*?)</tr>", text, re.S
    )
    assert row
    assert row[1].count("undefined</span>") == len(FORK)
    assert "0.0" not in row[1]
    figure = text[text.index('aria-label="F1 per label on home') :]
    assert figure[: figure.index("</svg>")].count(">undefined<") == 1, "one word for all stages"


# ---------------------------------------------------------------- runs that have less


def test_a_study_that_has_only_begun(tmp_path):
    (tmp_path / "study.yaml").write_text("stages: {base: {kind: model}, sft: {kind: sft, from: base}}\n")
    page = Page(read(tmp_path))
    assert sections(page) == ["provenance"]
    write_json(
        tmp_path / "stages" / "sft" / "begun.json", {"kind": "sft", "parents": {"from": {"node": "stages/base"}}}
    )
    assert "No update has been recorded." in visible(tmp_path)
    write_lines(tmp_path / "stages" / "sft" / "metrics.jsonl", metrics("sft", np.random.default_rng(0), 12))
    page = Page(read(tmp_path))
    assert sections(page) == ["headline", "training", "provenance"]
    assert "Under way: 12 updates so far." in page.text


def test_answers_of_one_data_set_by_two_entries_are_told_apart(own):
    shutil.copytree(own / "scores" / "findings", own / "scores" / "sampled")
    titles = [board.title for board in boards(read_run(own))]
    assert titles == ["home, findings", "away, findings", "medqa", "home, sampled", "away, sampled"]


def test_films_that_cannot_be_shown_are_said_to_be_so(own):
    (own / "images" / "0.png").write_bytes(b"no image")
    (own / "images" / "1.png").unlink()
    for room in ("scores", "stages", "sets"):
        shutil.rmtree(own / room)
    page = Page(read(own))
    assert sections(page) == ["cases", "provenance"]
    assert "img" not in page.tags
    assert "image not readable" in page.text
    assert "image not found" in page.text


# ---------------------------------------------------------------- folders of version 0.1


def test_a_chexreason_run_of_version_01(tmp_path):
    page = Page(read(write_chexreason(tmp_path / "old")))
    assert sections(page) == [
        *("headline", "scores", "reading", "coverage", "training", "labels", "differences", "baselines", "cases"),
        "provenance",
    ]
    assert "grpo GRPO from sft Mean reward 0." in page.text
    assert f"vlmalign chexreason {tmp_path / 'old' / 'config.yaml'}" in page.text
    assert "the command belongs to that version" in page.text


def test_an_align_run_of_version_01(tmp_path):
    run = write_align(tmp_path / "old")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page = Page(read(run))
    assert sections(page) == ["headline", "training", "left-out", "provenance"]
    assert "01-sft SFT from base Loss" in page.text
    assert "03-ppo PPO from 02-dpo Mean reward" in page.text
    first, last = re.search(r"01-sft 30 updates 40.5 s loss ([\d.]+) ([\d.]+) validation/loss", page.text).groups()
    rows = [json.loads(line)["loss"] for line in (run / "01-sft" / "metrics.jsonl").read_text().splitlines()]
    assert (float(first), float(last)) == pytest.approx((np.mean(rows[:6]), np.mean(rows[-6:])), rel=1e-3)
    assert "01-sft 6 too long" in page.text
    assert f"vlmalign align {run / 'config.yaml'}" in page.text
    assert {path: path.read_bytes() for path in before} == before


# ---------------------------------------------------------------- hostile and damaged folders


def test_model_text_cannot_become_markup(own):
    attack = '<script>alert(1)</script><img src=http://x.test/a onerror=y>" onload="z {{ 7 * 7 }} \ud800'
    for path in (own / "answers").rglob("predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"id": row["id"] + attack, "reasoning": attack, "completion": attack, "reason": attack}
            row |= {"unknown": [attack], "predicted": [attack] if isinstance(row["predicted"], list) else attack}
        write_lines(path, rows)
    results = json.loads((own / SCORES).read_text())
    results["results"][0]["results"]["unknown_names"] = [{"name": attack, "count": 1}]
    write_json(own / SCORES, results)
    write_lines(own / "sets" / "train" / "skipped.jsonl", [dict.fromkeys(("id", "path", "reason"), attack)])
    name = '<script>"$x_1$'  # of a label and of a data set, in tables and figures
    for path in (own / SCORES, own / "sets" / "train" / "coverage.json"):
        path.write_text(path.read_text().replace('"Edema"', json.dumps(name)).replace('"home"', json.dumps(name)))
    hostile = Page(read(own))
    assert name in hostile.text
    assert "script" not in hostile.tags
    assert not any("x.test" in reference for reference in hostile.references)
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{ 7 * 7 }} U+D800" in hostile.text


def broken_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("stages/dpo/metrics.jsonl", 3, b'{"step": 3, "rew', "line 3: expected JSON, found Unterminated string"),
        ("stages/dpo/metrics.jsonl", 4, b"", "line 4: expected JSON, found Expecting value"),
        ("stages/sft/metrics.jsonl", 2, b'{"step": 2, "loss": NaN}', "line 2: expected JSON, found NaN"),
        ("stages/sft/metrics.jsonl", 2, b'{"loss": 1}', "line 2: expected 'step', found no such entry"),
        ("stages/sft/made.json", 1, b'{"kind": "sft"}', "expected 'parents', found no such entry"),
        ("timing.jsonl", 1, b'{"stage": "\xff"}', "line 1: expected JSON, found bytes that are not UTF-8"),
        ("timing.jsonl", 2, b'{"stage": "sft", "seconds": true}', "line 2, seconds: expected a number, found true"),
        ("sets/train/skipped.jsonl", 1, b"[]", "line 1: expected an object, found a list"),
        ("sets/train/coverage.json", 1, b'{"labels": ["a"], "floor": 0.05}', "expected 'sets', found no such entry"),
        (ANSWERS, 2, b'{"stage": "sft", "reasoning": "Mrs Example has', "line 2: expected JSON"),
        (ANSWERS, 2, b'{"stage": "sft", "dataset": "Mrs Example"}', "line 2: expected 'id'"),
        (SCORES, 1, b'{"datasets": [],\n"results": [}', "line 2: expected JSON"),
        ("study.yaml", 2, b"seed: }", "(line 2, column 7)"),
    ],
)
def test_a_malformed_file_is_named_with_its_line_and_not_quoted(own, file, number, line, message):
    broken_line(own / file, number, line)
    with pytest.raises(ValueError) as caught:
        write_report(own)
    assert f"{own / file}" in str(caught.value)
    assert message in str(caught.value)
    assert "Example" not in str(caught.value)
    assert not (own / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["results"][0].update(dataset="moon"), "found 'moon'"),
        (lambda c: c["results"].append(c["results"][0]), "found it twice"),
        (lambda c: c["baselines"][0].pop("results"), "baselines, item 1: expected 'results'"),
        (
            lambda c: c["results"][1]["results"].update(unknown_names={"Oedema": 1}),
            "results, sft on home, unknown_names: expected a list, found an object",
        ),
        (
            lambda c: c["results"][1]["results"]["blocks"]["all"]["macro"].update(value="high"),
            "results, sft on home, blocks, all, macro, value: expected a number, found text",
        ),
    ],
)
def test_results_that_do_not_fit_are_named(own, change, message):
    content = json.loads((own / SCORES).read_text())
    change(content)
    write_json(own / SCORES, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(own)


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_run_folder(tmp_path, folder):
    with pytest.raises(ValueError, match=r"expected a run folder, found neither study\.yaml nor config\.yaml in"):
        write_report(tmp_path / folder)


# ---------------------------------------------------------------- parts


def test_a_run_of_many_steps_is_thinned_and_keeps_its_mean():
    line = curves.Curve(np.arange(60_000.0), np.where(np.arange(60_000) % 3 == 0, np.nan, 0.25))
    thinned = curves.thin(line)
    assert len(thinned.values) <= curves.MOST_POINTS
    np.testing.assert_allclose(thinned.values, 0.25)
    assert thinned.steps[0] == 0


def test_fifths_are_of_what_was_recorded():
    known = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    values = np.full(50, np.nan)
    values[::10] = known
    assert curves.fifths(curves.Curve(np.arange(50.0), values)) == (1.0, 5.0)


@pytest.mark.parametrize(("value", "ticks"), [(0.0, "−0.8 −0.4 0 0.4 0.8"), (0.25, "0.15 0.2 0.25 0.3 0.35")])
def test_a_number_that_never_moves_has_room_on_its_axis_and_steps_are_whole(value, ticks):
    svg = curves.curve_figure(curves.Curve(np.arange(1.0, 3), np.full(2, value)), "flat", "red")
    assert re.findall(r">([^<]+)</text>", svg) == [*ticks.split(), "1", "2", "step"]


def test_a_curve_has_a_gap_where_nothing_was_recorded():
    values = np.array([0.0, 1.0, np.nan, np.nan, *range(9)])
    svg = curves.curve_figure(curves.Curve(np.arange(1.0, 14), values), "loss & <co>", "red")
    recorded = re.search(r'd="([^"]*)"[^>]*stroke-opacity="\.35"/><path', svg)[1]
    assert re.sub("[^ML]", "", recorded) == "MLM" + 8 * "L"
    assert 'aria-label="loss &amp; &lt;co&gt; over 13 steps' in svg


def test_examples_are_right_then_wrong_with_new_truths_first_in_any_order_of_rows(run):
    rows = [row for row in read_run(run).entries[0].predictions if row["dataset"] == "home"]
    chosen = choose_examples(rows, list(FORK), run, per_kind=2)
    assert [film.right for film in chosen] == [True, True, False, False]
    assert {film.stage for film in chosen} == {"dpo"}
    assert all(set(film.others) == set(FORK) - {"dpo"} for film in chosen)
    truths = [film.truth for film in chosen]
    assert truths[0] != truths[1]
    assert truths[2] != truths[3]
    assert choose_examples(rows[::-1], list(FORK), run, per_kind=2) == chosen


@pytest.mark.parametrize(
    ("truth", "predicted", "unknown", "right", "shown"),
    [
        (["Edema"], ["Fracture", "Edema"], [], False, (["Edema"], [], ["Fracture"])),
        (["Edema", "Fracture"], ["Fracture", "Edema"], [], True, (["Edema", "Fracture"], [], [])),
        ([], [], [], True, ([], [], [])),
        ([], [], ["Fluid"], False, ([], [], [])),
        ([{"kind": "words"}, {"kind": "title"}], [True, False], [], False, (["kind: words"], ["kind: title"], [])),
        ({"grade": 2, "side": None}, {"grade": 2, "side": "left"}, [], True, ([], [], [])),
        ({"grade": 2, "side": None}, {"grade": 3, "side": "left"}, [], False, ([], [], [])),
        ("B", "B", [], True, ([], [], [])),
        (None, None, [], None, ([], [], [])),
    ],
)
def test_an_answer_of_any_task_is_right_or_wrong_or_neither(tmp_path, truth, predicted, unknown, right, shown):
    row = {"stage": "sft", "dataset": "d", "id": "1", "valid": True, "reason": None, "reasoning": "", "image": None}
    row |= {"completion": "Rest.", "truth": truth, "predicted": predicted, "unknown": unknown}
    (found,) = choose_examples([row], ["sft"], tmp_path)
    assert found.right is right
    assert (found.hits, found.missed, found.false_alarms) == shown
    assert (found.text, found.unknown, found.picture_problem) == ("Rest.", unknown, None)
