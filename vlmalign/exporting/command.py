"""`vlmalign export`: find the adapter and its base, write, read again, compare, and say what was found."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="DIR",
        help="PEFT folder, or a stage's folder of a run (runs/x/sft): its best state where one was kept, else its newest",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="checkpoint folder that the adapter is on; by default the one its run or its adapter_config.json names",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new, or empty")
    parser.add_argument("--merge", action="store_true", help="write a whole model, the adapter merged into its weights")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="with --merge: of the written weights; by default each tensor's own in the base",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        metavar="N",
        help="with --merge: split the weights anew into files of at most N x 10^9 bytes; by default as in the base",
    )
    parser.add_argument(
        "--check-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic in which logits are compared; bfloat16 takes half the memory and shows less",
    )


def run(arguments: argparse.Namespace) -> None:
    """Export; ValueError for anything that is not as it should be, and then nothing is written."""
    if not arguments.merge and (arguments.dtype is not None or arguments.max_shard_gb is not None):
        raise ValueError("--dtype and --max-shard-gb are for merged models; add --merge, or leave them out")
    if arguments.max_shard_gb is not None and not arguments.max_shard_gb > 0:
        raise ValueError(f"--max-shard-gb must be above 0, found {arguments.max_shard_gb:g}")
    from vlmalign.exporting.model_card import README, card_of
    from vlmalign.exporting.report import describe, report
    from vlmalign.exporting.sources import check_base, find_base, open_adapter
    from vlmalign.models.model import Model
    from vlmalign.weights.checkpoint import load_config, load_params
    from vlmalign.weights.export import export_adapter, export_merged
    from vlmalign.weights.new_folder import check_new

    check_new(arguments.out)  # before anything large is read
    card = card_of(arguments.adapter, merged=arguments.merge)
    base = arguments.base or find_base(arguments.adapter)
    config = load_config(base)
    check_base(arguments.adapter, base)
    found = open_adapter(arguments.adapter, config)
    model = Model(config, lora=found.spec, dtype=arguments.check_dtype)
    print(f"adapter  {found.words}: {describe(found.spec)}")
    print(f"base     {base} ({config.family})", flush=True)
    if arguments.merge:
        limit = None if arguments.max_shard_gb is None else max(1, int(arguments.max_shard_gb * 1e9))
        done = export_merged(arguments.out, base, model, found.params, dtype=arguments.dtype, max_shard_bytes=limit)
    else:
        params = load_params(base, model)
        done = export_adapter(arguments.out, model, params, found.params, base_path=str(base))
    print(report(arguments.out, done, arithmetic=arguments.check_dtype))
    if card is not None:
        (arguments.out / README).write_text(card, encoding="utf-8")
        print(f"card     {arguments.out / README}: data, scores, limits; read it before you pass the model on")
