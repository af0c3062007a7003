"""What a plan is made from beside the config: the model's config.json, without weights, and how long texts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmalign.models.config import ModelConfig, SiglipConfig
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.studies.align.config import Model as AlignModel
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.config import Model as ChexReasonModel
from vlmalign.weights.checkpoint import parse_config, read_json, refusals

Settings = AlignModel | ChexReasonModel


@dataclass(frozen=True)
class Lengths:
    """Tokens, which no config states. `known` says where each number is from."""

    prompt: int  #: of a prompt, its image included
    answer: int  #: of an answer learnt from in SFT
    completion: int  #: of a sampled completion, on average
    known: dict[str, str]


def read_model(settings: Settings, file: Path | None, *, films: bool = True) -> Model:
    """The model of a config's section from `file`, or from the config.json of its folder; no weights are needed.

    Raises:
        ValueError: when there is no config.json, or it describes a model that is not known, has a tower for images of
            any size, or none where the study reads `films`.
    """
    path = settings.path / "config.json" if file is None else file
    if not path.is_file():
        advice = (
            "the config of the model is enough to plan with: put its config.json there, or give --model-config FILE"
            if file is None
            else "--model-config takes the config.json of a model"
        )
        raise ValueError(f"{path} does not exist; {advice}")
    found = read_json(path)
    if wrong := refusals(found):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    shape: ModelConfig = parse_config(found)
    if not isinstance(shape.vision, SiglipConfig) and (films or shape.vision is not None):
        raise ValueError(
            f"{path}: planning needs to know how many tokens a film has, which only towers of fixed image size (SigLIP) "
            f"say; found {type(shape.vision).__name__ if shape.vision else 'no vision tower'}"
        )
    return Model(
        shape,
        lora=None if settings.lora is None else LoraSpec(**settings.lora.model_dump()),
        dtype=settings.dtype,
        attention=settings.attention,
        remat=settings.remat,
    )


def read_lengths(
    config: ChexReasonConfig, model: Model, *, prompt: int | None, answer: int | None, completion: int | None
) -> Lengths:
    """Given lengths, and for the others: the prompt by the folder's tokenizer, or else guessed; answers at the limit."""
    limit = config.grpo.rollout.completion
    if completion is not None and not 1 <= completion <= limit:
        raise ValueError(f"completions have 1 to {limit} tokens (grpo.rollout.completion), found {completion}")
    for name, value in (("prompt", prompt), ("answer", answer)):
        if value is not None and value < 1:
            raise ValueError(f"{name} tokens must be >= 1, found {value}")
    known = {
        name: "given" for name, value in (("prompt", prompt), ("answer", answer), ("completion", completion)) if value
    }
    if prompt is None:
        prompt, known["prompt"] = _prompt_length(config, model)
    if answer is None:
        answer, known["answer"] = limit, "the limit of completions"
    if completion is None:
        completion, known["completion"] = limit, "the limit: every completion runs to its end"
    return Lengths(prompt, answer, completion, known)


def _prompt_length(config: ChexReasonConfig, model: Model) -> tuple[int, str]:
    tokens = model.config.vision.tokens
    if (config.model.path / "tokenizer.json").is_file():
        from vlmalign.data.answers import film_question
        from vlmalign.data.chat.chat import open_chat

        chat = open_chat(config.model.path, family=model.config.family, image_tokens=lambda key: tokens)
        return len(chat.prompt(film_question("film", config.prompt), group_id=0).prompt), "the folder's tokenizer"
    # English has about four characters to a token of these vocabularies; a turn's frame is a dozen tokens.
    return tokens + 16 + -(-len(config.prompt) // 4), "image tokens and a quarter of the prompt's characters"
