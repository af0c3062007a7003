"""The model card of a finished stage, in Markdown with the front matter that the Hugging Face Hub reads: what it was trained
from and on, its settings, its scores, its limits, and how to repeat it.

    stages/NAME/model_card.md    (`vlmalign export` writes the same as README.md beside the weights)

It names no folder of the machine and no case or patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from vlmalign.config_yaml import write_yaml
from vlmalign.reporting.boards import FEWEST
from vlmalign.reporting.json_files import read_object, read_rows
from vlmalign.reporting.json_shape import Values
from vlmalign.reporting.pages import write_page
from vlmalign.reporting.record import KIND_NAMES, Row, Run, Stage, inner
from vlmalign.reporting.score_file import numbers
from vlmalign.reporting.visible_text import plain
from vlmalign.reporting.words import bounds, number, share

FILE = "model_card.md"
RECORD = {"settings": dict, "parents": Values({"node": str, "id": str}), "versions": dict}


class Terms(NamedTuple):
    """What a reader must know of a kind of source."""

    name: str
    terms: str
    truth: str  #: where its labels come from


_REPORTS = "labels were read from reports by a program, with its errors"
_OWN = Terms("data of the run's owner", "state its terms here before this card is passed on", "as its owner says")
_NIH = Terms(
    "NIH ChestX-ray14",
    "no restriction on use; the NIH Clinical Center asks to be named and Wang et al. (2017) to be cited",
    _REPORTS,
)
#: kind of source -> its terms
TERMS = {
    "mimic-cxr-jpg": Terms(
        "MIMIC-CXR-JPG",
        "PhysioNet Credentialed Health Data License and data use agreement: credentialed access only; what is trained on it "
        "may reveal training data and is shared under the same agreement",
        _REPORTS,
    ),
    "chexpert": Terms(
        "CheXpert",
        "Stanford's research use agreement: personal, non-commercial research; not for clinical care",
        "test and validation labels are radiologists', training labels were read from reports by a program",
    ),
    "nih-cxr14": _NIH,
    "nih-extract": _NIH._replace(name="an extract of NIH ChestX-ray14"),
    "table": _OWN,
    "rows": _OWN,
    "ehr": _OWN,
}
_INVENTED = Terms(
    "invented cases in its format", "drawn by vlmalign, of no patient", "known, as the cases were drawn from it"
)


def write_cards(run: Run) -> list[Path]:
    """Write the card of every finished stage of training; nothing for runs of version 0.1."""
    written = []
    for stage in run.stages:
        if stage.folder and stage.done and read_object(run.path / stage.folder / "made.json", dict):
            write_page(path := run.path / stage.folder / FILE, card(run, stage))
            written.append(path)
    return written


def card(run: Run, stage: Stage, *, merged: bool = False) -> str:
    """The card of a stage; `merged`: of a whole model, its adapter merged into the base.

    Raises:
        ValueError: when the stage has no record of how it was made.
    """
    path = run.path / stage.folder / "made.json"
    made = read_object(path, RECORD)
    if made is None:
        raise ValueError(f"{path} is not there: a card is of a finished stage; let the run end first")
    line = _line(run, stage)
    base = _base(run, line[0])
    whole = merged or not made["settings"].get("lora")
    front = {
        "base_model": base,
        "library_name": "transformers" if whole else "peft",
        "tags": ["vlmalign", "medical", stage.kind, *([] if made["settings"].get("lora") is None else ["lora"])],
    }
    parts = [
        ["---", write_yaml(front).rstrip("\n"), "---", ""],
        [f"# {_text(run.path.resolve().name)}: {_text(stage.name)}", ""],
        ["**Not for clinical use.** A result of research, not a medical device.", ""],
        _made_from(run, line, base),
        _data(run, stage, line),
        _scores(run, stage),
        ["## Settings", "", *_block(write_yaml(_placeless(made["settings"]))), ""],
        _limits(run, stage, line),
        _repeat(stage, made),
    ]
    return "\n".join(line for part in parts for line in part)


def _line(run: Run, stage: Stage) -> list[Stage]:
    """The stages from the base model to this one."""
    by_name = {each.name: each for each in run.stages}
    found = [stage]
    while (parent := by_name.get(found[0].parent or "")) is not None and parent not in found:
        found.insert(0, parent)
    return found


def _base(run: Run, first: Stage) -> str:
    """The last part of the base's folder: all of its name that is not of this machine."""
    return PurePath(str(inner(run.settings, "stages", first.name, "path") or first.name)).name


def _record(run: Run, stage: Stage) -> Row:
    return read_object(run.path / stage.folder / "made.json", RECORD) or {"settings": {}, "parents": {}}


def _made_from(run: Run, line: Sequence[Stage], base: str) -> list[str]:
    lines = ["## Trained from", "", f"Base model: `{_text(base)}` (a folder's name; give the Hub's name here)."]
    for before, stage in pairwise(line):
        if stage.folder:
            parent = _record(run, stage)["parents"].get("from", {})
            state = f", its {parent['which']} state" if parent.get("which") else ""
            lines.append(
                f"- `{_text(stage.name)}`: {KIND_NAMES.get(stage.kind, stage.kind)} from `{_text(before.name)}`{state}, "
                f"content id `{parent.get('id', 'unknown')[:16]}`; {stage.updates:,} updates"
            )
    return [*lines[:3], "", *lines[3:], ""]


class _Set(NamedTuple):
    """A set and what it was for."""

    ref: str
    role: str
    cases: int
    patients: int
    source: Row


def _sets(run: Run, stage: Stage, line: Sequence[Stage]) -> list[_Set]:
    """What the stages learnt from, were chosen by and scored on; each once a role."""
    wanted: dict[tuple[str, str], None] = {}
    for each in line:
        if each.folder:
            settings = _record(run, each)["settings"]
            uses = {"training": settings, "SFT beside": settings.get("sft"), "validation": settings.get("validation")}
            for role, section in uses.items():
                refs = inner(section, "data", "set")
                for ref in refs if isinstance(refs, list) else [refs] if refs else []:
                    wanted[str(ref), f"{role} of {each.name}"] = None
    for entry in run.entries:
        for dataset, results in entry.scores.results.items() if entry.scores else ():
            if stage.name in results:
                wanted[dataset, "scores"] = None
    found = []
    for ref, role in wanted:
        name, _, part = ref.partition(".")
        rows = read_rows(run.path / "sets" / name / f"{part or 'cases'}.jsonl", {"patient": str})
        found.append(_Set(ref, role, len(rows), len({row["patient"] for row in rows}), run.source_of(ref)))
    return found


def _terms(source: Row) -> Terms:
    found = TERMS.get(str(source.get("kind")), _OWN)
    return _INVENTED._replace(name=f"{found.name}: {_INVENTED.name}") if source.get("invented") else found


def _data(run: Run, stage: Stage, line: Sequence[Stage]) -> list[str]:
    sets = _sets(run, stage, line)
    rows = [
        (each.ref, each.role, _terms(each.source).name, f"{each.cases:,}", f"{each.patients:,}")
        for each in sets
        if each.cases
    ]
    lines = ["## Data", ""]
    lines += _table(("set", "for", "source", "cases", "patients"), rows) if rows else ["Files of the run's owner.", ""]
    told = dict.fromkeys(_terms(each.source) for each in sets)
    lines += [f"- {each.name}: {each.terms}. Truth: {each.truth}." for each in told or [_OWN]]
    return [*lines, ""]


def _scores(run: Run, stage: Stage) -> list[str]:
    """Of the state that is exported: the best one, where the stage has one."""
    date = str(run.environment.get("started") or "")[:10]
    rows, made = [], set()
    for entry in run.entries:
        for dataset in entry.scores.datasets if entry.scores else ():
            results = entry.scores.results[dataset["name"]].get(stage.name)
            if results is None:
                continue
            if "draws" in results:
                made.add(f"{100 * results['level']:g} % from {results['draws']:,} draws")
            scores = {
                f"{name}-F1, {subset}": block[name]
                for subset, block in results.get("blocks", {}).items()
                for name in ("macro", "micro")
            } or numbers(results)
            for name, score in scores.items():
                rows.append(
                    (
                        entry.name, f"{dataset['name']} ({dataset['role'] or 'test'})", name, _interval(score),
                        f"{results['n']:,}", f"{results.get('patients', results['n']):,}",
                        share(results["fail_rate"]) if "fail_rate" in results else "",
                    )
                )  # fmt: skip
    lines = ["## Scores", ""]
    if not rows:
        return [*lines, "Not scored on any set.", ""]
    lines += _table(("answers", "set", "score", "value [interval]", "cases", "patients", "not valid"), rows)
    said = f"Intervals resample patients ({'; '.join(sorted(made))})." if made else ""
    return [*lines, f"{said}{f' Run of {_text(date)}.' if date else ''}".strip(), ""]


def _interval(score: Row) -> str:
    found = bounds(score)
    return number(score["value"]) + (f" [{found.replace(' to ', ', ')}]" if score.get("low") is not None else "")


def _limits(run: Run, stage: Stage, line: Sequence[Stage]) -> list[str]:
    lines = [
        "- Not for clinical use: no score here says how the model would do on the films or records of your clinic.",
        "- The reasoning is text that the model writes; it may be wrong where the answer is right, and was not checked.",
        f"- One run of seed {_text(_record(run, stage)['settings'].get('seed', run.settings.get('seed', 0)))}: another seed gives other numbers.",
    ]
    if any(each.source.get("invented") for each in _sets(run, stage, line)):
        lines.append(
            "- Learnt from or scored on invented films: they show that the programs work, and nothing about patients."
        )
    if run.peeked:
        lines.append(f"- Test sets that were also used to choose or to watch: {', '.join(map(_text, run.peeked))}.")
    lines += dict.fromkeys(_of_sets(run, stage))
    return ["## Limits", "", *lines, ""]


def _of_sets(run: Run, stage: Stage) -> Iterator[str]:
    for entry in run.entries:
        for dataset in entry.scores.datasets if entry.scores else ():
            name, results = dataset["name"], entry.scores.results[dataset["name"]].get(stage.name)
            if results is None:
                continue
            if dataset["role"] == "cross-schema":
                yield f"- {_text(name)} is cross-schema: truth and answers were mapped to the labels that both conventions share."
            blocks = results.get("blocks") or {}
            labels = max((block["per_label"] for block in blocks.values()), key=len, default=[])
            if few := [each["label"] for each in labels if each["support"] < FEWEST]:
                yield f"- {_text(name)} has fewer than {FEWEST} cases of {', '.join(map(_text, few))}."


def _repeat(stage: Stage, made: Row) -> list[str]:
    return [
        "## To repeat",
        "",
        f"With vlmalign {made['versions'].get('vlmalign', '(version not recorded)')} and `study.yaml` of the run folder, whose paths "
        "name the data and the base:",
        "",
        f"    vlmalign run study.yaml --run NEW_FOLDER --only stages/{_text(stage.name)}",
        "",
    ]


def _placeless(value: Any) -> Any:
    """Without what is not set, and of absolute paths the last part alone."""
    if isinstance(value, Mapping):
        return {key: _placeless(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([_text(each) for each in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _text(text: object) -> str:
    """A name of a run's files, which must not become markup."""
    one = " ".join(plain(str(text)).split())
    return one.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "'")


def _block(text: str) -> list[str]:
    """Indented: no line of it can end the block."""
    return [f"    {line}" for line in plain(text).splitlines()]
