"""What an export did, in words."""

from __future__ import annotations

from pathlib import Path

from vlmalign.models.lora import LoraSpec
from vlmalign.weights.export import Exported

#: rounding that changes logits by more than this share of what the adapter does is worth a note
NOTABLE = 0.1


def describe(spec: LoraSpec) -> str:
    """An adapter's settings on one line.

    >>> describe(LoraSpec(8, 16.0, ("q_proj", "v_proj"), rank_stabilised=True))
    'rsLoRA of rank 8, alpha 16, on q_proj, v_proj'
    """
    kind = ("rs" if spec.rank_stabilised else "") + ("DoRA" if spec.magnitude else "LoRA")
    return f"{kind} of rank {spec.rank}, alpha {spec.alpha:g}, on {', '.join(spec.targets)}"


def report(out: Path, done: Exported, *, arithmetic: str) -> str:
    """What was written, how large it is, and how near to the adapter on its base."""
    lines = [f"wrote    {out}: {len(done.files)} files, {size(sum(done.files.values()))}"]
    lines += [f"         {name} {size(count)}" for name, count in done.files.items() if name.endswith(".safetensors")]
    lines += [
        f"compared read again, no logit differs by more than {done.gap:.2g} of the largest",
        f"         (allowed {done.tolerance:.2g}, {arithmetic} arithmetic; without the adapter it would be {done.effect:.2g})",
    ]
    if done.rounded_to is not None and done.gap > NOTABLE * done.effect:
        lines.append(
            f"note     rounding the merged weights to {done.rounded_to} is not small beside what the adapter does; "
            "--dtype float32, or a PEFT folder (without --merge), keeps all of it"
        )
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in decimal units.

    >>> size(5_021_000_000), size(999)
    ('5.02 GB', '999 bytes')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
