"""DICOM films to 8 bits a channel: modality rescale, then VOI (look-up table or window), then MONOCHROME1 inverted.

Only the elements that describe the pixels are read, so nothing about the patient can reach a message. pydicom is an
extra (`pip install "vlmalign[dicom]"`) and is imported when the first such film is met.
"""

from __future__ import annotations

import importlib.metadata
import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from vlmalign.data.films.files import BadImage

#: bytes until the end of the mark that says DICOM
PREAMBLE = 132
_TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
]  # fmt: skip
_DEFLATED = b"1.2.840.10008.1.2.1.99"
#: packages whose versions may change a pixel
_DECODERS = ("pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm")

Found = TypeVar("Found")


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes is DICOM (a preamble of 128 bytes, then the mark)."""
    return head[PREAMBLE - 4 : PREAMBLE] == b"DICM"


def dicom_size(file: BinaryIO, name: str | Path) -> tuple[int, int]:
    """(height, width) in pixels; BadImage naming the film where the header does not say."""

    def read(pydicom: Any) -> tuple[int, int]:
        _refuse_deflated(file.read(), name)
        file.seek(0)
        dataset = pydicom.dcmread(file, specific_tags=["Rows", "Columns"], stop_before_pixels=True)
        return int(dataset.Rows), int(dataset.Columns)

    return _attempt(name, read)


def decode_dicom(data: bytes, name: str | Path, *, max_pixels: int) -> Image.Image:
    """The film in Pillow's mode "L" or "RGB".

    Grey values are rescaled, then taken through the first VOI look-up table or the first window; without either, from
    their least to their greatest value. Padding is black. Colour must have 8 bits a channel.

    Raises:
        BadImage: naming the film: several frames, palettes, a compression whose plug-in is not installed, damage.
    """

    def read(pydicom: Any) -> Image.Image:
        _refuse_deflated(data, name)
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=_TAGS)
        if "PixelData" not in dataset:
            raise BadImage(f"{name}: a DICOM file without pixels (PixelData); this is no film")
        if dataset.Rows * dataset.Columns > max_pixels:
            raise BadImage(f"{name}: {dataset.Columns} x {dataset.Rows} pixels, more than the limit {max_pixels}")
        if (frames := int(dataset.get("NumberOfFrames") or 1)) != 1:
            raise BadImage(f"{name}: {frames} frames in one DICOM file; write each film to a file of its own")
        _require_plug_in(dataset, name)
        stored = pydicom.pixels.pixel_array(dataset)
        return Image.fromarray(_levels(dataset, stored, name))

    return _attempt(name, read)


@cache
def decoder_versions() -> tuple[str | None, ...]:
    """Versions whose change might change a pixel of a DICOM film; None for what is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return tuple(map(version, _DECODERS))


def _attempt(name: str | Path, read: Callable[[Any], Found]) -> Found:
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise BadImage(f'{name}: a DICOM film, which needs pydicom; pip install "vlmalign[dicom]"') from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote values of the file
        try:
            return read(pydicom)
        except BadImage:
            raise
        except Exception as error:  # of whatever type: pydicom parses lazily, so damage shows anywhere
            kind = type(error).__name__
            raise BadImage(f"{name}: unreadable DICOM film ({kind}: {error}); restore the file or skip it") from error


def _refuse_deflated(data: bytes, name: str | Path) -> None:
    # pydicom inflates such a file whole, without a limit, and a small one can unpack to gigabytes.
    if _DEFLATED in data:
        raise BadImage(f"{name}: deflated DICOM (transfer syntax {_DEFLATED.decode()}); write it uncompressed")


def _require_plug_in(dataset: Any, name: str | Path) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise BadImage(f"{name}: DICOM compressed as {syntax.name}, which pydicom cannot decode") from None
    if not decoder.is_available:
        needs = "; or ".join(decoder.missing_dependencies)
        raise BadImage(f"{name}: DICOM compressed as {syntax.name}, whose plug-in is not installed: {needs}")


def _levels(dataset: Any, stored: np.ndarray, name: str | Path) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3]."""
    kind = dataset.PhotometricInterpretation
    if stored.ndim == 3 and stored.dtype == np.uint8 and kind.startswith(("RGB", "YBR")):
        return stored  # YBR has become RGB by now
    if stored.ndim != 2 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadImage(
            f"{name}: DICOM pixels {kind} of {dataset.BitsAllocated} bits; expected MONOCHROME1, MONOCHROME2, or colour "
            "of 8 bits a channel"
        )
    padding = _padding(dataset, stored)
    shares = np.clip(_shares(dataset, stored, padding), 0, 1)
    shares = 1 - shares if kind == "MONOCHROME1" else shares
    return np.floor(np.where(padding, 0, shares) * 255 + 0.5).astype(np.uint8)


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """bool [height, width]: pixels outside the film."""
    if (first := dataset.get("PixelPaddingValue")) is None:
        return np.zeros(stored.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _shares(dataset: Any, stored: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """float64 [height, width]: each pixel's place between the darkest (0) and the brightest (1) that is shown, or beyond."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, dataset).astype(np.float64)
    if tables := dataset.get("VOILUTSequence"):
        return apply_voi(values, dataset) / (2.0 ** tables[0].LUTDescriptor[2] - 1)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        center, width = (float(np.atleast_1d(dataset[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
        return _window(values, center, width, dataset.get("VOILUTFunction") or "LINEAR")
    shown = values[~padding] if not padding.all() else values
    least, greatest = shown.min(), shown.max()
    return (values - least) / max(greatest - least, 1e-12)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Not cut off at 0 and 1: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    if function == "LINEAR" and width >= 1:
        if width == 1:
            return (values > center - 0.5).astype(np.float64)
        return (values - (center - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT" and width > 0:
        return (values - center) / width + 0.5
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    raise ValueError(f"VOILUTFunction {function} with a window of width {width:g}")
