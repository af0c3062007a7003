"""A second domain by YAML alone: ten-year cardiac risk from a table of a practice, nothing of it in the code."""

import numpy as np
import pandas as pd

from vlmalign.config import Config, load_config
from vlmalign.data.records.features import features
from vlmalign.data.sources.formats import AnySource
from vlmalign.tasks.tasks import AnyTask

STUDY = """
sources:
  practice:
    kind: ehr
    path: visits.csv
    patient: person
    missing: [NA]
    on_bad: skip
    fields:
      age: {kind: number, unit: years, low: 25, high: 84, required: true}
      sex: {kind: code, codes: {F: woman, M: man}, required: true}
      smoking: {kind: code, codes: [never, former, current]}
      systolic: {kind: number, label: systolic blood pressure, unit: mmHg, low: 70, high: 260}
      cholesterol: {kind: number, label: total cholesterol, unit: mmol/l, low: 1.5, high: 15}
      hdl: {kind: number, label: HDL, unit: mmol/l, low: 0.2, high: 5}
      diabetes: {kind: flag}
      family: {kind: flag, label: family history}
      region: {kind: code, role: group}
      risk: {kind: code, role: decision, required: true, codes: {1: low, 2: moderate, 3: high, 4: very high}}
      statin: {kind: number, role: decision, unit: mg, low: 0, high: 80}
      advice: {kind: list, role: decision, separator: "/"}
    after: [event_within_ten_years, date_of_event]
    summary:
      template: |
        A {age} old {sex}, smoking: {smoking}.
        Blood pressure {systolic}; cholesterol {cholesterol}, HDL {hdl}.
        Diabetes: {diabetes}. Heart disease in the family: {family}.
      missing: not measured
tasks:
  risk:
    kind: fields
    prompt: "{summary}\\nRisk within ten years, daily dose of atorvastatin, and advice, as {\\"risk\\": ..., \\"statin\\": ..., \\"advice\\": [...]}."
    fields:
      risk: {kind: ordinal, options: [low, moderate, high, very high]}
      statin: {kind: number, unit: mg, units: {g: 1000}, low: 0, high: 80, required: false}
      advice: {kind: list, names: [stop smoking, exercise, less salt, weight loss], required: false}
"""


class Study(Config):
    sources: dict[str, AnySource]
    tasks: dict[str, AnyTask]


def visits(n, rng):
    """An invented practice: a score of age, pressure and smoking decides."""
    age, systolic = rng.integers(25, 85, n), rng.normal(135, 20, n).round().clip(80, 220)
    smoking = rng.choice(["never", "former", "current"], n)
    score = (age - 55) / 10 + (systolic - 135) / 20 + 1.5 * (smoking == "current")
    risk = 1 + np.digitize(score, [-1.0, 0.5, 2.0])
    return pd.DataFrame(
        {
            "person": np.arange(n) // 2, "age": age, "sex": rng.choice(["F", "M"], n), "smoking": smoking,
            "systolic": np.where(rng.random(n) < 0.1, "NA", systolic.astype(int).astype(str)),
            "cholesterol": rng.normal(5.4, 1, n).round(1), "hdl": rng.normal(1.4, 0.2, n).round(1),
            "diabetes": rng.integers(0, 2, n), "family": "", "region": rng.choice(["coast", "hills"], n), "risk": risk,
            "statin": np.array([0, 10, 40, 80])[risk - 1],
            "advice": np.where(smoking == "current", "stop smoking/exercise", ""),
            "event_within_ten_years": rng.integers(0, 2, n), "date_of_event": "",
        }
    )  # fmt: skip


def test_a_domain_by_yaml_alone(tmp_path):
    table = visits(400, np.random.default_rng(0))
    table.loc[3, "age"] = 19
    table.loc[5, "risk"] = 9
    table.to_csv(tmp_path / "visits.csv", index=False)
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_config(Study, tmp_path / "study.yaml")
    records, task = study.sources["practice"].open(lambda path: tmp_path / path), study.tasks["risk"]
    assert len(records) == 398
    assert records.notes[0].startswith(
        "2 of 400 records are left out: age: out of range (25 to 84 years): 1; risk: unknown"
    )
    assert records.schema.labels[:4] == ("risk: low", "risk: moderate", "risk: high", "risk: very high")
    told = records[0].meta["summary"]
    assert told.startswith(f"A {table['age'][0]} years old {'woman' if table['sex'][0] == 'F' else 'man'}, smoking: ")
    assert told.endswith("Heart disease in the family: not measured.")
    for record in records:
        assert task.ask(record)[0]["content"].startswith("A ")
        facts = task.read(task.write(record), task.columns(record))
        assert facts.valid
        assert facts.values == task.truth(record)
    unread = task.read('{"risk": "middling", "statin": "a lot"}', task.columns(records[0]))
    assert not unread.valid
    assert unread.unknown == ('risk: "middling"', 'statin: "a lot"')
    assert features(records).names == ("age", "sex", "smoking", "systolic", "cholesterol", "hdl", "diabetes", "family")
