"""How the records of a run name images: from the run folder on, or from a folder that the config names.

So a record holds no path of the machine, and `reporting.image_places`, which reads the same config, finds the image again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from vlmalign.studies.engine.config import StudyConfig


def image_names(config: StudyConfig) -> Callable[[str | Path], str]:
    """From the path of an image to its name: relative to the run, or `sources.NAME/REST` and `stages.NAME.data/REST`,
    where the folder is that of the section's images. What lies in none of them keeps its path."""
    run = config.run.resolve()
    roots = sorted(
        ((name, config.place(folder).resolve()) for name, folder in _folders(config)),
        key=lambda root: -len(root[1].parts),  # the innermost first
    )

    def name(image: str | Path) -> str:
        path = Path(image).resolve()
        if path.is_relative_to(run):
            return path.relative_to(run).as_posix()
        for root, folder in roots:
            if path.is_relative_to(folder):
                return f"{root}/{path.relative_to(folder).as_posix()}"
        return str(image)

    return name


def _folders(config: StudyConfig) -> Iterator[tuple[str, Path]]:
    for name, section in config.sources.items():
        yield f"sources.{name}", section.folder
    for name, stage in config.trained.items():
        for place, data in stage.reads.items():
            if data.path is not None:
                yield f"stages.{name}.{place}", data.path.parent if data.images is None else data.images
