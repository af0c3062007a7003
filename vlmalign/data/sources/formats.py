"""The table of data set formats: the one place that names them all. A new format is one file and one line here."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from vlmalign.data.sources import chexpert, mimic, nih
from vlmalign.data.sources.films import Films

#: format -> reader: `reader(root, **options) -> Films`.
DATASETS = {
    "mimic-cxr-jpg": mimic.MimicCxrJpg,
    "chexpert": chexpert.CheXpert,
    "nih-cxr14": nih.Nih14,
    "nih-extract": nih.NihExtract,
}

#: format -> writer of an invented data set on disk: `writer(root, films=..., seed=..., **options) -> truth rows`.
WRITERS = {
    "mimic-cxr-jpg": mimic.write_synthetic,
    "chexpert": chexpert.write_synthetic,
    "nih-cxr14": nih.write_synthetic,
    "nih-extract": nih.write_synthetic_extract,
}


def open_dataset(format: str, root: str | Path, **options: Any) -> Films:
    """The data set at `root`, read as `format`; ValueError for an unknown format, FileNotFoundError for no root.

    `options` are those of the format's reader (split, views, on_bad, ...).
    """
    if format not in DATASETS:
        near = difflib.get_close_matches(format, DATASETS, n=2, cutoff=0.4)
        hint = f"nearest known: {', '.join(near)}" if near else f"known: {', '.join(DATASETS)}"
        raise ValueError(f"unknown data set format {format!r} ({hint})")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root} for a {format} data set")
    return DATASETS[format](root, **options)
