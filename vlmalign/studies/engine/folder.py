"""The run folder itself: whose it is, what is written into it once, and what is moved aside in it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from vlmalign.config import dump_config
from vlmalign.machine import environment_record, matmul_rate
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import Hashes, read_json, write_json, write_whole
from vlmalign.studies.engine.graph import Node
from vlmalign.studies.engine.owner import TOUCH_SECONDS, Owners
from vlmalign.studies.engine.record import BEGUN, MADE

STUDY, ENVIRONMENT, HASHES, SET_ASIDE = "study.yaml", "environment.json", ".hashes.json", "set-aside"


def check_folder(config: StudyConfig, nodes: Mapping[str, Node]) -> None:
    """Raises ValueError when the run folder holds an earlier layout, or nothing but artefacts of another study."""
    if (config.run / "config.yaml").exists() and not (config.run / STUDY).exists():
        raise ValueError(
            f"{config.run} holds a run of vlmalign 0.1 (config.yaml), which only that version can continue; `vlmalign "
            "report` and `vlmalign export` read it. Choose another run folder"
        )
    there = {
        path.parent.relative_to(config.run).as_posix()
        for name in (BEGUN, MADE)
        for path in config.run.glob(f"s*/*/{name}")
    }
    if there and not there & set(nodes):
        raise ValueError(
            f"{config.run} holds another study: {', '.join(sorted(there)[:3])}, and nothing of this one; choose another run "
            "folder"
        )


@contextmanager
def written_for(config: StudyConfig) -> Iterator[None]:
    """What is written meanwhile can be read by its owner alone, or by the group as well: rows are patients'."""
    before = os.umask(0o077 if config.readable_by == "owner" else 0o027)
    try:
        yield
    finally:
        os.umask(before)


def open_to_group(config: StudyConfig, folder: Path) -> None:
    """Weights are written for their owner alone, whatever the mask says; let the group read them where it may."""
    if config.readable_by == "group":
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o640)


def is_writable(config: StudyConfig) -> bool:
    """Whether something can be written into the run folder, or it can be made."""
    folder = next(path for path in (config.run, *config.run.absolute().parents) if path.exists())
    return os.access(folder, os.W_OK)


def first_start(config: StudyConfig) -> datetime:
    """When the run was first started; now for a new one.

    Raises:
        ValueError: when the run's record of it is lost.
    """
    path = config.run / ENVIRONMENT
    if not path.exists():
        if (config.run / STUDY).exists():
            raise ValueError(f"{path} is missing, which says when and where the run was started; restore it")
        return datetime.now().replace(microsecond=0)
    try:
        return datetime.fromisoformat(read_json(path, {"started": str})["started"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected a record with its time; restore it ({error})") from error


def begin_run(config: StudyConfig, owners: Owners, started: datetime) -> None:
    """Write the study's config, and once the machine's record."""
    config.run.mkdir(parents=True, exist_ok=True)
    while (held := owners.claim(STUDY)) is not None:  # another start, which is at this very moment
        if not held.here and held.silent > TOUCH_SECONDS:
            raise ValueError(f"{config.run / STUDY} is being written by {held}; --take-over if it has ended")
        time.sleep(0.1)
    with owners.holding(STUDY):
        if not (config.run / ENVIRONMENT).exists():
            record = {"started": started.isoformat(), **environment_record(), "matmul_gflops": matmul_rate()}
            write_json(config.run / ENVIRONMENT, record)
        write_whole(config.run / STUDY, dump_config(config))


def save_hashes(hashes: Hashes, owners: Owners) -> None:
    """Keep what was hashed for the next start, unless another start is just keeping its own."""
    if owners.claim(HASHES) is None:
        with owners.holding(HASHES):
            hashes.save()


def set_aside(config: StudyConfig, names: Iterable[str], owners: Owners) -> None:
    """Move artefacts into `set-aside/N/`, where they are kept and never looked at.

    Raises:
        ValueError: when somebody is at work on one of them; none is moved.
    """
    run = config.run
    there = [name for name in names if (run / name).is_dir()]
    if not there:
        return
    held = {name: found for name in there if (found := owners.claim(name)) is not None}
    if held:
        raise ValueError(
            f"--redo would set aside what others are at work on: {told(held)}. Wait for them, end them, or take over what "
            "they have with --take-over"
        )
    folder = run / SET_ASIDE
    number = 1 + sum(1 for _ in folder.glob("*"))
    for name in there:
        target = folder / str(number) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run / name, target)
        owners.release(name)


def told(held: Mapping[str, object]) -> str:
    return ", ".join(f"{name} ({owner})" for name, owner in held.items())
