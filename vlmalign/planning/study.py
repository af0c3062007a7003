"""A study read for planning: its workloads, and the devices that they would run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmalign.mesh import AXES, TENSOR, MeshSettings, default_mesh
from vlmalign.models.model import Model
from vlmalign.planning.devices import SHARE, Device, find_device
from vlmalign.planning.inputs import model_of
from vlmalign.planning.lengths import Given, Texts
from vlmalign.planning.read import read_workload
from vlmalign.planning.schedule import times
from vlmalign.planning.target import Target, build_sizes, open_target
from vlmalign.planning.workload import Workload
from vlmalign.studies.engine.config import StudyConfig


def workloads_of(
    config: StudyConfig,
    device: Callable[[str], Device],
    count: int,
    *,
    model_configs: Mapping[str, str] = {},
    given: Given = Given(),
    only: Sequence[str] = (),
    compiles: bool = True,
) -> list[tuple[Workload, Target]]:
    """What a study makes `count` devices do, a workload for each model; `device` is asked for with the model's dtype.

    `model_configs`: stage of kind model ("": all others) -> what `inputs.model_of` takes. `only`: of these stages, and of
    what they answer. `compiles`: programs are compiled where that can be done.

    Raises:
        ValueError: for anything in config, stages, lengths or device count that does not fit.
    """
    for name in (*only, *filter(None, model_configs)):
        if name not in config.stages:
            raise ValueError(f"no stage is called {name!r}; the stages are {', '.join(config.stages)}")
    models: dict[tuple[Model, str], list[str]] = {}
    for name in only or config.in_order():
        base = config.base_of(name)
        model = model_of(config, name, model_configs.get(base, model_configs.get("")))
        models.setdefault((model, config.stages[base].remat), []).append(name)
    found, targets = [], {}
    with TemporaryDirectory() as folder:
        texts = Texts(config, given, Path(folder))
        for (model, _), names in models.items():
            trained = [stage for name, stage in config.trained.items() if name in names]
            default = default_mesh(lora=model.lora is not None or not trained)
            axes = default if config.mesh is None else config.mesh.settings
            sizes = dict(zip(AXES, build_sizes(axes, count), strict=True))
            workload = read_workload(config, names, model, texts, shares=count // sizes[TENSOR])
            if workload is None:
                continue
            tensors = {stage.rollout.tensor for stage in trained if "rollout" in type(stage).model_fields} or {1}
            if len(tensors) > 1:
                raise ValueError(f"planned is one rollout.tensor at a time, found {sorted(tensors)}; choose by --stage")
            key = (model.dtype, axes, MeshSettings(tensor=tensors.pop()))
            if key not in targets:
                make = open_target if compiles else Target
                targets[key] = make(device(model.dtype), count, axes=axes, sampling_axes=key[2])
            found.append((workload, targets[key]))
    if not found:
        raise ValueError("there is nothing to plan: no stage trains, and none answers a set whose size is known")
    return found


def hours(
    config: StudyConfig, device_name: str, count: int, *, model_configs: Mapping[str, str] = {}
) -> dict[str, float]:
    """Hours that each stage trains on these devices, at `SHARE` of the roofline, by arithmetic alone; stages whose number
    of steps is not known are left out.

    Raises:
        ValueError: for an unknown device, and as `workloads_of`.
    """
    device, found = find_device(device_name), {}
    for workload, _ in workloads_of(config, lambda dtype: device, count, model_configs=model_configs, compiles=False):
        for each in times(workload, device, count).stages:
            for name in each.stages:
                stage = config.stages[name]
                steps = stage.steps or round(stage.epochs * workload[name].epoch)
                if steps:
                    found[name] = steps * each.step / SHARE / 3600
    return found
