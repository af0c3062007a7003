"""The application by its requests: nothing of the arms is ever sent, nobody gets in who should not, and what is clicked is
what is exported.
"""

import csv
import json
import re
import time
from statistics import median

import pytest
from reader_studies import (
    ARMS,
    Clock,
    Reader,
    attribute,
    begin,
    field,
    filled,
    number,
    texts,
    tokens,
    write_rows,
    write_study,
)
from starlette.testclient import TestClient

from vlmalign import cli
from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.review import access, web
from vlmalign.review.application import create_app
from vlmalign.review.export import export
from vlmalign.review.outcomes import votes

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)\' {{ 7*7 }} \u202e &lt;b&gt;'


def attention(folder):
    rows = [
        {
            "id": f"secret-known-{i}",
            "record": f"A plain case {i}.",
            "answers": ["A right answer.", "A wrong answer."],
            "expected": 0,
        }
        for i in range(3)
    ]
    write_rows(folder / "secret-attention.jsonl", rows)
    return {"path": str(folder / "secret-attention.jsonl"), "each": 2}


def whole_study(folder, **changes):
    """Everything at once: three arms, films, repetitions, attention cases, guesses, two readers and an adjudicator."""
    folder.mkdir(parents=True, exist_ok=True)
    design = {"readers_per_case": 2, "repeats": 2, "guesses": 2, "attention": attention(folder)}
    return write_study(folder, cases=6, arms=3, films=True, design=design, adjudicators=["S01"], **changes)


def everything_sent(path, people=(("R01", "A"), ("R02", "none"), ("S01", "B"))):
    """All bytes that two readers and the adjudicator get in the course of a whole study."""
    study, record, app = begin(path, clock=Clock(), token=tokens())
    received = []
    invited = tokens()
    for name, choice in people:
        reader = Reader(app, record, name, token=invited)
        reader.get("/")
        reader.get("/case")
        reader.enter()
        for address in ("/static/review.css", "/static/review.js", "/nothing", "/film/1/1", "/film/1/2", "/enter"):
            reader.get(address)
        page = reader.get("/case").text
        reader.get(f"/film/{attribute(page, 'position')}/1")
        reader.send("/save", page, reader.change(page, {"comment": "half"}))
        reader.send("/undo", reader.get("/case").text, reader.change(reader.get("/case").text, None))
        reader.send("/close", page, reader.change(reader.get("/case").text, {}))
        reader.send("/save", page, reader.change(page, {"arm": "x"}))
        pages = reader.read_all(choose=lambda page: choice)  # noqa: B023
        assert pages
        reader.get("/case")
        received += reader.received
    return study, record, received


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """(protocol, study, all bytes that were sent in the course of it)"""
    path = whole_study(tmp_path_factory.mktemp("whole"))
    study, _, received = everything_sent(path)
    return path, study, received


def test_nothing_of_arms_files_or_ids_is_ever_sent(sent):
    path, _, received = sent
    text = b"\n".join(received).decode("utf-8", errors="replace").lower().replace("repeat(auto-fit", "")
    assert len(received) > 60
    assert "ivf with a short protocol" in text
    for name in (*ARMS, *(name.replace("-", "_") for name in ARMS)):
        assert name not in text
    # Every id, file name, column that is not shown, and hidden block is called secret-something.
    for word in (
        "secret",
        "attention",
        "repeat",
        "zebra",
        "yak",
        "xenops",
        "jsonl",
        "sha256",
        str(path.parent).lower(),
    ):
        assert word not in text, word


def test_with_the_names_of_arms_exchanged_every_byte_is_the_same(sent, tmp_path):
    path, study, received = sent
    sections = read_yaml(path.read_text())
    other = dict(zip(ARMS, (ARMS[1], ARMS[2], ARMS[0]), strict=True))
    sections["arms"] = {other[name]: arm for name, arm in reversed(sections["arms"].items())}
    path = tmp_path / "study.yaml"
    path.write_text(write_yaml(sections | {"folder": str(tmp_path / "exchanged")}))
    exchanged, _, again = everything_sent(path)
    assert [slot.name for slot in exchanged.material.slots] != [slot.name for slot in study.material.slots]
    assert again == received
    # The comparison can fail: another seed is another study.
    path.write_text(write_yaml(sections | {"folder": str(tmp_path / "seed"), "seed": 4}))
    assert everything_sent(path, [("R01", "A")])[2] != received[: len(received) // 4]


def test_a_page_does_not_tell_a_repetition_or_an_attention_case_from_a_case(tmp_path):
    _, record, app = begin(whole_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    pages = reader.read_all()
    shapes = {}
    purposes = [vote.place.purpose for vote in votes(record)]
    for page, purpose in zip(pages, purposes, strict=True):
        plain = re.sub(r'<div class="text">.*?</div>', "", page, flags=re.DOTALL)
        plain = re.sub(r'<section class="card patient".*?</section>', "", plain, flags=re.DOTALL)
        plain = re.sub(r'(<h1>|<title>)Case \d+|value="\d+" max|position="\d+"', "", plain)
        shapes.setdefault(purpose, set()).add(plain)
    assert set(shapes) == {"case", "repeat", "attention", "guess"}
    assert shapes["case"] == shapes["repeat"] == shapes["attention"] != shapes["guess"]
    assert "Case 10 <small>of 10</small>" in pages[9]
    assert "Question 1 <small>of 2</small>" in pages[10]


def test_an_interrupted_session_goes_on_where_it_was(tmp_path):
    _, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    reader.close(reader.get("/case").text, preference="B")
    page = reader.get("/case").text
    half = {
        "preference": "tie",
        "comment": "not done",
        "answers": {"B": {"criteria": {"clarity": 4}, "tags": ["unsafe"]}},
    }
    assert reader.send("/save", page, reader.change(page, half)).json()["revision"] == 1
    record.close()
    _, _, app = begin(tmp_path / "study.yaml")  # the server is started again
    back = reader.client
    reader.client = type(back)(app, base_url="http://127.0.0.1:8321", cookies=back.cookies)
    page = reader.get("/case").text
    assert (attribute(page, "position"), attribute(page, "revision"), attribute(page, "active")) == ("2", "1", "1200")
    assert texts(page)
    for ticked in ('name="preference" value="tie" checked', 'name="answers.B.criteria.clarity" value="4" data-number'):
        assert ticked in page
    assert re.search(r'name="answers.B.criteria.clarity" value="4"[^>]* checked', page)
    assert re.search(r'name="answers.B.tags" value="unsafe" checked', page)
    assert page.count(" checked") == 3
    assert ">not done</textarea>" in page


def test_wrong_reused_and_guessed_tokens_are_refused(tmp_path):
    _, record, app = begin(write_study(tmp_path))
    reader, stranger = Reader(app, record, "R01"), Reader(app, record, "R02")
    reader.enter()
    for token in (reader.token, "guess", "", stranger.token[:-1], "a" * 43, "' OR 1=1 --"):
        answer = stranger.post("/enter", data={"token": token})
        assert answer.status_code == 403
        assert "This link does not work" in answer.text
        assert "set-cookie" not in answer.headers
    for path in ("/case", "/"):
        assert stranger.get(path).url.path == "/enter"
    assert stranger.get("/film/1/1").status_code == 401
    page = reader.get("/case").text
    for address in ("/save", "/close", "/undo"):
        refused = stranger.send(address, page, stranger.change(page, filled(page)))
        assert (refused.status_code, "not signed in" in refused.json()["sentence"]) == (401, True)
    stranger.client.cookies.set(web.COOKIE, "x" * 43)
    assert stranger.get("/case").url.path == "/enter"


def test_requests_of_other_sites_are_refused(tmp_path):
    _, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    page = reader.get("/case").text
    change = reader.change(page, filled(page))
    token = {"x-csrf-token": attribute(page, "csrf")}
    other = Reader(app, record, "R02")
    other.enter()
    stolen = {"x-csrf-token": attribute(other.get("/case").text, "csrf")}
    for headers in (
        {},
        {"x-csrf-token": "0" * 64},
        stolen,
        token | {"origin": "https://evil.example"},
        token | {"origin": "null"},
        token | {"sec-fetch-site": "cross-site"},
    ):
        assert reader.post("/close", json=change, headers=headers).status_code == 403
    for address in ("/begin", "/leave"):
        assert reader.post(address, data={"csrf": "0"}).status_code == 403
    assert reader.post("/enter", data={"token": "x"}, headers={"origin": "https://evil.example"}).status_code == 403
    # A form of another site can send JSON as text/plain; it is not taken for JSON.
    plain = reader.post("/close", content=json.dumps(change), headers=token | {"content-type": "text/plain"})
    assert plain.status_code == 415
    assert reader.get("/case", headers={"host": "evil.example"}).status_code == 400
    assert not any(vote.closed_at for vote in votes(record))
    assert reader.post("/close", json=change, headers=token | {"origin": "http://127.0.0.1:8321"}).status_code == 200


def test_malformed_and_oversized_requests_are_refused(tmp_path):
    _, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    page = reader.get("/case").text
    headers = {"x-csrf-token": attribute(page, "csrf"), "content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"[" * 100_000, b'{"position": "1"}', b"\xff\xfe"):
        assert reader.post("/save", content=body, headers=headers).status_code == 400
    assert reader.post("/save", content=b" " * (web.MAX_BODY + 1), headers=headers).status_code == 413
    assert reader.get("/film/1/99").status_code == 404
    assert reader.get("/static/../application.py").status_code == 404
    assert reader.get("/static/case.html").status_code == 404
    assert reader.get("/close").status_code == 405


def test_every_answer_has_the_headers_that_keep_it_safe(tmp_path, monkeypatch):
    _, record, app = begin(write_study(tmp_path, films=True))
    reader = Reader(app, record, "R01")
    reader.enter()
    monkeypatch.setattr("vlmalign.review.films.png", lambda film, folder: 1 / 0)
    answers = [
        reader.get(path) for path in ("/case", "/enter", "/nothing", "/static/review.js", "/film/1/1", "/film/9/9")
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 500, 404]
    for answer in answers:
        assert {name: answer.headers[name] for name in web.HEADERS} == web.HEADERS
        assert "ZeroDivision" not in answer.text
        assert str(tmp_path) not in answer.text
    assert "unsafe" not in web.CSP
    page = answers[0].text
    assert not re.search(r"<script(?! src=\"/static/)|\son\w+=|style=|javascript:", page)
    secure = create_app(*begin(write_study(tmp_path / "tls"))[:2], hosts=["study.example.org"], secure=True)
    safe = Reader(app, record, "R02")
    cookie = safe.post("/enter", data={"token": safe.token}).history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert secure is not None


def test_the_cookie_is_for_tls_alone_where_there_is_tls(tmp_path):
    study, record, _ = begin(write_study(tmp_path))
    app = create_app(study, record, hosts=["study.example.org"], secure=True)
    reader = Reader(app, record, "R01")
    reader.client.base_url = "https://study.example.org"
    answer = reader.post("/enter", data={"token": reader.token})
    assert "; Secure" in answer.history[0].headers["set-cookie"]
    assert "I agree to take part" in answer.text


def test_script_in_records_answers_and_comments_is_harmless(tmp_path):
    path = write_study(
        tmp_path, hostile=HOSTILE, rendering={"tags": False, "markdown": False}, title="<b>T</b>", question="<i>Q</i>"
    )
    _, record, app = begin(path)
    reader = Reader(app, record, "R01")
    reader.enter()
    page = reader.get("/case").text
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # the record and two answers
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>T" not in page
    assert "<i>Q" not in page
    assert 'title="RIGHT-TO-LEFT OVERRIDE">U+202E' in page
    comment = "</textarea><script>alert(4)</script>"
    assert reader.send("/save", page, reader.change(page, {"comment": comment})).status_code == 200
    page = reader.get("/case").text
    assert "&lt;/textarea&gt;&lt;script&gt;alert(4)" in page


def test_comments_may_hold_any_character(tmp_path):
    """Also half a surrogate pair, which JSON can write and UTF-8 cannot: it becomes a replacement character."""
    study, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    page = reader.get("/case").text
    change = reader.change(page, {"comment": "a\U0001f9ec\u0000\ud800z"})
    headers = {"x-csrf-token": attribute(page, "csrf"), "content-type": "application/json"}
    answer = reader.post("/save", content=json.dumps(change), headers=headers)
    assert answer.json()["entry"]["comment"] == "a\U0001f9ec\u0000\ufffdz"
    assert "a\U0001f9ec" in reader.get("/case").text
    export(record, study, tmp_path / "out")


def test_films_hold_pixels_alone(tmp_path):
    from PIL import Image, PngImagePlugin

    path = write_study(tmp_path, films=True)
    for file in (tmp_path / "films").iterdir():
        info = PngImagePlugin.PngInfo()
        info.add_text("patient", "secret-name")
        Image.open(file).save(file, pnginfo=info)
    _, record, app = begin(path)
    reader = Reader(app, record, "R01")
    reader.enter()
    film = reader.get("/film/1/1")
    assert film.headers["content-type"] == "image/png"
    assert b"secret" not in film.content
    assert b"tEXt" not in film.content
    assert film.content == reader.get("/film/1/1").content  # from the cache
    assert reader.get("/film/2/1").status_code == 404  # not its turn


def test_the_export_is_what_was_clicked(tmp_path):
    study, record, app = begin(whole_study(tmp_path))
    clicked = {}
    for name, choices in (("R01", ["A", "B", "tie", "none"]), ("R02", ["B", "A"])):
        reader = Reader(app, record, name)
        reader.enter()
        while "data-position" in (page := reader.get("/case").text):
            place = number(page, "position")
            entry = filled(page, preference=choices[place % len(choices)], level=place % 5)
            if ".guess" in page:
                entry["answers"]["A"]["guess"] = -1
            else:
                entry |= {"confidence": place % 4, "comment": f"=SUM({place})"}
                entry["answers"]["B"] |= {"tags": ["unsafe", "hallucination"], "harm_extent": 2}
            assert reader.send("/close", page, reader.change(page, entry)).status_code == 200
            clicked[name, place] = (entry, texts(page))
    written = {path.name: path for path in export(record, study, tmp_path / "out")}
    rows = {name: list(csv.DictReader(path.open())) for name, path in written.items() if name.endswith(".csv")}
    arms = {slot.name: {case: answer.text for case, answer in slot.answers.items()} for slot in study.material.slots}
    assert len(rows["comparisons.csv"]) == len([entry for entry, _ in clicked.values() if "preference" in entry]) == 20
    for row in rows["comparisons.csv"]:
        entry, shown = clicked[row["person"], int(row["position"])]
        assert row["preferred_letter"] == entry["preference"]
        assert row["confidence"] == str(entry["confidence"] + 1)
        assert row["comment"] == f"'{entry['comment']}"  # a spreadsheet would run the formula
        if row["purpose"] != "attention":
            # The arm in the file is the one whose text stood on that side of the page.
            assert [arms[row[f"arm_{letter}"]][row["case"]] for letter in "AB"] == shown
            by_letter = {"A": row["arm_A"], "B": row["arm_B"], "tie": "tie", "none": "none"}
            assert row["preferred"] == by_letter[entry["preference"]]
        else:
            assert shown["AB".index(row["expected_letter"])] == "A right answer."
            assert row["attentive"] == str(int(row["expected_letter"] == entry["preference"]))
    assert len(rows["ratings.csv"]) == 40
    for row in rows["ratings.csv"]:
        judged = clicked[row["person"], int(row["position"])][0]["answers"][row["letter"]]
        assert {key: row[key] for key in judged["criteria"]} == {
            key: str(v + 1) for key, v in judged["criteria"].items()
        }
        assert (row["harm_extent"], row["harm_likelihood"]) == (str(judged["harm_extent"] + 1), "2")
        assert (row["tag_unsafe"], row["tag_hallucination"], row["tag_knowledge_gap"]) == (
            ("1", "1", "0") if row["letter"] == "B" else ("0", "0", "0")
        )
    own = [row for row in rows["ratings.csv"] if row["own"] == "1"]
    assert own
    assert all(row["arm"] == ARMS[2] and row["author"] == row["person"] for row in own)
    assert {row["arm"] for row in rows["ratings.csv"] if row["author"]} == {ARMS[2]}
    for row in rows["guesses.csv"]:
        told = {"A": "", "B": "a doctor"}[row["letter"]]  # choice 0 of the sorted words
        assert row["guess"] == told
        assert row["right"] == ("" if not told else str(int(row["arm"] == ARMS[2])))
    # JSON and CSV say the same, and the dictionary names every column of every file.
    whole = json.loads(written["study.json"].read_text())
    assert [row["preferred_letter"] for row in whole["comparisons"]] == [
        row["preferred_letter"] for row in rows["comparisons.csv"]
    ]
    assert whole["comparisons"][0]["comment"].startswith("=SUM(")
    assert whole["hash"] == study.hash == whole["protocol_versions"][-1]["hash"]
    assert whole["flow"]["pages"]["closed_by_purpose"] == {"attention": 4, "case": 12, "guess": 4, "repeat": 4}
    assert whole["flow"]["audit"]["chain"] == rows["events.csv"][-1]["chain"]
    assert set(whole["blinding"]) <= set(ARMS)
    for name in ("comparisons.csv", "ratings.csv", "guesses.csv", "events.csv"):
        with written[name].open() as file:
            header = next(csv.reader(file))
        assert header == [row["name"] for row in rows["data_dictionary.csv"] if row["file"] == name]
    assert all(row["meaning"] and row["type"] for row in rows["data_dictionary.csv"])
    assert read_yaml(written["protocol.yaml"].read_text())["seed"] == 3
    with pytest.raises(ValueError, match="is not empty"):
        export(record, study, tmp_path / "out")


def test_withdrawn_votes_are_kept_or_left_out_and_counted(tmp_path):
    study, record, app = begin(write_study(tmp_path, simulated=True))
    for name in ("R01", "R02"):
        reader = Reader(app, record, name)
        reader.enter()
        assert "<title>Case 1 of 8 · Simulated: Infertility care" in reader.get("/case").text
        reader.close(reader.get("/case").text, comment=f"private words of {name}")
    access.withdraw(record, "R01", "asked to be taken out", keep_votes=False)
    assert reader.get("/case").status_code == 200
    export(record, study, tmp_path / "out")
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert all(name.startswith("simulated-") for name in files)
    assert "private words of R01" not in "".join(files.values())
    assert "private words of R02" in files["simulated-comparisons.csv"]
    people = json.loads(files["simulated-study.json"])["flow"]["people"]
    assert (people["withdrawn_votes_left_out"], people["readers"]) == (1, 2)


def test_adjudicators_get_what_readers_disagree_on_and_only_then(tmp_path):
    study, record, app = begin(write_study(tmp_path, cases=4, adjudicators=["S01"], design={"guesses": 0}))
    readers = [Reader(app, record, name) for name in ("R01", "R02")]
    judge = Reader(app, record, "S01")
    judge.enter()
    assert "No case is waiting for you" in judge.get("/case").text
    agreed = "couple 2"
    prefer = {0: "short", 1: "ICSI"}

    def choose(number, page):
        both = texts(page)
        if agreed in both[0]:
            return "tie"
        wanted = prefer[number]
        return next((letter for letter, text in zip("AB", both, strict=True) if wanted in text), "none")

    for number_, reader in enumerate(readers):
        reader.enter()
        reader.read_all(choose=lambda page: choose(number_, page))  # noqa: B023
        assert ("No case is waiting" in judge.get("/case").text) == (number_ == 0)
    pages = judge.read_all(choose=lambda page: "B")
    assert not any(agreed in page for page in pages)
    assert 1 <= len(pages) <= 3
    for page in pages:
        assert page.count("<li>") == 2
        assert len(re.findall(r"saw the answers in the order (?:A, B|B, A)<", page)) == 2
        assert "R01" not in page
        assert "R02" not in page
    export(record, study, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "comparisons.csv").open()))
    assert [row["purpose"] for row in rows if row["person"] == "S01"] == ["adjudication"] * len(pages)


def test_traces_are_accepted_rejected_or_corrected(tmp_path):
    form = {"preference": False, "criteria": {}, "harm": False, "verdict": True, "tags": {}}
    study, record, app = begin(
        write_study(tmp_path, form=form, design={"answers": 1, "guesses": 0, "readers_per_case": 1})
    )
    reader = Reader(app, record, "R01")
    reader.enter()
    page = reader.get("/case").text
    assert ">Answer</h2>" in page
    assert 'name="preference"' not in page
    lacking = reader.send("/close", page, reader.change(page, {"answers": {"A": {"verdict": "correct"}}}))
    assert lacking.json()["sentence"] == "Still to fill in: Answer A: the correction."
    entry = {"answers": {"A": {"verdict": "correct", "correction": "No effusion."}}}
    assert reader.send("/close", page, reader.change(page, entry)).status_code == 200
    export(record, study, tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out" / "ratings.csv").open())
    assert (row["verdict"], row["correction"]) == ("correct", "No effusion.")


@pytest.mark.full
def test_pages_of_a_large_study_are_fast(tmp_path):
    """1,000 cases, 20 readers, 3 arms: the median page and the median vote take less than 100 ms."""
    readers = [f"R{i:02}" for i in range(20)]
    path = write_study(tmp_path, cases=1000, arms=3, readers=readers, design={"readers_per_case": 3, "guesses": 3})
    _, record, app = begin(path)
    reader = Reader(app, record, "R07")
    reader.enter()
    assert "of 150" in reader.get("/case").text
    shown, voted = [], []
    for _ in range(8):
        start = time.perf_counter()
        page = reader.get("/case").text
        half = time.perf_counter()
        assert reader.close(page).status_code == 200
        shown.append(half - start)
        voted.append(time.perf_counter() - half)
    assert median(shown) < 0.1, shown
    assert median(voted) < 0.1, voted


def test_the_commands_lead_through_a_study(tmp_path, capsys):
    path = str(write_study(tmp_path, films=True))
    assert cli.main(["review", "check", path]) == 0
    assert "each read by 2 of 2 readers" in capsys.readouterr().out
    assert not (tmp_path / "record").exists()
    (tmp_path / "films" / "secret-film-1.png").write_bytes(b"no film")
    assert cli.main(["review", "check", path]) == 2
    assert "1 films cannot be shown" in capsys.readouterr().err
    assert cli.main(["review", "status", path]) == 2
    assert "no reader study in" in capsys.readouterr().err
    assert cli.main(["review", "invite", path, "--url", "https://study.example.org"]) == 0
    links = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert set(links) == {"R01", "R02"}
    assert re.fullmatch(r"https://study\.example\.org/enter#[\w-]{43}", links["R01"])
    assert cli.main(["review", "invite", path, "R99"]) == 2
    assert "R99 is not in the protocol; it names R01, R02" in capsys.readouterr().err
    assert cli.main(["review", "withdraw", path, "R02", "--reason", "moved", "--votes", "keep"]) == 0
    assert cli.main(["review", "status", path]) == 0
    assert "withdrawn" in capsys.readouterr().out
    assert cli.main(["review", "export", path, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["review", "amend", path, "--reason", "x"]) == 2
    for wrong, words in (
        (["--host", "0.0.0.0"], "without encryption"),
        (["--url", "study.example.org"], "--url must be"),
    ):
        assert cli.main(["review", "serve", path, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_the_form_of_the_start_page_is_needed_once(tmp_path):
    _, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    answer = reader.post("/enter", data={"token": reader.token})
    assert "Read the record, then the answers." in answer.text
    assert not votes(record)  # no case is opened before the reader agrees
    reader.post("/begin", data={"csrf": field(answer.text, "csrf")})
    assert 'id="case"' in reader.get("/case").text
    reader.post("/leave", data={"csrf": attribute(reader.get("/case").text, "csrf")})
    assert reader.get("/case").url.path == "/enter"


def test_a_server_of_another_protocol_shows_nothing(tmp_path):
    study, record, app = begin(write_study(tmp_path))
    reader = Reader(app, record, "R01")
    reader.enter()
    path = write_study(tmp_path, cases=5, title="Another")
    begin(path)  # registered by another process, while this server runs
    answer = reader.get("/case")
    assert answer.status_code == 503
    assert "The study was changed while this server ran" in answer.text
    assert study.hash not in answer.text


def test_serve_listens_on_this_machine_and_answers_to_its_own_names(tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path)
    seen = []

    def run(app, **options):
        for host in ("study.example.org", "127.0.0.1:9", "evil.example"):
            seen.append(TestClient(app, base_url=f"https://{host}").get("/enter").status_code)
        seen.append(options)

    monkeypatch.setattr("uvicorn.run", run)
    assert cli.main(["review", "serve", str(path), "--url", "https://study.example.org", "--port", "9"]) == 0
    *answers, options = seen
    assert answers == [200, 200, 400]
    assert (options["host"], options["port"]) == ("127.0.0.1", 9)
    assert (options["access_log"], options["server_header"]) == (False, False)  # no log of who asked for what
    assert "on http://127.0.0.1:9" in capsys.readouterr().err
