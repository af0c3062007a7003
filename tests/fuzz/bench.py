"""One reader under damaged files: what became of each case, and what was not handled.

A case is a file of the reader's folder and the bytes that it holds instead. It is *read*, *skipped* (a row or film is
left out and listed), or *refused*: by ValueError, FileNotFoundError or one of the package's own errors, whose text is
short and names a file of the folder. Everything else is unhandled: another exception, a library's own error, a call
that does not end in time.
"""

from __future__ import annotations

import signal
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from mutations import damaged

#: seconds of processor time after which a call counts as one that does not end
LIMIT_S = 5.0
#: seconds that are spent on making a case smaller
SHRINKING_S = 8.0
#: characters of an error: one sentence for people
LONGEST = 4000


class Case(NamedTuple):
    """A file of the reader's folder, and what it holds."""

    file: str
    content: bytes


class Reader(NamedTuple):
    """A reader of user files."""

    name: str
    prepare: Callable[[Path], Sequence[str]]  #: writes valid files into a folder; those that are then damaged, by name
    read: Callable[[Path, str], int | None]  #: reads the folder as users do; the rows that were skipped
    most: int = 10_000  #: cases that are worth their time: fewer where a case is slow
    names_file: bool = True  #: its errors name a file; those of readers of texts name what they found


class Unhandled(AssertionError):
    """A case that was neither read, nor skipped, nor refused; `kind` tells such cases apart."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


class Endless(BaseException):
    """Raised in a call that does not end; not an Exception, so that nothing on the way takes it for its own."""


class Bench:
    """A reader with its valid files in a folder of its own."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader, self.folder = reader, folder
        folder.mkdir(parents=True)
        files = reader.prepare(folder)
        self._valid = {name: (folder / name).read_bytes() for name in files}
        self._written: str | None = None  #: the file that does not hold what is valid
        self._names = {path.name for path in folder.rglob("*") if path.is_file()} | {str(folder)}
        for name in files if reader.most >= 10_000 else files[:1]:
            reader.read(folder, name)  # what is not damaged is read

    def cases(self) -> st.SearchStrategy[Case]:
        """Damaged files, each as often as every other."""
        return st.one_of(
            [
                damaged(content, name).map(lambda data, name=name: Case(name, data))
                for name, content in self._valid.items()
            ]
        )

    def attempt(self, case: Case) -> str:
        """ "read", "skipped" or "refused"; raises Unhandled for anything else."""
        if self._written not in (None, case.file):
            (self.folder / self._written).write_bytes(self._valid[self._written])
        (self.folder / case.file).write_bytes(case.content)
        self._written = case.file
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return "skipped" if self.reader.read(self.folder, case.file) else "read"
        except Exception as error:
            self._check_refusal(error)
            return "refused"
        except Endless as error:
            raise Unhandled(f"endless at {_place(error)}", f"no end within {LIMIT_S:g} s of processor time") from error

    def _check_refusal(self, error: Exception) -> None:
        ours = type(error) in (ValueError, FileNotFoundError) or (
            isinstance(error, ValueError | OSError) and type(error).__module__.startswith("vlmalign.")
        )
        text = str(error)
        if not ours:
            raise Unhandled(
                f"{type(error).__name__} at {_place(error)}", f"{type(error).__name__}: {text[:300]}"
            ) from error
        if len(text) > LONGEST:
            raise Unhandled(
                f"long text at {_place(error)}", f"an error of {len(text)} characters: {text[:300]}"
            ) from error
        if steers(text):
            raise Unhandled(
                f"raw characters at {_place(error)}", f"an error with characters that steer: {text[:300]!r}"
            ) from error
        if self.reader.names_file and not any(name in text for name in self._names):
            raise Unhandled(f"nameless at {_place(error)}", f"an error that names no file: {text[:300]}") from error


class Found(NamedTuple):
    """What became of the cases of a reader."""

    counts: dict[str, int]  #: read, skipped, refused, unhandled
    unhandled: dict[str, tuple[Case, str]]  #: kind -> its smallest case, and what happened


class Stop(BaseException):
    """Ends hypothesis's search, which has no limit of its own on time."""


def run(
    bench: Bench,
    cases: int,
    *,
    number: int | None,
    seconds: float = 1e9,
    tell: Callable[[int], None] = lambda done: None,
) -> Found:
    """`cases` cases, or as many as there is time for, from the seed `number`; with None the same every time, and only up to
    the first that is not handled. Each kind of those is made smaller once; attempts at that are no cases."""
    found = Found(dict.fromkeys(("read", "skipped", "refused", "unhandled"), 0), {})
    deadline = time.monotonic() + seconds
    rounds, before = 0, -1
    while before < (done := sum(found.counts.values())) < cases and time.monotonic() < deadline:
        rounds, before = rounds + 1, done
        _search(bench, cases - done, found, None if number is None else 1000 * number + rounds, deadline, tell)
        if number is None:
            break
    return found


def _search(
    bench: Bench, cases: int, found: Found, number: int | None, deadline: float, tell: Callable[[int], None]
) -> None:
    """Cases up to the first of a kind that is not known yet, which is then made smaller."""
    smallest: list[Any] = []  # kind, case, what happened, when to leave it at that

    @settings(
        max_examples=cases, derandomize=number is None, deadline=None, database=None, verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(bench.cases())
    def attempt(case: Case) -> None:
        if time.monotonic() > (smallest[3] if smallest else deadline):
            raise Stop
        try:
            became = bench.attempt(case)
        except Unhandled as error:
            became = "unhandled"
            if not smallest and error.kind not in found.unhandled:
                found.counts[became] += 1
                smallest[:] = [error.kind, case, str(error), time.monotonic() + SHRINKING_S]
            if smallest and error.kind == smallest[0]:
                if len(case.content) <= len(smallest[1].content):
                    smallest[1:3] = case, str(error)
                raise
        if not smallest:
            found.counts[became] += 1
            tell(sum(found.counts.values()))

    with suppress(Unhandled, Stop, Flaky):  # Flaky: what was seen once is kept all the same
        (attempt if number is None else seed(number)(attempt))()
    if smallest:
        found.unhandled[smallest[0]] = (smallest[1], smallest[2])


def steers(text: str) -> bool:
    """Whether a text has characters that steer a terminal, hide or reorder others, or are none."""
    return any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char != "\n" for char in text)


def _place(error: BaseException) -> str:
    """The innermost line of the package that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/vlmalign/" in frame.filename] or frames
    return f"{own[-1].filename.rpartition('/vlmalign/')[2]}:{own[-1].lineno}"


@contextmanager
def _limited() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise Endless

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
