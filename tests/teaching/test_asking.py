"""Traces from an endpoint that answers slowly, wrongly, partly, and with 429 and 500; kills, restarts, what is sent."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import signal
import time
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image
from stub import LABELS, Answer, completion, good, serving, write_study

from vlmalign.cli import main
from vlmalign.data.sources.json_lines import read_texts
from vlmalign.progress import Progress
from vlmalign.studies.engine.chain import load_study
from vlmalign.teaching.asking import Settings, write
from vlmalign.teaching.endpoint import Endpoint, EndpointStopped, Patience
from vlmalign.teaching.films import films_of
from vlmalign.teaching.teacher import Teacher, read_instruction
from vlmalign.teaching.trace_file import failed_file, mend, read_failed, read_traces

QUICK = Patience(tries=4, first=0.01, most=0.05, asked=5.0, timeout=5.0)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


def ask(study, url, out, *, patience=QUICK, key=None, **settings):
    """What `vlmalign traces ask` does, with less patience."""
    asked = films_of(load_study(study), ["train"])
    teacher = Teacher(read_instruction(study.with_name("ask.txt")), "free", asked.labels)
    endpoint = Endpoint(url, "teacher", key=key, patience=patience)
    with Progress(quiet=True) as progress:
        chosen = Settings(**{"concurrency": 1, "price_in": 2.0, "price_out": 10.0, **settings})
        return write(out, asked, teacher, endpoint, "teacher", chosen, progress)


def test_every_film_gets_its_trace_a_bounded_number_at_a_time(study, tmp_path):
    out = tmp_path / "traces.jsonl"
    with serving(lambda number, body: completion(good(body))._replace(wait=0.1)) as endpoint:
        state = ask(study, endpoint.url, out, concurrency=3)
    assert endpoint.most_at_once == 3
    assert len(endpoint.bodies) == 6
    assert {body["path"] for body in endpoint.bodies} == {"/v1/chat/completions"}
    traces = read_traces(out)
    assert len(traces) == state.written == 6
    assert {label for row in traces.values() for label in row.labels} == set(LABELS)
    assert read_texts(out, "id", "trace") == {id: row.trace for id, row in traces.items()}  # as a study reads it
    assert state.cost(Settings(price_in=2.0, price_out=10.0)) == (6000, 300, pytest.approx((6000 * 2 + 300 * 10) / 1e6))
    assert not any("Authorization" in headers for headers in endpoint.headers)
    assert out.stat().st_mode & 0o777 in (0o600, 0o644, 0o664)


def test_what_is_sent_is_a_bounded_jpeg_without_metadata(study, tmp_path):
    with serving(lambda number, body: completion(good(body))) as endpoint:
        ask(study, endpoint.url, tmp_path / "t.jsonl", side=30, key="k3y")
    assert b"SECRET" in study.with_name("0.jpg").read_bytes()
    assert endpoint.headers[0]["Authorization"] == "Bearer k3y"
    for body in endpoint.bodies:
        image, text = body["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        sent = base64.b64decode(data)
        assert kind == "data:image/jpeg;base64"
        assert b"SECRET" not in sent
        with Image.open(io.BytesIO(sent)) as film:
            assert film.size == (30, 20)
            assert not film.getexif()
        assert text["text"].endswith(f"of {', '.join(LABELS)}.")
        assert not {"id", "image", str(study.parent)} & set(json.dumps(text).split('"'))


@pytest.mark.parametrize(
    "first",
    [
        Answer({"error": {"message": "PATIENT"}}, 500),
        Answer({}, 503),
        Answer(b"<html>busy</html>"),
        Answer({"error": "overloaded"}),
        Answer({"choices": []}),
        Answer({"choices": [{"message": {"content": [1]}}]}),
        completion("whatever")._replace(cut=True),
        completion("whatever")._replace(wait=0.6),
        Answer({}, 429, {"Retry-After": "never mind"}),
    ],
    ids=["500", "503", "no JSON", "an error", "no choice", "no text", "half", "slow", "429"],
)
def test_what_may_pass_is_tried_again(study, tmp_path, first):
    with serving(lambda number, body: first if number == 0 else completion(good(body))) as endpoint:
        state = ask(study, endpoint.url, tmp_path / "t.jsonl", patience=QUICK._replace(timeout=0.4))
    assert len(endpoint.bodies) == 7
    assert (state.written, state.failed) == (6, {})


@pytest.mark.parametrize("header", ["1", "date"])
def test_retry_after_is_honoured_by_all_workers(study, tmp_path, header):
    def script(number, body):
        if number == 0:
            return Answer({}, 429, {"Retry-After": "1" if header == "1" else formatdate(time.time() + 2, usegmt=True)})
        return completion(good(body))._replace(wait=0.2)

    with serving(script) as endpoint:
        ask(study, endpoint.url, tmp_path / "t.jsonl", concurrency=2)
    assert len(endpoint.times) == 7
    assert min(endpoint.times[2:]) - endpoint.times[0] >= 0.9  # the second was under way already
    with serving(lambda number, body: Answer({}, 429, {"Retry-After": "3600"})) as endpoint:
        with pytest.raises(EndpointStopped, match="to be asked again in 3600 s"):
            ask(study, endpoint.url, tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Answer({"error": {"code": "invalid_api_key", "message": "PATIENT"}}, 401),
            r"401 \(invalid_api_key\): the key was",
        ),
        (Answer({}, 403), "403: the key may not"),
        (Answer({"error": {"type": "PATIENT said"}}, 404), "404: there is no such model or address"),
        (Answer({}, 307, {"Location": "http://127.0.0.1:9/"}), "redirects are not followed"),
    ],
)
def test_what_will_not_pass_ends_the_run(study, tmp_path, answer, words):
    out = tmp_path / "t.jsonl"
    with serving(lambda number, body: completion(good(body)) if number < 2 else answer) as endpoint:
        with pytest.raises(EndpointStopped, match=words) as stopped:
            ask(study, endpoint.url, out)
    assert "PATIENT" not in str(stopped.value)
    assert len(endpoint.bodies) == 3
    assert len(read_traces(out)) == 2


def test_an_endpoint_that_is_down_ends_the_run_and_lists_nobody_for_good(study, tmp_path):
    out = tmp_path / "t.jsonl"
    with serving(lambda number, body: Answer({}, 500)) as endpoint:
        with pytest.raises(EndpointStopped, match=r"5 films in a row had no reply.*status 500, after 4 tries"):
            ask(study, endpoint.url, out)
        assert len(endpoint.bodies) == 5 * 4
    with pytest.raises(EndpointStopped, match="ConnectError"):  # nobody listens any more
        ask(study, endpoint.url, out)
    with serving(lambda number, body: completion(good(body))) as endpoint:
        state = ask(study, endpoint.url, out)
    assert (state.written, state.failed) == (6, {})
    assert read_failed(failed_file(out)) == {}


def test_a_film_that_is_refused_is_listed_and_the_others_go_on(study, tmp_path):
    refusal = Answer({"error": {"code": "content_filter", "message": "PATIENT"}}, 400)
    with serving(lambda number, body: refusal if number == 1 else completion(good(body))) as endpoint:
        state = ask(study, endpoint.url, tmp_path / "t.jsonl")
    assert len(endpoint.bodies) == 6
    (failed,) = state.failed.values()
    assert (failed.kind, failed.reason) == ("endpoint", "the endpoint refused the request: status 400 (content_filter)")


WRONG = {
    "a tag": (lambda body: f"<think>{good(body)}</think>", "holds a tag"),
    "too short": (lambda body: "Short.", "expected 15 to 200 words, found 1"),
    "a leak": (lambda body: good(body) + " This is as the labels state.", "tells that the labels were known (labels)"),
    "another label": (lambda body: good(body) + " And a pneumothorax, edema, fracture and pneumonia.", "claims "),
    "silence": (lambda body: "The film is upright and sharp and nothing else is told about it in all of these words.", "does not name"),
    "nothing": (lambda body: None, "no text"),
    "half a character": (lambda body: good(body) + "\ud800", "holds half of a character"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_asked_again_with_its_fault_and_then_listed(study, tmp_path, name):
    say, fault = WRONG[name]
    out = tmp_path / "t.jsonl"
    with serving(lambda number, body: completion(say(body) if number in (0, 2, 3, 4) else good(body))) as endpoint:
        state = ask(study, endpoint.url, out)
    first, second = endpoint.bodies[0]["messages"], endpoint.bodies[1]["messages"]
    assert second[0] == first[0]
    assert [each["role"] for each in second] == ["user", "assistant", "user"]
    assert fault in second[2]["content"]
    assert len(endpoint.bodies[4]["messages"]) == 3  # the conversation does not grow
    assert len(endpoint.bodies) == 2 + 3 + 4
    traces = read_traces(out)
    assert len(traces) == 5
    assert sorted(row.asked for row in traces.values()) == [1, 1, 1, 1, 2]
    (failed,) = state.failed.values()
    assert (failed.kind, failed.asked) == ("answer", 3)
    assert fault in failed.reason
    assert "upright" not in failed_file(out).read_text()  # nothing of the answer
    assert sum(state.reasons().values()) >= 1

    # A restart does not ask about it, unless told to; what it took is not forgotten.
    with serving(lambda number, body: completion(good(body))) as endpoint:
        ask(study, endpoint.url, out)
        assert endpoint.bodies == []
        again = ask(study, endpoint.url, out, again=True)
        assert len(endpoint.bodies) == 1
    assert (again.failed, len(read_traces(out))) == ({}, 6)
    assert again.cost(Settings())[0] == (2 + 3 + 4 + 1) * 1000
    assert failed_file(out).read_text() == ""


def test_a_text_that_was_cut_off_is_not_taken(study, tmp_path):
    with serving(lambda number, body: completion(good(body), "length" if number == 0 else "stop")) as endpoint:
        state = ask(study, endpoint.url, tmp_path / "t.jsonl")
    assert "ended early (length)" in endpoint.bodies[1]["messages"][2]["content"]
    assert state.written == 6


def test_a_kill_loses_nothing_and_a_restart_goes_on(study, tmp_path):
    out = tmp_path / "t.jsonl"
    hold = {"after": 3}
    with serving(
        lambda number, body: completion(good(body))._replace(wait=0 if number < hold["after"] else 20)
    ) as endpoint:
        child = multiprocessing.get_context("fork").Process(target=ask, args=(study, endpoint.url, out))
        child.start()
        limit = time.monotonic() + 60
        while len(endpoint.bodies) < 4:
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        before = out.read_bytes()
        assert len(read_traces(out)) == 3
        hold["after"] = 10**6
        out.write_bytes(before + before.splitlines()[0].replace(b'"id": "', b'"id": "new ')[:40])  # torn
        ask(study, endpoint.url, out)
    assert out.read_bytes().startswith(before)
    assert len(read_traces(out)) == 6
    assert len(endpoint.bodies) == 4 + 3


@pytest.mark.parametrize(
    ("text", "left", "cut"),
    [
        (b"", b"", False),
        (b'{"a": 1}\n', b'{"a": 1}\n', False),
        (b'{"a": 1}\n{"b": ', b'{"a": 1}\n', True),
        (b'{"b": ', b"", True),
        (b'{"a": 1}', b'{"a": 1}\n', False),
        ('{"a": 1}\n{"é'.encode()[:-1], b'{"a": 1}\n', True),
    ],
)
def test_a_torn_last_line_is_cut_off(tmp_path, text, left, cut):
    path = tmp_path / "t.jsonl"
    path.write_bytes(text)
    assert mend(path) is cut
    assert path.read_bytes() == left
    assert mend(path) is False


def test_a_film_that_changed_is_not_sent(tmp_path):
    study = write_study(tmp_path, films=3)
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "1.png")
    with serving(lambda number, body: completion(good(body))) as endpoint:
        state = ask(study, endpoint.url, tmp_path / "t.jsonl")
    assert len(endpoint.bodies) == state.written == 2
    (failed,) = state.failed.values()
    assert failed.kind == "image"
    assert "1.png is not the image that its set was drawn with" in failed.reason


def test_a_file_of_other_traces_is_not_mixed_with_these(study, tmp_path):
    out = tmp_path / "t.jsonl"
    row = {"id": "0.jpg", "trace": "text", "format": "narrative", "model": "teacher"}
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="holds traces of format narrative by teacher"):
        ask(study, "http://127.0.0.1:9", out)
    id = next(iter(films_of(load_study(study), ["train"]).films)).id
    out.write_text(json.dumps({**row, "id": id, "format": "free", "labels": ["Edema", "Fracture"]}) + "\n")
    with pytest.raises(ValueError, match="written for other labels"):
        ask(study, "http://127.0.0.1:9", out)
    out.write_text('{"id": "0.jpg", "trace": 5, "asked": "PATIENT"}\n')
    with pytest.raises(ValueError, match=r"line 1: not a line of traces \(wrong or missing: asked, trace\)") as error:
        ask(study, "http://127.0.0.1:9", out)
    assert "PATIENT" not in str(error.value)


def command(study, url, out, *more):
    fixed = ["traces", "ask", study, "--set", "train", "--format", "free", "--endpoint", url, "--model", "teacher"]
    return main([*map(str, fixed), "--out", str(out), "--instruction", str(study.with_name("ask.txt")), *more])


def test_the_command(study, tmp_path, capsys, monkeypatch):
    out = tmp_path / "t.jsonl"
    monkeypatch.setenv("SOME_KEY", "k3y")
    with serving(lambda number, body: completion(good(body) if number else "PATIENT words")) as endpoint:
        assert command(study, endpoint.url, out) == 2
        said = capsys.readouterr().err
        assert "nothing was sent: " in said
        assert "go to 127.0.0.1" in said
        assert "add --data-may-leave" in said
        assert endpoint.bodies == []
        more = (
            "--data-may-leave",
            "--key-variable",
            "SOME_KEY",
            "--price-in",
            "2",
            "--asks",
            "1",
            "--concurrency",
            "1",
        )
        assert command(study, endpoint.url, out, *more, "--body", '{"temperature": 0.5}') == 0
    said = capsys.readouterr().out
    assert "credentialed data may only go where" in said
    assert f"traces: 5 of 6 films, 5 of them now, in {out}" in said
    assert "1 x expected 15 to 200 words, found 2" in said
    assert "tokens on all starts: 6,000 in, 300 out, 0.01 at the prices given; 0 requests" in said
    assert "PATIENT" not in said + failed_file(out).read_text()
    assert {body["temperature"] for body in endpoint.bodies} == {0.5}
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer k3y"}
    assert "k3y" not in said + out.read_text() + failed_file(out).read_text()
    assert out.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--set", "train.sft"), "no such set; this study has train"),
        (("--set", "nowhere"), "no such set; this study has train, held"),
        (("--set", "held"), "is a test set"),
        (("--format", "only-label"), "needs no traces"),
        (("--endpoint", "http://example.org/v1"), "give its https address, or --plain-http"),
        (("--endpoint", "example.org"), "expected an address such as"),
        (("--key-variable", "NOT_THERE"), "expected the key in this environment variable"),
        (("--body", "[1]"), "expected a JSON object"),
        (("--body", '{"model": "x"}'), "without messages, model"),
        (("--instruction", "nowhere.txt"), "name the text with --instruction"),
        (("--run", "elsewhere"), "has not been drawn in elsewhere; draw it first: vlmalign run"),
    ],
)
def test_mistakes_are_named(study, tmp_path, capsys, change, words):
    assert command(study, "http://127.0.0.1:9/v1", tmp_path / "t.jsonl", "--data-may-leave", *change) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
