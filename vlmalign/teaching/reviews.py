"""Expert review of traces: a random sample as CSV, and what the experts wrote into it applied to the file of traces."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vlmalign.teaching.teacher import text_faults
from vlmalign.teaching.trace_file import Trace, read_traces, rejected_file, write_traces

COLUMNS = ("id", "image", "labels", "trace", "verdict", "comment", "correction")
VERDICTS = ("accept", "reject", "correct")
#: what spreadsheets take for a formula; such a cell gets an apostrophe before it
_FORMULA = re.compile(r"^[=+\-@\t\r]")


class Applied(NamedTuple):
    """What an import did."""

    counts: Counter[str]  #: of accept, reject, correct; and open: rows without a verdict
    left: int  #: traces in the file now


def export(path: Path, out: Path, *, count: int, seed: int) -> int:
    """Write `count` traces of `path`, drawn at random by `seed`, to the CSV `out` for review; how many there are.

    Traces that were reviewed are left out. Raises FileExistsError: an earlier export may hold reviews.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already and may hold reviews; give another --out")
    traces = read_traces(path)
    fresh = sorted(id for id, row in traces.items() if "review" not in (row.model_extra or {}))
    if not fresh:
        raise ValueError(f"{path}: no trace is left that was not reviewed")
    drawn = random.Random(seed).sample(fresh, min(count, len(fresh)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8-sig", newline="") as file:  # the mark by which Excel knows UTF-8
        written = csv.writer(file)
        written.writerow(COLUMNS)
        for id in drawn:
            row = traces[id]
            written.writerow(
                _cell(text) for text in (id, row.image or "", "; ".join(row.labels), row.trace, "", "", "")
            )
    return len(drawn)


def apply(path: Path, reviews: Path) -> Applied:
    """Apply the reviews in a CSV to the traces in `path`: all of them, or none if a row cannot be used.

    A trace that is accepted is marked; a corrected one has the expert's text, and the teacher's beside it as `before`; a
    rejected one goes to `FILE.rejected.jsonl`, and its film is asked about again on the next start. To apply a file twice
    changes nothing.

    Raises ValueError naming the lines that cannot be used: an unknown id or verdict, an id that is there twice, a trace
    that was reviewed in other words than those in the file, a correction that is missing, or not of the format.
    """
    traces, gone = read_traces(path), rejected_file(path)
    rejected = read_traces(gone) if gone.exists() else {}
    counts: Counter[str] = Counter()
    wrong, seen = [], set()
    for number, row in _read(reviews):
        verdict = row["verdict"].strip().lower()
        if not verdict:
            counts["open"] += 1
            continue
        id = _text(row["id"])
        trace = traces.get(id)
        fault = "the id of an earlier line again" if id in seen else _fault(row, verdict, trace, rejected.get(id))
        seen.add(id)
        if fault:
            wrong.append(f"line {number}: {fault}")
            continue
        counts[verdict] += 1
        if trace is None:
            continue
        review = {"verdict": verdict, "comment": _text(row["comment"])}
        if verdict == "reject":
            rejected[id] = trace.model_copy(update={"review": review})
            del traces[id]
        else:
            update = {"review": review}
            if verdict == "correct" and not _same(trace.trace, row["correction"]):
                update |= {"trace": _text(row["correction"]).strip(), "before": trace.trace}
            traces[id] = trace.model_copy(update=update)
    if wrong:
        raise ValueError(f"{reviews}: {len(wrong)} rows cannot be used, nothing was changed\n  " + "\n  ".join(wrong))
    # In this order: what a kill leaves between the two is a trace in both, which the same command takes out of the first.
    write_traces(gone, rejected.values())
    write_traces(path, traces.values())
    return Applied(counts, len(traces))


def _fault(row: dict[str, str], verdict: str, trace: Trace | None, rejected: Trace | None) -> str | None:
    if verdict not in VERDICTS:
        return f"verdict must be {', '.join(VERDICTS)} or empty, found {verdict[:20]!r}"
    correction = _text(row["correction"]).strip()
    if verdict == "correct" and not correction:
        return "verdict correct needs the text in the column correction"
    if verdict != "correct" and correction:
        return f"has a correction, and verdict {verdict}; write correct, or empty the correction"
    if trace is None:
        return None if verdict == "reject" and rejected is not None else "no trace of this id in the file"
    before = (trace.model_extra or {}).get("before")
    if not _same(trace.trace, row["trace"]) and not (before is not None and _same(before, row["trace"])):
        return "the trace in the file is not the one that was reviewed"
    if verdict == "correct" and (faults := text_faults(correction, trace.format)):
        return f"the correction {'; '.join(faults)}"
    return None


def _read(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line on which the row begins, row); ValueError for a file without the columns."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found, line = [], 2
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restval="")
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise ValueError(
                    f"{path}: expected the columns {', '.join(COLUMNS)}, found no {', '.join(missing)}; keep commas as "
                    "separators when saving"
                )
            for row in rows:
                found.append((line, row))
                line = rows.line_num + 1
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text; save it as "CSV UTF-8"') from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    return found


def _cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell


def _same(text: str, cell: str) -> bool:
    """Whether a cell holds this text; spreadsheets write other line breaks."""
    return text.split() == _text(cell).split()
