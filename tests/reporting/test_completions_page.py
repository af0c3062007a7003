"""The completions pages: a small log counted by hand, hostile text, damaged and torn lines, images, several pages a step."""

import base64
import hashlib
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vlmalign.objectives.advantages import group_advantages
from vlmalign.reporting import completions
from vlmalign.reporting.completion_rows import Completion, PromptGroup
from vlmalign.reporting.completions import LOG, StagePages
from vlmalign.reporting.html import write_report
from vlmalign.reporting.visible_text import plain, visible
from vlmalign.rollout.completions import Completion as Sampled
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.rollouts import Rollout, Task
from vlmalign.types import Group, Segment


def row(step: int, prompt: int, sample: int, reward: float | None, **more) -> dict:
    """A line as training writes it."""
    return {
        "step": step,
        "prompt_id": prompt,
        "sample": sample,
        "images": [],
        "prompt": f"Question {prompt}?",
        "completion": f"answer {step}.{prompt}.{sample}",
        "tokens": 10,
        "stopped": True,
        "reward": reward,
        "parts": {"valid": 1.0, "jaccard": reward},
        "advantage": 0.0,
    } | more


#: Step 1: prompt 7 has two rewards; prompt 8 is flat; prompt 9 has an unscored completion and two rewards.
#: Step 2: prompt 7 again, and twice (the data began anew within the step): one flat group, one with no reward at all.
ROWS = [
    row(1, 7, 0, 0.25, tokens=4, advantage=-0.375),
    row(1, 7, 1, 1.0, tokens=8, advantage=0.375, stopped=False),
    row(1, 8, 0, 0.5),
    row(1, 8, 1, 0.5, parts={"valid": 0.0, "jaccard": 0.5}),
    row(1, 9, 0, None, parts={"valid": None, "jaccard": None}),
    row(1, 9, 1, 0.125),
    row(1, 9, 2, 1 / 3),
    row(2, 7, 0, 0.5),
    row(2, 7, 1, 0.5),
    row(2, 7, 0, None),
    row(2, 7, 1, None, parts={"jaccard": None, "judge": 0.75}),
]


def write_log(run: Path, rows, *, stage: str = "grpo", tail: bytes = b"") -> Path:
    path = run / stage / "completions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(each).encode() + b"\n" for each in rows) + tail)
    return path


def write_completions(run: Path) -> list[StagePages]:
    """The pages of every folder that holds a log."""
    return completions.write_completions(run, [path.parent.relative_to(run).as_posix() for path in run.rglob(LOG)])


VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}  # elements that have no end tag


class Element:
    """A page as a tree; complains about tags that do not match."""

    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag, self.attributes = tag, attributes
        self.content: list[Element | str] = []

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        found = []
        for each in self.content:
            if isinstance(each, Element):
                if each.tag == tag and all(each.attributes.get(name) == value for name, value in attributes.items()):
                    found.append(each)
                found += each.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> "Element":
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def raw(self) -> str:
        return "".join(each if isinstance(each, str) else each.raw for each in self.content)

    @property
    def text(self) -> str:
        return " ".join(self.raw.split())

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())


class Parser(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        element = Element(tag, dict(attrs))
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].content.append(data)


def read(path: Path) -> Element:
    return Parser(path.read_text(encoding="utf-8")).root


def facts(page: Element) -> dict[str, str]:
    return {div.one("dt").text: div.one("dd").text for div in page.one("dl").all("div")}


def table(element: Element) -> list[list[str]]:
    """The cells of the one table, headings first."""
    return [
        [cell.text for cell in line.content if isinstance(cell, Element)] for line in element.one("table").all("tr")
    ]


def groups(page: Element) -> list[Element]:
    return [section for section in page.all("section") if "group" in section.classes]


def pages(run: Path, stage: str = "grpo") -> list[str]:
    return sorted(path.name for path in (run / stage / "completions").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("completions") / "first-light"
    write_log(run, ROWS)
    write_completions(run)
    return run


@pytest.fixture(scope="module")
def index(run) -> Element:
    return read(run / "grpo" / "completions.html")


@pytest.fixture(scope="module")
def step(run) -> Element:
    return read(run / "grpo" / "completions" / "step_000001.html")


def test_the_index_counts_as_one_counts_by_hand(index):
    assert facts(index) == {"Steps": "2", "Groups": "5", "Completions": "11", "Unscored": "3", "Flat groups": "3"}
    names = ["valid", "jaccard", "judge"]
    assert table(index) == [
        ["Step", "Mean reward", "Stopped", "Unscored", "Flat groups", "Groups", "Completions", "Mean tokens", *names],
        # rewards 0.25 + 1 + 0.5 + 0.5 + 0.125 + 1/3 = 2.70833 of 6; 6 of 7 stopped; 62 tokens of 7; valid 5 of 6
        ["1", "0.4514", "85.7 %", "1", "1", "3", "7", "8.9", "0.8333", "0.4514", "–"],
        ["2", "0.5", "100.0 %", "2", "2", "2", "4", "10.0", "1", "0.5", "0.75"],
    ]
    links = [link.attributes["href"] for link in index.one("table").all("a")]
    assert links == ["completions/step_000001.html", "completions/step_000002.html"]


def test_what_is_written_is_told(run):
    (stage,) = write_completions(run)
    assert stage == ("grpo", run / "grpo" / "completions.html", 2, 11, ["valid", "jaccard", "judge"])


def test_a_step_counts_as_one_counts_by_hand(step):
    assert facts(step) == {
        "Groups": "3",
        "Completions": "7",
        "Mean reward": "0.4514",
        "Stopped": "85.7 %",
        "Mean tokens": "8.9",
        "Unscored": "1",
        "Flat groups": "1",
        "Mean valid": "0.8333",
        "Mean jaccard": "0.4514",
    }
    labels = [label.text for label in step.one("form").all("label")]
    assert labels == ["all 3 groups", "only flat groups (1)", "only groups with unscored completions (1)"]


def test_completions_stand_below_their_prompt(step):
    found = groups(step)
    assert [group.one("h2").text for group in found] == [
        "Prompt 7 group 1 of 3",
        "Prompt 8 group 2 of 3 flat",
        "Prompt 9 group 3 of 3 1 unscored",
    ]
    assert [group.one("pre").text for group in found] == ["Question 7?", "Question 8?", "Question 9?"]
    assert "Mean reward 0.625, from 0.25 to 1." in found[0].text
    heading = ["#", "Reward", "valid", "jaccard", "Advantage", "Tokens", "End", "Completion"]
    assert table(found[0]) == [
        heading,
        ["0", "0.25", "1", "0.25", "−0.375", "4", "stopped", "answer 1.7.0"],
        ["1", "1", "1", "1", "0.375", "8", "cut off", "answer 1.7.1"],
    ]
    assert table(found[2])[1] == ["0", "unscored", "–", "–", "0", "10", "stopped", "answer 1.9.0"]


def test_flat_and_unscored_groups_are_marked_for_the_filter(step):
    marks = [(g.attributes["data-flat"], g.attributes["data-unscored"], g.classes) for g in groups(step)]
    assert marks == [
        ("0", "0", {"group"}),
        ("1", "0", {"group", "flat"}),
        ("0", "1", {"group", "unscored"}),
    ]
    # The filter is style alone: these are the names it goes by.
    style = step.one("style").raw
    assert "main:has(#show-flat:checked) .group:not(.flat)" in style
    assert "main:has(#show-unscored:checked) .group:not(.unscored)" in style
    assert {box.attributes["id"] for box in step.all("input")} == {"show-all", "show-flat", "show-unscored"}


def test_a_filter_that_would_show_nothing_cannot_be_chosen(tmp_path):
    write_log(tmp_path, [row(1, 1, 0, 0.0), row(1, 1, 1, 1.0)])
    write_completions(tmp_path)
    boxes = read(tmp_path / "grpo" / "completions" / "step_000001.html").all("input")
    assert ["disabled" in box.attributes for box in boxes] == [False, True, True]


def test_rows_can_be_sorted_by_the_whole_number(step):
    rows = groups(step)[2].one("tbody").all("tr")
    assert [line.attributes["data-place"] for line in rows] == ["0", "1", "2"]
    assert [line.attributes["data-reward"] for line in rows] == ["", "0.125", repr(1 / 3)]
    headings = [cell for cell in groups(step)[2].one("thead").all("th") if "data-sort" in cell.attributes]
    for line in rows:
        cells = line.all("td")
        assert [cell.attributes.get("data-value") is not None for cell in cells] == [True] * len(headings) + [False]
        assert cells[0].attributes["data-value"] == line.attributes["data-reward"]
        assert [cell.attributes["data-name"] for cell in cells[:2]] == ["reward", "valid"]


def test_the_same_prompt_twice_in_a_step_is_two_groups(run):
    found = groups(read(run / "grpo" / "completions" / "step_000002.html"))
    assert [group.one("h2").text for group in found] == [
        "Prompt 7 group 1 of 2 flat",
        "Prompt 7 group 2 of 2 flat 2 unscored",
    ]
    assert "No reward is known." in found[1].text
    assert [line[4] for line in table(found[1])] == ["judge", "–", "0.75"]


def test_tables_can_be_read_aloud(step, index):
    for page in (step, index):
        assert page.one("html").attributes["lang"] == "en"
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in page.all("th"))
    assert all(group.one("caption").text for group in groups(step))
    assert all("alt" in image.attributes for image in step.all("img"))


def test_pages_link_to_each_other(run, step, index):
    second = read(run / "grpo" / "completions" / "step_000002.html")
    for page, there, hrefs in (
        (step, {"next": "step_000002.html"}, {"../../report.html", "../completions.html"}),
        (second, {"prev": "step_000001.html"}, {"../../report.html", "../completions.html"}),
        (index, {}, {"../report.html"}),
    ):
        links = page.all("a")
        assert {a.attributes["rel"]: a.attributes["href"] for a in links if "rel" in a.attributes} == there
        assert hrefs <= {a.attributes["href"] for a in links}
        assert not any(a.attributes["href"].startswith(("/", "http", "file")) for a in links)


ATTACK = '<script>alert(1)</script><img src=http://x.test/a onerror=y>" onload="z </style> {{ 7 * 7 }} **b** &lt;'


def test_text_of_a_model_cannot_become_markup(tmp_path):
    hostile = {"images": [ATTACK], "prompt": ATTACK, "completion": ATTACK, "prompt_id": ATTACK}
    hostile |= {"parts": {ATTACK: 1.0}, "advantage": None, "nonfinite": {"advantage": ATTACK}}
    run = tmp_path / "<b>run"
    write_log(run, [row(1, 0, k, float(k)) | hostile for k in range(2)], stage="<i>rl", tail=ATTACK.encode())
    write_completions(run)
    index = read(run / "<i>rl" / "completions.html")
    page = read(run / "<i>rl" / "completions" / "step_000001.html")
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.raw.encode()).digest()).decode()
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert f"script-src 'sha256-{digest}';" in policy, "the script must be the one that the policy allows, to the byte"
    assert index.all("script") == []
    for found in (index, page):
        assert not found.all("img")
        assert not found.all("b")
        assert not found.all("i")
        assert "x.test" not in " ".join(str(a.attributes) for a in found.all("a"))
    shown = " ".join(ATTACK.split())
    assert shown in index.one("thead").text
    assert index.one("pre").text == shown
    assert page.one("pre").text == shown
    line = table(page)[1]
    assert line[3] == shown, "the advantage that was not finite"
    assert line[-1] == shown
    assert page.one("ul", **{"class": "images"}).text == f"{shown} no such file here"


def test_characters_that_hide_or_reorder_are_shown(tmp_path):
    text = "a\u202eb\u2066\x1b[31m\x00\x00\x00\ud800\r\nnext\tline \U000e0041é漢\U0001f600"
    write_log(tmp_path, [row(1, 0, 0, 1.0, completion=text, prompt_id="p\u202e")])
    write_completions(tmp_path)
    page = read(tmp_path / "grpo" / "completions" / "step_000001.html")
    (cell,) = page.all("td", **{"class": "text"})
    assert cell.raw == "aU+202EbU+2066U+001B[31mU+0000 ×3U+D800U+000D\nnext\tline U+E0041é漢\U0001f600"
    assert [box.text for box in cell.all("span", **{"class": "code"})][:2] == ["U+202E", "U+2066"]
    assert cell.attributes["dir"] == "auto"
    assert "U+202E" in groups(page)[0].one("h2").text


def test_every_control_and_bidirectional_character_is_shown():
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    left = [
        f"U+{code:04X}"
        for code in range(0x110000)
        if (
            unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(chr(code)) in directions
        )
        and plain(chr(code)) == chr(code)
    ]
    assert left == ["U+0009", "U+000A"]
    for mark in "\u200e\u200f\u061c\ufeff\u200b\ufe0f":
        assert f"U+{ord(mark):04X}" in visible(mark)


def test_ordinary_text_of_any_script_is_left_alone():
    text = "Herzgröße 1/2 – “normal” … α≥β\u0301 心影 القلب हृदय \u00a0 🫀"
    assert plain(text) == visible(text) == text


def test_a_long_completion_is_folded_and_whole(tmp_path):
    long = "".join(f"{number:05d} " for number in range(400))
    write_log(tmp_path, [row(1, 0, 0, 1.0, completion=long), row(1, 0, 1, 0.0, completion="")])
    write_completions(tmp_path)
    cells = read(tmp_path / "grpo" / "completions" / "step_000001.html").all("td", **{"class": "text"})
    summary = cells[0].one("summary")
    assert cells[0].raw.removeprefix(summary.raw) == long
    start, end = (span.raw for span in summary.all("span", **{"class": "excerpt"}))
    assert long.startswith(start)
    assert long.endswith(end)
    assert f"{len(long) - len(start) - len(end):,} more characters" in summary.text
    assert cells[1].text == "empty"


def test_a_number_that_is_not_finite_is_told_by_its_name(tmp_path):
    lost = row(1, 0, 0, 1.0, advantage=None, nonfinite={"advantage": "nan"})
    write_log(tmp_path, [lost, row(1, 0, 1, -0.0, advantage=None, parts={"valid": None})])
    write_completions(tmp_path)
    lines = table(read(tmp_path / "grpo" / "completions" / "step_000001.html"))
    assert [line[4] for line in lines[1:]] == ["nan", "–"]
    assert lines[2][1] == "0", "no minus before a zero"


def group_of(rewards) -> PromptGroup:
    known = [None if np.isnan(reward) else float(reward) for reward in rewards]
    return PromptGroup("0", (), "", {}, [Completion(0, "", 1, True, reward, {}, 0.0, {}) for reward in known])


def test_a_group_is_flat_where_training_found_it_flat():
    rng = np.random.default_rng(0)
    rewards = rng.choice(
        [0.1 + 0.2, 0.3, 0.7, np.nan, 0.0, -1e6, 1e-300], (3000, 3), p=[0.25, 0.25, 0.1, 0.2, 0.1, 0.05, 0.05]
    )
    flat = [group_of(row).flat for row in rewards]
    assert 0.1 < np.mean(flat) < 0.9
    assert flat == group_advantages(rewards).flat.tolist()
    assert group_of([0.1 + 0.2, 0.3]).flat, "equal but for rounding"


def test_what_training_writes_can_be_read(tmp_path):
    def segment(tokens):
        return Segment(
            np.array(tokens, np.int32), np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.float32)
        )

    zeros = np.zeros(2, np.float32)
    sampled = [Sampled(np.array([1, 2], np.int32), zeros, zeros, stopped) for stopped in (True, False)]
    task = Task(Group(3, segment([1]), (), ("film.png",)), "What is seen?", {})
    rollout = Rollout(task, sampled, ["one", "two"], np.array([0.5, np.nan]), {"valid": np.array([1.0, np.nan])})
    log = CompletionLog(tmp_path / "rl" / "completions.jsonl")
    log.write(12, [rollout], np.array([[np.inf, 0.0]], np.float32))
    log.close()
    write_completions(tmp_path)
    page = read(tmp_path / "rl" / "completions" / "step_000012.html")
    assert groups(page)[0].one("h2").text == "Prompt 3 group 1 of 1 flat 1 unscored"
    assert [line[1:] for line in table(page)[1:]] == [
        ["0.5", "1", "inf", "2", "stopped", "one"],
        ["unscored", "–", "0", "2", "cut off", "two"],
    ]


def test_an_empty_log_says_so_and_no_log_makes_no_page(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0")
    assert "completions.html" not in write_report(tmp_path).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "report.html"}
    write_log(tmp_path, [])
    (stage,) = write_completions(tmp_path)
    assert (stage.steps, stage.completions) == (0, 0)
    page = read(stage.index)
    assert "Not there yet: no completion has been written" in page.text
    assert facts(page)["Completions"] == "0"
    assert not (tmp_path / "grpo" / "completions").exists()


@pytest.mark.parametrize("tail", [b'{"step": 3, "prompt_id": 7, "comp', '{"prompt": "Größe'.encode()[:-3]])
def test_a_torn_last_line_is_shown_and_not_counted(tmp_path, run, tail):
    write_log(tmp_path, ROWS, tail=tail)
    write_completions(tmp_path)
    page = read(tmp_path / "grpo" / "completions.html")
    assert "1 torn line: the last line of completions.jsonl breaks off" in page.text
    assert page.one("pre").raw == tail.decode(errors="replace")
    assert facts(page)["Completions"] == "11"
    assert pages(tmp_path) == pages(run)


def test_a_log_of_nothing_but_a_torn_line(tmp_path):
    write_log(tmp_path, [], tail=b'{"step": 1' + b" " * 200_000)
    write_completions(tmp_path)
    page = read(tmp_path / "grpo" / "completions.html")
    assert "1 torn line" in page.text
    assert "200,010 characters, the first 2,000 shown" in page.text
    assert len(page.one("pre").raw) == 2000


def test_a_last_line_that_only_lacks_its_line_break_counts(tmp_path):
    write_log(tmp_path, ROWS[:-1], tail=json.dumps(ROWS[-1]).encode())
    write_completions(tmp_path)
    page = read(tmp_path / "grpo" / "completions.html")
    assert "torn" not in page.text
    assert facts(page)["Completions"] == "11"


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in ROWS[2].items() if key != name}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1, "completion": "Mrs Example', "line 3: expected JSON, found Unterminated string"),
        (b'{"step": 1', "line 3: expected JSON, found Expecting ',' delimiter"),
        (b"", "line 3: expected JSON, found Expecting value"),
        (b"[]", "line 3: expected an object, found a list"),
        (b'{"step": ' + b"1" * 5000 + b"}", "line 3: expected JSON, found a number of more than 300 digits"),
        (
            b"[" * 100_000,
            "line 3: expected JSON, found a number of more than 300 digits, or brackets nested in thousands",
        ),
        (b"\xff", "line 3: expected JSON, found bytes that are not UTF-8"),
        (without("advantage"), "line 3: expected 'advantage', found no such entry"),
        (json.dumps(ROWS[2] | {"reward": "Mrs Example"}).encode(), "line 3, reward: expected a number, found text"),
        (json.dumps(ROWS[2] | {"parts": {"valid": True}}).encode(), "line 3, parts, valid: expected a number"),
        (json.dumps(ROWS[2] | {"nonfinite": ["nan"]}).encode(), "line 3, nonfinite: expected an object, found a list"),
        (
            json.dumps(ROWS[2]).replace('"reward": 0.5', '"reward": 1e999').encode(),
            "line 3: expected JSON, found NaN or an infinity",
        ),
        (
            json.dumps(ROWS[2] | {"advantage": 10**400}).encode(),
            "line 3: expected JSON, found a number of more than 300 digits",
        ),
        (json.dumps(ROWS[2] | {"step": 0}).encode(), "line 3: expected steps in order, found step 0 after 1"),
        (
            json.dumps(ROWS[1] | {"sample": 2, "prompt": "Mrs Example"}).encode(),
            "line 3: expected prompt, images and columns of",
        ),
    ],
)
def test_a_damaged_line_is_named_and_not_quoted(tmp_path, line, message):
    (tmp_path / "config.yaml").write_text("seed: 0")
    path = write_log(tmp_path, ROWS)
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path)
    assert f"{path}, {message}" in str(caught.value)
    assert "Example" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_report_links_to_the_pages_of_every_stage(tmp_path):
    (tmp_path / "study.yaml").write_text("stages: {}")
    for stage, rows in (("grpo", ROWS), ("second & last", ROWS[:7])):
        write_log(tmp_path / "stages", rows, stage=stage)
        folder = tmp_path / "stages" / stage
        (folder / "begun.json").write_text(json.dumps({"kind": "grpo", "parents": {}}))
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    page = read(write_report(tmp_path))
    links = {a.text: a.attributes["href"] for a in page.all("a")}
    assert links["11 completions of 2 steps"] == "stages/grpo/completions.html"
    assert links["7 completions of 1 step"] == "stages/second%20%26%20last/completions.html"
    folder = tmp_path / "stages" / "second & last"
    for page, href in (
        ("completions.html", "../../report.html"),
        ("completions/step_000001.html", "../../../report.html"),
    ):
        assert href in {a.attributes["href"] for a in read(folder / page).all("a")}


def test_the_truth_stands_beside_the_completions(tmp_path):
    columns = {"truth": ["Edema", "<b>Fracture"], "view": None}
    write_log(tmp_path, [row(1, 0, sample, float(sample), columns=columns) for sample in range(2)])
    write_completions(tmp_path)
    (group,) = groups(read(tmp_path / "grpo" / "completions" / "step_000001.html"))
    shown = {div.one("dt").text: div.one("dd").text for div in group.one("dl").all("div")}
    assert shown == {"truth": "Edema, <b>Fracture", "view": ""}
    write_log(tmp_path, [row(1, 0, 0, 1.0, columns=columns), row(1, 0, 1, 1.0, columns={})])
    with pytest.raises(ValueError, match="line 2: expected prompt, images and columns"):
        write_completions(tmp_path)


def test_the_index_draws_the_mean_reward(run, index, tmp_path):
    (curve,) = index.all("svg")
    assert (
        curve.attributes["aria-label"] == "Mean reward over 2 steps: mean 0.4514 in the first fifth, 0.5 in the last."
    )
    write_log(tmp_path, [row(1, 0, 0, None)])
    write_completions(tmp_path)
    assert read(tmp_path / "grpo" / "completions.html").all("svg") == [], "no reward is known"


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked into")
    return path


def image_items(run: Path, keys: list[str]) -> list[tuple[str, str | None, bool]]:
    """(words, href, has a picture) of the images of one prompt"""
    write_log(run, [row(1, 0, 0, 1.0, images=keys)])
    write_completions(run)
    page = read(run / "grpo" / "completions" / "step_000001.html")
    items = page.one("ul", **{"class": "images"}).all("li")
    for image in page.all("img"):
        assert image.attributes["loading"] == "lazy"
    return [(li.text, next((a.attributes["href"] for a in li.all("a")), None), bool(li.all("img"))) for li in items]


def test_images_in_the_run_folder_are_told_without_a_machine_path(tmp_path):
    run = tmp_path / "machine" / "first-light"
    inside = picture(run / "films" / "p 1#?.png")
    picture(run / "films" / "scan.dcm")
    keys = [str(inside), "films/scan.dcm", str(run / "films" / "gone.jpg"), "key 7"]
    assert image_items(run, keys) == [
        ("films/p 1#?.png", "../../films/p%201%23%3F.png", True),
        ("films/scan.dcm", "../../films/scan.dcm", False),
        ("films/gone.jpg no such file here", None, False),
        ("key 7 no such file here", None, False),
    ]
    for path in run.rglob("*.html"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert sorted(path.name for path in run.rglob("*.png")) == [inside.name], "images are never copied"


def test_images_elsewhere_are_told_by_their_file_name_alone(tmp_path):
    run = tmp_path / "runs" / "first-light"
    outside = picture(tmp_path / "data" / "patient 4711" / "film.JPG")
    assert image_items(
        run, [str(outside), str(tmp_path / "gone" / "film 2.png"), "../../data/patient 4711/film.JPG"]
    ) == [
        ("film.JPG", "../../../../data/patient%204711/film.JPG", True),
        ("film 2.png no such file here", None, False),
        ("film.JPG", "../../../../data/patient%204711/film.JPG", True),
    ]
    for path in run.rglob("*.html"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_a_run_folder_reached_by_a_link_is_the_same_folder(tmp_path):
    real = tmp_path / "disk" / "first-light"
    inside = picture(real / "films" / "1.png")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert image_items(tmp_path / "runs" / "first-light", [str(inside)]) == [("films/1.png", "../../films/1.png", True)]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("javascript:alert(1)", "javascript:alert(1)"),
        ("http://x.test/a.png", "http://x.test/a.png"),
        ("a\x00b", "aU+0000b"),
        ("x" * 5000, "x" * 5000),
        ("\ud800", "U+D800"),
        ("", ""),
    ],
)
def test_a_key_that_is_no_file_is_never_a_link(tmp_path, key, words):
    assert image_items(tmp_path, [key]) == [(f"{words} no such file here".strip(), None, False)]


@pytest.mark.parametrize(("name", "most"), [("MOST_COMPLETIONS", 5), ("MOST_CHARACTERS", 100)])
def test_a_large_step_has_several_pages_and_nothing_is_left_out(tmp_path, monkeypatch, name, most):
    # 7 groups of 2 completions, 12 characters each, below prompts of 11: two groups fit on a page by either limit.
    rows = [row(1, p, k, 0.5 if p == 4 else float(k)) for p in range(7) for k in (0, 1)]
    write_log(tmp_path, rows)
    monkeypatch.setattr(completions, name, most)
    write_completions(tmp_path)
    names = ["step_000001.html", "step_000001_2.html", "step_000001_3.html", "step_000001_4.html"]
    assert pages(tmp_path) == names
    found = [read(tmp_path / "grpo" / "completions" / name) for name in names]
    shown = [group.one("h2").text for page in found for group in groups(page)]
    assert shown == [f"Prompt {p} group {p + 1} of 7" + (" flat" if p == 4 else "") for p in range(7)]
    texts = [cell.text for page in found for cell in page.all("td", **{"class": "text"})]
    assert texts == [each["completion"] for each in rows]
    for number, page in enumerate(found):
        (nav,) = page.all("nav", **{"class": "pages"})
        assert f"This page shows {1 if number == 3 else 2} of the step's 7 groups" in nav.text
        assert [item.text for item in nav.all("li")] == [
            "page 1 2 groups, 0 flat, 0 with unscored",
            "page 2 2 groups, 0 flat, 0 with unscored",
            "page 3 2 groups, 1 flat, 0 with unscored",
            "page 4 1 group, 0 flat, 0 with unscored",
        ]
        assert [link.attributes["href"] for link in nav.all("a")] == names
        assert nav.one("a", **{"aria-current": "page"}).text == f"page {number + 1}"
        assert facts(page)["Groups"] == "7", "the facts are those of the whole step"
    assert "all 2 groups only flat groups (1)" in found[2].one("form").text
    assert table(read(tmp_path / "grpo" / "completions.html"))[1][0] == "14 pages"


def test_pages_of_steps_that_a_rewind_took_back_are_removed(tmp_path):
    write_log(tmp_path, [*ROWS, row(3, 1, 0, 1.0)])
    write_completions(tmp_path)
    assert pages(tmp_path) == [f"step_00000{number}.html" for number in (1, 2, 3)]
    notes = tmp_path / "grpo" / "completions" / "step_notes.html"
    notes.write_text("mine")
    write_log(tmp_path, ROWS[:7])
    write_completions(tmp_path)
    assert pages(tmp_path) == ["step_000001.html", "step_notes.html"]
    last = read(tmp_path / "grpo" / "completions" / "step_000001.html")
    assert not any("rel" in link.attributes for link in last.all("a")), "there is no next step"


def test_the_same_log_gives_the_same_pages(run, tmp_path):
    again = tmp_path / "first-light"
    write_log(again, ROWS)
    write_completions(again)
    for path in sorted(run.rglob("*.html")):
        assert (again / path.relative_to(run)).read_bytes() == path.read_bytes()


def test_the_pages_need_nothing_else(step, index):
    for page in (step, index):
        assert page.all("link") == []
        assert not any("src" in each.attributes for each in page.all("script"))
        assert not any(re.search(r"@import|url\(", style.raw) for style in page.all("style"))
