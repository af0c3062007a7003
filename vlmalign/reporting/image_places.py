"""Where the images are that the records of a run name: the other side of `studies.engine.image_names`.

sources/mimic/files/p10/a.jpg     in the run folder
sources.nih/images/1.png          in the folder of the study's source `nih`
stages.sft.data/1.png             in the folder of the images of a stage's own rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmalign.reporting.json_files import read_yaml


def image_places(run: Path) -> Callable[[str], Path]:
    """From the name of an image to its path; an absolute path stays as it is. A root in the config that is relative starts
    from the working directory, as it did when the study ran."""
    file = run / "study.yaml"
    study = read_yaml(file)[1] if file.is_file() else {}

    def place(name: str) -> Path:
        first, _, rest = name.partition("/")
        section: Any = study if rest else None
        for key in first.split("."):
            section = section.get(key) if isinstance(section, Mapping) else None
        folder = _folder(section) if isinstance(section, Mapping) else None
        return run / name if folder is None else Path(folder.replace("{run}", str(run))) / rest

    return place


def _folder(section: Mapping[str, Any]) -> str | None:
    """Where the images of a source or of rows lie, as their section says it."""
    if section.get("root") is not None:
        return str(section["root"])
    if section.get("images") is not None:
        return str(section["images"])
    return None if section.get("path") is None else str(Path(str(section["path"])).parent)
