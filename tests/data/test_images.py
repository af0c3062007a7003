"""Decoding films: pixel formats, reduced decoding, and files that must be refused."""

import io

import numpy as np
import pytest
from PIL import Image

from vlmalign.data.films import images
from vlmalign.data.films.images import BadImage, load_image

RAMP = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)


def _save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_grey_rgb_rgba_and_16_bit_become_rgb(tmp_path):
    grey = (RAMP // 12).astype(np.uint8)
    rgb = np.stack([grey, grey[::-1], grey.T.copy().reshape(48, 64)], axis=2)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert (load_image(_save(tmp_path / "grey.png", grey)) == expected).all()
    assert (load_image(_save(tmp_path / "deep.png", RAMP * 21)) == ((RAMP * 21) >> 8)[:, :, None]).all()
    assert (load_image(_save(tmp_path / "rgb.png", rgb)) == rgb).all()
    alpha = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((48, 1), np.uint8)
    over_black = load_image(_save(tmp_path / "rgba.png", np.dstack([rgb, alpha])))
    assert (over_black[:, :32] == rgb[:, :32]).all()
    assert (over_black[:, 32:] == 0).all()
    for name in ("grey.png", "deep.png", "rgb.png", "rgba.png"):
        loaded = load_image(tmp_path / name)
        assert loaded.dtype == np.uint8
        assert loaded.shape == (48, 64, 3)


def test_jpeg_is_decoded_smaller_but_never_below_the_hint(tmp_path):
    smooth = np.add.outer(np.linspace(0, 120, 600), np.linspace(0, 120, 800)).astype(np.uint8)
    jpeg = _save(tmp_path / "film.jpg", smooth, quality=95)
    full = load_image(jpeg)
    assert full.shape == (600, 800, 3)
    for hint in (64, 75, 76, 150, 299, 300, 301, 600, 900, (150, 400), (300, 100)):
        small = load_image(jpeg, hint)
        height, width = hint if isinstance(hint, tuple) else (hint, hint)
        assert small.shape[0] >= min(height, 600)
        assert small.shape[1] >= min(width, 800)
    assert load_image(jpeg, 75).shape == (75, 100, 3)
    assert load_image(jpeg, 75).mean() == pytest.approx(full.mean(), abs=2)
    png = _save(tmp_path / "film.png", smooth)
    assert load_image(png, 75).shape == (600, 800, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated_files_are_refused_by_name(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    with pytest.raises(BadImage, match=r"cut\.img: unreadable"):
        load_image(path)
    with pytest.raises(BadImage, match=r"cut\.img: unreadable"):
        load_image(path, 24)


def test_other_files_are_refused(tmp_path, monkeypatch):
    text = tmp_path / "note.png"
    text.write_text("not an image")
    with pytest.raises(BadImage, match=r"note\.png"):
        load_image(text)
    with pytest.raises(BadImage, match=r"film\.gif"):
        load_image(_save(tmp_path / "film.gif", (RAMP // 12).astype(np.uint8)))
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        load_image(tmp_path / "absent.png")
    flipped = bytearray(_save(tmp_path / "bad.png", (RAMP // 12).astype(np.uint8)).read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "bad.png").write_bytes(bytes(flipped))
    with pytest.raises(BadImage, match=r"bad\.png"):
        load_image(tmp_path / "bad.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadImage, match="64 x 48 pixels, more than the limit"):
        load_image(_save(tmp_path / "big.png", (RAMP // 12).astype(np.uint8)))


def test_partial_loading_set_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(_save(tmp_path / "grey.png", (RAMP // 12).astype(np.uint8)))
