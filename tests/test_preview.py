"""`vlmalign preview` shows the tokens that training sees, says the same without colour, and names what it cannot show."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_tokenizer import FAMILIES, SOFT_TOKENS, chat_folder, family_folder

from vlmalign import cli
from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.preview import IMAGE, LABEL, READ, STOP, render
from vlmalign.types import Grid, Group

FILM = {"type": "image", "image": "film.png"}
QUESTION = {"role": "user", "content": [FILM, {"type": "text", "text": "Is it large?"}]}
ROW = {
    "messages": [
        QUESTION,
        {"role": "assistant", "content": "Yes.", "weight": 0.5},
        {"role": "user", "content": [{"type": "text", "text": "And\nthis?"}, FILM]},
        {"role": "assistant", "content": "No."},
    ]
}
LEGEND = "«label» trained on, its stop token last (xW: with loss weight W)   text read only   [image] soft tokens\n"

QWEN_CONFIG = {
    "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                      "fullatt_block_indexes": [0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma(repository):
    """16 soft tokens an image."""
    return repository / "configs" / "models" / "tiny-medgemma"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(family_folder("qwen2_5_vl"), folder)
    (folder / "config.json").write_text(json.dumps(QWEN_CONFIG))
    return folder


@pytest.fixture
def rows(tmp_path):
    Image.new("L", (150, 60), 9).save(tmp_path / "film.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION]}) + "\n" + json.dumps(ROW) + "\n{\n", encoding="utf-8")
    return path


def test_gemma_by_hand(gemma, rows, capsys):
    assert cli.main(["preview", str(gemma), str(rows), "--row", "2", "--no-color"]) == 0
    film = "\n\n<start_of_image>[image film.png 4x4 = 16 tokens]<end_of_image>\n\n"
    assert capsys.readouterr().out == (
        f"<bos><start_of_turn>user\n{film}Is it large?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»x0.5\n"
        f"<start_of_turn>user\nAnd\nthis?{film}<end_of_turn>\n<start_of_turn>model\n«No.<end_of_turn>»\n\n"
        "prompt tokens        36\n"
        "continuation tokens  45\n"
        "image tokens         32 (16 in the prompt); distinct images: 1\n"
        "label tokens         7\n"
        "loss weights         0.5, 1 (sum 5)\n" + LEGEND
    )


def test_qwen_by_hand(qwen, rows, capsys):
    """150 x 60 pixels are 5 x 2 soft tokens of 28 x 28."""
    assert cli.main(["preview", str(qwen), str(rows), "--row", "2", "--no-color"]) == 0
    film = "<|vision_start|>[image film.png 2x5 = 10 tokens]<|vision_end|>"
    said = capsys.readouterr().out
    assert said.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{film}Is it large?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»x0.5\n"
        f"<|im_start|>user\nAnd\nthis?{film}<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»\n\nprompt tokens "
    )
    assert "image tokens         20 (10 in the prompt); distinct images: 1\n" in said


def chat_of(family: str) -> tuple[Chat, Grid | None]:
    if family == "tiny":
        return open_chat(chat_folder(), family="gemma3", image_tokens=lambda key: SOFT_TOKENS), Grid(1, SOFT_TOKENS)
    grid = Grid(2, 3) if family in ("gemma3", "qwen2_5_vl") else None
    tokens = None if grid is None else lambda key: grid.tokens
    return open_chat(family_folder(family), family=family, image_tokens=tokens), grid


def conversation(chat: Chat) -> Group:
    question = QUESTION if chat.image_text else {"role": "user", "content": "Is it large?"}
    return chat.example([question, *ROW["messages"][1:2], {"role": "user", "content": "So?"}, ROW["messages"][3]])


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_counts_and_marks_are_those_of_the_group(family):
    """Every label, and nothing else, between « and »; every soft token counted in a bracket; nothing left out."""
    chat, grid = chat_of(family)
    group = conversation(chat)
    text = render(chat, group, grid=None if grid is None else lambda key: grid)
    body = text.plain[: text.plain.index("\n\nprompt tokens ")]
    pieces = [group.prompt, *group.continuations]
    tokens, weight, image = (np.concatenate([getattr(p, n) for p in pieces]) for n in ("tokens", "weight", "image"))
    inside = "".join(part.split("»")[0] for part in body.split("«")[1:])
    assert inside == chat.tokenizer.decode(tokens[weight > 0])
    assert body.count("«") == body.count("»") == 2
    assert body.count("»x0.5") == 1
    shown = body.replace("»x0.5", "").replace("«", "").replace("»", "")
    if grid is not None:
        bracket = f"[image film.png {grid.rows}x{grid.columns} = {grid.tokens} tokens]"
        assert shown.count(bracket) == 1
        shown = shown.replace(bracket, chat.image_text.soft * grid.tokens)
    assert shown == chat.tokenizer.decode(tokens)
    counts = dict(line.split(None, 2)[::2] for line in text.plain.splitlines()[-6:-1])
    assert counts["prompt"] == str(len(group.prompt))
    assert counts["label"] == str(int((weight > 0).sum()))
    assert counts["image"].split()[0] == str(int((image >= 0).sum()))
    assert counts["loss"] == f"0.5, 1 (sum {weight.sum():g})"


def test_styles():
    """Labels, their stop tokens, context and images each in their own style."""
    chat, grid = chat_of("gemma3")
    text = render(chat, conversation(chat), grid=lambda key: grid)
    styled = {style: [] for style in (READ, LABEL, STOP, IMAGE)}
    for span in text.spans:
        styled[span.style].append(text.plain[span.start : span.end])
    assert styled[LABEL] == ["Yes.", "No.", "label"]
    assert styled[STOP] == ["<end_of_turn>", "<end_of_turn>"]
    assert styled[IMAGE] == ["[image film.png 2x3 = 6 tokens]", "[image]"]
    assert "<end_of_image>\n\nIs it large?<end_of_turn>\n<start_of_turn>model\n" in styled[READ]


def test_several_continuations_and_the_same_image_again():
    """A pair; and an image twice without a token between is told apart by its grid."""
    chat, _ = chat_of("gemma3")
    first = conversation(chat)
    pair = Group(0, first.prompt, (first.continuations[0], first.continuations[0]), first.images)
    said = render(chat, pair, grid=lambda key: Grid(1, 3)).plain
    assert said.count("[image film.png 1x3 = 3 tokens][image film.png 1x3 = 3 tokens]") == 1
    assert "--- continuation 2 of 2\n«Yes.<end_of_turn>»x0.5" in said
    labels = int((first.continuations[0].weight > 0).sum())
    assert f"label tokens         {labels} + {labels}\n" in said


def test_text_cannot_steer_the_terminal():
    chat, _ = chat_of("qwen2.5")
    group = chat.example([{"role": "user", "content": "a\x1b[2Jb\r[red]c"}, {"role": "assistant", "content": "\x07d"}])
    text = render(chat, group, grid=None)
    assert "a[U+001B][2Jb[U+000D][red]c<|im_end|>" in text.plain
    assert "«[U+0007]d<|im_end|>»" in text.plain
    console = Console(force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b" not in captured.get()


def test_colour_only_where_it_is_wanted(gemma, rows, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["preview", str(gemma), str(rows), "--row", "2"]) == 0
    assert "\x1b[" in capsys.readouterr().out
    assert cli.main(["preview", str(gemma), str(rows), "--row", "2", "--no-color"]) == 0
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (3, "rows.jsonl:3: not a line of JSON"),
        (4, "there is no row 4; it has 3 rows, the last is rows.jsonl:3"),
    ],
)
def test_rows_that_cannot_be_shown(gemma, rows, capsys, row, said):
    assert cli.main(["preview", str(gemma), str(rows), "--row", str(row)]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert found.out == ""


def test_missing_and_damaged_films(gemma, qwen, rows, capsys):
    for folder in (gemma, qwen):
        (rows.parent / "film.png").write_bytes(b"no film")
        assert cli.main(["preview", str(folder), str(rows), "--row", "2"]) == 2
        assert "rows.jsonl:2: " in (said := capsys.readouterr().err)
        assert "film.png: unreadable image" in said
        (rows.parent / "film.png").unlink()
        assert cli.main(["preview", str(folder), str(rows), "--row", "2"]) == 2
        assert "rows.jsonl:2: no image " in capsys.readouterr().err


def test_files_and_folders_that_are_not_there(gemma, rows, tmp_path, capsys):
    assert cli.main(["preview", str(gemma), str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert cli.main(["preview", str(tmp_path / "model"), str(rows)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_prompt_and_both_answers_of_a_preference(gemma, rows, capsys):
    """Images in a column beside the turns, below a folder of their own."""
    assert cli.main(["preview", str(gemma), str(rows), "--no-color"]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-3:-1] == [
        "prompt tokens        36, and an answer is sampled", "image tokens         16; distinct images: 1",
    ]  # fmt: skip
    folder = rows.parent / "rows"
    folder.mkdir()
    pair = {"prompt": "Is it large?", "chosen": "Yes.", "rejected": "No.", "images": ["film.png"]}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    arguments = ["preview", str(gemma), str(folder / "pairs.jsonl"), "--images", str(rows.parent), "--no-color"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "[image film.png 4x4 = 16 tokens]" in said
    assert "--- continuation 1 of 2\n«Yes.<end_of_turn>»" in said
    assert "--- continuation 2 of 2\n«No.<end_of_turn>»" in said
    (folder / "records.jsonl").write_text('{"question": "?"}\n')
    assert cli.main(["preview", str(gemma), str(folder / "records.jsonl")]) == 2
    assert "a task asks about a record" in capsys.readouterr().err
