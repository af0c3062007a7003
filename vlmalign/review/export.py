"""What the readers said, as files: CSV for spreadsheets and statistics, the same as JSON, with their data dictionary.

    comparisons.csv ratings.csv guesses.csv events.csv   rows; data_dictionary.csv says what each column means
    study.json                                           all of it, with protocol, hash, amendments, flow and blinding index
    protocol.yaml                                        the protocol as it stands last

Only here, on the coordinator's disk, do letters become arms. Files of a study with simulated votes begin with `simulated-`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmalign.review import audit, dictionary
from vlmalign.review.bang import blinding_index
from vlmalign.review.database import Database
from vlmalign.review.dictionary import Column
from vlmalign.review.flow import counted, stopwatch_ahead
from vlmalign.review.form import UNKNOWN
from vlmalign.review.freezing import Version, versions
from vlmalign.review.material import Study
from vlmalign.review.outcomes import Vote, votes
from vlmalign.review.rendering import word_count

Row = dict[str, Any]

_FORMULA = re.compile(r"^[=+\-@\t\r]")


def export(database: Database, study: Study, folder: Path) -> list[Path]:
    """Write the files into `folder` and return their paths.

    Raises:
        ValueError: for a folder that holds something, a protocol that is not the frozen one, or an audit log that was changed.
    """
    with database.snapshot():
        files = _files(database, study)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose a new folder")
    for name, text in files.items():
        # Half a surrogate pair in a model's text has no bytes in UTF-8.
        (folder / name).write_bytes(text.encode("utf-8", errors="replace"))
    return [folder / name for name in files]


def _files(database: Database, study: Study) -> dict[str, str]:
    """Name -> content."""
    latest = frozen(database, study)
    found = [vote for vote in votes(database) if vote.kept]
    tables = {
        "comparisons": (
            dictionary.comparisons(study.protocol),
            [_comparison(study, vote) for vote in found if not _is_guess(vote)],
        ),
        "ratings": (
            dictionary.ratings(study.protocol),
            [row for vote in found if not _is_guess(vote) for row in _ratings(study, vote)],
        ),
        "guesses": (dictionary.GUESSES, [row for vote in found if _is_guess(vote) for row in guess_rows(study, vote)]),
        "events": (dictionary.EVENTS, _events(database)),
    }
    prefix = "simulated-" if study.protocol.simulated else ""
    files = {f"{prefix}{name}.csv": _csv(columns, rows) for name, (columns, rows) in tables.items()}
    columns = [
        {"file": f"{prefix}{name}.csv", **column._asdict()} for name, (own, _) in tables.items() for column in own
    ]
    files[f"{prefix}data_dictionary.csv"] = _csv(
        [Column("file", "", ""), *(Column(n, "", "") for n in Column._fields)], columns
    )
    files[f"{prefix}protocol.yaml"] = f"# version {latest.version}, SHA-256 {latest.hash}\n{latest.text}"
    whole = {
        "title": study.protocol.title,
        "simulated": study.protocol.simulated,
        "hash": study.hash,
        "protocol_versions": [_version(version) for version in versions(database)],
        "flow": counted(database, study),
        "left_out": [{"case": case, "reason": reason} for case, reason in study.material.left_out],
        "notes": list(study.material.notes),
        "blinding": blinding(study, tables["guesses"][1]),
        "data_dictionary": columns,
        **{
            name: [{column.name: row.get(column.name) for column in own} for row in rows]
            for name, (own, rows) in tables.items()
        },
    }
    files[f"{prefix}study.json"] = json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
    return files


def frozen(database: Database, study: Study) -> Version:
    """The latest version of the protocol in the record. Raises ValueError where `study` is not that one."""
    latest = versions(database)[-1]
    if latest.hash != study.hash:
        raise ValueError(
            "the protocol or what it shows is not what the votes were given on (its hash differs); restore it, or record the "
            "change with `vlmalign review amend`"
        )
    return latest


def blinding(study: Study, guesses: Sequence[Row]) -> dict[str, Any]:
    """Arm -> Bang's index of the guesses of its answers."""
    by_arm: dict[str, list[tuple[str, bool | None]]] = defaultdict(list)
    for row in guesses:
        by_arm[row["arm"]].append((row["person"], None if row["right"] is None else bool(row["right"])))
    choices = len(study.protocol.guesses)
    return {arm: blinding_index(own, choices)._asdict() for arm, own in sorted(by_arm.items())}


def _is_guess(vote: Vote) -> bool:
    return vote.place.purpose == "guess"


def _who(vote: Vote) -> Row:
    place = vote.place
    return {
        "person": vote.person,
        "role": vote.role,
        "position": place.position,
        "purpose": place.purpose,
        "case": place.case,
    }


def _arm(study: Study, vote: Vote, slot: int) -> str | None:
    return None if vote.place.purpose == "attention" else study.material.slots[slot].name


def _comparison(study: Study, vote: Vote) -> Row:
    place, chosen = vote.place, vote.entry.get("preference")
    arms = {f"arm_{letter}": _arm(study, vote, slot) for letter, slot in zip(place.letters, place.shown, strict=True)}
    preferred = vote.preferred
    row = _who(vote) | arms
    row |= {
        "state": "open" if vote.closed_at is None else "closed",
        "withdrawn": int(vote.withdrawn),
        "preferred": _arm(study, vote, preferred) if isinstance(preferred, int) else preferred,
        "preferred_letter": chosen,
        "confidence": _from_one(vote.entry.get("confidence")),
        "identical": int(
            len({study.material.answer(place.case, slot).text for slot in place.shown}) < len(place.shown)
        ),
        "comment": vote.entry.get("comment"),
        "opened_at": _time(vote.opened_at),
        "closed_at": None if vote.closed_at is None else _time(vote.closed_at),
        "elapsed_s": None if vote.closed_at is None else round(vote.closed_at - vote.opened_at, 3),
        "active_s": round(vote.active_ms / 1000, 3),
        "clock_wrong": None
        if vote.closed_at is None
        else int(stopwatch_ahead(vote) or vote.closed_at < vote.opened_at),
        "revisions": vote.revision,
        "protocol_version": vote.protocol,
    }
    if place.purpose == "attention":
        expected = study.material.known[place.case].expected
        row["expected_letter"] = place.letters[place.shown.index(expected)]
        row["attentive"] = None if chosen is None else int(preferred == expected)
    return row


def _ratings(study: Study, vote: Vote) -> list[Row]:
    form, place, found = study.protocol.form, vote.place, []
    for letter, (slot, said) in zip(place.letters, vote.by_slot().items(), strict=True):
        answer = study.material.answer(place.case, slot)
        tags = said.get("tags", [])
        found.append(
            _who(vote)
            | {"letter": letter, "arm": _arm(study, vote, slot), "author": answer.author}
            | {"own": int(answer.author == vote.person)}
            | {key: _from_one(said.get("criteria", {}).get(key)) for key in form.criteria}
            | {key: _from_one(said.get(key)) for key in ("harm_extent", "harm_likelihood")}
            | {f"tag_{key}": int(key in tags) for key in form.tags}
            | {key: said.get(key) for key in ("verdict", "correction")}
            | dict(answer.form)
            | {"shown_words": word_count(answer.text)}
        )
    return found


def guess_rows(study: Study, vote: Vote) -> list[Row]:
    """The last questions of a page; none on other pages."""
    found = []
    for letter, (slot, said) in zip(vote.place.letters, vote.by_slot().items(), strict=True):
        if "guess" in said:
            own, number = study.material.slots[slot], said["guess"]
            guess = None if number == UNKNOWN else study.protocol.guesses[number]
            right = None if guess is None else int(guess == own.guess)
            row = {"letter": letter, "arm": own.name, "guess": guess, "truth": own.guess, "right": right}
            found.append(_who(vote) | row)
    return found


def _events(database: Database) -> list[Row]:
    with database.reading() as connection:
        gone = {row["name"] for row in connection.execute("SELECT name FROM person WHERE votes_kept = 0")}
    rows = [asdict(event) for event in audit.events(database)]
    return [
        row
        | {"at": _time(row["at"])}
        | {"body": None if row["actor"] in gone else json.dumps(row["body"], ensure_ascii=False, sort_keys=True)}
        for row in rows
    ]


def _version(version: Any) -> Row:
    row = asdict(version)
    del row["text"]
    frozen = None if version.frozen_at is None else _time(version.frozen_at)
    return row | {"at": _time(version.at), "frozen_at": frozen}


def _from_one(index: int | None) -> int | None:
    return None if index is None else index + 1


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _csv(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([_cell(row.get(column.name)) for column in columns] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and _FORMULA.match(value):
        return f"'{value}"
    return "" if value is None else value
