"""A PEFT adapter folder: its settings and the headers of its weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

from vlmalign.inspection.records import Adapter, Files, Inspection
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD
from vlmalign.weights.adapter import CONFIG, WEIGHTS
from vlmalign.weights.layout import PICKLES, read_json, stored_tensors
from vlmalign.weights.peft_config import check_settings, read_spec


def inspect_adapter(folder: Path) -> Inspection:
    """What a folder with an adapter_config.json holds. Whether it fits its base shows only beside the base."""
    problems: list[str] = []
    settings = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        pickled = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in PICKLES)
        hint = f" (found {', '.join(pickled)}: pickled weights are never read, they can run code)" if pickled else ""
        return Inspection(folder, problems=(f"no {WEIGHTS}{hint}: save the adapter again as safetensors",))
    try:
        stored = list(stored_tensors([folder / WEIGHTS]))
    except ValueError as error:
        return Inspection(folder, problems=(f"{error}: fetch it again",))
    targets = tuple(t for t in ATTENTION_AND_FEED_FORWARD if any(f".{t}.lora_" in tensor.name for tensor in stored))
    others = [tensor.name for tensor in stored if not any(f".{t}.lora_" in tensor.name for t in targets)]
    if others:
        problems.append(
            f"{len(others)} tensors on other modules than {', '.join(ATTENTION_AND_FEED_FORWARD)}, such as "
            f"{others[0]}: merge the adapter where it was made"
        )
    tower = [t.name for t in stored if re.search(r"\b(?:vision_tower|visual|vision_model)\.", t.name)]
    if tower:
        problems.append(
            f"{len(tower)} tensors on the vision tower, such as {tower[0]}: merge the adapter where it was made"
        )
    dtypes = {dtype: sum(t.dtype == dtype for t in stored) for dtype in sorted({t.dtype for t in stored})}
    files = Files((WEIGHTS,), (folder / WEIGHTS).stat().st_size, dtypes)
    layers = {found[1] for t in stored if (found := re.search(r"\blayers\.(\d+)\.", t.name))}
    try:
        check_settings(settings)
        spec = read_spec(settings, targets)
    except ValueError as error:
        return Inspection(folder, files=files, problems=(*problems, f"{CONFIG}: {error}"))
    adapter = Adapter(
        rank=spec.rank,
        alpha=spec.alpha,
        targets=targets,
        base=settings.get("base_model_name_or_path"),
        magnitude=spec.magnitude,
        rank_stabilised=spec.rank_stabilised,
        layers=len(layers),
        parameters=sum(math.prod(t.shape) for t in stored),
    )
    return Inspection(folder, files=files, adapter=adapter, problems=tuple(problems))
