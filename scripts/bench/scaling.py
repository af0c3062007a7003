"""The scaling page: what changes from 1 to 8 to 512 GPUs, bytes and seconds by formula, beside what plans compiled.

    python scripts/bench/scaling.py > scripts/bench/SCALING.md

Nothing on it was run on a GPU. Sizes are those of the models' config.json in `vlmalign/planning/known_models`; compiled numbers
are read from the plans kept in `scripts/bench/results`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmalign.models.config import DecoderConfig
from vlmalign.models.sizes import head_weights, layer_weights
from vlmalign.weights.checkpoint import parse_config, read_json

ROOT = Path(__file__).resolve().parents[2]
SIZES = ROOT / "vlmalign" / "planning" / "known_models"
RESULTS = Path(__file__).resolve().parent / "results"

#: bytes per second into and out of one GPU, each: data sheets of H100 SXM (900 GB/s NVLink, both ways together) and of
#: one 400 Gbit/s adapter per GPU (ConnectX-7)
NVLINK, NETWORK = 450e9, 50e9
#: dense bfloat16 operations per second of an H100 SXM, and the share of them that training is taken to reach
PEAK, SHARE = 989e12, 0.5
NODE = 8
COUNTS = (1, 8, 512)
#: numbers of an adapter of this rank on all seven projections
RANK = 16
F32, BF16 = 4, 2


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and the share of each GPU in an optimiser batch."""

    title: str
    file: str
    lora: bool
    prompt: int
    group: int
    completion: int
    fsdp: int = 0  #: GPUs over which parameters that are trained whole are cut; 0: those of a node

    @property
    def decoder(self) -> DecoderConfig:
        return parse_config(read_json(SIZES / self.file)).decoder

    @property
    def parameters(self) -> int:
        """Numbers in the decoder's matrices, table and head."""
        config = self.decoder
        return layer_weights(config) + head_weights(config) * (1 if config.tied_head else 2)

    @property
    def trained(self) -> int:
        if not self.lora:
            return self.parameters
        config = self.decoder
        width, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        sides = 2 * (config.embed + width) + 2 * (config.embed + narrow) + 3 * (config.embed + config.ffn)
        return len(config.layers) * RANK * sides

    @property
    def gradient_bytes(self) -> float:
        """Of what devices add up: float32, but bfloat16 for the table and the head of a decoder that is trained whole."""
        matrices = layer_weights(self.decoder)
        return self.trained * F32 if self.lora else matrices * F32 + (self.parameters - matrices) * BF16

    @property
    def update_seconds(self) -> float:
        """Of one group per GPU with every layer recomputed: 6 or 8 operations per weight and token, attention aside."""
        row = self.prompt + self.group * self.completion
        layers = (6 if self.lora else 8) * layer_weights(self.decoder) * row
        head = (6 if self.lora else 8) * head_weights(self.decoder) * self.group * self.completion
        return (layers + head) / (PEAK * SHARE)


CASES = (
    Case("LoRA, MedGemma 4B", "medgemma-4b.json", True, 456, 4, 512),
    Case("full, Llama 3 8B", "openbiollm-8b.json", False, 512, 16, 2048),
    Case("full, MedGemma 27B text, cut over four nodes", "medgemma-27b-text.json", False, 512, 16, 2048, fsdp=32),
)
#: bytes of an H100
MEMORY = 80e9


def ring(size: float, devices: int, rate: float, *, both: bool) -> tuple[float, float]:
    """(bytes that each device sends, seconds) of a ring over `devices`; `both`: an all-reduce, which goes round twice.

    (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2), 2009: (n - 1) / n of the array per round.)

    >>> ring(8.0, 8, 7.0, both=True)
    (14.0, 2.0)
    """
    sent = (2 if both else 1) * size * (devices - 1) / devices
    return sent, sent / rate


def collectives(case: Case, count: int) -> Iterator[tuple[str, float, str, float, float]]:
    """(what, how often per step, over which links, bytes sent by each GPU, seconds) with one micro-batch per step."""
    if count == 1:
        return
    inside = min(count, case.fsdp or NODE)
    nodes = count // inside
    if case.lora:
        # One ring over all GPUs is as slow as its slowest link.
        rate, links = (NVLINK, "NVLink") if count <= NODE else (NETWORK, "network")
        yield ("adapter gradients, all-reduce, float32", 1, links, *ring(case.gradient_bytes, count, rate, both=True))
        return
    weights, gradients = case.parameters * BF16, case.gradient_bytes
    rate, links = (NVLINK, "NVLink") if inside <= NODE else (NETWORK, "network")
    yield ("weights, all-gather, forward and backward, bfloat16", 2, links, *ring(weights, inside, rate, both=False))
    yield ("gradients, reduce-scatter", 1, links, *ring(gradients, inside, rate, both=False))
    if nodes > 1:
        share = ring(gradients / inside, nodes, NETWORK, both=True)
        yield ("a GPU's share of the gradients, all-reduce over copies", 1, "network", *share)
    yield ("weights for the rollout, all-gather, bfloat16", 1, links, *ring(weights, inside, rate, both=False))


def memory(case: Case, count: int) -> tuple[float, float]:
    """Bytes on each GPU that stay: (weights, what is trained with gradients and two moments, all float32)."""
    if case.lora:
        return case.parameters * BF16, case.trained * 4 * F32
    inside = min(count, case.fsdp or NODE)
    return case.parameters * BF16, case.trained * 4 * F32 / inside


def page() -> Iterator[str]:
    yield "# From 1 to 8 to 512 GPUs\n"
    yield (
        "Written by `python scripts/bench/scaling.py`. **Nothing on this page was measured**: the first part is "
        "arithmetic, the second what XLA's compiler planned for GPUs that were not there.\n"
    )
    yield (
        f"Taken: H100 SXM, {PEAK / 1e12:.0f} TFLOP/s of which training reaches {SHARE:.0%}; {NVLINK / 1e9:.0f} GB/s each way "
        f"between the {NODE} GPUs of a node, {NETWORK / 1e9:.0f} GB/s each way per GPU between nodes; rings, without "
        "latency and without overlap with computation. Every GPU has one group per step, so that the optimiser batch "
        "grows with the GPUs. Every layer is recomputed in the backward pass.\n"
    )
    yield "## What changes\n"
    yield (
        "- **LoRA**: every GPU holds the whole frozen base (`mesh: {data: -1}`, the default). Per step the adapter's "
        "gradients are added up, whatever the number of GPUs; rollouts, rewards, reference and optimiser stay where they "
        "are.\n"
        "- **Full fine-tuning**: parameters, gradients and moments are cut over the GPUs of a node (`mesh: {fsdp: 8}`, the "
        "default on one node), and nodes hold copies (`mesh: {replicas: 64, data: 1, fsdp: 8}` on 512). Weights cross "
        "NVLink alone; a GPU's share of the gradients crosses the network.\n"
        "- **Micro-batches** multiply all of this but the rollout's weights, since each one's gradients are added up over "
        "the GPUs within its own program: take the rows as large as they fit. The tables have one micro-batch per step.\n"
        "- **Gradients** are added up in float32; those of the token table and the output head of a whole decoder in bfloat16.\n"
        "- **Rollouts** read weights that are whole on each GPU: gathered once per step, not once per token.\n"
    )
    yield "## Arithmetic\n"
    for case in CASES:
        yield f"### {case.title}\n"
        yield (
            f"{case.parameters / 1e9:.2f} B parameters in the decoder, {case.trained / 1e6:.4g} M trained; a group of "
            f"{case.group} x {case.completion} tokens on a prompt of {case.prompt}: {case.update_seconds:.2f} s of "
            "computation for the update.\n"
        )
        yield "| GPUs | stays on each, GB | collective | per step | over | each GPU sends, GB | seconds | of the update |"
        yield "|---:|---:|---|---:|---|---:|---:|---:|"
        for count in COUNTS:
            weights, state = memory(case, count)
            fits = weights + state < MEMORY
            stays = f"{(weights + state) / 1e9:.1f}" + ("" if fits else ", does not fit")
            rows = list(collectives(case, count))
            if not rows:
                yield f"| {count} | {stays} | none | | | | | |"
            for what, often, links, sent, seconds in rows:
                yield (
                    f"| {count} | {stays} | {what} | {often} | {links} | {often * sent / 1e9:.3g} | "
                    f"{often * seconds:.4f} | {often * seconds / case.update_seconds:.1%} |"
                )
        yield ""
    yield (
        '"Stays" is the bfloat16 copy of the decoder that rollouts read (and that LoRA trains on), and float32 parameters, '
        "gradients and AdamW's two moments of what is trained, where more than 80 GB do not fit. Full fine-tuning of 27 B "
        "needs `mesh: {fsdp: 32}`, with weights gathered over the network; with `fsdp: 16` 27 GB of state and the 54 GB "
        "that rollouts read are just too much, unless rollouts cut them as well (`rollout.tensor`).\n"
    )
    yield from compiled()


def compiled() -> Iterator[str]:
    """Collectives of the plans that are kept."""
    yield "## Compiled\n"
    yield (
        "From `vlmalign plan` (deviceless compilation, never run): peaks, and the collectives of every program that has "
        "any. Programs of training are drawn out from models of few layers, where it says so.\n"
    )
    yield "| plan | GPUs | peak of each, GiB | program | how | collective | number | in a loop | MB per call |"
    yield "|---|---|---:|---|---|---|---:|---|---:|"
    for path, found in _plans():
        if found.get("method") != "compiled":
            continue
        device, peak = found["device"], found["as_configured"]["peak_bytes"] / 2**30
        start = f"| `{path.name}` | {device['count']} x {device['name']} | {peak:.1f} |"
        rows = [
            f"{start} {program['name']} | {program['how']} | {each['kind']} | {each['count']} | {each['loop'] or 'no'} | "
            f"{each['bytes'] / 1e6:.1f} |"
            for program in found["programs"]
            for each in program["collectives"]
        ]
        yield from rows or [f"{start} all | | none | | | |"]


def _plans() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every plan of every file; earlier files hold one."""
    for path in sorted(RESULTS.glob("plan_*.json")):
        read = json.loads(path.read_text(encoding="utf-8"))
        yield from ((path, found) for found in read.get("plans", [read]))


def main() -> None:
    print("\n".join(page()))


if __name__ == "__main__":
    main()
