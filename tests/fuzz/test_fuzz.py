"""No file of the user's, whatever it holds, ends in anything but a reading, a counted skip or a clear error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "reporting"))

from bench import Bench, Case, Unhandled, run
from found import FOUND
from readers import READERS, Reader

#: of the cases that are worth a reader's time, one in so many is tried here
ONE_IN = 1000


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[Reader, Bench]:
    """Each reader's valid files, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("fuzz")

    class Made(dict):
        def __missing__(self, reader: Reader) -> Bench:
            self[reader] = Bench(reader, folder / str(READERS.index(reader)))
            return self[reader]

    return Made()


def marked(reader: Reader) -> pytest.param:
    """Readers that take tenths of a second a case are left to the full set."""
    return pytest.param(reader, id=reader.name, marks=[pytest.mark.full] if reader.most <= 200 else [])


@pytest.mark.parametrize("reader", [*map(marked, READERS)])
def test_every_case_is_read_skipped_or_refused(benches, reader):
    found = run(benches[reader], max(1, reader.most // ONE_IN), number=None)
    assert not found.unhandled, "\n".join(f"{kind}: {case}: {what}" for kind, (case, what) in found.unhandled.items())
    assert found.counts["refused"] + found.counts["read"] + found.counts["skipped"] > 0


@pytest.mark.parametrize(("name", "file", "content", "became"), FOUND)
def test_what_was_found_is_handled(benches, name, file, content, became):
    """The smallest case of every kind that fuzzing has found."""
    reader = next(reader for reader in READERS if reader.name == name)
    assert benches[reader].attempt(Case(file, content)) == became


def test_what_is_not_handled_is_told_apart(tmp_path, monkeypatch):
    """The bench itself: errors of other types, without a name, too long, or with characters that steer."""

    def prepare(folder: Path) -> list[str]:
        (folder / "file.txt").write_bytes(b"ok")
        return ["file.txt"]

    def read(folder: Path, name: str) -> int | None:
        text = (folder / name).read_text()
        if text == "key":
            raise KeyError(name)
        if text == "endless":
            while True:
                pass
        if text not in ("ok", "skipped"):
            raise ValueError(text.replace("NAME", name))
        return int(text == "skipped")

    monkeypatch.setattr("bench.LIMIT_S", 0.2)
    bench = Bench(Reader("own", prepare, read), tmp_path / "own")
    became = {}
    for text in ("ok", "skipped", "NAME: no", "no", "key", "NAME: \x1b[31m", "NAME" + "x" * 5000, "endless"):
        try:
            became[text[:7]] = bench.attempt(Case("file.txt", text.encode()))
        except Unhandled as error:
            became[text[:7]] = error.kind.partition(" at ")[0]
    assert list(became.values()) == [
        "read", "skipped", "refused", "nameless", "KeyError", "raw characters", "long text", "endless",
    ]  # fmt: skip
