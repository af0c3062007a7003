"""DICOM films: rescale, VOI and inversion beside pydicom and the standard's own formulas, and what must be refused."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from PIL import Image  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from vlmalign.data.films import images  # noqa: E402
from vlmalign.data.films.depth import check_depth  # noqa: E402
from vlmalign.data.films.files import BadImage  # noqa: E402
from vlmalign.data.films.header import image_size  # noqa: E402
from vlmalign.data.films.images import load_image  # noqa: E402
from vlmalign.data.films.resize import Recipe, entry_key, resize_film  # noqa: E402

STORED = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
STORED[0, :2] = 0, 4095


def film(stored=STORED, *, bits=12, syntax=ExplicitVRLittleEndian, **elements) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PatientName = "Secret^Patient"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    dataset.BitsAllocated = 8 * stored.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def write(path, dataset) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return str(path)


def grey(path) -> np.ndarray:
    found = load_image(path)
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()
    return found[..., 0].astype(int)


def level(share) -> np.ndarray:
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(int)


WINDOWS = {
    "linear": {"WindowCenter": 2000, "WindowWidth": 1500},
    "exact": {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
    "several": {"WindowCenter": [2000, 40], "WindowWidth": [1500, 80]},
    "rescaled": {"WindowCenter": 100, "WindowWidth": 700, "RescaleSlope": 0.5, "RescaleIntercept": -1000},
    "wider than the data": {"WindowCenter": 2048, "WindowWidth": 8000},
    "one": {"WindowCenter": 2000, "WindowWidth": 1},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_those_of_the_standard(tmp_path, name):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and .2, and pydicom's own."""
    elements = WINDOWS[name]
    path = write(tmp_path / "film.dcm", film(**elements))
    values = STORED * float(elements.get("RescaleSlope", 1)) + float(elements.get("RescaleIntercept", 0))
    center, width = (float(np.atleast_1d(elements[key])[0]) for key in ("WindowCenter", "WindowWidth"))
    function = elements.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(-4 * (values - center) / width))
    elif function == "LINEAR_EXACT":
        share = np.clip((values - center) / width + 0.5, 0, 1)
    else:
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
        share = np.where(values <= low, 0, np.where(values > high, 1, (values - low) / max(width - 1, 1)))
    assert np.abs(grey(path) - 255 * share).max() <= 0.5 + 1e-9
    dataset = pydicom.dcmread(path)
    theirs = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    slope, intercept = float(elements.get("RescaleSlope", 1)), float(elements.get("RescaleIntercept", 0))
    assert np.abs(grey(path) - 255 * (theirs - intercept) / (4095 * slope)).max() <= 0.5 + 1e-6


def test_inversion_comes_last(tmp_path):
    for elements in (WINDOWS["linear"], WINDOWS["rescaled"], {}):
        plain = grey(write(tmp_path / "plain.dcm", film(**elements)))
        inverted = grey(write(tmp_path / "inverted.dcm", film(PhotometricInterpretation="MONOCHROME1", **elements)))
        assert np.abs(inverted - (255 - plain)).max() <= 1  # halves are rounded up on either side
        assert plain.std() > 40


def test_without_a_window_the_whole_range_is_shown(tmp_path):
    stored = (STORED // 8 + 100).astype(np.uint16)  # 100 to 611 of 65,535
    path = write(tmp_path / "film.dcm", film(stored, bits=16))
    assert np.array_equal(grey(path), level((stored - 100.0) / 511))
    check_depth([path])  # nothing to say about bits
    even = write(tmp_path / "even.dcm", film(np.full((4, 4), 7, np.uint16)))
    assert (grey(even) == 0).all()


def test_padding_is_black_and_does_not_count(tmp_path):
    stored = STORED.astype(np.int16)
    stored[:, :5], stored[:, 5] = -2000, -1990
    inside = stored[:, 6:].astype(float)
    share = (inside - inside.min()) / (inside.max() - inside.min())
    for photometric, expected in (("MONOCHROME2", level(share)), ("MONOCHROME1", level(1 - share))):
        elements = {
            "PixelPaddingValue": -2000,
            "PixelPaddingRangeLimit": -1990,
            "PhotometricInterpretation": photometric,
        }
        found = grey(write(tmp_path / "film.dcm", film(stored, bits=16, **elements)))
        assert (found[:, :6] == 0).all()
        assert np.array_equal(found[:, 6:], expected)


def test_look_up_tables(tmp_path):
    """A VOI table wins over a window; a modality table replaces the rescale."""
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    curve = (1023 * (np.arange(4096) / 4095) ** 2).astype(np.uint16)
    table.LUTData = curve.tobytes()
    path = write(tmp_path / "voi.dcm", film(VOILUTSequence=[table], **WINDOWS["linear"]))
    expected = curve[STORED].astype(float) / 1023
    assert np.array_equal(grey(path), level(expected))
    table.ModalityLUTType, table.LUTDescriptor = "US", [4096, 0, 16]
    path = write(tmp_path / "modality.dcm", film(ModalityLUTSequence=[table], WindowCenter=512, WindowWidth=1024))
    values = curve[STORED].astype(float)
    assert np.array_equal(grey(path), level((values - 511.5) / 1023 + 0.5))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_grey_of_8_bits_and_colour(tmp_path, syntax):
    stored = (STORED // 16).astype(np.uint8)
    path = write(tmp_path / "grey.dcm", film(stored, bits=8, syntax=syntax, WindowCenter=128, WindowWidth=256))
    assert np.array_equal(grey(path), stored)
    colour = np.dstack([stored, stored[::-1], 255 - stored])
    assert np.array_equal(load_image(write(tmp_path / "rgb.dcm", film(colour, bits=8, syntax=syntax))), colour)
    deep = np.dstack([STORED] * 3)
    with pytest.raises(BadImage, match=r"deep\.dcm: DICOM pixels RGB of 16 bits"):
        load_image(write(tmp_path / "deep.dcm", film(deep)))


def test_compression(tmp_path):
    """RLE and baseline JPEG need no plug-in; lossless JPEG does, and its name is in the message."""
    plain = grey(write(tmp_path / "plain.dcm", film(**WINDOWS["linear"])))
    packed = film(**WINDOWS["linear"])
    packed.compress(RLELossless)
    assert np.array_equal(grey(write(tmp_path / "rle.dcm", packed)), plain)

    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    dataset = film(smooth, bits=8, syntax=JPEGBaseline8Bit, WindowCenter=128, WindowWidth=256)
    dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR = "OB"
    found = grey(write(tmp_path / "jpeg.dcm", dataset))
    assert np.array_equal(found, np.asarray(Image.open(buffer)))

    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    path = write(tmp_path / "lossless.dcm", dataset)
    with pytest.raises(
        BadImage, match=r"lossless\.dcm: DICOM compressed as JPEG Lossless, .* not installed: .*pylibjpeg"
    ):
        load_image(path)


def test_what_is_no_film_is_refused(tmp_path, monkeypatch):
    report = film()
    del report.PixelData
    frames = film(np.concatenate([STORED, STORED]))
    frames.Rows, frames.NumberOfFrames = 20, 2
    palette = film(PhotometricInterpretation="PALETTE COLOR")
    cases = {
        "without pixels": report,
        "2 frames in one": frames,
        "pixels PALETTE COLOR": palette,
        "deflated DICOM": film(syntax=DeflatedExplicitVRLittleEndian),
        "unreadable DICOM film .*SQUARE": film(WindowCenter=1, WindowWidth=9, VOILUTFunction="SQUARE"),
        "unreadable DICOM film .*width 0": film(WindowCenter=1, WindowWidth=0),
    }
    for said, dataset in cases.items():
        with pytest.raises(BadImage, match=rf"film\.dcm: .*{said}"):
            load_image(write(tmp_path / "film.dcm", dataset))
    whole = (tmp_path / "whole.dcm").read_bytes() if write(tmp_path / "whole.dcm", film()) else b""
    for share in (0.2, 0.6, 0.95):
        (tmp_path / "cut.dcm").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadImage, match=r"cut\.dcm: .*DICOM") as caught:
            load_image(tmp_path / "cut.dcm")
        assert "Secret" not in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(BadImage, match="30 x 20 pixels, more than the limit 599"):
        load_image(tmp_path / "whole.dcm")


def test_sizes_and_resizing(tmp_path):
    path = write(tmp_path / "film", film(**WINDOWS["linear"]))  # told by its content, not by its name
    assert image_size(path) == (20, 30)
    data = (tmp_path / "film").read_bytes()
    small = resize_film(data, path, Recipe(10, 15, Image.Resampling.BILINEAR, reduce=True, source=(20, 30)))
    expected = Image.fromarray(grey(path).astype(np.uint8)).resize((15, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(small, np.asarray(expected))
    with pytest.raises(BadImage, match="30 x 20 pixels, but 20 x 20 when it was looked at before"):
        resize_film(data, path, Recipe(10, 15, 2, reduce=True, source=(20, 20)))
    (tmp_path / "bare.dcm").write_bytes(data[:140])
    with pytest.raises(BadImage, match=r"bare\.dcm: .*DICOM"):
        image_size(tmp_path / "bare.dcm")


def test_the_cache_knows_the_version_of_pydicom(tmp_path, monkeypatch):
    data = (tmp_path / "film.dcm").read_bytes() if write(tmp_path / "film.dcm", film()) else b""
    recipe = Recipe(10, 15, 2, reduce=True)
    before = entry_key(data, recipe)
    monkeypatch.setattr("vlmalign.data.films.resize.decoder_versions", lambda: ("0.0",))
    assert entry_key(data, recipe) != before


def test_without_pydicom_the_extra_is_named(tmp_path):
    path = write(tmp_path / "film.dcm", film())
    program = (
        "import sys; sys.modules['pydicom'] = None\n"
        "from vlmalign.data.films.images import load_image\n"
        "try: load_image(sys.argv[1])\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert 'film.dcm: a DICOM film, which needs pydicom; pip install "vlmalign[dicom]"' in done.stdout
