"""Reasoning traces: a few plain sentences that lead from what is seen on a film to its labels.

A trace of an invented film is written from its row of `truth.jsonl` (see `synthetic.truth_row`). It names every
label of the row with its evidence, side and place, denies a few others that are truly absent, and stays silent on
what the institution has no label for. The words are few (under 250 in all), for models of a million parameters.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmalign.data.phantoms.institutions import WIDE_MEDIASTINUM
from vlmalign.data.sources.json_lines import parse

#: From this many sentences on, findings are told in the short form, so that a trace stays under about 60 words.
_MANY = 5


@dataclass(frozen=True)
class Wording:
    """An institution's phrases. Slots: {side}, {zone}, {size}, and {name}, the institution's label in small letters."""

    opening: str
    evidence: Mapping[str, str]  #: kind of finding (device: its style) -> sentence
    short: str  #: one finding among many: {side} {name}
    ratios: Mapping[str, str]  #: Cardiomegaly, Enlarged Cardiomediastinum -> sentence
    implied: str  #: a label that follows from another
    absent: Mapping[str, str]  #: kind of finding -> sentence that denies it
    normal: str  #: for No Finding


PLAIN = Wording(
    opening="This is a frontal chest film.",
    evidence={
        "opacity": "Soft haze covers the {side} {zone} zone: {name}.",
        "pneumonia": "Patchy bright spots cluster in the {side} {zone} zone: {name}.",
        "consolidation": "A dense block fills the {side} {zone} zone: {name}.",
        "lesion": "A {size} round shadow lies in the {side} {zone} zone: {name}.",
        "atelectasis": "A flat bright plate crosses the {side} {zone} zone: {name}.",
        "edema": "Haze spreads from both hila: {name}.",
        "pneumothorax": "A {size} black crescent lies at the {side} apex: {name}.",
        "effusion": "A {size} bright meniscus fills the {side} base: {name}.",
        "rind": "A bright layer lines the {side} lateral wall: {name}.",
        "fracture": "A {side} {zone} rib shows a step: {name}.",
        "line": "A thin bright line enters from the {side}: {name}.",
        "pacemaker": "A bright box with a lead lies on the {side}: {name}.",
        "tube": "A bright tube lies in the windpipe: {name}.",
        "emphysema": "Both lungs are dark and the diaphragm is flat: {name}.",
        "fibrosis": "A fine net marks both lower zones: {name}.",
        "hernia": "An air bubble lies behind the heart: {name}.",
    },
    short="Also {side} {name}.",
    ratios={
        "Cardiomegaly": "The heart is wide for the chest: {name}.",
        "Enlarged Cardiomediastinum": "The upper mediastinum is wide: {name}.",
    },
    implied="This also means {name}.",
    absent={
        "heart": "The heart size is normal.",
        "mediastinum": "The mediastinum is not wide.",
        "effusion": "Both bases are sharp without effusion.",
        "pneumothorax": "Markings reach the wall, so no pneumothorax.",
        "consolidation": "No dense block is seen.",
        "edema": "The hila are clear without edema.",
        "lesion": "No round shadow is seen.",
    },
    normal="Nothing abnormal is seen in the lungs: {name}.",
)

#: Another house: it argues from the label to the sign, region by region.
BASE = Wording(
    opening="I look at the film of the chest.",
    evidence={
        "opacity": "I call {name} as the {zone} {side} lung is hazy.",
        "pneumonia": "I call {name} as the {zone} {side} lung has white patches.",
        "consolidation": "I call {name} as the {zone} {side} lung is solid white.",
        "lesion": "I call {name} as the {zone} {side} lung holds a {size} disc.",
        "atelectasis": "I call {name} as the {zone} {side} lung has a white band.",
        "edema": "I call {name} as wings of haze lie on both sides.",
        "pneumothorax": "I call {name} as the {side} top is empty and black.",
        "effusion": "I call {name} as {size} fluid hides the {side} base.",
        "rind": "I call {name} as the {side} edge is thick and white.",
        "fracture": "I call {name} as a {zone} {side} rib has two ends.",
        "line": "I call {name} as a wire comes from the {side}.",
        "pacemaker": "I call {name} as a metal box is on the {side}.",
        "tube": "I call {name} as a tube is in the neck.",
        "emphysema": "I call {name} as both lungs are large and black.",
        "fibrosis": "I call {name} as both lungs have a fine net.",
        "hernia": "I call {name} as air lies behind the heart.",
    },
    short="I call {side} {name}.",
    ratios={
        "Cardiomegaly": "I call {name} as the heart takes half the chest.",
        "Enlarged Cardiomediastinum": "I call {name} as the middle is broad.",
    },
    implied="So I add {name}.",
    absent={
        "heart": "The heart is not large.",
        "mediastinum": "The middle is not broad.",
        "effusion": "I see no fluid at either base.",
        "pneumothorax": "I see no empty black top.",
        "consolidation": "I see no solid white lung.",
        "edema": "I see no wings of haze.",
        "lesion": "I see no disc in either lung.",
    },
    normal="I see both lungs clear and call {name}.",
)

#: Institution -> its wording; the three target institutions share one.
WORDINGS = {"mimic-like": PLAIN, "chexpert-like": PLAIN, "nih-like": PLAIN, "base": BASE}


def reason(row: Mapping[str, Any], wording: Wording | None = None) -> list[str]:
    """The sentences of one film's trace, from its truth row; the wording is its institution's unless given.

    The denials are chosen by the film's id, so the same row always gives the same trace.
    """
    wording = wording or WORDINGS[row["institution"]]
    labels = row["labels"]
    shown = [finding for finding in row["findings"] if finding["label"] in labels]
    named = {finding["label"] for finding in shown}
    rest = [label for label in labels if label not in named and label != "No Finding"]
    # An implied parent is no sign of its own; the two ratios are, when the film shows them.
    ratios = [label for label in rest if label in wording.ratios and _shows(row, label)]
    implied = [label for label in rest if label not in ratios]

    many = len(shown) + len(ratios) + len(implied) >= _MANY
    sentences = [wording.opening]
    for label in ratios:
        sentences.append(wording.ratios[label].format(name=spoken(label)))
    for finding in shown:
        side = "" if many and finding["side"] == "both" else finding["side"]
        kind = finding["style"] if finding["kind"] == "device" else finding["kind"]
        text = wording.short if many else wording.evidence[kind]
        name = spoken(finding["label"])
        sentences.append(" ".join(text.format(**{**finding, "side": side, "name": name}).split()))
    for label in implied:
        sentences.append(wording.implied.format(name=spoken(label)))

    denials = _denials(row, wording)
    order = np.random.default_rng(zlib.crc32(row["id"].encode())).permutation(len(denials))
    sentences += [denials[i] for i in sorted(order[: max(1, 3 - len(shown))])]
    if "No Finding" in labels:
        sentences.append(wording.normal.format(name=spoken("No Finding")))
    return sentences


def spoken(label: str) -> str:
    """A label as a trace writes it: `Pleural_Thickening` -> `pleural thickening`."""
    return label.replace("_", " ").lower()


def _shows(row: Mapping[str, Any], label: str) -> bool:
    return label == "Cardiomegaly" or row["mediastinum"] >= WIDE_MEDIASTINUM


def _denials(row: Mapping[str, Any], wording: Wording) -> list[str]:
    """Sentences for what is neither on the film nor among its labels (an uncertain finding is not denied)."""
    present = {finding["kind"] for finding in row["findings"]}
    if row["heart"] >= 0.5:
        present.add("heart")
    if row["mediastinum"] >= 0.3:
        present.add("mediastinum")
    return [sentence for kind, sentence in wording.absent.items() if kind not in present]


def narrative(sentences: Sequence[str], labels: Sequence[str]) -> str:
    """All that was seen, as one text."""
    del labels
    return " ".join(sentences)


def steps(sentences: Sequence[str], labels: Sequence[str]) -> str:
    """The same in numbered steps."""
    del labels
    return " ".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, start=1))


def short(sentences: Sequence[str], labels: Sequence[str]) -> str:
    """Only what leads to a label; of a film without one the last sentence."""
    names = [spoken(label) for label in labels]
    return " ".join(text for text in sentences if any(name in text for name in names)) or sentences[-1]


#: how a trace may be told -> the writer of its text
TELLINGS = {"narrative": narrative, "steps": steps, "short": short}


def write_traces(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    wording: Wording | None = None,
    telling: Literal["narrative", "steps", "short"] = "narrative",
) -> None:
    """JSONL of {"id", "trace"}, one line per truth row."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            text = TELLINGS[telling](reason(row, wording), row["labels"])
            file.write(json.dumps({"id": row["id"], "trace": text}) + "\n")


def read_truth(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `truth.jsonl`."""
    return [row for _, row in _json_lines(Path(path), ("id", "institution", "labels", "findings"))]


def read_traces(path: str | Path) -> dict[str, str]:
    """Traces by film id, from JSONL lines {"id": ..., "trace": ...}; other fields are ignored.

    ValueError, naming file and line, for a line that is no JSON object, a missing or empty field, or a repeated id.
    """
    path = Path(path)
    traces: dict[str, str] = {}
    for line, row in _json_lines(path, ("id", "trace")):
        for name in ("id", "trace"):
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{path}, line {line}: field {name!r} must be a text that is not empty")
        if row["id"] in traces:
            raise ValueError(f"{path}, line {line}: id {row['id']!r} is repeated; keep one trace per film")
        traces[row["id"]] = row["trace"]
    return traces


def _json_lines(path: Path, fields: tuple[str, ...]) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = parse(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            missing = [name for name in fields if name not in row]
            if missing:
                raise ValueError(f"{path}, line {line}: missing field {missing[0]!r}; expected {', '.join(fields)}")
            yield line, row
