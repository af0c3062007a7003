"""What a compiled program's text shows that its sizes do not: collectives, library calls and copies, and in which loop.

Bytes are those of one call of the program on one device: what lies in loops of known length is multiplied by it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
#: copies below this are noise beside weights and caches
LARGE = 1 << 20

#: a fusion of nothing else only moves data
_MOVES = ("copy", "concatenate", "transpose", "slice", "pad")
_FREE = ("parameter", "bitcast", "reshape", "tuple", "get-tuple-element", "constant")

_ITEM = {"pred": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "token": 0, "opaque": 0}
_ITEM |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
#: kinds of at most a byte: s4, u8, f8e4m3fn and their like
_BYTE = re.compile(r"[suf][1248](e\dm\d\w*)?")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
#: one instruction: its shape (with layouts), its opcode, and what follows the opening bracket
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Instruction(NamedTuple):
    opcode: str
    bytes: int  #: of the result
    rest: str


class Traffic(NamedTuple):
    """One kind of collective or copy at one place."""

    kind: str
    loop: str  #: how often: "" once, "x16" in a loop of 16 rounds, "x?" in one whose length depends on data
    count: int  #: instructions
    bytes: int  #: per call of the program


@dataclass(frozen=True)
class Findings:
    """What is counted in a program. `copies` are large ones within loops: of weights or caches, made again each round."""

    collectives: tuple[Traffic, ...]
    copies: tuple[Traffic, ...]
    calls: dict[str, int]  #: library calls by target, once each however often their loop runs
    sorts: int


def size_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple.

    >>> size_of("bf16[8,4]{1,0}"), size_of("(f32[2]{0}, s32[])")
    (64, 12)
    """
    return sum(_item(kind) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _ARRAY.findall(shape))


def _item(kind: str) -> int:
    if kind in _ITEM:
        return _ITEM[kind]
    if _BYTE.fullmatch(kind):
        return 1
    raise ValueError(f"a compiled program holds arrays of {kind}, whose size is not known; add it to planning.hlo")


class Module(Mapping[str, list[Instruction]]):
    """The instructions of each computation of a program's text by its name, read when it is asked for: most of them are
    kernels, into which nobody looks."""

    def __init__(self, text: str):
        self._text = text
        self._bodies: dict[str, slice] = {}
        self._read: dict[str, list[Instruction]] = {}
        self.entry = ""  #: the name of the computation that is called first
        for opened in _COMPUTATION.finditer(text):
            self._bodies[opened[2]] = slice(opened.end() + 1, text.index("\n}", opened.end()))
            if opened[1]:
                self.entry = opened[2]

    def __getitem__(self, name: str) -> list[Instruction]:
        if name not in self._read:
            parsed = map(_INSTRUCTION.match, self._text[self._bodies[name]].split("\n"))
            self._read[name] = [Instruction(m[2], size_of(m[1]), m[3]) for m in parsed if m is not None]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bodies)

    def __len__(self) -> int:
        return len(self._bodies)


def read_program(text: str) -> Findings:
    """What stands in an optimised HLO module."""
    found = Module(text)
    traffic: dict[str, Counter] = {"collectives": Counter(), "copies": Counter()}
    moved: dict[str, Counter] = {"collectives": Counter(), "copies": Counter()}
    calls: Counter[str] = Counter()
    sorts = 0
    for instruction, trips in _walk(found, found.entry, ()):
        # Of an asynchronous pair the end is counted: the shape of its start holds operands too.
        opcode = instruction.opcode.removesuffix("-done")
        place = (opcode, "".join(f"x{n}" for n in trips))
        rounds = math.prod(n for n in trips if n != "?")
        if opcode in COLLECTIVES:
            traffic["collectives"][place] += 1
            moved["collectives"][place] += rounds * instruction.bytes
        elif trips and instruction.bytes >= LARGE and (kind := _movement(found, instruction)) is not None:
            traffic["copies"][kind, place[1]] += 1
            moved["copies"][kind, place[1]] += rounds * instruction.bytes
        elif opcode == "custom-call" and (target := _TARGET.search(instruction.rest)) is not None:
            calls[target[1]] += 1
        elif opcode == "sort":
            sorts += 1

    def listed(kind: str) -> tuple[Traffic, ...]:
        return tuple(Traffic(*place, n, moved[kind][place]) for place, n in sorted(traffic[kind].items()))

    return Findings(listed("collectives"), listed("copies"), dict(sorted(calls.items())), sorts)


def _movement(found: Mapping[str, list[Instruction]], instruction: Instruction) -> str | None:
    """What an instruction that computes nothing does with its data; None for one that computes."""
    if instruction.opcode in _MOVES:
        return instruction.opcode
    if instruction.opcode != "fusion":
        return None
    inside = {i.opcode for _, name in _CALLED.findall(instruction.rest) for i in found.get(name, ())}
    moves = [kind for kind in _MOVES if kind in inside]
    return "+".join(moves) if moves and inside <= {*_MOVES, *_FREE} else None


def _walk(
    found: Mapping[str, list[Instruction]], name: str, trips: tuple[int | str, ...]
) -> Iterator[tuple[Instruction, tuple[int | str, ...]]]:
    """Every instruction that runs, with the rounds of the loops around it. Fused ones are not memory traffic."""
    for instruction in found.get(name, ()):
        yield instruction, trips
        if instruction.opcode == "fusion":
            continue
        inner = trips
        if instruction.opcode == "while":
            known = _TRIPS.search(instruction.rest)
            inner = (*trips, int(known[1]) if known is not None else "?")
        called = [other for role, other in _CALLED.findall(instruction.rest) if role != "condition"]
        for branches in _BRANCHES.findall(instruction.rest):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            yield from _walk(found, other, inner)
