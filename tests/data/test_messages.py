"""Conversations in files: what a row must hold, where its images may lie, and which line is to blame."""

import json
from pathlib import Path

import pytest

from vlmalign.data.chat.messages import ControlTokens, for_template, image_keys, label_weight
from vlmalign.data.sources.rows import read_row
from vlmalign.data.sources.stored_images import StoredImages

ROW = {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes.", "weight": 2}]}


def lines(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def read(path: Path, line: int) -> list:
    """The turns of the row at a line."""
    return read_row(path, line, StoredImages(path.parent, path.parent / "cache")).meta["messages"]


def shown(path) -> dict:
    return {
        "messages": [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "?"}]}]
    }


def test_rows_are_lines_counted_from_one(tmp_path):
    other = {"messages": [{"role": "user", "content": "Größe?"}], "id": 7}
    path = lines(tmp_path, ROW, b"not JSON", other)
    assert read(path, 1) == ROW["messages"]
    assert read(path, 3) == other["messages"]
    assert read(lines(tmp_path, ROW, b"", other), 3) == other["messages"], "empty lines count"
    assert read(lines(tmp_path, b"\xef\xbb\xbf" + json.dumps(ROW).encode()), 1) == ROW["messages"]
    for row in (0, -1, 4):
        with pytest.raises(ValueError, match=f"there is no row {row}"):
            read(lines(tmp_path, ROW, ROW), row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"messages": [}', r"rows\.jsonl:2: not a line of JSON \(Expecting value"),
        (b"", r"there is no row 2; it has 2 rows, the last is rows\.jsonl:3"),
        (b'{"messages": "\xff"}', r"rows\.jsonl:2: not a line of JSON \('utf-8' codec"),
        ([], r"rows\.jsonl:2: expected an object, found list"),
        ({"messages": {}}, r'rows\.jsonl:2: expected an object \{"messages"'),
        ({"messages": []}, r"rows\.jsonl:2: the conversation has no turns"),
        ({"messages": ["Is it?"]}, r"rows\.jsonl:2: messages\[0\]: expected an object with role .*, found str"),
        ({"messages": [{"role": "user", "content": None}]}, r"rows\.jsonl:2: messages\[0\]: content must be"),
        (shown("../film.png"), r"rows\.jsonl:2: path '\.\./film\.png' leaves the data root"),
        (shown("/film.png"), r"rows\.jsonl:2: path '/film\.png' leaves the data root"),
        (shown("out/film.png"), r"rows\.jsonl:2: path 'out/film\.png' leads by a link"),
    ],
)
def test_the_line_is_named(tmp_path, row, said):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=said):
        read(lines(folder, ROW, row, ROW), 2)


def test_images_lie_beside_the_file(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").touch()
    found = read(lines(tmp_path, shown("films/a.png")), 1)
    assert image_keys(found) == [str(tmp_path.resolve() / "films" / "a.png")]
    assert found[0]["content"][1] == {"type": "text", "text": "?"}


def test_what_a_template_is_given():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = [{"type": "image", "image": "k"}]
    messages = [{"role": "user", "content": c} for c in ("t", parts[:1], parts, image, [])]
    messages.append({"role": "assistant", "content": "c", "weight": 0.5, "name": "n", "tool_calls": None})

    def contents(flag):
        return [turn["content"] for turn in for_template(messages, parts=flag)]

    assert contents(True) == ["t", "a", parts, image, [], "c"]
    assert contents(False) == ["t", "a", "ab", image, "", "c"]
    assert for_template(messages, parts=True)[-1] == {"role": "assistant", "content": "c", "name": "n"}


def test_parts_and_turns_with_fields_of_others_set_to_null(tmp_path):
    """As tables write rows: templates that ask whether a part has an image, or a turn calls a tool, must see none."""
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "image", "text": None, "image": "k.png"}]
    messages = [
        {"role": "user", "content": parts, "weight": None},
        {"role": "assistant", "content": "c", "weight": None},
    ]
    (tmp_path / "k.png").touch()
    found = read(lines(tmp_path, {"messages": messages}), 1)
    assert [label_weight(message) for message in found] == [0.0, 1.0]
    key = str(tmp_path.resolve() / "k.png")
    assert for_template(found, parts=True) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": key}]},
        {"role": "assistant", "content": "c"},
    ]


def test_a_system_turn_is_one_text():
    """Gemma 3's template writes the first part of it and drops the others."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert for_template([{"role": "system", "content": parts}], parts=True) == [{"role": "system", "content": "ab"}]


def test_control_tokens_are_found_wherever_a_template_might_write_them():
    tokens = ControlTokens(["<a>", "<abc>", "[x]", "^"])
    texts = {"<ab>": None, "a<abc>": "<abc>", "<<a>": "<a>", "[x": None, "[x]": "[x]", "2^3": "^", "": None}
    assert {text: tokens.find(text) for text in texts} == texts
    assert ControlTokens([]).find("<a>") is None
    tokens.refuse([{"role": "user", "content": [{"type": "image", "image": "films/[x].png"}]}])
    for message in (
        {"role": "user", "content": [{"type": "text", "text": "<a>"}]},
        {"role": "user", "content": [{"type": "text", "text": "so <"}, {"type": "text", "text": "a>"}]},
        {"role": "user", "content": [{"type": "text", "text": "< "}, {"type": "text", "text": " a>"}]},
        {"role": "assistant", "content": "", "reasoning_content": "so <a>"},
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": ["<a>"]}}]},
    ):
        with pytest.raises(ValueError, match=r"messages\[1\] \(\w+\) spells '<a>'"):
            tokens.refuse([{"role": "user", "content": "a"}, message])
