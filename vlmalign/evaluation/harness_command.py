"""`vlmalign lm-eval`: a checkpoint on tasks of lm-evaluation-harness, results as JSON. Imports the harness only to run."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmalign.machine import environment_record

#: parts of the harness's results that are kept as they are; its listing of the machine and the samples are not
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "config",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--tasks", metavar="A,B", required=True, help="names of tasks, tags or groups; * matches any")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="results, as JSON")
    parser.add_argument("--samples", metavar="FILE", type=Path, help="also every document's outcome, as JSON Lines")
    parser.add_argument("--adapter", metavar="PEFT", type=Path, help="folder of a PEFT adapter, merged into the model")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as saved")
    parser.add_argument("--limit", metavar="N", type=float, help="documents per task; below 1, their share")
    parser.add_argument("--num-fewshot", metavar="K", type=int, help="solved examples in each prompt")
    parser.add_argument("--include-path", metavar="DIR", type=Path, help="folder with task files of your own")
    parser.add_argument("--apply-chat-template", action="store_true", help="ask as the user of a chat")
    parser.add_argument("--system-instruction", metavar="TEXT", help="system message of every prompt")
    parser.add_argument("--gen-kwargs", metavar="a=b,c=d", help="generation settings in place of the tasks' own")
    parser.add_argument("--max-length", metavar="N", type=int, help="tokens of a prompt with its answer, at most")
    parser.add_argument("--batch-tokens", metavar="N", type=int, default=8192, help="tokens that run at once (8192)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sampled answers")


def run(chosen: argparse.Namespace) -> None:
    """Evaluate, print the table, write the files."""
    try:
        import lm_eval  # noqa: F401 - to say in plain words that it is missing
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError('lm-evaluation-harness is not installed: pip install "vlmalign[harness]"') from None
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from vlmalign.evaluation.harness import VlmalignLM
    from vlmalign.evaluation.results import write_predictions

    for path in (chosen.out, chosen.samples):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is not a folder; make it first, or write elsewhere")
    manager = TaskManager(include_path=None if chosen.include_path is None else str(chosen.include_path))
    tasks = find_tasks(chosen.tasks, manager.all_tasks, manager.match_tasks)
    model = VlmalignLM(
        chosen.checkpoint,
        dtype=chosen.dtype,
        adapter=chosen.adapter,
        max_length=chosen.max_length,
        batch_tokens=chosen.batch_tokens,
        seed=chosen.seed,
    )
    found = simple_evaluate(
        model,
        tasks=tasks,
        num_fewshot=chosen.num_fewshot,
        limit=chosen.limit,
        apply_chat_template=chosen.apply_chat_template,
        system_instruction=chosen.system_instruction,
        gen_kwargs=chosen.gen_kwargs,
        task_manager=manager,
        log_samples=chosen.samples is not None,
    )
    record = {
        "checkpoint": str(chosen.checkpoint),
        "adapter": None if chosen.adapter is None else str(chosen.adapter),
        "dtype": model.model.dtype,
        "chat_template": chosen.apply_chat_template,
        "system_instruction": chosen.system_instruction,
        "scores": list(scores(found)),
        "computed": model.computed,
        "environment": {**environment_record(), "lm_eval": version("lm_eval")},
        "harness": {key: found[key] for key in KEPT if key in found},
    }
    partial = chosen.out.with_name(f"{chosen.out.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(chosen.out)
    if chosen.samples is not None:
        write_predictions(
            chosen.samples,
            ({"task": task, **_plain(row)} for task, rows in found["samples"].items() for row in rows),
        )
    print(table(record["scores"]))
    print(f"results: {chosen.out}")


def find_tasks(asked: str, known: Sequence[str], match: Any) -> list[str]:
    """Names of tasks from a list with commas; ValueError naming the unknown ones and their nearest known names."""
    names, unknown = [], []
    for name in asked.split(","):
        found = match([name.strip()])
        names += found
        if not found:
            near = difflib.get_close_matches(name, known, n=3)
            unknown.append(f"{name!r}" + (f" (near: {', '.join(near)})" if near else ""))
    if unknown:
        raise ValueError(f"no such task: {', '.join(unknown)}; tasks of your own need --include-path")
    return list(dict.fromkeys(names))


def scores(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per task or group, metric and filter: value, standard error (None: not defined) and n."""
    everything = {**found["results"], **found.get("groups", {})}
    for task, metrics in everything.items():
        for name, value in metrics.items():
            metric, comma, chain = name.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = metrics.get(f"{metric}_stderr,{chain}")
            yield {
                "task": task,
                "version": found["versions"].get(task),
                "shots": found["n-shot"].get(task),
                "metric": metric,
                "filter": chain,
                "value": value,
                "stderr": None if isinstance(error, str) else error,
                "n": metrics["sample_len"],
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
            }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores as aligned lines. The harness's own table is made in forked processes, which JAX does not survive surely.

    >>> row = {"task": "medqa", "filter": "none", "metric": "acc", "shots": 0, "n": 4, "value": 0.5, "stderr": 0.25}
    >>> print(table([row]))
    task   filter  metric  shots  n  value  stderr
    medqa  none    acc     0      4  0.5    0.25
    """
    names = ("task", "filter", "metric", "shots", "n", "value", "stderr")
    lines = [names, *(tuple(_cell(row[name]) for name in names) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """In JSON's own types; NaN and infinities become null, which JSON has."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable), parse_constant=lambda name: None)
