"""A config file of either study, read for planning: its workload, and the devices that it would run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlmalign.config import load_config, read_yaml
from vlmalign.mesh import AXES, TENSOR, MeshSettings, default_mesh
from vlmalign.planning.align_workload import align_lengths, read_align
from vlmalign.planning.devices import Device
from vlmalign.planning.inputs import read_lengths, read_model
from vlmalign.planning.target import Target, build_sizes, open_target
from vlmalign.planning.workload import Workload, read_workload
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.chexreason.config import ChexReasonConfig

Study = AlignConfig | ChexReasonConfig


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The checked config: one with stages is of `vlmalign align`."""
    found = read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
    kind = AlignConfig if isinstance(found, dict) and "stages" in found else ChexReasonConfig
    return load_config(kind, path, overrides)


def axes_of(config: Study) -> MeshSettings:
    """Of training: the config's section mesh, or what suits what is trained."""
    if config.mesh is not None:
        return config.mesh.settings
    return default_mesh(lora=config.model.lora is not None)


def sampling_axes_of(config: Study) -> MeshSettings:
    """Of rollouts: rows are shared out, and weights where the config's rollouts have a `tensor`.

    Raises:
        ValueError: where stages differ in it.
    """
    sections = [dict(stage).get("rollout") for stage in config.stages] if isinstance(config, AlignConfig) else None
    found = {each.tensor for each in sections or [config.grpo.rollout] if each is not None} or {1}
    if len(found) > 1:
        raise ValueError(f"planned is one rollout.tensor for all stages, found {sorted(found)}; plan them one by one")
    return MeshSettings(tensor=found.pop())


def read_study(
    path: Path,
    overrides: Sequence[str],
    device: Callable[[str], Device],
    count: int,
    *,
    model_config: Path | None = None,
    prompt: int | None = None,
    answer: int | None = None,
    completion: int | None = None,
) -> tuple[Workload, Target]:
    """What a config makes `count` devices do; `device` is asked for with the model's dtype.

    Raises:
        ValueError: for anything in file, overrides, lengths or device count that does not fit.
    """
    return workload_of(
        load_study(path, overrides), device, count, model_config=model_config, prompt=prompt, answer=answer,
        completion=completion,
    )  # fmt: skip


def workload_of(
    config: Study,
    device: Callable[[str], Device],
    count: int,
    *,
    model_config: Path | None = None,
    prompt: int | None = None,
    answer: int | None = None,
    completion: int | None = None,
) -> tuple[Workload, Target]:
    """`read_study` of a config that is loaded."""
    axes = axes_of(config)
    sizes = dict(zip(AXES, build_sizes(axes, count), strict=True))
    shares = count // sizes[TENSOR]
    lengths = {"prompt": prompt, "answer": answer, "completion": completion}
    if isinstance(config, AlignConfig):
        model = read_model(config.model, model_config, films=False)
        workload = read_align(config, model, align_lengths(config, **lengths), count=shares)
    else:
        model = read_model(config.model, model_config)
        workload = read_workload(config, model, read_lengths(config, model, **lengths), count=shares)
    return workload, open_target(device(model.dtype), count, axes, sampling_axes_of(config))
