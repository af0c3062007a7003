"""What the tiny text bases are taught: records of an invented ward, questions with four options, simple constraints.

The ward's rules are made up and simple: each patient has a few measurements, at most one of them out of its range; a
finding has one treatment and one urgency. They are no medical advice, and no study of this project evaluates on them.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vlmalign.data.chat.messages import Message
from vlmalign.types import Layout

FIELDS, CHOICE, CONSTRAINTS, REPORT = "fields", "choice", "constraints", "report"
#: how many tokens question and answer may take; a template with a system turn of its own needs more
LAYOUTS: Mapping[str, Layout] = {
    FIELDS: Layout(84, 1, 32), CHOICE: Layout(88, 1, 20), CONSTRAINTS: Layout(28, 1, 40), REPORT: Layout(68, 1, 36),
}  # fmt: skip


class Measure(NamedTuple):
    unit: str
    low: int  #: the least that is normal
    high: int  #: the most that is normal
    least: int  #: that is drawn
    most: int


MEASURES = {
    "temperature": Measure("C", 36, 37, 33, 41),
    "pulse": Measure("/min", 60, 100, 32, 170),
    "pressure": Measure("mmHg", 100, 140, 62, 220),
    "saturation": Measure("%", 94, 100, 74, 100),
    "breaths": Measure("/min", 12, 20, 5, 44),
    "glucose": Measure("mmol/l", 4, 8, 1, 29),
    "sodium": Measure("mmol/l", 135, 145, 112, 168),
    "hemoglobin": Measure("g/l", 120, 170, 55, 215),
}


class Finding(NamedTuple):
    measure: str
    side: str  #: low or high
    treatment: str
    urgency: str


FINDINGS = {
    "chill": Finding("temperature", "low", "blankets", "soon"),
    "fever": Finding("temperature", "high", "paracetamol", "soon"),
    "bradycardia": Finding("pulse", "low", "atropine", "now"),
    "tachycardia": Finding("pulse", "high", "bisoprolol", "soon"),
    "hypotension": Finding("pressure", "low", "fluids", "now"),
    "hypertension": Finding("pressure", "high", "ramipril", "later"),
    "hypoxia": Finding("saturation", "low", "oxygen", "now"),
    "bradypnea": Finding("breaths", "low", "naloxone", "now"),
    "tachypnea": Finding("breaths", "high", "salbutamol", "soon"),
    "hypoglycemia": Finding("glucose", "low", "sugar", "now"),
    "hyperglycemia": Finding("glucose", "high", "insulin", "soon"),
    "hyponatremia": Finding("sodium", "low", "salt", "soon"),
    "hypernatremia": Finding("sodium", "high", "water", "soon"),
    "anemia": Finding("hemoglobin", "low", "iron", "later"),
    "polycythemia": Finding("hemoglobin", "high", "venesection", "later"),
}
NOTHING = Finding("", "", "nothing", "never")  #: of a patient whose measurements are all normal
URGENCIES = ("now", "soon", "later", "never")
TREATMENTS = tuple(finding.treatment for finding in FINDINGS.values())


class Record(NamedTuple):
    age: int
    sex: str
    measures: Mapping[str, int]
    finding: str | None

    @property
    def facts(self) -> dict[str, object]:
        """What can be asked about the patient."""
        found = FINDINGS.get(self.finding or "", NOTHING)
        return {
            "finding": self.finding or "none",
            "treatment": found.treatment,
            "urgency": found.urgency,
            "measure": found.measure or "none",
            "age": self.age,
            "sex": self.sex,
            **self.measures,
        }


def draw_record(rng: np.random.Generator) -> Record:
    """Three to five measurements; in seven of eight patients one of them is out of its range."""
    names = [str(name) for name in rng.permutation(list(MEASURES))[: rng.integers(3, 6)]]
    values = {name: int(rng.integers(MEASURES[name].low, MEASURES[name].high + 1)) for name in names}
    finding = None
    if rng.random() < 7 / 8:
        finding = str(rng.choice([name for name, found in FINDINGS.items() if found.measure in names]))
        values[FINDINGS[finding].measure] = _value(finding, rng)
    return Record(int(rng.integers(18, 95)), str(rng.choice(["female", "male"])), values, finding)


def _value(finding: str, rng: np.random.Generator) -> int:
    """A measurement that is called `finding`."""
    measure = MEASURES[FINDINGS[finding].measure]
    low = FINDINGS[finding].side == "low"
    return int(rng.integers(measure.least, measure.low) if low else rng.integers(measure.high + 1, measure.most + 1))


def told(record: Record, rng: np.random.Generator) -> str:
    """The record as text, in one of three layouts."""
    pairs = [(name, f"{value} {MEASURES[name].unit}") for name, value in record.measures.items()]
    style = rng.integers(3)
    if style == 0:
        return "\n".join(f"{name}: {value}" for name, value in [("age", record.age), ("sex", record.sex), *pairs])
    if style == 1:
        listed = ", ".join(f"{name} {value}" for name, value in pairs)
        return f"A {record.sex} patient of {record.age} years: {listed}."
    return "; ".join(f"{name} = {value}" for name, value in [("age", record.age), ("sex", record.sex), *pairs])


# ------------------------------------------------------------------------------------------------- questions and answers


def _fields(rng: np.random.Generator) -> tuple[str, str]:
    """A JSON object, or tagged fields, by a layout that the question shows."""
    record = draw_record(rng)
    names = [str(name) for name in rng.permutation(["finding", "treatment", "urgency", "measure", "age", "sex"])]
    names = names[: rng.integers(1, 5)]
    as_json = rng.random() < 0.6
    if as_json:
        layout = "{" + ", ".join(f'"{name}": ...' for name in names) + "}"
        answer = json.dumps({name: record.facts[name] for name in names})
        asked = rng.choice(["Answer with one JSON object:", "Fill in this JSON:", "Give the JSON object"])
    else:
        layout = "".join(f"<{name}>...</{name}>" for name in names)
        answer = "".join(f"<{name}>{record.facts[name]}</{name}>" for name in names)
        asked = rng.choice(["Answer with these fields:", "Fill in:", "Give"])
    ahead = rng.choice(["Read the record.", "This is a patient of the ward.", "Decide about this patient."])
    return f"{ahead}\n\n{told(record, rng)}\n\n{asked} {layout}", answer


#: how an option is to be named, and how that is written
NAMED = (
    ("Answer with the letter of the right option.", "{letter}"),
    ("Which letter is right?", "{letter}"),
    ("Answer with one letter.", "{letter}"),
    ("Answer with the letter and the option.", "{letter}. {text}"),
    ("Give a reason, then the letter.", "{reason} The answer is {letter}."),
)


def _choice(rng: np.random.Generator) -> tuple[str, str]:
    """A question with four options of which one is right."""
    finding = str(rng.choice(list(FINDINGS)))
    found = FINDINGS[finding]
    value = f"{_value(finding, rng)} {MEASURES[found.measure].unit}"
    names = list(FINDINGS)
    kind = rng.integers(5)
    if kind == 0:
        question, right, pool = f"What is a {found.measure} of {value} called?", finding, names
        reason = f"A {found.side} {found.measure} is {finding}."
    elif kind == 1:
        question, right, pool = f"Which treatment helps against {finding}?", found.treatment, TREATMENTS
        reason = f"{finding.capitalize()} is treated with {found.treatment}."
    elif kind == 2:
        question, right, pool = f"When must {finding} be treated?", found.urgency, URGENCIES
        reason = f"{finding.capitalize()} is treated {found.urgency}."
    else:
        record = draw_record(rng)
        while record.finding is None:
            record = draw_record(rng)
        found = FINDINGS[record.finding]
        reason = f"A {found.side} {found.measure} is {record.finding}."
        if kind == 3:
            question, right, pool = f"{told(record, rng)}\nWhat is found?", record.finding, names
        else:
            question, right, pool = f"{told(record, rng)}\nWhich treatment is right?", found.treatment, TREATMENTS
            reason += f" It is treated with {found.treatment}."
    others = rng.choice([name for name in dict.fromkeys(pool) if name != right], 3, replace=False)
    options = [str(option) for option in rng.permutation([right, *others])]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))
    asked, answer = NAMED[rng.integers(len(NAMED))]
    letter = string.ascii_uppercase[options.index(right)]
    return f"{question}\n\n{listed}\n\n{asked}", answer.format(letter=letter, text=right, reason=reason)


def sentences(finding: str) -> list[str]:
    """What can be said about a finding."""
    found = FINDINGS[finding]
    return [
        f"{finding.capitalize()} is a {found.side} {found.measure}.",
        f"It is treated with {found.treatment}.",
        f"It must be treated {found.urgency}.",
        f"Measure the {found.measure} again.",
        "Ask the patient how it began.",
        "Tell the doctor.",
    ]


def _constraints(rng: np.random.Generator) -> tuple[str, str]:
    """A few sentences under a constraint that can be checked, or under two."""
    finding = str(rng.choice(list(FINDINGS)))
    said = [sentences(finding)[i] for i in sorted(rng.permutation(6)[: rng.integers(2, 6)])]
    asked = str(rng.choice([f"Write about {finding}.", f"What is {finding}?", f"Tell me about {finding}."]))
    kind = rng.integers(5)
    if kind == 0:
        form = str(rng.choice([f"Use {len(said)} bullets.", f"Answer in {len(said)} bullet points that begin with -."]))
        return f"{asked} {form}", "\n".join(f"- {sentence}" for sentence in said)
    if kind == 1:
        found = FINDINGS[finding]
        given = {"finding": finding, "measure": found.measure, "treatment": found.treatment}
        return f"{asked} {rng.choice(['Answer in JSON.', 'Write nothing but JSON.'])}", json.dumps(given)
    if kind == 2:
        kept = [sentence for sentence in said if "treated" not in sentence] or ["Tell the doctor."]
        return f'{asked} {rng.choice(["Do not use", "Leave out"])} the word "treated".', " ".join(kept)
    text = " ".join(said)
    if kind == 3:
        most = -(-len(text.split()) // 5) * 5
        return f"{asked} {rng.choice(['Use at most', 'Write no more than'])} {most} words.", text
    least = len(text.split()) // 5 * 5
    return f"{asked} {rng.choice(['Use at least', 'Write no fewer than'])} {least} words.", text


def _report(rng: np.random.Generator) -> tuple[str, str]:
    """The record in sentences: each measurement, then what to do."""
    record = draw_record(rng)
    said = []
    for name, value in record.measures.items():
        measure = MEASURES[name]
        side = "low" if value < measure.low else "high" if value > measure.high else "normal"
        called = f": {record.finding}" if side != "normal" else ""
        said.append(f"The {name} is {side}{called}.")
    found = FINDINGS.get(record.finding or "", NOTHING)
    said.append(f"Give {found.treatment}, {found.urgency}." if record.finding else "Nothing is to be done.")
    asked = rng.choice(
        ["Report on this patient.", "Go through the record.", "What do you think of this patient, and why?"]
    )
    return f"{told(record, rng)}\n\n{asked}", " ".join(said)


MAKERS = {FIELDS: _fields, CHOICE: _choice, CONSTRAINTS: _constraints, REPORT: _report}


def conversation(number: int, task: str, seed: int) -> list[Message]:
    """Question `number` of a task, and its answer."""
    question, answer = MAKERS[task](np.random.default_rng([seed, number]))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


#: words that studies use and the ward does not: the tokenizer has them, the weights have not met them
LATER = (
    "IVF", "ICSI", "PGT-A", "PGT-M", "PGT-SR", "antagonist protocol", "agonist protocol", "short protocol", "diagnosis",
    "strategy", "protocol", "dose", "infertility", "primary", "secondary", "tubal factor", "male factor", "ovarian",
    "endometriosis", "polycystic ovary syndrome", "diminished ovarian reserve", "AMH", "FSH", "sperm", "embryo", "cycle",
    "question", "options", "answer", "reasoning", "therefore", "because", "likely", "patient", "history", "duration",
)  # fmt: skip


def words(seed: int) -> list[str]:
    """What the tokenizer learns from: the ward's questions and answers, digits, and words of later studies."""
    turns = [conversation(number, task, seed) for number in range(1500) for task in MAKERS]
    texts = [turn["content"] for both in turns for turn in both]
    texts += 100 * [*LATER, *(f" {word}" for word in LATER), "<think>", "</think>", "<solution>", "</solution>"]
    texts += 100 * ["user\n", "assistant\n\n", "system\n", "You are a helpful assistant.", "Think first, then answer."]
    return texts


def task_of(step: int, total: int) -> str:
    """Each in turn, records and options most."""
    del total
    return (FIELDS, CHOICE, CONSTRAINTS, CHOICE, FIELDS, REPORT)[step % 6]
