"""From a config to a trained adapter: all rows read and checked first, then stage after stage, in one run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from vlmalign.config import dump_config
from vlmalign.distributed import is_writer
from vlmalign.exchange import agree, from_first
from vlmalign.log import stage_timer
from vlmalign.progress import Progress
from vlmalign.shapes import Array
from vlmalign.studies.align.config import AlignConfig, AnyStage
from vlmalign.studies.align.finish import finish
from vlmalign.studies.align.policy import run_policy
from vlmalign.studies.align.policy_config import Policy
from vlmalign.studies.align.prepare import prepare
from vlmalign.studies.align.prepare import remember as remember_data
from vlmalign.studies.align.rewards import Built, build_rewards, refuse_received
from vlmalign.studies.align.rewards import remember as remember_rewards
from vlmalign.studies.align.run_folder import begin
from vlmalign.studies.align.stage_config import Sft
from vlmalign.studies.align.stages import Work, run_dpo, run_sft, stage_seed
from vlmalign.studies.align.summary import print_summary
from vlmalign.studies.align.system import Trained, open_front, open_model, open_system
from vlmalign.studies.devices import Devices, open_devices
from vlmalign.studies.earlier import check_folder


def run(config: AlignConfig, source: Path, *, before: AlignConfig | None = None) -> Path:
    """Train all stages, continuing an interrupted run; returns the folder of the result, `adapter` or `model`.

    `source` is the file that the config was read from, as the user named it; `before` the config as an earlier start
    may have left it in the run folder, with rows and rematerialisation that were chosen for other devices.

    Raises:
        ValueError: for anything that is not as it should be: folder, config, model, data, rewards. Before any work starts
            where it can be known then.
    """
    refuse_received(config, source)
    agree(dump_config(config), "the config")
    check_folder(config, before)
    with Progress(quiet=not is_writer()) as progress:

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            with stage_timer(config.run / "timing.jsonl", name, writes=is_writer()):
                yield

        progress.say(f"run folder {config.run}")
        front = open_front(config.model, config.reading, config.run)
        devices = open_devices(config.mesh, open_model(config.model, front))
        check_rows(config, devices)
        stages = list(enumerate(config.stages))
        built = {index: build_rewards(stage) for index, stage in stages if isinstance(stage, Policy)}
        data = prepare(config, front.chat, built, progress)
        # Other rows would make other batches: processes would compute different things, or wait for each other for ever.
        agree([stage.record for stage in data], "the rows that they read")
        agree([stage.files for stage in built.values()], "the files of the rewards")
        from_first(lambda: begin(config))
        from_first(lambda: remember_rewards(config, built))
        from_first(lambda: remember_data(config, data))
        with timed("load model"):
            system, trained = open_system(config, front, devices, progress)
        with closing(system):
            for index, stage in stages:
                folder = config.folder(index)
                with timed(folder.name):
                    work = Work(system, data[index], folder, stage_seed(config, index), progress)
                    params = _run_stage(stage, work, trained, built.get(index))
                    trained = Trained(params, fresh=False)
            if system.reader is not None:
                progress.say(f"images: {system.reader.statistics()}")
        with timed("export"):
            result = finish(config, system, trained)
    if is_writer():
        print_summary(config, result)
    return result


def check_rows(config: AlignConfig, devices: Devices) -> None:
    """Raises ValueError, naming the setting, for rows that do not share out over the devices."""
    for index, stage in enumerate(config.stages):
        devices.require_rows(stage.shapes.rows, f"stages.{index}.shapes.rows")
        if isinstance(stage, Policy):
            rollout = stage.rollout
            devices.require_rows(rollout.rows, f"stages.{index}.rollout.rows", tensor=rollout.tensor)


def _run_stage(stage: AnyStage, work: Work, start: Trained, built: Built | None) -> dict[str, Array]:
    if built is not None:
        return run_policy(stage, work, start, built.rewards)
    return run_sft(stage, work, start) if isinstance(stage, Sft) else run_dpo(stage, work, start)
