"""Rows of the user's files as a source: each layout and each form of file, images under a root, and what is refused."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from vlmalign.data.films.files import BadImage
from vlmalign.data.films.images import load_image
from vlmalign.data.sources import examples, row_files
from vlmalign.data.sources.formats import AnySource
from vlmalign.data.sources.rows import Rows

TURNS = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes.", "weight": 2}]
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {
        "role": "user",
        "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content),
    }


def said(*content):
    return {**user(*content), "role": "assistant"}


def shown(path):
    return {"type": "image", "image": str(path)}


@pytest.fixture
def folder(tmp_path):
    """Rows in `rows`, films in `films`."""
    for name in ("rows", "films/deep"):
        (tmp_path / name).mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.png", "c.png")):
        Image.fromarray(np.full((4, 6), 40 * i, np.uint8)).save(tmp_path / "films" / name)
    return tmp_path


def opened(folder, *rows, **settings) -> Rows:
    path = folder / "rows" / "rows.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return source(folder, path="rows/rows.jsonl", images="films", **settings)


def source(folder, **settings) -> Rows:
    config = TypeAdapter(AnySource).validate_json(json.dumps({"kind": "rows", **settings}), strict=True)
    return config.open(lambda path: folder / path.replace("{run}", "run"))


def test_rows_are_lines_counted_from_one(folder):
    rows = opened(
        folder, {"messages": TURNS, "answer": "yes", "patient": 7}, b"  ", {"messages": TURNS, "patient": "x"}
    )
    assert len(rows) == 2
    assert list(rows.ids()) == ["rows.jsonl:1", "rows.jsonl:3"]
    assert list(rows.patients()) == ["7", "x"]
    assert rows.layout == "conversations"
    assert rows[0].meta == {"messages": TURNS, "answer": "yes", "patient": 7}
    assert (rows[1].id, rows[1].patient, rows[1].image, rows[1].labels) == ("rows.jsonl:3", "x", None, ())
    assert rows[-1] == rows[1] == list(rows)[1]
    assert rows.files == (folder / "rows" / "rows.jsonl",)
    assert opened(folder, b"\xef\xbb\xbf" + json.dumps({"messages": TURNS}).encode())[0].patient == "rows.jsonl:1"
    with pytest.raises(IndexError, match="row 2: there are 2 rows"):
        rows[2]


def test_images_lie_under_a_root_of_their_own(folder):
    row = {"messages": [user(shown("deep/b.png"), text("And?"), shown("a.png")), said("Same.")]}
    films = (folder / "films").resolve()
    expected = [user(shown(films / "deep/b.png"), text("And?"), shown(films / "a.png")), said("Same.")]
    assert opened(folder, row)[0].meta["messages"] == expected
    with pytest.raises(
        FileNotFoundError, match=r"rows\.jsonl:1: no image .*rows/deep/b\.png; correct the row, or set on_bad"
    ):
        source(folder, path="rows/rows.jsonl")  # beside the file
    with pytest.raises(FileNotFoundError, match=r"no folder .*elsewhere for the images of"):
        source(folder, path="rows/rows.jsonl", images="elsewhere")


PLACES = {
    # columns beside the turns -> content of the first user turn
    "images": ({"images": ["a.png", "c.png"]}, [IMAGE, text("One"), IMAGE], ["a.png", None, "c.png"]),
    "image": ({"image": "a.png"}, [text("One"), IMAGE], [None, "a.png"]),
    "in front": ({"images": ["a.png", "c.png"]}, "One", ["a.png", "c.png", None]),
    "in front of parts": ({"images": ["c.png"]}, [text("One")], ["c.png", None]),
}


@pytest.mark.parametrize("key", ["messages", "prompt"])
@pytest.mark.parametrize("name", PLACES)
def test_images_beside_the_turns_are_placed(folder, key, name):
    columns, content, expected = PLACES[name]
    films = (folder / "films").resolve()
    rows = opened(
        folder, {key: [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}], **columns}
    )
    assert rows[0].meta.keys() == {"messages"}
    found = rows[0].meta["messages"][1]["content"]
    assert found == [text("One") if path is None else shown(films / path) for path in expected]


PAIRS = {
    "texts": {"prompt": "Q", "chosen": "Yes.", "rejected": "No."},
    "turns": {"prompt": [user("Q")], "chosen": [said("Yes.")], "rejected": [said("No.")]},
    "implicit": {"chosen": [user("Q"), said("Yes.")], "rejected": [user("Q"), said("No.")]},
    "null prompt": {"prompt": None, "chosen": [user("Q"), said("Yes.")], "rejected": [user("Q"), said("No.")]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_come_in_one_form(folder, name):
    rows = opened(folder, {**PAIRS[name], "score": 3})
    assert rows.layout == "preferences"
    assert rows[0].meta == {**PAIRS["turns"], "score": 3}


def test_images_of_preferences(folder):
    films = (folder / "films").resolve()
    row = {
        "prompt": [user(IMAGE, text("Q"))],
        "chosen": [said(text("Like"), IMAGE)],
        "rejected": [said(text("Unlike"), IMAGE)],
        "images": ["a.png", "c.png"],
    }
    meta = opened(folder, row)[0].meta
    assert meta["prompt"] == [user(shown(films / "a.png"), text("Q"))]
    assert meta["chosen"] == [said(text("Like"), shown(films / "c.png"))]
    assert meta["rejected"] == [said(text("Unlike"), shown(films / "c.png"))]
    assert meta.keys() == {"prompt", "chosen", "rejected"}
    meta = opened(folder, {**PAIRS["texts"], "images": ["a.png"]})[0].meta
    assert meta["prompt"] == [user(shown(films / "a.png"), text("Q"))]


def test_records_keep_every_column(folder):
    row = {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "A", "patient": None}
    rows = opened(folder, row)
    assert rows.layout == "records"
    assert rows[0].meta == row
    assert (rows[0].patient, rows[0].image) == ("rows.jsonl:1", None)
    films = (folder / "films").resolve()
    found = opened(folder, {"question": "Q", "image": "a.png", "images": ["c.png", "deep/b.png"]})[0]
    assert found.image == films / "a.png"
    assert found.meta["image"] == str(films / "a.png")
    assert found.meta["images"] == [str(films / "c.png"), str(films / "deep/b.png")]
    # The prompts of instruction sets are records too: a text is not turns.
    assert opened(folder, {"prompt": "Write.", "kwargs": [{}]}).layout == "records"


BAD = [
    (b'{"messages": [}', r"not a line of JSON \(Expecting value"),
    (b'{"messages": "\xff"}', r"not a line of JSON \('utf-8' codec"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"messages": [{"role": "user", "content": "pain \\ud83d"}]}', "half of a character"),
    ([], "expected an object, found list"),
    ({"message": []}, r'expected an object \{"messages"'),
    ({"messages": {}}, r'expected an object \{"messages"'),
    ({"messages": []}, "the conversation has no turns"),
    ({"messages": ["Is it?"]}, r"messages\[0\]: expected an object with role"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content must be"),
    ({"messages": [user(IMAGE, text("Q"))]}, r"messages\[0\]: content\[0\] must be"),
    ({"messages": [user(shown("../films/a.png"))]}, r"path '\.\./films/a\.png' leaves the data root"),
    ({"messages": [user(shown("/etc/passwd"))]}, "leaves the data root"),
    ({"messages": [user(shown("out/secret.png"))]}, "leads by a link"),
    ({"messages": [user(shown("circle.png"))]}, "links in a circle|no image"),
    ({"messages": [user(shown("n" * 300))]}, "too long"),
    ({"messages": [user(shown("absent.png"))]}, r"no image .*absent\.png"),
    ({"messages": TURNS, "images": "a.png"}, '"images" must be a list'),
    ({"messages": [user(IMAGE)], "images": ["a.png", "c.png"]}, '"images" holds 2, the turns have places for 1'),
    ({"messages": [user("<image> Q")], "images": ["a.png"]}, r"messages\[0\] spells <image> in its text"),
    ({"messages": [said("Hm.")], "images": ["a.png"]}, "has no user turn to show them in"),
    ({"messages": TURNS, "image": 7}, "an image must be a path or stored bytes, found int"),
    ({"messages": TURNS, "tools": [{"name": "f"}]}, '"tools" is not supported'),
    ({"messages": TURNS, "patient": [7]}, '"patient" must be text or a whole number, found list'),
]


@pytest.mark.parametrize(("row", "why"), BAD, ids=[why for _, why in BAD])
def test_the_line_is_named(folder, row, why):
    (folder / "films" / "out").symlink_to(folder / "rows")
    (folder / "rows" / "secret.png").write_text("")
    os.symlink("circle.png", folder / "films" / "circle.png")
    good = {"messages": TURNS}
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"^rows\.jsonl:2: .*({why}).*; correct the row, or set on_bad to skip"
    ):
        opened(folder, good, row, good)
    rows = opened(folder, good, row, good, on_bad="skip")
    assert list(rows.ids()) == ["rows.jsonl:1", "rows.jsonl:3"]
    (skipped,) = rows.skipped
    assert skipped["id"] == "rows.jsonl:2"
    assert skipped["path"].endswith("rows.jsonl")


BAD_PAIRS = [
    ({"prompt": "Q", "chosen": "Yes."}, 'no "rejected"; expected "prompt", "chosen" and "rejected"'),
    ({"chosen": "Yes.", "rejected": "No."}, 'no "prompt"'),
    ({"chosen": [said("Yes.")], "rejected": [said("No.")]}, "begin with different turns"),
    ({"chosen": TURNS, "rejected": TURNS}, "are the same turns"),
    ({"prompt": "Q", "chosen": 7, "rejected": "No."}, '"chosen": expected a list of turns or text, found int'),
    ({"prompt": "Q", "chosen": [{"role": 1}], "rejected": "No."}, r'"chosen": messages\[0\]: role must be text'),
    (
        {"prompt": [user(shown("../a.png"))], "chosen": "Yes.", "rejected": "No."},
        '"prompt": path .* leaves the data root',
    ),
]


@pytest.mark.parametrize(("row", "why"), BAD_PAIRS)
def test_pairs_that_are_none(folder, row, why):
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:2: {why}" if why.startswith('"') else rf"rows\.jsonl:2: .*{why}"
    ):
        opened(folder, PAIRS["texts"], row)


def test_a_bad_image_is_told_from_a_bad_row(folder):
    with pytest.raises(BadImage):
        opened(folder, {"messages": [user(shown("../a.png"))]})
    with pytest.raises(ValueError, match="no row to use: 2 were skipped, the first: expected an object"):
        opened(folder, [], {"messages": []}, on_bad="skip")
    with pytest.raises(ValueError, match=r"has no row to use$"):
        opened(folder)


def test_no_word_of_a_row_is_in_a_message(folder):
    for row in (
        {"messages": [{"role": "user", "content": 7}], "note": "SECRET"},
        b'{"note": "SECRET", ',
        {"note": "SECRET"},
    ):
        with pytest.raises(ValueError) as caught:
            opened(folder, {"messages": TURNS}, row)
        assert "SECRET" not in str(caught.value)


# ---- Parquet and saved folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """The same 40 rows in three forms."""
    root = tmp_path_factory.mktemp("conversations")
    for form in ("jsonl", "parquet", "saved"):
        (root / form).mkdir()
        examples.write_conversations(root / form, rows=40, seed=1, size=16, form=form)
    return root


FORMS = {"parquet": "parquet/conversations.parquet", "saved": "saved/conversations"}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_rows(conversations, tmp_path, form):
    plain = source(conversations, path="jsonl/conversations.jsonl")
    rows = source(conversations, path=FORMS[form], cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()  # opened and checked, nothing written
    assert len(rows) == len(plain) == 40
    assert rows.layout == "conversations"
    assert list(rows.patients()) == list(plain.patients())
    assert list(rows.ids()) == [f"{FORMS[form].split('/')[1]}:{i + 1}" for i in range(40)]
    for i in (*range(0, 40, 3), 39, 0):  # forwards, and back to another piece of the file
        (a, a_text), (b, b_text) = (x[i].meta["messages"][0]["content"] for x in (plain, rows))
        assert a_text == b_text
        assert rows[i].meta["messages"][1:] == plain[i].meta["messages"][1:]
        assert rows[i].meta.keys() == plain[i].meta.keys()
        assert np.array_equal(load_image(a["image"]), load_image(b["image"]))
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert 0 < len(written) <= 15
    assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in written)


def test_nothing_is_written_outside_the_run(conversations, tmp_path):
    """A process whose home, cache and temporary folders are empty and watched."""
    program = (
        "import sys, json\nfrom pathlib import Path\nfrom pydantic import TypeAdapter\n"
        "from vlmalign.data.sources.formats import AnySource\n"
        "for path in sys.argv[2:]:\n"
        "    config = TypeAdapter(AnySource).validate_python({'kind': 'rows', 'path': path})\n"
        "    rows = config.open(lambda path: Path(path.replace('{run}', sys.argv[1])))\n"
        "    print(len([rows[i] for i in range(len(rows))]))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    before = {path: path.stat().st_mtime_ns for path in conversations.rglob("*")}
    paths = [str(conversations / path) for path in FORMS.values()]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run"), *paths],
        env={**kept, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["40", "40"], done.stderr
    assert list(home.rglob("*")) == []
    assert {path: path.stat().st_mtime_ns for path in conversations.rglob("*")} == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"sources"}
    assert list((tmp_path / "run").rglob("*.partial")) == []


def test_nulls_of_tables_are_no_fields(folder):
    rows = [
        {"messages": [user(shown("a.png"), text("Q")), {**said(text("A")), "weight": 1.0}]},
        {"messages": [{"role": "system", "content": [text("S")]}, user(text("Q"))]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows" / "rows.parquet")
    found = source(folder, path="rows/rows.parquet", images="films")
    assert found[1].meta["messages"] == rows[1]["messages"]
    assert found[0].meta["messages"][0]["content"][0] == shown((folder / "films").resolve() / "a.png")
    assert found[0].meta["messages"][1]["weight"] == 1.0


def test_records_with_stored_images(folder):
    data = (folder / "films" / "c.png").read_bytes()
    rows = [
        {"question": "Q", "image": {"bytes": data, "path": None}, "scan": {"bytes": data, "path": "x.png"}},
        {"question": "Q", "image": {"bytes": None, "path": "a.png"}, "scan": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows" / "rows.parquet")
    found = source(folder, path="rows/rows.parquet", images="films")
    first, second = found
    assert first.image.read_bytes() == data
    assert first.image.is_relative_to(folder / "run" / "sources" / "images")
    assert first.meta["scan"] == first.meta["image"] == str(first.image)
    assert second.image == (folder / "films").resolve() / "a.png"
    for bad, why in (
        ({"bytes": b"", "path": None}, "an image of 0 bytes"),
        ({"bytes": None, "path": None}, "stored bytes, found dict"),
    ):
        pq.write_table(pa.Table.from_pylist([{"image": bad}]), folder / "rows" / "bad.parquet")
        with pytest.raises(BadImage, match=rf"bad\.parquet:1: .*{why}"):
            source(folder, path="rows/bad.parquet")


def test_splits_of_saved_folders(folder):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"question": str(i)} for i in range(130)])
    datasets.DatasetDict({"train": table, "test": table.select(range(5, 8))}).save_to_disk(
        str(folder / "rows" / "both")
    )
    assert len(source(folder, path="rows/both", split="train")) == 130
    test = source(folder, path="rows/both", split="test")
    assert [example.meta["question"] for example in test] == ["5", "6", "7"]
    assert [example.id for example in test] == ["test:1", "test:2", "test:3"]
    for split in (None, "valid"):
        with pytest.raises(
            ValueError, match=rf"holds the splits test, train; set split to one of them, found {split!r}"
        ):
            source(folder, path="rows/both", split=split)
    with pytest.raises(ValueError, match="holds no splits"):
        source(folder, path="rows/both/test", split="test")
    with pytest.raises(ValueError, match="not a folder that save_to_disk wrote"):
        source(folder, path="films")


def test_large_files_are_read_piece_by_piece(folder, monkeypatch):
    pq.write_table(
        pa.table({"question": [str(i) for i in range(200)]}), folder / "rows" / "q.parquet", row_group_size=90
    )
    monkeypatch.setattr(row_files, "_AT_ONCE", 7)
    rows = row_files.open_rows(folder / "rows" / "q.parquet")
    order = np.random.default_rng(0).permutation(200)
    assert [rows[int(i)]["question"] for i in order] == [str(i) for i in order]


def test_files_of_other_kinds(folder):
    with pytest.raises(ValueError, match=r"rows are read from \.jsonl, .* found 'rows\.csv'"):
        source(folder, path="rows/rows.csv")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.jsonl"):
        source(folder, path="rows/gone.jsonl")
    (folder / "rows" / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a Parquet file that can be read"):
        source(folder, path="rows/bad.parquet")
    with pytest.raises(ValueError, match="split is of saved folders"):
        source(folder, path="rows/bad.parquet", split="train")


@pytest.mark.parametrize("prompt", ["Is it?", [user("Is it?")]])
@pytest.mark.parametrize("completion", ["Yes.", [said("Yes.")]])
def test_a_prompt_and_its_completion_are_a_conversation(folder, prompt, completion):
    """TRL's layout: the completion alone is learnt from, whatever answers the prompt holds."""
    rows = opened(folder, {"prompt": prompt, "completion": completion, "truth": "a"})
    assert rows.layout == "conversations"
    assert rows[0].meta == {"messages": [user("Is it?"), said("Yes.")], "truth": "a"}


def test_answers_in_a_prompt_are_not_learnt_from(folder):
    rows = opened(folder, {"prompt": [user("1?"), said("One."), user("2?")], "completion": "Two.", "images": ["a.png"]})
    first, answer, *rest = rows[0].meta["messages"]
    assert first["content"][0] == shown(folder / "films" / "a.png")
    assert answer == {**said("One."), "weight": 0.0}
    assert rest == [user("2?"), said("Two.")]


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({**said("Bad."), "loss": False}, r"nobody reads 'loss', whose name here is \"weight\" \(0: not learnt from\)"),
        ({**said("Bad."), "train": 0}, r"nobody reads 'train', whose name here is \"weight\""),
        ({**said("Bad."), "score": 0.5}, r"nobody reads 'score'; a turn holds role, content, weight"),
        (user("<image>Effusion?"), r"messages\[1\] spells <image> in its text, which shows no image"),
        (user(text("<image>"), text("Effusion?")), r"messages\[1\] spells <image> in its text"),
    ],
)
def test_what_nobody_would_read_is_refused(folder, turn, why):
    with pytest.raises(ValueError, match=why):
        opened(folder, {"messages": [user("Q"), turn, said("No.")]})
