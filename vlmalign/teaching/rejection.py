"""Rejection sampling: of the sampled answers of a study's own model, those whose labels are the truth become traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.data.sources.json_lines import lines, parse
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.config import set_ref
from vlmalign.teaching.teacher import text_faults
from vlmalign.teaching.trace_file import Failed, Trace, failed_file, write_traces

PREDICTIONS = "predictions.jsonl"


class Kept(NamedTuple):
    """What rejection sampling left."""

    films: int  #: that were answered
    samples: int  #: answers in all
    right: int  #: answers whose labels are the truth
    traces: int  #: films with a trace


def from_answers(run: Path, entry: str, stage: str, ref: str, out: Path, *, format: str | None = None) -> Kept:
    """Write a trace for every film of RUN/answers/ENTRY/STAGE/SET that has a usable answer, the first of its samples.

    An answer is usable if it is of valid form, ended by itself, names exactly the true labels and no unknown one, and its
    reasoning is not empty, tells nothing of known labels and, with `format`, is of that form.

    Raises ValueError for a test set, for answers to what has no labels, and where `out` exists.
    """
    folder = run / "answers" / entry / stage / ref
    if not (folder / PREDICTIONS).is_file():
        there = sorted(
            str(path.parent.relative_to(run / "answers")) for path in run.glob(f"answers/*/*/*/{PREDICTIONS}")
        )
        raise FileNotFoundError(f"no answers {folder}; there are {', '.join(there) or 'none'}")
    if not (folder / "made.json").is_file():
        raise ValueError(f"{folder} is not finished; run the study to its end first")
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another --out")
    if load_study(run / "study.yaml").sets[set_ref(ref).name].role == "test":
        raise ValueError(f"{ref} is a test set; traces are for training, answer a training set")
    kept: dict[str, Trace] = {}
    failed: dict[str, Failed] = {}
    asked: dict[str, int] = {}
    samples = right = 0
    for row in _rows(folder / PREDICTIONS):
        samples += 1
        asked[row["id"]] = asked.get(row["id"], 0) + 1
        own = {
            "id": row["id"], "labels": tuple(row["truth"]), "image": row["image"], "format": format, "model": stage,
            "asked": asked[row["id"]],
        }  # fmt: skip
        is_right = _is_right(row)
        right += is_right
        faults = text_faults(row["reasoning"], format) if is_right else ["no answer with the true labels"]
        if row["id"] in kept:
            continue
        if not faults:
            kept[row["id"]] = Trace(trace=row["reasoning"], **own)
            failed.pop(row["id"], None)
        elif is_right or row["id"] not in failed or not failed[row["id"]].reason.startswith("right labels"):
            reason = f"right labels, but: {'; '.join(faults)}" if is_right else faults[0]
            failed[row["id"]] = Failed(kind="answer", reason=reason, **own)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_traces(failed_file(out), failed.values())
    write_traces(out, kept.values())
    return Kept(len(asked), samples, right, len(kept))


def _is_right(row: dict[str, Any]) -> bool:
    return row["valid"] and row["stopped"] and not row["unknown"] and set(row["predicted"]) == set(row["truth"])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    needed: Sequence[str] = ("id", "truth", "predicted", "valid", "unknown", "reasoning", "stopped", "image")
    for number, _, text in lines(path):
        row = parse(text)
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{path}, line {number}: not a line of predictions (no {', '.join(missing)})")
        if not isinstance(row["truth"], list) or not isinstance(row["predicted"], list):
            raise ValueError(
                f"{path}, line {number}: answers to a task of kind labels are needed, this has no label lists"
            )
        yield row
