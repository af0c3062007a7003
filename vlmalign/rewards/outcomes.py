"""What every completion was given, on disk before it is used: a run that is continued, or looked at, reads it there.

JSON Lines, appended. A step is one line per completion, then one that closes it:

    {"step": 3, "prompt": 17, "sample": 0, "digest": "9f...", "reward": 0.5, "parts": {"labels": 0.5}, "faults": {}}
    {"step": 3, "end": 8, "memory": {}}

A judge may answer differently when asked again, so a step that is run again after a kill takes its rewards from here.
Lines hold no text of prompts or completions, only a digest that tells whether it is the same one.

In a run of several processes one of them keeps the file (`Crew`), and each scores its share of the completions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.log import EMPTY, Position, digest_before, require_beginning
from vlmalign.rewards.crew import ALONE, Crew
from vlmalign.rewards.runner import RewardRunner, RowFault, ScoredBatch

#: of a reward, as JSON has it: null where it does not apply
NUMBER = (int, float, type(None))
#: (prompt id, sample id): which completion of a step
Key = tuple[int | str, int]


class StepOutcomes(NamedTuple):
    """One step as it was written."""

    keys: tuple[Key, ...]
    digests: tuple[str, ...]
    scored: ScoredBatch
    memory: dict[str, Any]  #: state of the rewards with memory after this step


class OutcomeFile:
    """Appends steps to `path` and reads them back. For one writer at a time.

    Opening drops what a kill left at the end: a step without its last line. `dropped` counts its lines, the torn one
    included. Raises ValueError when anything before that is not as this class writes it.

    Of a `crew` only the writer opens the file; to the others it holds no step, and they write nothing.
    """

    def __init__(self, path: str | Path, crew: Crew = ALONE):
        self.path, self.crew = Path(path), crew
        self._places: dict[int, tuple[int, int]] = {}  # step -> where its lines begin and end
        self._end = self.dropped = 0
        self._file = None
        if not crew.is_writer():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (open for the object's life)
        self._end, self.dropped = self._index()
        self._file.truncate(self._end)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self._places)

    def write(
        self,
        step: int,
        keys: Sequence[Key],
        digests: Sequence[str],
        scored: ScoredBatch,
        memory: Mapping[str, Any],
    ) -> None:
        """Append a step. It survives `kill -9` when this returns, and a power cut after `sync`.

        Raises ValueError for a step that is not after the last one, and for a key given twice.
        """
        if self._places and step <= max(self._places):
            raise ValueError(
                f"{self.path} holds steps up to {max(self._places)}, cannot append step {step}; read it, or call "
                f"drop_from({step}) first"
            )
        if len(set(keys)) < len(keys):
            double = next(key for key in keys if list(keys).count(key) > 1)
            raise ValueError(f"step {step}: expected every (prompt, sample) once, found {double} more than once")
        faults: list[dict[str, list[str]]] = [{} for _ in keys]
        for fault in scored.faults:
            faults[fault.row][fault.reward] = [fault.kind, fault.reason]
        lines: list[dict[str, Any]] = []
        for row, ((prompt, sample), digest) in enumerate(zip(keys, digests, strict=True)):
            parts = {name: column[row] for name, column in scored.parts.items()}
            line = {"step": step, "prompt": prompt, "sample": sample, "digest": digest, "reward": scored.rewards[row]}
            lines.append(line | {"parts": parts, "faults": faults[row]})
        lines.append({"step": step, "end": len(lines), "rewards": list(scored.parts), "memory": dict(memory)})
        data = b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)
        while data and self._file is not None:  # one call, unless the system takes less at a time
            data = data[self._file.write(data) :]
        if self._file is not None:
            end = os.fstat(self._file.fileno()).st_size
            self._places[step] = (self._end, end)
            self._end = end

    def read(self, step: int) -> StepOutcomes:
        """A step as it was written. Raises ValueError for a step that is not here."""
        if step not in self._places:
            raise ValueError(f"{self.path} holds no step {step}; found {len(self._places)} steps")
        begin, end = self._places[step]
        lines = [json.loads(line) for line in os.pread(self._file.fileno(), end - begin, begin).splitlines()]
        rows, last = lines[:-1], lines[-1]
        names = last["rewards"]
        # By reward, then by row, as the runner gives them.
        faults = tuple(
            RowFault(name, i, *row["faults"][name])
            for name in names
            for i, row in enumerate(rows)
            if name in row["faults"]
        )
        parts = {name: [row["parts"][name] for row in rows] for name in names}
        return StepOutcomes(
            keys=tuple((row["prompt"], row["sample"]) for row in rows),
            digests=tuple(row["digest"] for row in rows),
            scored=ScoredBatch([row["reward"] for row in rows], parts, faults),
            memory=last["memory"],
        )

    def drop_from(self, step: int) -> None:
        """Forget this step and all after it: for a run that is continued on purpose with other code or hardware."""
        kept = {number: place for number, place in self._places.items() if number < step}
        self._end = max((end for _, end in kept.values()), default=0)
        self._places = kept
        if self._file is not None:
            self._file.truncate(self._end)

    def sync(self) -> None:
        """Have everything on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def position(self) -> Position:
        """Where the file ends, all of it on the disk: what a checkpoint records."""
        self.sync()
        return EMPTY if self._file is None else Position(self._end, digest_before(self.path, self._end).hexdigest())

    def require(self, position: Sequence[Any]) -> None:
        """Raises ValueError when the file does not begin as it did when `position()` returned this (a list from JSON)."""
        if self._file is not None:
            require_beginning(self.path, Position(*position))

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()

    def _index(self) -> tuple[int, int]:
        """Where the last whole step ends, and how many lines stand after it."""
        self._file.seek(0)
        end = begin = place = 0
        rows: list[dict[str, Any]] = []
        lines = self._file.read().splitlines(keepends=True)
        for number, data in enumerate(lines, start=1):
            place += len(data)
            try:
                line = _line(data)
            except (ValueError, RecursionError) as error:
                if number == len(lines) and not data.endswith(b"\n"):
                    return end, len(rows) + 1
                raise self._damaged(number, "is not a line of outcomes") from error
            step, last = line["step"], line.get("end")
            if not data.endswith(b"\n"):  # whole JSON, but what follows it is lost
                return end, len(rows) + 1
            if rows and step != rows[0]["step"]:
                raise self._damaged(number, f"is of step {step}, while step {rows[0]['step']} has no end")
            if last is None:
                rows.append(line)
                continue
            if not all(row["parts"].keys() == set(line["rewards"]) for row in rows):
                raise self._damaged(number, f"closes step {step} for rewards that its completions do not have")
            if last != len(rows) or (self._places and step <= max(self._places)):
                raise self._damaged(number, f"closes step {step} with {last} completions, found {len(rows)}")
            self._places[step] = (begin, place)
            end = begin = place
            rows = []
        return end, len(rows)

    def _damaged(self, number: int, what: str) -> ValueError:
        return ValueError(f"{self.path}, line {number}, {what}: the file was changed; restore it or start a new run")


def _line(data: bytes) -> dict[str, Any]:
    """A line as it is written: of a completion, or of a step's end. Raises ValueError for anything else."""
    line = json.loads(data, parse_constant=_refuse)
    if not isinstance(line, dict):
        raise ValueError("no object")
    if "end" in line:
        fits = _fits(line, {"step": int, "end": int, "rewards": list, "memory": dict})
        fits = fits and all(isinstance(name, str) for name in line["rewards"])
    else:
        shape = {
            "step": int,
            "prompt": (int, str),
            "sample": int,
            "digest": str,
            "reward": NUMBER,
            "parts": dict,
            "faults": dict,
        }
        fits = _fits(line, shape)
        fits = fits and all(isinstance(value, NUMBER) for value in line["parts"].values())
        fits = fits and all(
            isinstance(fault, list) and len(fault) == 2 and all(isinstance(word, str) for word in fault)
            for fault in line["faults"].values()
        )
    if not fits:
        raise ValueError("entries of other kinds")
    return line


def _fits(line: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    return all(name in line and isinstance(line[name], kinds) for name, kinds in shape.items())


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def digest(prompt: Any, completion: Any) -> str:
    """Sixteen hexadecimal digits that tell one (prompt, completion) from another."""
    text = json.dumps([prompt, completion], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def score_or_replay(
    runner: RewardRunner,
    outcomes: OutcomeFile,
    *,
    step: int,
    keys: Sequence[Key],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> ScoredBatch:
    """The rewards of a step: read when it is on file, else computed and written before they are returned.

    A step that is read leaves the runner's memory as if it had been computed. In each process of the crew all
    completions are given and all rewards returned; each scores its share. Raises ValueError when the file holds the step
    for other completions or other rewards.
    """
    crew = outcomes.crew
    digests = [digest(*pair) for pair in zip(prompts, completions, strict=True)]

    def on_file() -> dict[str, Any] | None:
        if step not in outcomes.steps:
            return None
        found = outcomes.read(step)
        same = found.keys == tuple(keys) and found.digests == tuple(digests)
        if not same or tuple(found.scored.parts) != runner.names:
            what = "rewards" if same else "completions"
            raise ValueError(
                f"{outcomes.path} holds step {step} for other {what}: the run is continued with another config, code or "
                f"hardware; go back to those, or drop its steps from {step} on (OutcomeFile.drop_from) to score them anew"
            )
        return {"scored": found.scored, "memory": found.memory}

    known = crew.from_first(on_file)
    if known is not None:
        runner.set_state(known["memory"])
        return _joined([known["scored"]])
    if runner.get_state():
        # Memory grows over all completions in order: one process scores them, and tells the others what it remembers.
        told = crew.from_first(lambda: [runner.score(prompts, completions, columns), runner.get_state()])
        scored, memory = _joined(told[:1]), told[1]
        runner.set_state(memory)
    else:
        rows = crew.own_share(range(len(keys)))

        def score_own() -> list[ScoredBatch]:
            own = {name: [column[row] for row in rows] for name, column in columns.items()}
            return [runner.score([prompts[row] for row in rows], [completions[row] for row in rows], own)]

        scored, memory = _joined(crew.gather_from(score_own)), {}
    # Through the crew, so that a full disk ends all of its processes.
    crew.from_first(lambda: outcomes.write(step, keys, digests, scored, memory))
    return scored


def _joined(parts: Sequence[Sequence[Any]]) -> ScoredBatch:
    """Consecutive rows scored apart, as one batch; what was exchanged has come as plain lists."""
    rewards: list[float | None] = []
    columns: dict[str, list[float | None]] = {}
    faults: list[RowFault] = []
    for numbers, values, failed in parts:
        faults += [RowFault(name, len(rewards) + row, kind, reason) for name, row, kind, reason in failed]
        rewards += numbers
        for name, column in values.items():
            columns.setdefault(name, []).extend(column)
    order = {name: place for place, name in enumerate(columns)}
    return ScoredBatch(rewards, columns, tuple(sorted(faults, key=lambda fault: (order[fault.reward], fault.row))))
