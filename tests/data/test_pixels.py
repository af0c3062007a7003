"""Films reach the tower as transformers' own processor would hand them over."""

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import SIDE, chat_folder, processor

from vlmalign.data.images import BadImage
from vlmalign.data.pixels import open_pixels


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Wide, tall, already right, grey; PNG, since a JPEG may be decoded at a fraction of its size."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    paths = []
    for name, shape in {"wide": (20, 50, 3), "tall": (70, 33, 3), "right": (SIDE, SIDE, 3), "grey": (40, 40)}.items():
        paths.append(folder / f"{name}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def test_pixels_are_those_of_transformers(films):
    found = open_pixels(chat_folder())(films)
    assert found.shape == (4, 3, SIDE, SIDE)
    assert found.dtype == np.float32
    images = [Image.open(path).convert("RGB") for path in films]
    text = ["<start_of_image>" * len(images)]
    expected = processor()(text=text, images=[images], return_tensors="np")["pixel_values"]
    assert np.array_equal(found, expected.astype(np.float32))
    assert found.min() >= -1
    assert found.max() <= 1
    assert found.std() > 0.1


def test_order_and_batch_do_not_matter(films):
    read = open_pixels(chat_folder())
    assert np.array_equal(read(films[::-1])[::-1], read(films))
    assert np.array_equal(read(films[1:2])[0], read(films)[1])


def test_a_large_jpeg_stays_close(tmp_path):
    """Decoded at half or a quarter of its size and then resized: the same film within a few grey levels."""
    rows, columns = np.mgrid[0:200, 0:300]
    smooth = (127 + 80 * np.sin(rows / 40) * np.cos(columns / 50)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "film.jpg", quality=95)
    Image.fromarray(np.asarray(Image.open(tmp_path / "film.jpg"))).save(tmp_path / "film.png")
    jpeg, png = open_pixels(chat_folder())([tmp_path / "film.jpg", tmp_path / "film.png"])
    assert 0 < np.abs(jpeg - png).max() < 8 * 2 / 255


def test_a_damaged_film_is_named(films, tmp_path):
    (tmp_path / "cut.png").write_bytes(films[0].read_bytes()[:60])
    with pytest.raises(BadImage, match=r"cut\.png"):
        open_pixels(chat_folder())([films[1], tmp_path / "cut.png"])
