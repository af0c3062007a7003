"""Films as archives have them: turned, deep, in colour, transparent, in CMYK; right beside a reference, or refused."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_tokenizer import SOFT_TOKENS, chat_folder, processor
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image as transformers_image

from vlmalign.data.films import files
from vlmalign.data.films.depth import check_depth
from vlmalign.data.films.files import BadImage
from vlmalign.data.films.header import image_size
from vlmalign.data.films.images import load_image
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.films.resize import Recipe, entry_key, resize_film

NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
SMOOTH = (127 + 80 * np.sin(np.arange(1200)[:, None] / 90) * np.cos(np.arange(800) / 120)).astype(np.uint8)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return str(path)


def tagged(path, image, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, image, exif=exif, **options)


def with_chunk(path, kind, content, *, before_end=True):
    """Adds a chunk to a PNG, behind its pixels or right after its header."""
    data = path.read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    at = data.rindex(b"IEND") - 4 if before_end else 33
    path.write_bytes(data[:at] + chunk + data[at:])


def reference(path) -> np.ndarray:
    return np.asarray(transformers_image(str(path)))


# ---- orientation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(10))
def test_films_are_upright_as_transformers_has_them(tmp_path, suffix, orientation):
    path = tagged(tmp_path / f"film.{suffix}", NOISE[..., :3], orientation)
    expected = reference(path)
    assert np.array_equal(load_image(path), expected)
    assert image_size(path) == expected.shape[:2]
    assert expected.shape[:2] == ((56, 40) if 5 <= orientation <= 8 else (40, 56))


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_tag_is_found_wherever_it_stands(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    late, text, early = (tmp_path / f"{name}.png" for name in ("late", "text", "early"))
    for path in (late, text, early):
        save(path, NOISE[..., 0])
    with_chunk(late, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(orientation).encode()
    with_chunk(text, b"iTXt", xmp)
    with_chunk(early, b"iTXt", xmp, before_end=False)
    jpeg = save(tmp_path / "xmp.jpg", NOISE[..., 0], xmp=XMP.format(orientation).encode())
    for path in (late, text, early, jpeg):
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert image_size(path) == expected.shape[:2]
        assert np.array_equal(load_image(path), expected)
        assert not np.array_equal(expected, np.asarray(Image.open(path).convert("RGB")))


def test_a_plain_png_is_not_decoded_for_its_size(tmp_path, monkeypatch):
    path = save(tmp_path / "film.png", NOISE[..., 0])
    with_chunk(tmp_path / "film.png", b"tEXt", b"Comment\0nothing of interest")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path) == (40, 56)


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_reduced_decoding_of_a_turned_jpeg(tmp_path, orientation):
    """The hint is of the upright film: 300 x 300 of a film of 1200 x 800 is a quarter, upright or not."""
    path = tagged(tmp_path / "film.jpg", SMOOTH, orientation, quality=95)
    full, small = load_image(path), load_image(path, (300, 200) if orientation == 1 else (200, 300))
    assert small.shape[:2] == (full.shape[0] // 4, full.shape[1] // 4)
    block = full[..., 0].reshape(small.shape[0], 4, small.shape[1], 4).mean((1, 3))
    assert np.abs(small[..., 0] - block).max() < 3
    wide = (600, 100) if orientation == 1 else (100, 600)
    assert load_image(path, wide).shape[:2] == (full.shape[0] // 2, full.shape[1] // 2)


def test_damaged_exif_says_nothing(tmp_path):
    for exif in (b"II nonsense", b"II*\0\xff\0\0\0", b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0"):
        path = save(tmp_path / "film.jpg", NOISE[..., 0], exif=b"Exif\0\0" + exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the damage
            assert np.array_equal(load_image(path), reference(path))
            assert image_size(path) == (40, 56)
    save(tmp_path / "text.png", NOISE[..., 0])
    with_chunk(tmp_path / "text.png", b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno hex")
    for use in (load_image, image_size):
        with pytest.raises(BadImage, match=r"text\.png: unreadable image \(non-hex"):
            use(tmp_path / "text.png")


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_turned_films_reach_the_tower_as_the_processor_has_them(tmp_path, family):
    path = tagged(tmp_path / "film.png", NOISE[..., :3], 6)
    if family == "gemma3":
        reader = open_pixels(chat_folder(), family=family, image_tokens=SOFT_TOKENS, exact=True)
        expected = processor()(text=["<start_of_image>"], images=[[transformers_image(path)]], return_tensors="np")
        assert np.array_equal(reader.read([path])[0], expected["pixel_values"][0].astype(np.float32))
        return
    settings = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 24 * 28**2})
    settings.save_pretrained(tmp_path)
    reader = open_pixels(tmp_path, family=family, image_tokens=None, exact=True)
    expected = settings(transformers_image(path), return_tensors="np")
    (found,) = reader.read([path])
    assert np.array_equal(found.values, expected["pixel_values"])
    assert [[1, found.rows, found.columns]] == expected["image_grid_thw"].tolist()
    grid = reader.grid(path)
    assert (2 * grid.rows, 2 * grid.columns) == (found.rows, found.columns)


# ---- colour and depth ---------------------------------------------------------------------------------------------


def test_colour_models_are_those_of_transformers(tmp_path):
    rgb = Image.fromarray(NOISE[..., :3])
    images = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "one_bit.png": rgb.convert("1"),
        "grey.jpg": rgb.convert("L"),
        "colour.png": rgb,
    }
    for name, image in images.items():
        path = save(tmp_path / name, image)
        assert np.array_equal(load_image(path), reference(path)), name


def test_transparency_is_laid_over_black(tmp_path):
    grey, alpha = NOISE[..., 0], NOISE[..., 3]
    path = save(tmp_path / "la.png", Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))))
    exact = grey.astype(float) * alpha / 255
    assert np.abs(load_image(path)[..., 0] - exact).max() <= 1
    clear = save(tmp_path / "key.png", Image.fromarray(grey), transparency=int(grey[0, 0]))
    assert (load_image(clear)[..., 0] == np.where(grey == grey[0, 0], 0, grey)).all()


DEEP = np.random.default_rng(1).integers(0, 2**16, (40, 56), dtype=np.uint16)


def test_the_bits_of_deep_grey(tmp_path):
    for bits in (9, 10, 12, 14, 16):
        levels = DEEP >> (16 - bits)
        path = save(tmp_path / f"{bits}.png", levels)
        assert np.array_equal(load_image(path, bits=bits)[..., 0], levels >> (bits - 8))
        assert load_image(path, bits=bits).max() == 255
        if bits < 16:
            with pytest.raises(BadImage, match=rf"{bits}\.png: a grey level of \d+, more than {bits - 1} bits hold"):
                load_image(path, bits=max(bits - 1, 8))
    turned = tagged(tmp_path / "turned.png", DEEP, 6)
    assert np.array_equal(load_image(turned)[..., 0], np.rot90(DEEP >> 8, -1))
    grey = save(tmp_path / "grey.png", NOISE[..., 0])
    assert np.array_equal(load_image(grey, bits=12), load_image(grey))  # 8 bits are 8 bits


def deep_colour(path, levels):
    """A PNG of 16-bit RGB, which Pillow does not write."""
    height, width = levels.shape
    rows = np.repeat(levels[..., None], 3, 2).astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return str(path)


def test_deep_colour(tmp_path):
    path = deep_colour(tmp_path / "colour.png", DEEP)
    assert np.array_equal(load_image(path), np.repeat((DEEP >> 8)[..., None], 3, 2))
    with pytest.raises(BadImage, match=r"colour\.png: 16-bit colour .* as 12 bits"):
        load_image(path, bits=12)


def test_a_set_that_uses_twelve_of_sixteen_bits_is_refused(tmp_path):
    grey = save(tmp_path / "grey.png", NOISE[..., 0])
    jpeg = save(tmp_path / "grey.jpg", NOISE[..., 0])
    dark = save(tmp_path / "dark.png", DEEP >> 5)
    low = save(tmp_path / "low.png", DEEP >> 4)
    high = save(tmp_path / "high.png", np.full((4, 4), 4096, np.uint16))
    check_depth([grey, jpeg])
    check_depth([grey, dark, low, high])
    check_depth([grey, dark, low], bits=12)
    check_depth([])
    with pytest.raises(ValueError, match=r"dark\.png: a film of 16 bits, .* above 4095: .*bits to 12"):
        check_depth([grey, dark, jpeg, low])
    colour, black = deep_colour(tmp_path / "colour.png", DEEP), deep_colour(tmp_path / "black.png", DEEP >> 4)
    check_depth([black, colour])
    with pytest.raises(ValueError, match=r"black\.png: a film of 16 bits"):
        check_depth([black])
    with pytest.raises(FileNotFoundError, match="absent"):
        check_depth([tmp_path / "absent.png"])


def test_bits_belong_to_folders(tmp_path):
    """Readers and their cache know a source's bits by where its films lie."""
    for name in ("ours", "ours/deeper", "ours2"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "film.png", DEEP >> 4)
    paths = [str(tmp_path / name / "film.png") for name in ("ours", "ours/deeper", "ours2")]
    bits = {tmp_path / "ours": 12, tmp_path / "ours" / "deeper": 14}
    for _ in range(2):  # the second time from the cache
        reader = open_pixels(
            chat_folder(), family="gemma3", image_tokens=SOFT_TOKENS, bits=bits, cache=tmp_path / "cache"
        )
        assert [reader.recipe(path).bits for path in paths] == [12, 14, 16]
        means = [float(pixels.mean()) for pixels in reader.read(paths)]
        expected = [load_image(path, bits=n).mean() / 127.5 - 1 for path, n in zip(paths, (12, 14, 16), strict=True)]
        assert np.allclose(means, expected, atol=0.02)


def test_the_cache_key_tells_bits_and_turns_apart(tmp_path):
    plain, turned = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP).save(plain, "PNG")
    Image.fromarray(DEEP).save(turned, "PNG", exif=exif)
    recipe = Recipe(20, 28, 2, reduce=True)
    asked = [(plain, recipe), (plain, recipe._replace(bits=14)), (turned, recipe)]
    assert len({entry_key(file.getvalue(), r) for file, r in asked}) == 3
    assert not np.array_equal(*(resize_film(file.getvalue(), "film", recipe) for file in (plain, turned)))


# ---- files --------------------------------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to("circle.png")
    for use in (load_image, image_size):
        for name in ("pipe.png", "folder.png", "/dev/zero"):
            with pytest.raises(BadImage, match="no regular file"):
                use(tmp_path / name)
        with pytest.raises(BadImage, match=r"circle\.png: unreadable image \(Too many levels"):
            use(tmp_path / "circle.png")


def test_reasons_say_what_the_file_is(tmp_path, monkeypatch):
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "page.png").write_text("<html>")
    for use in (load_image, image_size):
        with pytest.raises(BadImage, match=r"Git LFS pointer .*git lfs pull"):
            use(tmp_path / "pointer.png")
        with pytest.raises(BadImage, match=r"page\.png: unreadable image \(it is no JPEG, PNG or DICOM file\)"):
            use(tmp_path / "page.png")
    monkeypatch.setattr(files, "MAX_BYTES", 5)
    with pytest.raises(BadImage, match="6 bytes, more than the limit 5"):
        image_size(tmp_path / "page.png")
