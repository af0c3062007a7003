"""Settings of `vlmalign align`: one model, and the stages it goes through in order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vlmalign.config import Config
from vlmalign.models.attention import IMPLEMENTATIONS
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec
from vlmalign.studies.align.policy_config import Grpo, Policy, Ppo
from vlmalign.studies.align.reward_config import FileReward
from vlmalign.studies.align.stage_config import Dpo, Sft
from vlmalign.studies.chexreason.config import Lora
from vlmalign.studies.run_config import Mesh, Reading

AnyStage = Annotated[Sft | Dpo | Grpo | Ppo, Field(discriminator="kind")]


class Model(Config):
    """A checkpoint folder of any known family, and what of it is trained."""

    path: Path
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of frozen parameters and activations; never float16
    attention: Literal["auto", *IMPLEMENTATIONS] = "auto"
    #: what the backward pass makes again (`models.decoder.REMAT`); auto: chosen by the plan, as rows are
    remat: Literal["none", "dots", "attention", "full", "auto"] = "none"
    lora: Lora | None = Lora()  #: null: the whole decoder is trained (never the vision tower)
    adapter: Path | None = None  #: PEFT folder to go on from; `lora` must be as in it

    @field_validator("lora")
    @classmethod
    def _in_range_and_order(cls, lora: Lora | None) -> Lora | None:
        if lora is None:
            return None
        LoraSpec(**lora.model_dump())
        # One order, the one in which adapters are read back from their folders.
        return lora.model_copy(update={"targets": tuple(t for t in ATTENTION_AND_FEED_FORWARD if t in lora.targets)})

    @model_validator(mode="after")
    def _adapter_has_settings(self) -> Model:
        if self.adapter is not None and self.lora is None:
            raise ValueError(
                "adapter needs a section lora with its settings; with lora: null the whole decoder is trained"
            )
        return self


class AlignConfig(Config):
    """Stages in one run folder, each going on from what the one before ended with."""

    run: Path
    seed: Annotated[int, Field(ge=0)] = 0
    model: Model
    mesh: Mesh | None = None  #: null: an adapter is trained on copies of its base, a whole decoder is cut over fsdp
    reading: Reading = Reading()  #: of images
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]

    def folder(self, index: int) -> Path:
        """Of a stage, the first is 0: `01-sft`, `02-grpo`."""
        return self.run / f"{index + 1:02}-{self.stages[index].kind}"

    @property
    def runs_files(self) -> bool:
        """Whether some reward is code of the user's own."""
        stages = [stage for stage in self.stages if isinstance(stage, Policy)]
        return any(isinstance(reward, FileReward) for stage in stages for reward in stage.rewards.values())
