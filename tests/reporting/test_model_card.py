"""Model cards: what was made from what, counted and scored as the run says, without a path or a patient in them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import FORK, write_json, write_lines, write_study

from vlmalign.config_yaml import read_yaml
from vlmalign.data.sources.formats import SOURCES
from vlmalign.exporting.model_card import card_of
from vlmalign.reporting import model_card
from vlmalign.reporting.model_card import TERMS, card, write_cards
from vlmalign.reporting.run_folder import read_run

SETTINGS = {
    "data": {"set": "train.sft", "traces": "/secret/traces.jsonl"}, "validation": {"data": {"set": "train.rl"}},
    "lora": {"rank": 16, "alpha": 32.0}, "steps": 30, "reference": None,
}  # fmt: skip
SOURCES_OF_RUN = """
sources:
  films: {kind: mimic-cxr-jpg, root: /secret/mimic}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = write_study(tmp_path_factory.mktemp("cards") / "fork")
    study = run / "study.yaml"
    text = study.read_text().replace("base: {kind: model", "base: {path: /secret/models/medgemma-4b-it, kind: model")
    study.write_text(text + SOURCES_OF_RUN)
    write_json(run / "environment.json", {"started": "2026-11-28T09:30:00+00:00"})
    for name, cases in (("train/sft", 60), ("train/rl", 30), ("home/cases", 40), ("away/cases", 40)):
        rows = [{"id": f"secret-{case}", "patient": f"secret-p{case // 2}"} for case in range(cases)]
        write_lines(run / "sets" / f"{name}.jsonl", rows)
    for name in FORK:
        if name != "base":
            path = run / "stages" / name / "made.json"
            made = json.loads(path.read_text()) | {"settings": SETTINGS, "versions": {"vlmalign": "0.2.0"}}
            write_json(path, made)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "fork"))


def card_from(run: Path, name: str = "grpo-hard", **how) -> str:
    found = read_run(run)
    return card(found, next(stage for stage in found.stages if stage.name == name), **how)


def section(text: str, title: str) -> str:
    return text[text.index(f"## {title}\n") :].split("\n## ")[0]


def test_the_front_matter_is_what_the_hub_reads(run):
    front = read_yaml(card_from(run).split("---")[1])
    tags = ["vlmalign", "medical", "grpo", "lora"]
    assert front == {"base_model": "medgemma-4b-it", "library_name": "peft", "tags": tags}
    assert read_yaml(card_from(run, merged=True).split("---")[1])["library_name"] == "transformers"


def test_it_says_what_the_stage_goes_back_to(run):
    said = section(card_from(run), "Trained from")
    assert re.search(r"`sft`: SFT from `base`.*`0{16}`; 30 updates\n- `grpo-hard`: GRPO from `sft`", said)


def test_data_are_counted_and_have_their_terms(run):
    said = section(card_from(run), "Data")
    assert "| train.sft | training of sft | MIMIC-CXR-JPG | 60 | 30 |" in said
    assert "| train.rl | validation of grpo-hard | MIMIC-CXR-JPG | 30 | 15 |" in said
    assert "| home | scores | MIMIC-CXR-JPG | 40 | 20 |" in said
    assert said.count(TERMS["mimic-cxr-jpg"].terms) == 1
    assert set(TERMS) == set(SOURCES)


def test_several_sets_of_a_stage_are_each_told_and_the_seed_is_its_own(run):
    path = run / "stages/grpo-hard/made.json"
    settings = {"data": {"set": ["train.rl", "home"]}, "sft": {"data": {"set": "train.sft"}}, "seed": 7}
    write_json(path, json.loads(path.read_text()) | {"settings": settings})
    said = section(card_from(run), "Data")
    for start in ("train.rl | training of", "home | training of", "train.sft | SFT beside of"):
        assert f"| {start} grpo-hard |" in said
    assert "One run of seed 7" in card_from(run)


def test_invented_films_are_said_to_be_so_also_where_another_source_draws_them(run):
    study = run / "study.yaml"
    text = study.read_text().replace(
        "/secret/mimic}", "/x}\n  drawn: {kind: mimic-cxr-jpg, root: /x, phantom: {seed: 1}}"
    )
    study.write_text(text)
    said = card_from(run)
    assert "drawn by vlmalign, of no patient" in section(said, "Data")
    assert "nothing about patients" in section(said, "Limits")


def test_scores_are_those_of_the_results_with_interval_n_and_date(run):
    said = section(card_from(run), "Scores")
    results = json.loads((run / "scores/findings/results.json").read_text())["results"]
    shown = 0
    for row in results:
        if row["stage"] == "grpo-hard":
            for subset, block in row["results"]["blocks"].items():
                score = block["macro"]
                value = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                assert f"| macro-F1, {subset} | {value} | 40 | 20 |" in said
                shown += 1
    assert shown == 3
    assert "| exam | medqa (in-schema) | accuracy | 0.667 [0.420, 0.920] | 12 | 12 | 0.0 % |" in said
    assert "95 % from 50 draws" in said
    assert "Run of 2026-11-28." in said


def test_limits_name_what_is_thin(run):
    said = card_from(run)
    assert said.count("**Not for clinical use.**") == 1
    limits = section(said, "Limits")
    assert "Test sets that were also used to choose or to watch: away." in limits
    assert "away is cross-schema" in limits
    assert re.search(r"home has fewer than 10 cases of .*Hernia &amp; Co\.", limits)


def test_settings_are_those_of_the_record_and_nothing_names_a_place_or_a_patient(run):
    said = card_from(run)
    lines = [line[4:] for line in section(said, "Settings").splitlines() if line.startswith("    ")]
    expected = {key: value for key, value in SETTINGS.items() if value is not None}
    assert read_yaml("\n".join(lines)) == expected | {"data": {"set": "train.sft", "traces": "traces.jsonl"}}
    assert "secret" not in said
    assert str(run) not in said
    assert "film-0" not in said
    assert "vlmalign run study.yaml --run NEW_FOLDER --only stages/grpo-hard" in said


def test_a_name_cannot_break_the_table(run):
    path = run / "scores/findings/results.json"
    path.write_text(path.read_text().replace('"home"', json.dumps("<b>a|b`\n# c")))
    said = card_from(run)
    assert "| &lt;b>a&#124;b' # c (in-schema) |" in said


def test_every_finished_stage_has_a_card_and_no_other(run):
    (run / "stages/dpo/made.json").rename(run / "stages/dpo/begun.json")
    write_cards(read_run(run))
    assert {path.parent.name for path in run.glob("stages/*/model_card.md")} == {"sft", "grpo-hard", "grpo-nuanced"}
    shutil.rmtree(run / "scores")
    assert "Not scored on any set." in write_cards(read_run(run))[0].read_text()


def test_an_export_takes_the_card_of_the_stage_it_comes_from(run, tmp_path):
    (run / "stages/sft/adapter").mkdir()
    for adapter in (run / "stages/sft", run / "stages/sft/adapter"):
        assert card_of(adapter, merged=False) == card_from(run, "sft")
    assert card_of(tmp_path, merged=False) is None
    (run / "stages/sft/made.json").unlink()
    assert card_of(run / "stages/sft", merged=False) is None
    assert model_card.FILE not in {path.name for path in (run / "stages/sft").iterdir()}
