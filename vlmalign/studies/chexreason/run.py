"""The pipeline from a config to a report, in one run folder that a killed run continues.

Several processes train together and share the answers out; process 0 invents films, draws the sets, scores and writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmalign.config import dump_config
from vlmalign.distributed import is_writer
from vlmalign.exchange import agree, from_first
from vlmalign.log import stage_timer
from vlmalign.machine import environment_record, matmul_rate
from vlmalign.progress import Progress
from vlmalign.reporting.html import write_report
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.evaluate import evaluate, open_test_sets
from vlmalign.studies.chexreason.films import open_films
from vlmalign.studies.chexreason.prepare import prepare
from vlmalign.studies.chexreason.stages import run_grpo, run_sft
from vlmalign.studies.chexreason.system import choose_devices, open_system
from vlmalign.studies.earlier import CONFIG, check_folder


def run(config: ChexReasonConfig, *, before: ChexReasonConfig | None = None) -> Path:
    """Sample, train, evaluate and report; returns the path of the report.

    `before` is the config as an earlier start may have left it in the run folder, with rows and rematerialisation that
    were chosen for other devices.

    Raises:
        ValueError: when the run folder holds a run of another config, the devices do not fit it, or the processes of
            the run were not started alike.
    """
    agree(dump_config(config), "the config")
    choose_devices(config)
    from_first(lambda: begin(config, before))

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with stage_timer(config.run / "timing.jsonl", name, writes=is_writer()):
            yield

    with Progress(quiet=not is_writer()) as progress:
        with stage("films"):
            progress.say(f"run folder {config.run}")
            films = open_films(config.data.train, config)
            sets = prepare(config, films, progress)
            tests = open_test_sets(config, films, sets.rows["test"])
            progress.say(
                ", ".join(f"{len(rows)} {name}" for name, rows in sets.rows.items() if len(rows))
                + f" films of {len(films)} from {config.data.train.name}"
            )
        with stage("load model"):
            system = open_system(config, progress)
        with closing(system):
            with stage("sft"):
                sft = run_sft(config, system, films, sets.rows["sft"], sets.rows["validation"], progress)
            with stage("grpo"):
                grpo = run_grpo(config, system, films, sets.rows["rl"], sets.rows["validation"], sft, progress)
            with stage("evaluation"):
                results = evaluate(config, system, films, tests, {"base": None, "sft": sft, "grpo": grpo}, progress)
            if system.reader is not None:
                progress.say(f"films: {system.reader.statistics()}")
    with stage("report"):
        report = Path(from_first(lambda: str(write_report(config.run))))
    if is_writer():
        print_summary(config.run, results, report)
    return report


def print_summary(run: Path, results: dict[str, Any], report: Path) -> None:
    """Scores, rewards and times on the terminal, or as plain lines where there is none."""
    console = Console()
    if not console.is_terminal:
        # A log file has no width of its own, and 80 columns would fold every row into four.
        console = Console(width=150)
    console.print(*summary(results), _timing(run / "timing.jsonl"), sep="\n")
    machine = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    print(f"this machine multiplies float32 matrices at {machine['matmul_gflops']:.0f} GFLOP/s")
    print(f"report: {report}")


def begin(config: ChexReasonConfig, before: ChexReasonConfig | None = None) -> None:
    """Write the resolved config and the machine's record, or check that the folder belongs to this config."""
    config.run.mkdir(parents=True, exist_ok=True)
    if check_folder(config, before):
        return
    path = config.run / CONFIG
    record = {**environment_record(), "matmul_gflops": matmul_rate()}
    (config.run / "environment.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial = path.with_suffix(".partial")
    partial.write_text(dump_config(config), encoding="utf-8")
    partial.replace(path)


def summary(results: dict[str, Any]) -> list[Table]:
    """Macro-F1 with its interval by stage and set, beside the four baselines; and what GRPO did to the reward."""
    table = Table(title="macro-F1 [95 % patient bootstrap]", title_justify="left")
    for column in ("set", "labels", "n", "system", "macro-F1", "micro-F1", "not valid"):
        table.add_column(column, justify="left" if column in ("set", "labels", "system") else "right")
    entries = [(row["dataset"], row["stage"], row["results"]) for row in results["results"]]
    entries += [(row["dataset"], row["name"], row["results"]) for row in results["baselines"]]
    for dataset in results["datasets"]:
        for name, who, found in entries:
            if name == dataset["name"]:
                for subset, block in found["blocks"].items():
                    table.add_row(
                        f"{name} ({dataset['role']})",
                        subset,
                        str(found["n"]),
                        who,
                        _interval(block["macro"]),
                        _interval(block["micro"]),
                        f"{found['fail_rate']:.3f}",
                    )
        table.add_section()
    gain = results["reward"]
    reward = Table(title="GRPO reward, first and last 20 % of steps", title_justify="left")
    for column in ("first", "last", "gain", "standard errors"):
        reward.add_column(column, justify="right")
    errors = gain["gain_in_standard_errors"]
    reward.add_row(
        *(f"{gain[part]['mean']:.3f} ± {gain[part]['standard_error']:.3f}" for part in ("first", "last")),
        f"{gain['gain']:+.3f}",
        "undefined" if errors is None else f"{errors:+.1f}",
    )
    return [table, reward]


def _interval(interval: dict[str, Any]) -> str:
    if interval["value"] is None:
        return "undefined"
    if interval["low"] is None:
        return f"{interval['value']:.3f}"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _timing(path: Path) -> Table:
    seconds: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    table = Table(title="seconds per stage", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("all", f"{sum(seconds.values()):.1f}")
    return table
