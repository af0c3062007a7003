"""Overlaps of training and evaluation sets: which kinds there are, copies that must be found, films that must not."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmalign.data.films.images import BadImage
from vlmalign.data.overlap.films import BITS, NEAR, FilmMark, difference_hash, hash_distances, marks_of_film, near_films
from vlmalign.data.overlap.sets import Overlap, SetMarks, describe, overlaps
from vlmalign.data.overlap.texts import TextMark, marks_of_text, near_questions, words_of
from vlmalign.data.sources.mimic import write_synthetic

STEM = (
    "a woman of 61 years has had a dry cough and fever for three days and her film shows an opacity at the right base"
)
OTHER = (
    "two weeks after a fall from a ladder this man cannot lift his arm and feels a dull pain that wakes him every night"
)


def half(film: Image.Image) -> Image.Image:
    return film.resize((film.width // 2, film.height // 2), Image.Resampling.LANCZOS)


#: name -> what is done to a grey film, how it is saved
COPIES = {
    **{
        f"quality {quality}": (lambda film: film, {"format": "JPEG", "quality": quality})
        for quality in (95, 85, 75, 60)
    },
    "half": (half, {"format": "PNG", "compress_level": 0}),
    "half, quality 75": (half, {"format": "JPEG", "quality": 75}),
    "rgb": (lambda film: film.convert("RGB"), {"format": "PNG", "compress_level": 0}),
    "16 bit": (
        lambda film: Image.fromarray(np.asarray(film).astype(np.uint16) * 257),
        {"format": "PNG", "compress_level": 0},
    ),
    "inverted": (ImageOps.invert, {"format": "JPEG", "quality": 95}),
}


def copies_found(paths: list[Path], change, options: dict, folder: Path) -> list[bool]:
    """Whether a copy of each film is found, alone, among all films."""
    marks = [marks_of_film(path) for path in paths]
    copies = []
    for path in paths:
        with Image.open(path) as film:
            change(film.convert("L")).save(folder / "copy", **options)
        copies.append(marks_of_film(folder / "copy"))
    pairs = near_films(marks, copies)
    assert all(one == other for one, other in pairs), "a film was taken for another one"
    return [(index, index) in pairs for index in range(len(paths))]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("phantoms")
    written = write_synthetic(root, films=40, seed=5, size=128)
    frontal = {row["id"] for row in written}
    return [path for path in sorted(root.rglob("*.jpg")) if path.stem in frontal]


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_phantoms_are_found(phantoms, tmp_path, name):
    change, options = COPIES[name]
    # Of 600 phantoms two were missed at 64 px and quality 75, none otherwise.
    assert sum(copies_found(phantoms, change, options, tmp_path)) >= len(phantoms) - (name == "half, quality 75")


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_real_films_are_found(shared_data, tmp_path, name):
    paths = sorted((shared_data / "nih_images" / "jpg512").glob("*.jpg"))[::12]
    assert len(paths) == 25
    assert all(copies_found(paths, *COPIES[name], tmp_path))


def test_different_films_are_no_copies(shared_data, phantoms):
    """Follow-ups of one patient neither; of 1,300 real films the two folders hold the same three."""
    large = sorted((shared_data / "nih_images" / "jpg512").glob("*.jpg"))
    small = sorted((shared_data / "nih_images_tiny64").rglob("*.png"))
    marks = {path: marks_of_film(path) for path in (*large, *small, *phantoms)}
    found = near_films([marks[path] for path in large], [marks[path] for path in small])
    assert sorted((large[i].stem, small[j].stem) for i, j in found) == [
        (name, name) for name in ("00000061_012", "00000211_013", "00000211_018")
    ]
    for paths, nearest in ((large, 190), (small, 110), (phantoms, 150)):
        words = np.array([list(bytes.fromhex(marks[path].dhash)) for path in paths], np.uint8).view(np.uint64)
        distances = hash_distances(words, words)[np.triu_indices(len(paths), 1)]
        assert distances.min() > nearest > NEAR


def test_hash_distances_count_bits():
    rng = np.random.default_rng(0)
    bits = rng.random((7, BITS)) < 0.5
    bits[1] = ~bits[0]
    bits[2] = bits[0] ^ (np.arange(BITS) < 30)
    words = np.packbits(bits, axis=1).view(np.uint64)
    differ = (bits[:, None] != bits).sum(axis=2)
    assert (hash_distances(words[:4], words) == np.minimum(differ, BITS - differ)[:4]).all()
    assert hash_distances(words[:3], words[:1])[:, 0].tolist() == [0, 0, 30]


def test_near_films_leave_out_the_same_file_and_blank_films(tmp_path):
    rng = np.random.default_rng(1)
    bits = rng.random(BITS) < 0.5

    def mark(sha256: str, flipped: int, blank: bool = False) -> FilmMark:
        return FilmMark(sha256, "" if blank else np.packbits(bits ^ (np.arange(BITS) < flipped)).tobytes().hex())

    far = mark("far", BITS // 2)
    assert near_films([mark("a", 0)], [mark("a", 0)]) == []
    assert near_films([mark("a", 0)], [mark("b", NEAR)]) == [(0, 0)]
    assert near_films([mark("a", 0)], [mark("b", NEAR + 1)]) == []
    assert near_films([mark("a", 0, blank=True)], [mark("b", 0, blank=True)]) == []
    assert near_films([], [far]) == near_films([far], []) == []
    # The same file and a copy of it: the copy is still shown. Each film once, with its nearest.
    training = [far, mark("a", 0), mark("b", 9), mark("c", 60)]
    assert near_films(training, [mark("a", 0), far, mark("d", 10)]) == [(1, 2), (2, 0), (2, 2), (3, 2)]
    # More films than are compared at once.
    many = [FilmMark(str(i), (rng.random(BITS // 8) * 256).astype(np.uint8).tobytes().hex()) for i in range(300)]
    assert near_films([*many, mark("a", 0)], [far, mark("b", 3)]) == [(300, 1)]

    for name, grey in (("dark", 10), ("light", 200)):
        Image.new("L", (64, 48), grey).save(tmp_path / f"{name}.png")
        assert marks_of_film(tmp_path / f"{name}.png").dhash == ""


def test_marks_of_a_film(tmp_path):
    ramp = np.add.outer(np.arange(90) * 20, np.arange(80) * 25).astype(np.uint16)  # 12 bits
    Image.fromarray(ramp).save(tmp_path / "film.png")
    Image.fromarray(ramp).save(tmp_path / "packed.png", compress_level=9)
    one, other = (marks_of_film(tmp_path / name, bits=12) for name in ("film.png", "packed.png"))
    assert one.dhash == other.dhash == "ff" * (BITS // 8)  # lighter to the right and below, everywhere
    assert one.sha256 != other.sha256
    (tmp_path / "film.jpg").write_bytes(b"no film")
    with pytest.raises(BadImage, match=r"film\.jpg"):
        marks_of_film(tmp_path / "film.jpg")


@pytest.mark.full
def test_the_speed_of_comparing(cpu_seconds):
    packed = np.random.default_rng(2).integers(0, 256, (4000, BITS // 8), dtype=np.uint8)
    films = [FilmMark(str(index), row.tobytes().hex()) for index, row in enumerate(packed)]
    assert cpu_seconds(lambda: near_films(films[:2000], films[2000:])) < 1.5  # 0.3 s measured
    assert cpu_seconds(lambda: near_films(films[:2000], films[2000:2518])) < 0.5
    words = [f"w{number}" for number in np.random.default_rng(3).integers(0, 5000, 40_000)]
    template = "a template that all of the cases have in common, " * 4
    texts = [marks_of_text(template + " ".join(words[start : start + 60])) for start in range(0, 36_000, 18)]
    assert cpu_seconds(lambda: near_questions(texts[:1000], texts[1000:])) < 1.0


def test_normalised_questions():
    assert words_of("Is  the HEART\nlarge?") == words_of("is the heart large") == ["is", "the", "heart", "large"]
    assert marks_of_text("ＷＢＣ 9×10⁹/L, “diagnosis”?") == marks_of_text('wbc 9 × 109 / l: "Diagnosis"')
    assert marks_of_text("患者，男，30岁").question == marks_of_text("患者男 30 岁。").question
    assert marks_of_text("Is the heart large?").question != marks_of_text("Is the heart small?").question
    assert marks_of_text(" ?! ") == TextMark("", ())
    assert len(marks_of_text(" ".join(STEM.split()[:12])).grams) == 0
    assert len(marks_of_text(" ".join(STEM.split()[:13])).grams) == 1
    assert len(marks_of_text("男性，45岁，酗酒后8小时出现中上腹疼痛").grams) == 5  # 17 words: 15 characters, 2 numbers


@pytest.mark.parametrize(
    ("training", "evaluation", "near"),
    [
        (STEM, STEM.upper() + ".", False),  # the same question is no 13-gram
        (STEM, STEM + " what is it", True),
        (STEM + " what is it", STEM + " which drug is best", True),
        (STEM, OTHER, False),
        (f"{OTHER} {STEM}", STEM, True),  # held whole
        (" ".join(STEM.split()[:13]), f"{STEM} {OTHER}", False),  # 1 of 36 13-grams
        (" ".join(STEM.split()[:12]), STEM, False),
        ("", "", False),
    ],
)
def test_13_grams_truth_table(training, evaluation, near):
    marks = [marks_of_text(training)], [marks_of_text(evaluation)]
    assert near_questions(*marks) == ([(0, 0)] if near else [])


def test_phrases_of_many_evaluation_questions_do_not_count():
    preface = "the following is taken from the notes of a clinic and has been shortened where names stood"
    questions = [f"{preface} {name} is what" for name in "abcdefghijklmn"]
    marks = [marks_of_text(question) for question in questions]
    trained = [marks_of_text(f"{preface} something else")]
    assert near_questions(trained, marks) == []
    assert {i for i, _ in near_questions(trained, marks[:10])} == {0}
    # What a case has of its own still counts, and all that copy it are named.
    own = marks_of_text(f"{preface} {STEM} is what")
    copies = [marks_of_text(f"{STEM} number {number}") for number in range(12)]
    assert near_questions(copies, [*marks, own]) == [(i, 14) for i in range(12)]


def test_marks_are_the_same_in_every_process(phantoms):
    program = (
        "import sys; from pathlib import Path; from vlmalign.data.overlap.films import marks_of_film; "
        "from vlmalign.data.overlap.texts import marks_of_text; "
        "print(repr((marks_of_film(Path(sys.argv[1])), marks_of_text(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, phantoms[0], STEM],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == repr((marks_of_film(phantoms[0]), marks_of_text(STEM)))


def texture(seed: int) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return Image.fromarray(grid).resize((128, 128), Image.Resampling.BICUBIC)


def row(id: str, patient: str, path: str = "", seed: int = 0, quality: int = 95) -> dict:
    """A case with a film: pictures differ by seed, files by quality."""
    buffer = io.BytesIO()
    texture(seed).save(buffer, "JPEG", quality=quality)
    mark = FilmMark(hashlib.sha256(buffer.getvalue()).hexdigest(), difference_hash(Image.open(buffer).convert("L")))
    return {"id": id, "patient": patient, "path": path or f"{id}.jpg", **mark._asdict()}


def asked(id: str, question: str, patient: str = "") -> dict:
    return {"id": id, "patient": patient or id, **marks_of_text(question)._asdict()}


def kinds(training: list[dict], evaluation: list[dict], *, origins: tuple[str, str] = ("csv a", "csv a")) -> dict:
    found = overlaps(SetMarks("train", origins[0], training), SetMarks("test", origins[1], evaluation))
    return {overlap.kind: overlap.pairs for overlap in found}


@pytest.mark.parametrize(
    ("training", "evaluation", "same_origin", "other_origin"),
    [
        (row("a", "1", seed=1), row("b", "2", seed=2), [], []),
        (row("a", "1", seed=1), row("b", "1", seed=2), ["patient"], []),
        (row("a", "1", seed=1), row("a", "2", "b.jpg", seed=2), ["case"], []),
        (row("a", "1", "x.jpg", seed=1), row("b", "2", "x.jpg", seed=2), ["path"], []),
        (row("a", "1", seed=1), row("b", "2", seed=1), ["content"], ["content"]),
        (row("a", "1", seed=1), row("b", "2", seed=1, quality=70), ["copy"], ["copy"]),
        (row("a", "1", seed=1), row("a", "1", seed=1), ["patient", "case", "path", "content"], ["content"]),
        (asked("a", STEM), asked("b", OTHER), [], []),
        (asked("a", STEM), asked("b", f"  {STEM}?"), ["question"], ["question"]),
        (asked("a", STEM), asked("b", f"{STEM}, and why?"), ["13-gram"], ["13-gram"]),
        (asked("a", STEM, "7"), asked("b", OTHER, "7"), ["patient"], []),
        # One question may be asked of every film; a row without patient or question has none in common.
        (row("a", "1", seed=1) | asked("a", STEM), row("b", "2", seed=2) | asked("b", STEM), [], []),
        (row("a", "1", seed=1), asked("b", STEM), [], []),
        ({"id": "a", "patient": ""}, {"id": "b", "patient": ""}, [], []),
        ({"id": "a", "patient": "1"}, {"id": "b", "patient": "1", "path": None, "question": None}, ["patient"], []),
    ],
)
def test_truth_table_of_kinds(training, evaluation, same_origin, other_origin):
    names = (training["id"], evaluation["id"])
    assert kinds([training], [evaluation]) == {kind: [names] for kind in same_origin}
    assert kinds([training], [evaluation], origins=("csv a", "csv b")) == {kind: [names] for kind in other_origin}


def test_every_case_that_overlaps_stands_in_a_pair():
    training = [{"id": f"t{i}", "patient": patient} for i, patient in enumerate("ppqzp")]
    evaluation = [{"id": f"e{i}", "patient": patient} for i, patient in enumerate("qxpq")]
    assert kinds(training, evaluation) == {
        "patient": [("t2", "e0"), ("t0", "e2"), ("t1", "e2"), ("t4", "e2"), ("t2", "e3")]
    }
    texts = [asked("s", STEM), asked("u", OTHER), asked("v", STEM)]
    assert kinds(texts, [asked("e", STEM), asked("f", f"{STEM} now")]) == {
        "question": [("s", "e"), ("v", "e")],
        "13-gram": [("s", "f"), ("v", "f")],
    }


def test_the_error_says_how_many_which_and_what_to_do():
    training = SetMarks("sft", "csv", [asked(f"t{i}", f"{STEM} {i}", patient=str(i)) for i in range(5)])
    evaluation = SetMarks("exam", "csv", [asked(f"e{i}", f"{STEM} {i}", patient=str(9 * i - 36)) for i in range(4, 9)])
    found = [
        Overlap("patient", [("t0", "e4"), ("t1", "e4")]),
        Overlap("13-gram", [("t4", "e4"), ("t4", "e5"), ("t4", "e6"), ("t4", "e7")]),
    ]
    text = describe(found, training, evaluation)
    assert text.splitlines()[:3] == [
        "the training set 'sft' overlaps the evaluation set 'exam':",
        "  patient: 1 of 5 cases of 'exam' and 2 of 5 of 'sft' of the same patient: t0 - e4, t1 - e4",
        "  13-gram: 4 of 5 cases of 'exam' and 1 of 5 of 'sft' whose questions share much of their wording; read these pairs:"
        " t4 - e4, t4 - e5, t4 - e6, ...",
    ]
    assert "sets.sft.apart: [exam]" in text
    assert "sets.sft.may_overlap: [exam]" in text
    found = overlaps(training, evaluation)
    assert [overlap.kind for overlap in found] == ["patient", "question", "13-gram"]
    assert not any(word in describe(found, training, evaluation) for word in ("woman", "cough", "opacity"))
