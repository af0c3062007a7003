"""Films reach the tower as transformers' own processor would hand them over, and their grids are known beforehand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizer import SIDE, SOFT_TOKENS, chat_folder, processor
from transformers import Qwen2VLImageProcessorPil

from vlmalign.data.films.images import BadImage
from vlmalign.data.films.pixels import PixelReader, image_size, open_pixels
from vlmalign.types import Grid

#: limits on the pixels of a film: 4 and 24 soft tokens of 28 x 28
LEAST, MOST = 4 * 28**2, 24 * 28**2
SHAPES = {
    "wide": (60, 150, 3),
    "tall": (170, 33, 3),
    "right": (SIDE, SIDE, 3),
    "grey": (140, 140),
    "tiny": (9, 20, 3),
    "huge": (400, 310, 3),
    "strip": (5, 900, 3),
    "half": (42, 70, 3),  # 1.5 and 2.5 soft tokens: rounded to even
}


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, str]:
    """PNG, since a JPEG may be decoded at a fraction of its size."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    paths = {}
    for name, shape in SHAPES.items():
        paths[name] = str(folder / f"{name}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[name])
    return paths


def settings(folder, **size) -> dict:
    """Writes the image settings of Qwen2.5-VL as its hub folder has them."""
    text = Qwen2VLImageProcessorPil().to_dict()
    text = {k: v for k, v in text.items() if k not in ("size", "min_pixels", "max_pixels")} | size
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(text))
    return text


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    settings(folder, min_pixels=LEAST, max_pixels=MOST)
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_folder) -> PixelReader:
    return open_pixels(qwen_folder, family="qwen2_5_vl", image_tokens=None)


@pytest.fixture(scope="module")
def gemma() -> PixelReader:
    return open_pixels(chat_folder(), family="gemma3", image_tokens=SOFT_TOKENS)


def plain_qwen(path, size=None):
    """transformers' processor, called as its documentation says."""
    size = size or {"shortest_edge": LEAST, "longest_edge": MOST}
    return Qwen2VLImageProcessorPil(size=size)(Image.open(path), return_tensors="np")


def test_gemma_pixels_are_those_of_transformers(gemma, films):
    found = gemma.read(list(films.values()))
    images = [Image.open(path).convert("RGB") for path in films.values()]
    text = ["<start_of_image>" * len(images)]
    expected = processor()(text=text, images=[images], return_tensors="np")["pixel_values"]
    assert np.array_equal(np.stack(found), expected.astype(np.float32))
    assert {(x.shape, x.dtype.name) for x in found} == {((3, SIDE, SIDE), "float32")}
    assert min(x.min() for x in found) >= -1
    assert max(x.max() for x in found) <= 1
    assert np.stack(found).std() > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_qwen_patches_are_those_of_transformers(qwen, films, name):
    """Values, patch order and grid, exactly; the grid known from the header agrees."""
    expected = plain_qwen(films[name])
    (found,) = qwen.read([films[name]])
    assert np.array_equal(found.values, expected["pixel_values"])
    assert found.values.dtype == np.float32
    assert [[1, found.rows, found.columns]] == expected["image_grid_thw"].tolist()
    assert qwen.grid(films[name]) == Grid(found.rows // 2, found.columns // 2)
    assert 4 * qwen.grid(films[name]).tokens == len(found.values)


def test_qwen_grids_by_hand(qwen, films):
    """28 pixels a soft token, 4 to 24 of them, shape kept as far as that allows."""
    grids = {name: tuple(qwen.grid(films[name])) for name in ("wide", "grey", "tiny", "half", "right")}
    # grey: 5 x 5 would be 25; shrunk to 24 that is 4.9 x 4.9.
    assert grids == {"wide": (2, 5), "grey": (4, 4), "tiny": (2, 3), "half": (2, 2), "right": (2, 2)}


def test_gemma_grid_is_a_square_and_opens_no_file(gemma):
    assert gemma.grid("no such film") == Grid(2, 2)
    assert gemma.grid("no such film").tokens == SOFT_TOKENS


@pytest.mark.parametrize("family", ["gemma", "qwen"])
def test_order_and_batch_do_not_matter(request, films, family):
    reader = request.getfixturevalue(family)
    names = ["wide", "tall", "grey"]
    values = [x if isinstance(x, np.ndarray) else x.values for x in reader.read([films[n] for n in names])]
    for name, value in zip(names[::-1], values[::-1], strict=True):
        (alone,) = reader.read([films[name]])
        assert np.array_equal(alone if isinstance(alone, np.ndarray) else alone.values, value)
    assert reader.read([]) == []


def test_the_grid_is_read_once_and_from_the_header(qwen_folder, films, tmp_path):
    reader = open_pixels(qwen_folder, family="qwen2_5_vl", image_tokens=None)
    path = tmp_path / "film.png"
    whole = Path(films["wide"]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the header is there, the pixels are not
    first = reader.grid(str(path))
    path.unlink()
    assert reader.grid(str(path)) == first == Grid(2, 5)


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [
        ({"min_pixels": LEAST, "max_pixels": MOST}, 24),
        ({"size": {"shortest_edge": LEAST, "longest_edge": MOST}}, 24),
        # Files of transition have both: transformers lets min_pixels and max_pixels win.
        ({"min_pixels": LEAST, "max_pixels": MOST, "size": {"shortest_edge": 1, "longest_edge": LEAST}}, 24),
        ({"size": {"shortest_edge": LEAST, "longest_edge": 12 * 28**2}}, 12),
    ],
    ids=["old", "new", "both", "smaller"],
)
def test_limits_of_old_and_new_folders(films, tmp_path, sizes, tokens):
    settings(tmp_path, **sizes)
    reader = open_pixels(tmp_path, family="qwen2_5_vl", image_tokens=None)
    grid = reader.grid(films["huge"])
    assert grid.tokens <= tokens
    assert (grid.rows + 1) * (grid.columns + 1) > tokens
    limits = {"shortest_edge": LEAST, "longest_edge": tokens * 28**2}
    expected = plain_qwen(films["huge"], limits)["pixel_values"]
    assert np.array_equal(reader.read([films["huge"]])[0].values, expected)


def smooth_film(folder, height=1003, width=701):
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = (127 + 80 * np.sin(rows / 90) * np.cos(columns / 120)).astype(np.uint8)
    Image.fromarray(smooth).save(folder / "film.jpg", quality=95)
    return str(folder / "film.jpg")


def test_a_large_jpeg_stays_close_and_exact_is_exact(tmp_path, qwen_folder):
    """Decoded at a fraction of its size and then resized: the same film within a few grey levels, the same grid."""
    jpeg = smooth_film(tmp_path)
    image = Image.open(jpeg).convert("RGB")
    square = processor()(text=["<start_of_image>"], images=[[image]], return_tensors="np")["pixel_values"][0]
    for folder, family, tokens, expected, levels in (
        (chat_folder(), "gemma3", SOFT_TOKENS, square, 2 / 255),
        (qwen_folder, "qwen2_5_vl", None, plain_qwen(jpeg)["pixel_values"], 1 / 255 / 0.26),
    ):
        quick, exact = (open_pixels(folder, family=family, image_tokens=tokens, exact=e) for e in (False, True))
        (a,), (b,) = quick.read([jpeg]), exact.read([jpeg])
        assert quick.grid(jpeg) == exact.grid(jpeg)
        a, b = (x if isinstance(x, np.ndarray) else x.values for x in (a, b))
        assert np.array_equal(b, expected)
        assert 0 < np.abs(a - b).max() < 8 * levels


def test_reduced_decoding_never_changes_the_grid(tmp_path):
    """Sizes at which the halved film, left to itself, would be cut into another number of patches."""
    settings(tmp_path, min_pixels=LEAST, max_pixels=60 * 28**2)
    reader = open_pixels(tmp_path, family="qwen2_5_vl", image_tokens=None)
    rng = np.random.default_rng(1)
    for i in range(30):
        height, width = (int(n) for n in rng.integers(300, 1200, 2))
        path = str(tmp_path / f"{i}.jpg")
        Image.fromarray(np.full((height, width), 9, np.uint8)).save(path)
        (found,) = reader.read([path])
        expected = Qwen2VLImageProcessorPil(size={"shortest_edge": LEAST, "longest_edge": 60 * 28**2})
        assert found.rows * found.columns == expected.get_number_of_image_patches(height, width)
        assert (found.rows // 2, found.columns // 2) == reader.grid(path)


def test_a_film_too_long_for_patches_is_named(qwen, tmp_path):
    path = str(tmp_path / "line.png")
    Image.fromarray(np.zeros((4, 804), np.uint8)).save(path)
    for use in (qwen.grid, lambda key: qwen.read([key])):
        with pytest.raises(BadImage, match=r"line\.png: 804 x 4 pixels .*aspect ratio"):
            use(path)


@pytest.mark.parametrize("family", ["gemma", "qwen"])
def test_damaged_and_missing_films_are_named(request, films, tmp_path, family):
    reader = request.getfixturevalue(family)
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(films["wide"]).read_bytes()[:60])
    with pytest.raises(BadImage, match=r"cut\.png"):
        reader.read([films["tall"], str(cut)])
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        reader.read([str(tmp_path / "absent.png")])


def test_the_header_alone(films, tmp_path):
    assert image_size(films["wide"]) == (60, 150)
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(BadImage, match=r"note\.png"):
        image_size(tmp_path / "note.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        image_size(tmp_path / "absent.png")


def test_settings_that_do_not_fit(tmp_path, qwen_folder):
    with pytest.raises(ValueError, match="no rule for the pixels of family 'llama'; known: gemma3, qwen2_5_vl"):
        open_pixels(qwen_folder, family="llama", image_tokens=None)
    for tokens in (None, 0, 8):
        with pytest.raises(ValueError, match="square of a whole number, such as 256, found"):
            open_pixels(chat_folder(), family="gemma3", image_tokens=tokens)
    # What transformers itself only notices at the first film.
    settings(tmp_path / "old", size={"min_pixels": LEAST, "max_pixels": MOST})
    with pytest.raises(ValueError, match="found None and None"):
        open_pixels(tmp_path / "old", family="qwen2_5_vl", image_tokens=None)
    settings(tmp_path / "swapped", min_pixels=MOST, max_pixels=LEAST)
    with pytest.raises(ValueError, match="min_pixels <= max_pixels"):
        open_pixels(tmp_path / "swapped", family="qwen2_5_vl", image_tokens=None)
    settings(tmp_path / "bare", min_pixels=LEAST, max_pixels=MOST, do_resize=False)
    with pytest.raises(ValueError, match="do_resize is false"):
        open_pixels(tmp_path / "bare", family="qwen2_5_vl", image_tokens=None)
    crops = tmp_path / "crops"
    shutil.copytree(chat_folder(), crops)
    text = json.loads((crops / "processor_config.json").read_text())
    text["image_processor"]["do_pan_and_scan"] = True
    (crops / "processor_config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="do_pan_and_scan"):
        open_pixels(crops, family="gemma3", image_tokens=SOFT_TOKENS)
