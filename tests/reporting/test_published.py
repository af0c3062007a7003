"""A paper's printed tables beside a run: transcribed without a slip, told apart from ours, and nothing of ours invented."""

import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_json

from vlmalign.data.sources.schema import CHEXPERT, CHEXPERT9
from vlmalign.evaluation.results import evaluate_predictions
from vlmalign.reporting import published
from vlmalign.reporting.html import write_report
from vlmalign.reporting.published import beside, gain, read_paper, systems
from vlmalign.reporting.run_folder import read_run
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.graph import build_graph

REPOSITORY = Path(__file__).resolve().parents[2]
STUDY = REPOSITORY / "configs" / "chexreason" / "study.yaml"
NEVER = "Pleural Other"  # in no film, and named by nobody
LABELS, NINE = CHEXPERT.labels, tuple(label for label in CHEXPERT.labels if label in CHEXPERT9.labels)
RUN = """
stages: {base: {kind: model}, sft: {kind: sft, from: base}, rl: {kind: grpo, from: sft}}
answers: {test: {}}
report:
  beside: chexreason
  rows:
    chexpert: {MedGemma-SFT: test/sft/home, ChexReason: test/rl/home}
    nih: {ChexReason: test/rl/home, MedGemma: other/base/home}
    grpo: {Free Reasoning SFT: test/sft/home, "hard reward, last": test/rl/home}
"""


def scores(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    known = [label for label in LABELS if label != NEVER]
    rows = [
        {
            "id": str(film), "patient": str(film // 2), "valid": film > 0,
            "truth": [known[film % 13]],
            "predicted": [label for label in known if rng.random() < 0.3] if film else [],
        }
        for film in range(60)
    ]  # fmt: skip
    return evaluate_predictions(rows, LABELS, subsets={"all 14": LABELS, "shared 9": NINE}, draws=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    (folder / "study.yaml").write_text(RUN)
    results = [{"stage": stage, "dataset": "home", "results": scores(seed)} for seed, stage in enumerate(("sft", "rl"))]
    dataset = {"name": "home", "role": "in-schema", "n": 60, "labels": list(LABELS)}
    write_json(folder / "scores" / "test" / "results.json", {"datasets": [dataset], "results": results})
    return folder


def tables(run: Path) -> dict[str, published.Table]:
    return dict(zip(read_paper("chexreason")["tables"], beside(read_run(run), 10).tables, strict=True))


def test_printed_averages_are_the_means_of_the_printed_labels():
    for name, table in read_paper("chexreason")["tables"].items():
        if "labels" in table:
            values = np.array(list(table["labels"].values()))
            assert values.shape == ({"chexpert": 14, "nih": 9}[name], 5)
            np.testing.assert_allclose(values.mean(0), table["macro"], atol=1.1e-3)
    assert set(read_paper("chexreason")["tables"]["chexpert"]["labels"]) == set(LABELS)


def test_what_the_headline_hides_is_computed_from_the_printed_numbers(run):
    told = tables(run)["chexpert"].sentences[0]
    assert "mean of 14 0.282 → 0.346, +0.064 (+23 %); mean of the 9 shared 0.264 → 0.274, +0.010 (+4 %)" in told
    assert "Lung Opacity alone is 65 % of the gain over 14 labels." in told
    first, _, third, _ = tables(run)["nih"].sentences
    assert "(+23 %)" in first  # SFT's NIH gain is one label's
    assert "Pneumothorax alone is 83 % of the gain" in first
    assert "(−19 %)" in third
    assert "alone" not in third, "what falls has no share of a gain"
    printed, ours = tables(run)["grpo"].sentences
    assert (
        "hard reward, best micro-F1 −0.024, macro-F1 +0.005; hard reward, last micro-F1 −0.040, macro-F1 −0.011"
        in printed
    )
    assert ours.startswith("Ours, against Free Reasoning SFT: hard reward, last micro-F1 ")


def test_ours_are_the_scores_of_the_run_and_a_gap_is_a_reason(run):
    found = {row.name: row for row in tables(run)["chexpert"].lines}
    names = systems(read_paper("chexreason")["tables"]["chexpert"])
    sft, rl = scores(0), scores(1)
    cells = dict(zip(names, found["mean of 14"].pairs, strict=True))
    assert cells["ChexReason"].ours.score == rl["blocks"]["all 14"]["macro_all"]
    assert cells["ChexReason"].printed == pytest.approx(0.346, abs=1e-3)
    shared = dict(zip(names, found["mean of the 9 shared"].pairs, strict=True))
    assert shared["MedGemma-SFT"].ours.score == sft["blocks"]["shared 9"]["macro_all"]
    assert cells["MedGemma"].ours == published.Cell(None, published.NOT_MAPPED)
    assert [pair.ours.why for pair in found[NEVER].pairs][3:] == [published.UNDEFINED] * 2
    assert found["Edema"].note == str(rl["blocks"]["all 14"]["per_label"][LABELS.index("Edema")]["support"])
    assert found["Edema"].few
    nih = {row.name: dict(zip(names, row.pairs, strict=True)) for row in tables(run)["nih"].lines}
    assert nih["Edema"]["MedGemma"].ours.why == published.NOT_SCORED
    assert nih["mean of 9"]["ChexReason"].ours.score == rl["blocks"]["shared 9"]["macro_all"]


def test_ours_gain_by_the_same_function(run):
    before, after = (
        {each["label"]: each["f1"]["value"] or 0.0 for each in scores(seed)["blocks"]["all 14"]["per_label"]}
        for seed in (0, 1)
    )
    subsets = {"mean of 14": LABELS, "mean of the 9 shared": NINE}
    assert (
        tables(run)["chexpert"].sentences[1] == f"Ours: {gain(before, after, subsets, 'test/sft/home', 'test/rl/home')}"
    )
    assert tables(run)["nih"].sentences[1].startswith("Ours: MedGemma-SFT against MedGemma cannot be told, for want of")


def test_the_page_marks_what_is_printed_and_writes_no_number_for_a_gap(run):
    text = write_report(run).read_text()
    section = text[text.index('<section id="published">') :]
    section = section[: section.index("</section>")]
    row = re.search(r'<th scope="row">Fracture<small>\d+ cases</small></th>(.*?)</tr>', section, re.S)[1]
    cells = re.findall(r'<td class="num( printed)?">(.*?)</td>', row)
    assert [bool(printed) for printed, _ in cells] == [True, False] * 5
    assert [re.sub("<.*?>", "", cell) for _, cell in cells[:2]] == ["0.750", "–a"]
    assert f"<sup>a</sup> {published.NOT_MAPPED}" in section
    assert "60 cases of 30 patients" in section


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("report.beside=chexreasn", "expected 'chexreason'"),
        ("report.rows.moon={}", "report.rows: no table 'moon'; known: prompts, formats, grpo, chexpert and nih"),
        ("report.rows.nih.Gemma=base/qwen/nih", "report.rows.nih: no system 'Gemma'; known: NV-Reason, MedGemma,"),
        ("report.rows.nih.MedGemma=base/nih", "expected ENTRY/STATE/SET"),
        (
            "report.rows.nih.MedGemma=base/moon/nih",
            "report.rows.nih.MedGemma: this study has no answers 'base/moon/nih'",
        ),
    ],
)
def test_what_is_not_there_is_named(setting, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_study(STUDY, [setting])


def test_the_study_answers_every_system_and_a_report_makes_nothing_stale(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = load_study(STUDY)
    for name, table in read_paper("chexreason")["tables"].items():
        assert tuple(study.report.rows[name]) == systems(table)
    bare = study.model_copy(update={"report": type(study.report)()})
    assert build_graph(bare) == build_graph(study)
    assert load_study(STUDY.with_name("small.yaml")).report.beside == "chexreason"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{nih: {MedGemma: test}}", "study.yaml: report.rows.nih.MedGemma: expected ENTRY/STATE/SET"),
        ("{nih: [MedGemma]}", "study.yaml: report.rows, nih: expected an object, found a list"),
    ],
)
def test_a_run_folder_that_does_not_fit_is_named(tmp_path, rows, message):
    (tmp_path / "study.yaml").write_text(f"report: {{beside: chexreason, rows: {rows}}}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path)
