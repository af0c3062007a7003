"""Films from which something was taken: what is left of them, whose film is shown to whom, and that the tower gets them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import SOFT_TOKENS, chat_folder

from vlmalign.data.films.altered import AlteredFilms, blank, border, cover, other_patients
from vlmalign.data.films.pixels import PixelReader, open_pixels


def film(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_blank_film_is_its_mean_grey():
    assert (blank(np.array([[0, 10], [20, 40]], np.uint8)) == 18).all()  # 17.5 rounds to even
    colours = film(5, 7, 3)
    found = blank(colours)
    assert found.dtype == np.uint8
    assert (found == np.rint(colours.mean(axis=(0, 1)))).all()


def test_of_a_border_the_frame_is_left():
    whole = film(20, 40)
    found = border(whole, 0.1)  # two pixels
    inside = np.zeros((20, 40), bool)
    inside[2:-2, 2:-2] = True
    assert (found[~inside] == whole[~inside]).all()
    assert (found[inside] == np.rint(whole.mean())).all()


def test_a_patch_is_covered_and_the_film_itself_is_left_alone():
    whole = film(8, 12)
    before = whole.copy()
    found = cover(whole, 0.25, 0.5, 0.5, 0.75)
    changed = np.zeros((8, 12), bool)
    changed[2:4, 6:9] = True
    assert (found[changed] == np.rint(whole.mean())).all()
    assert (found[~changed] == whole[~changed]).all()
    assert (whole == before).all()


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_films_are_of_another_patient_and_every_patient_is_shown(seed):
    patients = [f"P{number}" for number in np.random.default_rng(seed).integers(0, 9, 40)]
    shown = other_patients(patients, seed=seed)
    assert (shown == other_patients(patients, seed=seed)).all()
    partner = {}
    for own, place in zip(patients, shown, strict=True):
        assert own != patients[place]
        partner.setdefault(own, set()).add(patients[place])
    assert all(len(others) == 1 for others in partner.values())
    assert set.union(*partner.values()) == set(patients), "a derangement shows each patient to one other"


def test_the_films_of_one_patient_cannot_be_exchanged():
    with pytest.raises(ValueError, match="at least two patients, found 1"):
        other_patients(["a", "a"], seed=0)


def test_the_tower_gets_the_altered_film(tmp_path):
    """A grey film altered and read equals the altered film saved and read."""
    reader = open_pixels(chat_folder(), family="gemma3", image_tokens=SOFT_TOKENS)
    side = reader.recipe("any").height
    whole = film(side, side)
    Image.fromarray(whole).save(tmp_path / "whole.png")
    Image.fromarray(border(whole, 0.2)).save(tmp_path / "border.png")
    path = str(tmp_path / "whole.png")
    altered = AlteredFilms(reader, lambda key: (key, lambda film: border(film, 0.2)))
    assert isinstance(altered, PixelReader)
    (found,), (expected,), (before,) = (
        altered.read([path]),
        reader.read([str(tmp_path / "border.png")]),
        reader.read([path]),
    )
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, before)
    assert altered.grid(path) == reader.grid(path)
    assert Path(path).is_file()
