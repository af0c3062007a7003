"""Small reader studies on disk, and a reader's browser without a browser: what the tests of this folder share."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from vlmalign.config_yaml import write_yaml
from vlmalign.review import access
from vlmalign.review.application import create_app
from vlmalign.review.database import open_database
from vlmalign.review.freezing import register
from vlmalign.review.reading import load_study

#: names of arms that stand nowhere else: if one is in what a browser got, it leaked
ARMS = ("zebra-sft", "yak-grpo", "xenops-own")
AGES = ("31", "34", "38", "41")
PLANS = ("IVF with a short protocol", "ICSI with freezing of all embryos", "one more cycle of insemination")


class Clock:
    """A server's clock that a test sets; every reading is a millisecond later."""

    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_study(
    folder: Path, *, cases: int = 8, arms: int = 2, films: bool = False, hostile: str = "", **changes
) -> Path:
    """A study of records of `cases` invented couples, as its YAML file; `changes` replace sections of the protocol."""
    rows = [
        {
            "id": f"secret-file-{i:03}.png",
            "record": f"Couple {i}. Woman of {AGES[i % 4]}, {i % 3} earlier cycles.{hostile}",
            "truth": "secret-truth",
        }
        for i in range(cases)
    ]
    if films:
        (folder / "films").mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(rows):
            grey = np.add.outer(np.arange(96), np.arange(128)) % 256
            Image.fromarray(((grey + 17 * i) % 256).astype(np.uint8)).save(folder / "films" / f"secret-film-{i}.png")
            row["image"] = f"secret-film-{i}.png"
    write_rows(folder / "cases.jsonl", rows)
    sections = {}
    for number, name in enumerate(ARMS[:arms]):
        answers = [
            {
                "id": row["id"],
                "answer": f"<think>secret-thought</think>\n## Plan\n**{PLANS[(number + i) % 3]}** for couple {i}.{hostile}",
                "author": f"R{1 + i % 2:02}",
            }
            for i, row in enumerate(rows)
        ]
        write_rows(folder / f"secret-answers-{number}.jsonl", answers)
        sections[name] = {
            "kind": "file",
            "path": str(folder / f"secret-answers-{number}.jsonl"),
            "guess": "a doctor" if number == 2 else ("a model", "another model")[number],
        }
        if number == 2:
            sections[name]["author"] = "author"
    protocol = {
        "title": "Infertility care",
        "folder": str(folder / "record"),
        "seed": 3,
        "instructions": "Read the record, then the answers.",
        "cases": {"path": str(folder / "cases.jsonl")} | ({"images": str(folder / "films")} if films else {}),
        "arms": sections,
        "readers": ["R01", "R02"],
        "design": {"readers_per_case": 2, "guesses": 1},
        "rendering": {"hide": ["think"]},
    }
    path = folder / "study.yaml"
    path.write_text(write_yaml(protocol | changes), encoding="utf-8")
    return path


def tokens():
    """Tokens that follow from nothing but their number: what is sent can be compared byte by byte."""
    numbers = itertools.count(1)
    return lambda: f"token-{next(numbers):04}-" + "x" * 30


class Reader:
    """A reader at the application: opens the link, reads pages, fills in forms; keeps all that was sent to it."""

    def __init__(self, app, database, name, *, token=None):
        self.client = TestClient(app, base_url="http://127.0.0.1:8321", raise_server_exceptions=False)
        self.name, self.received, self.keys = name, [], itertools.count(1)
        self.token = access.invite(database, name, **({"token": token} if token else {}))

    def get(self, path, **options):
        return self._kept(self.client.get(path, **options))

    def post(self, path, **options):
        return self._kept(self.client.post(path, **options))

    def _kept(self, answer):
        for one in (*answer.history, answer):
            self.received.append(bytes(str(one.status_code) + str(sorted(one.headers.items())), "utf-8") + one.content)
        return answer

    def enter(self):
        answer = self.post("/enter", data={"token": self.token})
        assert "I agree to take part" in answer.text
        return self.post("/begin", data={"csrf": field(answer.text, "csrf")})

    def change(self, page: str, entry: dict | None, key: str | None = None, **other) -> dict:
        own = {"position": number(page, "position"), "revision": number(page, "revision"), "active_ms": 1200}
        return own | {"key": key or f"{self.name}-{next(self.keys):08}", "entry": entry} | other

    def send(self, path: str, page: str, change: dict):
        return self.post(path, json=change, headers={"x-csrf-token": attribute(page, "csrf")})

    def close(self, page: str, **entry):
        return self.send("/close", page, self.change(page, filled(page, **entry)))

    def read_all(self, choose=lambda page: "A") -> list[str]:
        """Close every page that is left; the pages, in order."""
        pages = []
        while "data-position" in (page := self.get("/case").text):
            pages.append(page)
            done = self.close(page, preference=choose(page))
            assert done.status_code == 200, done.text
        return pages


def begin(path: Path, *, clock=None, token=None):
    """(study, database, application) of a protocol, registered."""
    study = load_study(path)
    database = open_database(study.protocol.folder, **({"clock": clock} if clock else {}))
    register(database, study)
    return study, database, create_app(study, database, **({"token": token} if token else {}))


def filled(page: str, *, preference: str = "A", level: int = 2, **more) -> dict:
    """A whole entry for the page, as its form asks for it."""
    letters = sorted(set(re.findall(r'name="answers\.([A-F])\.', page)))
    if ".guess" in page:
        return {"answers": {letter: {"guess": 0} for letter in letters}}
    answers = {}
    for letter in letters:
        criteria = sorted(set(re.findall(rf'name="answers\.{letter}\.criteria\.(\w+)"', page)))
        answers[letter] = {"criteria": dict.fromkeys(criteria, level), "harm_extent": 0, "harm_likelihood": 1}
    return {"preference": preference, "confidence": 2, "answers": answers} | more


def attribute(page: str, name: str) -> str:
    return re.search(rf'data-{name}="([^"]*)"', page)[1]


def number(page: str, name: str) -> int:
    return int(attribute(page, name))


def field(page: str, name: str) -> str:
    return re.search(rf'name="{name}" value="([^"]*)"', page)[1]


def texts(page: str) -> list[str]:
    """The answers that a page shows, in order."""
    return re.findall(r'<h2 id="answer-\w">.*?</h2>\s*<div class="text">(.*?)</div>', page, re.DOTALL)
