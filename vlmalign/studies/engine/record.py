"""What an artefact was made from, and whether it still is what the study asks for.

`begun.json` is written before an artefact, `made.json` after it; both hold the same record. An artefact is the same while
kind, format, settings, parents and inputs are. Settings that are `FREE` (`sections`) are recorded too; while an artefact
is under way they are frozen as well, so that it is continued bit for bit. Versions are recorded and never compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmalign.reporting.json_shape import Values, check_shape
from vlmalign.studies.engine.files import Hashes, digest_of, read_json, write_json

BEGUN, MADE = "begun.json", "made.json"

#: of a record, which may lack what stands in EMPTY
RECORD = {"kind": str, "settings": dict, "free": dict, "parents": Values({"node": str, "id": str}), "inputs": dict}
EMPTY: Mapping[str, Any] = {"settings": {}, "free": {}, "parents": {}, "inputs": {}}
#: of a whole artefact besides
WHOLE = {"id": str, "content": dict, "files": Values(list)}

#: raised by hand where equal settings would now give other results
FORMATS = {
    "set": 1,
    "sft": 1,
    "dpo": 1,
    "grpo": 1,
    "ppo": 1,
    "answers": 1,
    "scores": 1,
    "source": 1,
    "measured": 1,
    "probe": 1,
}

#: kinds of which a start continues what an earlier one has begun; all others are made anew
CONTINUED = ("sft", "dpo", "grpo", "ppo")


@dataclass(frozen=True)
class Parent:
    """What an artefact was made from: another one, by its content."""

    node: str
    id: str
    which: str | None = None  #: "best" or "last" of a stage, a part of a set


@dataclass(frozen=True)
class Record:
    """The identity of an artefact, before it is made."""

    node: str
    kind: str
    settings: Mapping[str, Any]  #: everything that can change the result
    free: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, Parent] = field(default_factory=dict)  #: role -> parent
    inputs: Mapping[str, str] = field(default_factory=dict)  #: what was read beside -> SHA-256

    @property
    def format(self) -> int:
        return FORMATS[self.kind]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "format": self.format}


def differences(record: Record, earlier: Mapping[str, Any], *, under_way: bool, before: Mapping[str, Any]) -> list[str]:
    """What differs between an artefact on disk and what is asked for, in words, field by field.

    `before` holds, for settings younger than the record, the values that they had when nobody could set them.
    """
    found = []
    for name in ("kind", "format"):
        if earlier.get(name) != (now := getattr(record, name)):
            found.append(f"{name}: {earlier.get(name)!r} then, {now!r} now")
    found += _changed("", earlier.get("settings", {}), record.settings, before)
    if under_way:
        found += _changed("", earlier.get("free", {}), record.free, before)
    then = earlier.get("parents", {})
    for role in sorted(then.keys() | record.parents.keys()):
        now = record.parents.get(role)
        if role not in then or now is None:
            found.append(f"{role}: {_named(then.get(role))} then, {_named(now and asdict(now))} now")
        elif then[role]["id"] != now.id:
            found.append(
                f"{role}: the content of {now.node}{'' if now.which is None else f' ({now.which})'} is another"
            )
    read = earlier.get("inputs", {})
    for name in sorted(read.keys() | record.inputs.keys()):
        if read.get(name) != record.inputs.get(name):
            was = (
                "not read then" if name not in read else "not read now" if name not in record.inputs else "has changed"
            )
            found.append(f"{name} {was}")
    return found


def _named(parent: Mapping[str, Any] | None) -> str:
    return "nothing" if parent is None else parent["node"]


def _changed(path: str, then: Any, now: Any, before: Any) -> Iterator[str]:
    """Fields that differ; one that the record lacks counts as what `before` says it was."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        known = before if isinstance(before, Mapping) else {}
        for key in sorted(then.keys() | now.keys()):
            inner = known.get(key)
            yield from _changed(f"{path}.{key}" if path else key, then.get(key, inner), now.get(key, inner), inner)
    elif then != now:
        yield f"{path}: {then!r} then, {now!r} now"


def read_record(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """The record in an artefact's folder, and whether the artefact is whole; None where nothing has begun.

    Raises:
        ValueError: for a record that cannot be read.
    """
    for name, whole in ((MADE, True), (BEGUN, False)):
        if (folder / name).exists():
            found = {**EMPTY, **read_json(folder / name)}
            check_shape(found, RECORD, str(folder / name))
            if whole:
                check_shape({"files": {}, **found}, WHOLE, str(folder / name))
            return found, whole
    return None, False


def refuse_unrecorded(folder: Path) -> None:
    """Raises ValueError for an artefact's folder whose record is gone: its files would be taken for anything."""
    if folder.is_dir() and any(path.suffix != ".partial" for path in folder.iterdir()):
        raise ValueError(
            f"{folder} has files, and neither {BEGUN} nor {MADE}, which say what they were made from; restore the one that "
            "was there, or move the folder away to make it anew"
        )


def damage(folder: Path, made: Mapping[str, Any], hashes: Hashes) -> str | None:
    """What of a whole artefact is not as its record says: a file that is missing or has another content; None for none."""
    for name, written in made.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if [path.stat().st_size, hashes.of(path)] != list(written):
            return f"{path} is not as it was written"
    return None


def begin(folder: Path, record: Record, versions: Mapping[str, Any]) -> None:
    """Write down what is about to be made, unless an earlier start has; what cannot be continued is cleared away."""
    if record.kind not in CONTINUED and (folder / BEGUN).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BEGUN).exists():
        write_json(folder / BEGUN, {**record.as_json(), "versions": dict(versions)})


def finish(folder: Path, record: Record, content: Mapping[str, Any], versions: Mapping[str, Any], **more: Any) -> str:
    """Write `made.json`, last; returns the artefact's id, which follows from its content."""
    found = digest_of(content)
    made = {**record.as_json(), "versions": dict(versions), "content": dict(content), "id": found, **more}
    write_json(folder / MADE, made)
    (folder / BEGUN).unlink(missing_ok=True)
    return found
