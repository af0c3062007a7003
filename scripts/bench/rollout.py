"""Time of sampling G completions of one prompt, beside transformers' `generate`, as one JSON object.

    python scripts/bench/rollout.py                       # 19 M parameters, prompt 300, 64 new tokens, G = 8
    python scripts/bench/rollout.py --group 4 --new-tokens 32 --repeats 3

Both sides run the same randomly initialised Gemma 3 text model in float32, in one process, in turn, and are told never
to stop; times are wall-clock seconds of a whole call with the completions on the host. `rates` are the frameworks' own
float32 matrix products, and `corrected` is the ratio left after dividing the larger product's out. Needs the packages
of the test extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not spin on JAX's cores
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vlmalign.models.model import Model
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.types import Group, Segment
from vlmalign.weights.checkpoint import load_config, load_params

#: a token that is never drawn
NEVER = 1_000_000
#: [m, k] x [k, n], of which each framework's rate is given
PRODUCTS = ((2048, 384, 1536), (8, 384, 16384))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "prompt": 300, "new-tokens": 64, "group": 8, "prompts": 1, "repeats": 5, "threads": 2, "seed": 0,
        "vocab": 16384, "hidden": 384, "ffn": 1536, "layers": 6, "heads": 4, "kv-heads": 1, "head-dim": 96,
        "window": 512,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> tuple[Gemma3ForCausalLM, Model, dict[str, jax.Array]]:
    torch.manual_seed(options.seed)
    config = Gemma3TextConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim, query_pre_attn_scalar=options.head_dim, sliding_window=options.window,
        max_position_embeddings=8192, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    module = Gemma3ForCausalLM(config).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        model = Model(load_config(folder))
        params = load_params(folder, model)
    return module, model, params


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of each, one after the other so that what else the machine does meets them alike; the first is not kept."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                found[name].append(taken)
    return found


def matmul_rates(repeats: int) -> dict[str, dict[str, float]]:
    """GFLOP/s of float32 products as [m, k] x [k, n]."""
    found: dict[str, dict[str, float]] = {}
    rng = np.random.default_rng(0)
    product = jax.jit(jnp.dot)
    for m, k, n in PRODUCTS:
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((m, k), (k, n)))
        ja, jb, ta, tb = jnp.asarray(a), jnp.asarray(b), torch.from_numpy(a), torch.from_numpy(b)
        count = 20

        def ours(ja=ja, jb=jb, count=count) -> None:
            jax.block_until_ready([product(ja, jb) for _ in range(count)])

        def theirs(ta=ta, tb=tb, count=count) -> None:
            for _ in range(count):
                ta @ tb

        times = in_turn({"jax": ours, "torch": theirs}, repeats)
        found[f"[{m},{k}]x[{k},{n}]"] = {
            name: 2e-9 * m * k * n * count / statistics.median(values) for name, values in times.items()
        }
    return found


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    module, model, params = make_model(options)
    rng = np.random.default_rng(options.seed)
    ids = rng.integers(3, options.vocab, (options.prompts, options.prompt)).astype(np.int32)
    prompts = [
        Group(i, Segment(row, np.full(len(row), -1, np.int32), np.ones(len(row), np.float32)), (), ())
        for i, row in enumerate(ids)
    ]
    generator = Generator(
        model, None, (NEVER,), rows=options.prompts, group=options.group, completion=options.new_tokens,
        sampling=Sampling(), prompt_lengths=(-(-options.prompt // 4) * 4,),
    )  # fmt: skip
    compiling = seconds(lambda: generator.warm_up(params))
    key, stats = jax.random.key(options.seed), []

    def ours(new: int = options.new_tokens) -> None:
        found = generator.run(params, prompts, key, report=stats.append)
        assert all(len(c.tokens) == new for answers in found for c in answers)

    def theirs(new: int = options.new_tokens) -> None:
        with torch.no_grad():
            found = module.generate(
                input_ids=torch.from_numpy(ids.astype(np.int64)), attention_mask=torch.ones(ids.shape, dtype=torch.long),
                do_sample=True, temperature=1.0, top_k=0, num_return_sequences=options.group, max_new_tokens=new,
                min_new_tokens=new, eos_token_id=NEVER, pad_token_id=0,
            )  # fmt: skip
        assert found.shape[1] == options.prompt + new

    times = in_turn({"vlmalign": ours, "transformers": theirs}, options.repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["transformers"] / median["vlmalign"]
    rates = matmul_rates(options.repeats)
    large = next(iter(rates.values()))
    last: RolloutStats = stats[-1]
    result = {
        "shapes": {name: value for name, value in vars(options).items() if name != "out"},
        "parameters": sum(value.size for value in params.values()),
        "seconds": times,
        "median_seconds": median,
        "ratio": ratio,
        "corrected": ratio / (large["jax"] / large["torch"]),
        "tokens_per_second": {
            name: options.prompts * options.group * options.new_tokens / value for name, value in median.items()
        },
        "warm_up_seconds": compiling,
        "statistics": {**vars(last), "decoded_per_token": last.decoded_per_token},
        "rates_gflops": rates,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "load": os.getloadavg()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
