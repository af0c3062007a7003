"""The short form of a study that is a chain: one model, and a list of stages that each go on from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from vlmalign.config import Config, ConfigError, load_config, read_yaml
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.sections import Mesh, Reading
from vlmalign.studies.engine.seeds import spread
from vlmalign.studies.engine.stage_config import AdapterStage, Dpo, Grpo, ModelStage, Ppo, Sft

#: what the chain's stages are called that nobody names
BASE, ADAPTER = "base", "adapter"


class ChainModel(ModelStage):
    """A checkpoint folder, and what of it is trained."""

    adapter: Path | None = None  #: PEFT folder to go on from; `lora` must be as in it

    @model_validator(mode="after")
    def _adapter_has_settings(self) -> ChainModel:
        if self.adapter is not None and self.lora is None:
            raise ValueError(
                "adapter needs a section lora with its settings; with lora: null the whole decoder is trained"
            )
        return self


class ChainConfig(Config):
    """Stages in one run folder, each going on from what the one before ended with; they are called 01-sft, 02-dpo."""

    run: Path
    seed: Annotated[int, Field(ge=0)] = 0
    model: ChainModel
    mesh: Mesh | None = None  #: null: an adapter is trained on copies of its base, a whole decoder is cut over fsdp
    reading: Reading = Reading()  #: of images
    stages: tuple[Annotated[Sft | Dpo | Grpo | Ppo, Field(discriminator="kind")], ...]

    @model_validator(mode="after")
    def _has_stages(self) -> ChainConfig:
        if not self.stages:
            raise ValueError("stages: expected at least one stage, found none; list what is to be trained")
        for number, stage in enumerate(self.stages):
            if stage.from_ is not None:
                raise ValueError(
                    f"stages.{number}.from: in a list each stage goes on from the one before; name the stages "
                    "(`stages: {sft: {from: base, ...}}`) to choose"
                )
        return self

    def study(self) -> StudyConfig:
        """The same as a graph."""
        model = self.model
        base = ModelStage(**{name: getattr(model, name) for name in ModelStage.model_fields})
        stages: dict[str, Config] = {BASE: base}
        above = BASE
        if model.adapter is not None:
            stages[ADAPTER] = AdapterStage(
                **{"kind": "adapter", "from": BASE, "path": model.adapter, "lora": model.lora}
            )
            above = ADAPTER
        for number, stage in enumerate(self.stages, start=1):
            name = f"{number:02}-{stage.kind}"
            stages[name] = stage.model_copy(update={"from_": above})
            above = name
        return StudyConfig(run=self.run, seed=self.seed, mesh=self.mesh, reading=self.reading, stages=stages)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file; one whose stages are a list is a chain.

    Raises:
        ConfigError: with all problems, see `config.load_config`.
    """
    file = Path(path)
    try:
        found = read_yaml(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        found = None  # said by `load_config`, with the place
    if isinstance(found, dict) and found.get("stages") in ([], {}):
        raise ConfigError(str(path), ["stages: expected at least one stage, found none"])
    if isinstance(found, dict) and isinstance(found.get("stages"), list):
        return load_config(ChainConfig, path, overrides).study()
    return spread(load_config(StudyConfig, path, overrides), str(path))
