"""Where an exported adapter comes from: a PEFT folder, or a stage of a run with its checkpoints and its run's config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from vlmalign.config_yaml import read_yaml
from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.quoting import MOST_OF_LINE, quoted, shown
from vlmalign.shapes import Array
from vlmalign.training.outcome import is_stage, read_outcome
from vlmalign.weights.adapter import CONFIG, load_adapter
from vlmalign.weights.checkpoint import load_config
from vlmalign.weights.layout import read_json

#: the records of a stage, of which the second is there once it is whole
RECORDS = ("begun.json", "made.json")

#: in runs of version 0.1, the file of a run folder that says what was trained; a stage's folder lies beside it
RUN_CONFIG = "config.yaml"


class Found(NamedTuple):
    """An adapter that fits its base."""

    spec: LoraSpec
    params: dict[str, Array]
    words: str  #: where it was found, for the reader


def find_base(adapter: Path) -> Path:
    """The checkpoint folder that an adapter's settings, or its run's config, name.

    Raises:
        ValueError: when there is none of that name, or `adapter` is neither a PEFT folder nor a stage's.
    """
    named = _named_base(adapter)
    if not named or not Path(named).is_dir():
        raise ValueError(f"{adapter} names {named!r} as its base, which is no folder here; give its folder with --base")
    return Path(named)


def check_base(adapter: Path, base: Path) -> None:
    """ValueError when the base that `adapter` names is here, and another model than `base`.

    Shapes alone would not tell: models of one size differ in their norms, rotations and windows. Other weights of the
    same model are the caller's choice.
    """
    named = _named_base(adapter)
    if named and (Path(named) / "config.json").exists() and load_config(Path(named)) != load_config(base):
        raise ValueError(
            f"{adapter} is an adapter on {named}, and {base} is another model (their config.json differ); take it on its own base"
        )


def _named_base(adapter: Path) -> str | None:
    if (adapter / CONFIG).exists():
        named = read_json(adapter / CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str | None):
            raise ValueError(f"{adapter / CONFIG}: base_model_name_or_path must be text or null, found {quoted(named)}")
        return named
    return _model_section(adapter)["path"]


def open_adapter(adapter: Path, config: ModelConfig) -> Found:
    """The adapter in a PEFT folder, or what a stage of a run ended with, for a base of this config.

    Raises:
        ValueError: when there is none, or it is not an adapter of such a base.
    """
    if (adapter / CONFIG).exists():
        found = load_adapter(adapter, config)
        return Found(found.spec, found.params, str(adapter))
    spec = _spec(adapter)
    outcome = read_outcome(adapter)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in outcome.params.items() if is_adapter(name)}
    words = f"{outcome.folder}, step {outcome.step}"
    rest = sorted(outcome.params.keys() - params.keys())
    if rest:
        words += f" (left out, as no part of an adapter: {', '.join(rest[:3])}{', ...' * (len(rest) > 3)})"
    needed = {name: shape.shape for name, shape in Model(config, lora=spec).shapes.items() if is_adapter(name)}
    had = {name: value.shape for name, value in params.items()}
    differ = sorted(name for name in needed.keys() | had.keys() if needed.get(name) != had.get(name))
    if differ:
        first = differ[0]
        raise ValueError(
            f"{outcome.folder} holds no adapter of this base: {len(differ)} tensors differ, such as {first}, which is "
            f"{had.get(first, 'absent')} there and {needed.get(first, 'absent')} here; give the checkpoint folder that the "
            "run trained on with --base"
        )
    return Found(spec, params, words)


def _model_section(adapter: Path) -> dict[str, Any]:
    """`path` of the base and `lora` of a stage's folder: from its record, or from the config of a run of version 0.1."""
    if not is_stage(adapter):
        raise ValueError(_what_it_is(adapter))
    for name in RECORDS:
        if (adapter / name).exists():
            found = read_json(adapter / name)
            free, settings = (found[key] if isinstance(found.get(key), dict) else {} for key in ("free", "settings"))
            model = {"path": free.get("base"), "lora": settings.get("lora")}
            if not isinstance(model["path"], str) or not isinstance(model["lora"], dict):
                raise ValueError(f"{adapter / name} names no base with an adapter: its stage trained a whole decoder")
            return model
    path = adapter.absolute().parent / RUN_CONFIG
    if not path.exists():
        raise ValueError(
            f"{adapter} is a stage's folder without a record ({' or '.join(RECORDS)}), and no {RUN_CONFIG} of a run of "
            "version 0.1 lies beside it; restore the record"
        )
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {shown(error, MOST_OF_LINE)}") from error
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or "path" not in model or not isinstance(model.get("lora"), dict):
        raise ValueError(f"{path} needs a section `model` with `path` and a section `lora`; found {quoted(model)}")
    return model


def _spec(adapter: Path) -> LoraSpec:
    """The adapter's settings as the run's config states them."""
    lora = _model_section(adapter)["lora"]
    known = [field.name for field in fields(LoraSpec)]
    unknown = sorted(lora.keys() - set(known))
    if unknown:
        raise ValueError(
            f"the run of {adapter} sets model.lora.{shown(unknown[0])}, which no adapter here has; known: {', '.join(known)}"
        )
    try:
        return LoraSpec(**{key: tuple(value) if isinstance(value, list) else value for key, value in lora.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the run of {adapter} has no adapter's settings: {shown(error, MOST_OF_LINE)}") from error


def _what_it_is(adapter: Path) -> str:
    """Why a folder is not what was asked for."""
    if not adapter.is_dir():
        return f"{adapter} is not a folder; give a PEFT folder, or a stage's folder of a run"
    below = [adapter, *([adapter / "stages"] if (adapter / "stages").is_dir() else [])]
    stages = sorted(str(path) for folder in below for path in folder.iterdir() if path.is_dir() and is_stage(path))
    if stages:
        return f"{adapter} is a run with several stages; give the folder of one: {', '.join(stages)}"
    return f"{adapter} is neither a PEFT folder (no {CONFIG}) nor a stage's folder of a run (no checkpoints)"
