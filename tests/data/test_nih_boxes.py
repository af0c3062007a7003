"""Boxes of findings: the release's real list, lists that are damaged, and where phantoms are drawn."""

import gzip

import numpy as np
import pytest

from vlmalign.data.phantoms.cases import ALLOWED, SIZES, ZONES, Case, Finding
from vlmalign.data.phantoms.looks import Look
from vlmalign.data.phantoms.phantom import finding_boxes, render
from vlmalign.data.sources.nih import Nih14, write_synthetic
from vlmalign.data.sources.nih_boxes import BOXED, BOXES, FindingBox, read_boxes, write_boxes

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


def test_the_real_list(shared_data):
    found = read_boxes(shared_data / "nih_cxr14" / f"{BOXES}.gz")
    assert len(found) == 984
    assert len({box.id for box in found}) == 880
    counts = {label: sum(box.label == label for box in found) for label in BOXED}
    assert list(counts.values()) == [180, 146, 153, 123, 85, 79, 120, 98]
    assert found[0].id == "00013118_008.png"
    assert np.allclose(
        found[0][2:], np.array([225.084745762712, 547.019216763771, 86.7796610169491, 79.1864406779661]) / 1024
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"line 1: expected the columns Image Index, "),
        ("a,b\n", r"line 1: expected the columns Image Index, .*found 'a, b'"),
        (HEADER + "x.png,Mass,1,2,3,4\nx.png,Mass,1,2,3\n", r"line 3: expected 6 values or more, found 5"),
        (HEADER + ",Mass,1,2,3,4\n", r"line 2, column 'Image Index': expected an image index"),
        (HEADER + "x.png,Mas,1,2,3,4\n", r"unknown label 'Mas' in .*line 2, column 'Finding Label' \(nearest known: Mass"),
        (HEADER + "x.png,Mass,1,2,w,4\n", r"line 2, column 'w': expected a number of pixels, found 'w'"),
        (HEADER + "x.png,Mass,1,nan,3,4\n", r"line 2, column 'y': expected a number"),
        (HEADER + "x.png,Mass,1000,2,30,4\n", r"line 2, column 'x \+ w': expected a box within 1024 px, found 1000 to 1030"),
        (HEADER + "x.png,Mass,1,2,30,0\n", r"line 2, column 'y \+ h': expected a box"),
    ],
)  # fmt: skip
def test_a_damaged_list_names_line_and_column(tmp_path, text, expected):
    path = tmp_path / BOXES
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_boxes(path)


def test_lists_read_back_as_they_were_written(tmp_path):
    boxes = [FindingBox("a.png", "Infiltration", 0.1, 0.2, 0.3, 0.4), FindingBox("b.png", "Mass", 0.5, 0.5, 0.5, 0.5)]
    write_boxes(tmp_path / BOXES, boxes)
    assert "a.png,Infiltrate," in (tmp_path / BOXES).read_text()
    found = read_boxes(tmp_path / BOXES)
    assert [box[:2] for box in found] == [box[:2] for box in boxes]
    assert np.allclose([box[2:] for box in found], [box[2:] for box in boxes])
    (tmp_path / f"{BOXES}.gz").write_bytes(gzip.compress((tmp_path / BOXES).read_bytes()))
    assert read_boxes(tmp_path / f"{BOXES}.gz") == found
    with pytest.raises(FileNotFoundError, match="no list of boxes"):
        read_boxes(tmp_path / "none.csv")


@pytest.mark.parametrize("kind", ["lesion", "consolidation", "effusion", "atelectasis", "pneumothorax"])
def test_a_phantoms_box_is_where_its_finding_changes_the_film(kind):
    zone = ALLOWED[kind][-1]
    x, y = ZONES["left", zone]
    finding = Finding(kind, "left", zone, x, y, sum(SIZES[kind]) / 2)
    look, size = Look(noise=0.0), 128
    with_it, without = (
        render(Case(0.45, 0.22, findings), look, np.random.default_rng(4), size).astype(float) for findings in ((finding,), ())
    )  # fmt: skip
    ((left, top, width, height),) = finding_boxes(Case(0.45, 0.22, (finding,)), look, np.random.default_rng(4), size)
    change = np.abs(with_it - without)
    inside = np.zeros_like(change, bool)
    inside[round(top * size) : round((top + height) * size), round(left * size) : round((left + width) * size)] = True
    assert change[inside].mean() > 5 * change[~inside].mean()
    assert 0.5 < left + width / 2 < 1.0, "the patient's left is on the right of the film"
    assert inside.mean() < 0.35


def test_invented_test_films_have_boxes_as_the_release_has(tmp_path):
    write_synthetic(tmp_path, films={"train_val": 4, "test": 30}, seed=1, size=64)
    boxes = read_boxes(tmp_path / BOXES)
    films = {film.id: film.labels for film in Nih14(tmp_path, "test")}
    assert len(boxes) >= 10
    for box in boxes:
        assert box.label in BOXED
        assert box.label in films[box.id]
