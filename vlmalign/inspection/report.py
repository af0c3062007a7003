"""An inspection as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmalign.inspection.records import Adapter, Inspection, Part, Text
from vlmalign.models.config import DecoderConfig, LayerSpec, Rope, SiglipConfig

#: characters of a chat template that are shown
SHOWN = 60


def describe(found: Inspection) -> str:
    """The whole report: what is there, what is worth knowing, what is wrong."""
    rows = [("folder", str(found.folder)), *_rows(found)]
    lines = [f"{name:<15}{text}".rstrip() for name, text in rows]
    if found.parts:
        lines += ["", *_table(found.parts)]
    if found.notes:
        lines += ["", "worth knowing", *(f"  - {note}" for note in found.notes)]
    if found.problems:
        count = len(found.problems)
        lines += ["", f"{count} problem{'s' * (count > 1)}", *(f"  - {problem}" for problem in found.problems)]
    else:
        lines += ["", "nothing wrong was found"]
    return "\n".join(lines)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.model_type is not None:
        family = "unknown" if found.config is None else found.config.family
        yield "family", f"{family} (model_type {found.model_type})"
    if found.config is not None:
        yield from _decoder_rows(found.config.decoder)
        vision = found.config.vision
        if vision is not None:
            kind = "SigLIP" if isinstance(vision, SiglipConfig) else "windowed, any size"
            yield "vision tower", f"{vision.layers} layers of width {vision.embed}, {vision.heads} heads ({kind})"
            yield "images", found.images or "not known"
    if found.text is not None:
        yield from _text_rows(found.text, found.config.decoder.vocab if found.config else None)
    if found.adapter is not None:
        yield from _adapter_rows(found.adapter)
    if found.files is not None:
        count = len(found.files.names)
        dtypes = ", ".join(f"{n} x {dtype}" for dtype, n in found.files.tensors.items())
        yield "weights", f"{count} file{'s' * (count > 1)}, {size(found.files.bytes)}; tensors: {dtypes}"


def _decoder_rows(decoder: DecoderConfig) -> Iterator[tuple[str, str]]:
    yield (
        "decoder",
        f"{len(decoder.layers)} layers of width {decoder.embed}, {decoder.heads} heads and {decoder.kv_heads} "
        f"key-value heads of {decoder.head_dim}, feed-forward {decoder.ffn}",
    )
    windows = sorted({spec.window for spec in decoder.layers if spec.window is not None})
    if windows:
        yield "windows", f"{', '.join(map(str, windows))} tokens; {pattern(decoder.layers)}"
    for rope in dict.fromkeys(spec.rope for spec in decoder.layers):
        kinds = {"local" if s.window else "global" for s in decoder.layers if s.rope == rope}
        yield "rope", f"{' and '.join(sorted(kinds))} layers: {_rope(rope)}"


def _text_rows(text: Text, rows: int | None) -> Iterator[tuple[str, str]]:
    yield "vocabulary", f"{text.tokens} tokens" + ("" if rows is None else f", embedding of {rows} rows")
    yield "stop ids", ", ".join(f"{id} {token}" for id, token in text.stops) or "none"
    if not text.template:
        yield "chat template", "none"
        return
    first = " ".join(text.template.split())
    yield "chat template", first if len(first) <= SHOWN else first[:SHOWN] + " ..."
    marked = "marked by the template ({% generation %})" if text.marked else "told apart by prefixes (no markers)"
    yield "answers", marked


def _adapter_rows(adapter: Adapter) -> Iterator[tuple[str, str]]:
    kinds = [name for name, here in (("DoRA", adapter.magnitude), ("rsLoRA", adapter.rank_stabilised)) if here]
    yield "adapter", f"{' with '.join(kinds) or 'LoRA'}, rank {adapter.rank}, alpha {adapter.alpha:g}"
    yield "on", f"{', '.join(adapter.targets)} of {adapter.layers} layers"
    yield "of the model", adapter.base or "not recorded"
    yield "parameters", f"{adapter.parameters:,}"


def _table(parts: Sequence[Part]) -> Iterator[str]:
    whole = Part(
        "all",
        sum(part.parameters for part in parts),
        sum(part.stored for part in parts),
        tuple(sorted({dtype for part in parts for dtype in part.dtypes})),
    )
    yield f"{'part':<15}{'parameters':>16}  {'on disk':>10}  dtype"
    for part in (*parts, whole):
        yield f"{part.name:<15}{part.parameters:>16,}  {size(part.stored):>10}  {', '.join(part.dtypes) or '-'}"
    yield f"in memory: {size(2 * whole.parameters)} in bfloat16, {size(4 * whole.parameters)} in float32"


def pattern(layers: Sequence[LayerSpec]) -> str:
    """Which layers are local, as the shortest run of kinds that repeats.

    >>> rope = Rope(1e4)
    >>> pattern([LayerSpec(rope, 8 if (i + 1) % 6 else None) for i in range(26)])
    'local x 5, global x 1, repeated'
    """
    kinds = ["local" if spec.window is not None else "global" for spec in layers]
    period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
    runs: list[list[str]] = []
    for kind in kinds[:period]:
        if runs and runs[-1][0] == kind:
            runs[-1].append(kind)
        else:
            runs.append([kind])
    if period == 1:
        return f"all layers {kinds[0]}"
    return ", ".join(f"{run[0]} x {len(run)}" for run in runs) + (", repeated" if period < len(kinds) else "")


def _rope(rope: Rope) -> str:
    said = f"base {rope.theta:,.0f}"
    if rope.factor != 1.0:
        said += f", wavelengths x {rope.factor:g}"
    if rope.llama3 is not None:
        said += f" (Llama 3.1's ramp, from {rope.llama3.original} tokens)"
    if rope.sections is not None:
        said += f", M-RoPE sections {', '.join(map(str, rope.sections))}"
    return said


def size(count: int) -> str:
    """Bytes in the unit that suits them.

    >>> size(512), size(8_600_079_472)
    ('512 B', '8.60 GB')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
