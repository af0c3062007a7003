"""The models that are planned with: of a checkpoint folder its config.json alone, or a public model by its name."""

from __future__ import annotations

from pathlib import Path

from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.studies.engine.config import StudyConfig, stage_ref
from vlmalign.studies.engine.stage_config import AdapterStage, ModelStage
from vlmalign.weights.adapter import load_adapter
from vlmalign.weights.checkpoint import parse_config, read_json, refusals

#: config.json of public checkpoints, some of which are behind an agreement: name -> file
KNOWN_MODELS = {path.stem: path for path in sorted((Path(__file__).parent / "known_models").glob("*.json"))}


def model_of(config: StudyConfig, name: str, given: str | None = None) -> Model:
    """The model that a stage trains, or is: with its adapter, and keeping every activation where remat is "auto".

    Its sizes are those of its folder's config.json, or of `given`: a file, or one of `KNOWN_MODELS`.

    Raises:
        ValueError: when there is no config.json, it describes a model that is not known, or neither the config nor an
            adapter's folder says what the adapter is.
    """
    section: ModelStage = config.stages[config.base_of(name)]
    path = config.place(section.path) / "config.json" if given is None else KNOWN_MODELS.get(given, Path(given))
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; the config of the model is enough to plan with: put its config.json there, or give "
            f"--model-config FILE or NAME (known: {', '.join(KNOWN_MODELS)})"
        )
    found = read_json(path)
    if wrong := refusals(found):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    shape = parse_config(found)
    remat = "none" if section.remat == "auto" else section.remat
    return Model(shape, _spec(config, name, shape), section.dtype, section.attention, remat)


def _spec(config: StudyConfig, name: str, shape: ModelConfig) -> LoraSpec | None:
    """The adapter of a stage; None where the whole decoder is trained."""
    while not isinstance(stage := config.stages[name], ModelStage | AdapterStage):
        name = stage_ref(stage.from_).name
    if isinstance(stage, ModelStage) or stage.lora is not None:
        return None if stage.lora is None else stage.lora.spec
    folder = config.place(stage.path)
    if not folder.is_dir():
        raise ValueError(f"stages.{name}: there is no folder {folder}; give the adapter's settings in a section lora")
    return load_adapter(folder, shape).spec
