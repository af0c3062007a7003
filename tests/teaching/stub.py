"""An endpoint on this machine that answers as a test's script says, and a drawn set of films to ask about."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmalign.config_yaml import write_yaml
from vlmalign.progress import Progress
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.sets import draw

LABELS = ("Edema", "Fracture", "No Finding", "Pneumonia")
INSTRUCTION = "Shown are exactly: [{findings}] of {labels}."


class Answer(NamedTuple):
    """What the endpoint does with one request."""

    body: Any = None  #: an object is sent as JSON, bytes as they are
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    wait: float = 0.0  #: seconds before the answer
    cut: bool = False  #: announce the body, send half of it, and hang up


def completion(text: str | None, finish: str = "stop") -> Answer:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    return Answer({"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage})


def good(body: dict[str, Any]) -> str:
    """A trace of the format free that passes every check."""
    told = asked_labels(body)
    said = " and ".join(told).lower() if told else "nothing on the list"
    return f"The film is upright and sharp. Both lungs, the heart and the bones are seen. What decides is plain: there is {said}."


def asked_labels(body: dict[str, Any]) -> list[str]:
    text = body["messages"][0]["content"][1]["text"]
    found = re.search(r"\[(.*?)\]", text)[1]
    return [] if found.startswith("none") else found.split(", ")


class Endpoint:
    """`script(number, body)` says what the request of this number (from 0) gets."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer]):
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.bodies)
                    endpoint.bodies.append({**body, "path": self.path})
                    endpoint.headers.append(dict(self.headers))
                    endpoint.times.append(time.monotonic())
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    answer = endpoint.script(number, body)
                    time.sleep(answer.wait)
                finally:
                    with endpoint.lock:
                        endpoint.at_once -= 1
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                    self.send_response(answer.status)
                    for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if answer.cut else data)
                if answer.cut:
                    self.close_connection = True

            def log_message(self, *words: object) -> None:
                del words

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def serving(script: Callable[[int, dict[str, Any]], Answer]) -> Iterator[Endpoint]:
    endpoint = Endpoint(script)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()


def write_study(folder: Path, films: int = 6) -> Path:
    """A study in `folder` with the drawn set `train` of so many films, and a test set that is not drawn."""
    rng = np.random.default_rng(0)
    lines = ["file,person,findings"]
    for number in range(films):
        image = Image.fromarray(rng.integers(0, 255, (40, 60), np.uint8))
        if number == 0:  # a file with all that must not be sent
            exif = Image.Exif()
            exif[0x010E] = "SECRET-EXIF"
            image.save(folder / "0.jpg", comment=b"SECRET-COMMENT", exif=exif)
        else:
            image.save(folder / f"{number}.png")
        name = "0.jpg" if number == 0 else f"{number}.png"
        lines.append(f"{name},p{number},{LABELS[number % 4]}{';Edema' if number % 4 == 1 else ''}")
    (folder / "films.csv").write_text("\n".join(lines) + "\n")
    source = {
        "kind": "table", "path": str(folder / "films.csv"), "images": str(folder), "image": "file", "patient": "person",
        "labels": {"column": "findings", "separator": ";", "normal": "No Finding"},
    }  # fmt: skip
    study = {
        "run": str(folder / "run"),
        "sources": {"films": source},
        "sets": {"train": {"from": "films"}, "held": {"from": "films", "role": "test"}},
        "stages": {"base": {"kind": "model", "path": "nowhere"}},
    }
    (folder / "study.yaml").write_text(write_yaml(study))
    (folder / "ask.txt").write_text(INSTRUCTION)
    config = load_study(folder / "study.yaml")
    place = folder / "run" / "sets" / "train"
    place.mkdir(parents=True)
    with Progress(quiet=True) as progress:
        draw(config, "train", config.sources["films"].open(config.place), set(), place, progress)
    return folder / "study.yaml"
