#!/usr/bin/env python3
"""Kill runs at random moments, or let their disk run full; let the same command end them, and compare every byte with a
run that was left alone.

    scripts/soak.py                        # 60 kills over the five kinds of run
    scripts/soak.py --kills 10 --only grpo --seed 3 --work /tmp/soak
    scripts/soak.py --kills 0 --full 20    # disks of 20 random sizes (Linux, as root: they are mounted in memory)

Five kinds of run, each small: supervised, preferences, GRPO, PPO (text, tiny-llama), and a study of films with SFT, GRPO,
answers, scores and report (tiny-medgemma). A kill is a SIGKILL of the process, in turn at a random moment of its start,
at a random moment of the whole, and the moment after one of the files appears by which a stage or an evaluation ends.
A disk that is full must end the run with exit code 2 and a sentence that names a path on it; then it is made larger.
Prints one JSON object: kills by the phase they fell into, runs, files compared, those that differ, and what a full disk was
answered with. The exit code is 1 where any file differs or an answer is another.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = REPOSITORY / "configs" / "models"
#: files that hold time and place, and differ between a run and its repetition
RECORDS = {".hashes.json", "environment.json", "timing.jsonl", "study.yaml", "begun.json", "made.json", "model_card.md"}
#: files by whose appearance a phase is known
ENDING = ("states", "adapter", "predictions.jsonl", "results.json", "report.html", "best")
KINDS = ("sft", "dpo", "grpo", "ppo", "films")
SHAPES = {"rows": 4, "prompt_multiple": 32, "completion_multiple": 16}
ADAPTER = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


def study(kind: str, folder: Path) -> dict[str, Any]:
    """The study of one kind; its rows are written into `folder`."""
    if kind == "films":
        return _films()
    asked = [{"role": "user", "content": f"What follows {number}?"} for number in range(12)]
    answers = [{"role": "assistant", "content": str(number + 1)} for number in range(12)]
    pairs = list(zip(asked, answers, strict=True))
    rows = {
        "sft": [{"messages": [question, answer]} for question, answer in pairs],
        "dpo": [{"prompt": q["content"], "chosen": a["content"], "rejected": "no"} for q, a in pairs],
        "grpo": [{"messages": [question]} for question in asked],
        "ppo": [{"messages": [question]} for question in asked],
    }[kind]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage: dict[str, Any] = {"kind": kind, "from": "base", "data": {"path": str(path)}, "checkpoint_every": 2}
    stage |= {"steps": 6, "shapes": SHAPES, "optimiser": {"learning_rate": 1e-3}}
    if kind in ("sft", "dpo"):
        stage |= {"batch": 4, "validation": {"data": {"path": str(path)}, "every": 2, "best": "loss"}}
    else:
        stage |= {
            "prompts": 4, "rollout": {"rows": 4, "group": 4, "completion": 16}, "updates": 2,
            "rewards": {"short": {"kind": "length", "options": {"high": 8, "high_ramp": 16}}, "same": {"kind": "repetition", "weight": 0.1}},
        }  # fmt: skip
    model = {"kind": "model", "path": str(MODELS / "tiny-llama"), "lora": ADAPTER}
    return {"run": "run", "stages": {"base": model, kind: stage}}


def _films() -> dict[str, Any]:
    root = "{run}/sources/mimic"
    common = {"checkpoint_every": 2, "shapes": {**SHAPES, "prompt_multiple": 64}, "optimiser": {"learning_rate": 1e-3}}
    return {
        "run": "run",
        "sources": {
            "mimic": {
                "kind": "mimic-cxr-jpg", "root": root, "split": "train", "traces": f"{root}/traces.jsonl",
                "phantom": {"films": {"train": 40, "validate": 2, "test": 6}, "seed": 1, "size": 64},
            },
            "test": {"kind": "mimic-cxr-jpg", "root": root, "split": "test"},
        },
        "sets": {
            "train": {"from": "mimic", "draw": "balanced", "parts": {"sft": 12, "rl": 6}, "floor": 0.0},
            "held": {"from": "test", "role": "test"},
        },
        "tasks": {"findings": {"kind": "labels", "labels": "chexpert", "prompt": "Which findings?"}},
        "stages": {
            "base": {"kind": "model", "path": str(MODELS / "tiny-medgemma"), "lora": ADAPTER},
            "sft": {"kind": "sft", "from": "base", "data": "train.sft", "steps": 6, "batch": 4, **common},
            "grpo": {
                "kind": "grpo", "from": "sft", "data": "train.rl", "steps": 4, "prompts": 2, **common,
                "rollout": {"rows": 2, "group": 4, "completion": 32}, "rewards": {"r": {"kind": "hard"}},
            },
        },
        "answers": {"test": {"stages": ["sft", "grpo"], "sets": ["held"], "completion": 32, "draws": 20}},
    }  # fmt: skip


def differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many files two runs have, and those that are not the same in both."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (one, other)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in RECORDS and path.suffix != ".html"
    }
    wrong = [
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]
    return len(names), sorted(wrong)


def files(folder: Path) -> set[str]:
    """Names below a folder that is being written."""
    try:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    except FileNotFoundError:  # one of its folders has just gone
        return set()


def kill_once(command: list[str], run: Path, seconds: float, way: str, chance: random.Random) -> str | None:
    """Start the command and kill it; returns the phase that it was in, None where it had ended before."""
    before = files(run)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if way == "ending":
            while process.poll() is None:
                fresh = files(run) - before
                if any(Path(name).name.startswith(ENDING) for name in fresh) and chance.random() < 0.3:
                    break
                time.sleep(0.01)
            time.sleep(chance.random() * 0.05)
        else:
            limit = chance.uniform(0, 0.3 * seconds if way == "start" else seconds)
            deadline = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        ended = process.poll() is not None
        if not ended:
            process.send_signal(signal.SIGKILL)
    return None if ended else phase(run, before)


def phase(run: Path, before: set[str]) -> str:
    """What a run that was killed was at."""
    there = files(run)
    under_way = [name for name in there if name.endswith("begun.json")]
    if not there - before and not under_way:
        return "start"
    if not under_way:
        return "between artefacts"
    folder = under_way[0].removesuffix("/begun.json")
    if folder.startswith(("answers", "scores")):
        return "evaluation"
    if any(name.startswith((f"{folder}/states", f"{folder}/adapter")) for name in there):
        return "export"
    return "training" if f"{folder}/metrics.jsonl" in there else folder.split("/")[0]


def _uninterrupted(kind: str, folder: Path) -> tuple[list[str], float]:
    """The command of a study, without its run folder, and the seconds that it takes; `folder/whole` is the run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "study.yaml"
    path.write_text(json.dumps(study(kind, folder)))
    command = [sys.executable, "-m", "vlmalign.cli", "run", str(path), "--run"]
    started = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True, stdout=subprocess.DEVNULL)
    return command, time.monotonic() - started


def soak(kind: str, kills: int, work: Path, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """Yields ("kill", phase) for each kill and ("run", (files, differing)) for each run that was ended."""
    folder = work / kind
    command, seconds = _uninterrupted(kind, folder)
    number = done = 0
    while done < kills:
        run = folder / f"killed-{number}"
        number += 1
        for way in ("start", "any", "ending", "any")[: min(4, kills - done)]:
            if (found := kill_once([*command, str(run)], run, seconds, way, chance)) is None:
                break
            done += 1
            yield "kill", found
        subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)
        yield "run", differing(run, folder / "whole")
        if number > 5 * kills:
            raise SystemExit(f"{kind}: runs end before they can be killed")


def fill(kind: str, disks: int, work: Path, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """Yields ("full", phase), or ("answer", what was said) where it is not as it must be, and ("run", ...) as `soak`."""
    folder = work / kind
    command, _ = _uninterrupted(kind, folder)
    whole = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    for number in range(disks):
        disk = folder / f"disk-{number}"
        disk.mkdir()
        run = disk / "run"
        size = chance.randrange(2**16, whole)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            full = subprocess.run([*command, str(run)], capture_output=True, text=True, check=False)
            if full.returncode:
                said = full.stderr.strip().splitlines()
                right = full.returncode == 2 and str(run) in full.stderr and "Traceback" not in full.stderr
                yield ("full", phase(run, set())) if right else ("answer", [size, full.returncode, *said[-4:]])
                subprocess.run(["mount", "-o", f"remount,size={4 * whole}", str(disk)], check=True)
                subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)
            yield "run", differing(run, folder / "whole")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="kills, shared out over the kinds (60)")
    parser.add_argument("--full", type=int, default=0, metavar="N", help="disks that run full, shared out too (0)")
    parser.add_argument("--only", choices=KINDS, help="one kind of run")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where runs are kept; by default they are removed")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="vlmalign-soak-"))
    chance = random.Random(arguments.seed)
    kinds = (arguments.only,) if arguments.only else KINDS
    phases: Counter[str] = Counter()
    full: Counter[str] = Counter()
    answers: list[Any] = []
    runs = compared = 0
    wrong: dict[str, list[str]] = {}
    for index, kind in enumerate(kinds):
        kills, disks = (
            total * (index + 1) // len(kinds) - total * index // len(kinds)
            for total in (arguments.kills, arguments.full)
        )
        found_in = chain(
            soak(kind, kills, work, chance) if kills else (), fill(kind, disks, work, chance) if disks else ()
        )
        for what, found in found_in:
            if what == "kill":
                phases[found] += 1
            elif what == "full":
                full[found] += 1
            elif what == "answer":
                answers.append([kind, *found])
            else:
                runs, compared = runs + 1, compared + found[0]
                if found[1]:
                    wrong[f"{kind}, run {runs}"] = found[1]
            print(
                f"{kind}: {sum(phases.values())} kills, {sum(full.values())} full disks, {runs} runs, {len(wrong)} differ, "
                f"{len(answers)} wrong answers",
                file=sys.stderr,
                flush=True,
            )
    if arguments.work is None:
        shutil.rmtree(work)
    result = {
        "kills": sum(phases.values()),
        "phases": dict(phases),
        "full disks": dict(full),
        "wrong answers": answers,
        "runs": runs,
        "files": compared,
        "differing": wrong,
    }
    print(json.dumps({**result, "kinds": kinds, "seed": arguments.seed}, indent=1))
    return 1 if wrong or answers else 0


if __name__ == "__main__":
    sys.exit(main())
