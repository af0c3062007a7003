"""Does GRPO help on its own schema? Runs the arms of `configs/chexreason/arms.yaml` and writes `docs/grpo_arms.md`.

    python scripts/grpo_arms.py dev --run runs/arms                    # all arms, seeds 0 to 2, films of `dev`
    python scripts/grpo_arms.py dev --run runs/arms --arms mix --seeds 0 1      # one of them
    python scripts/grpo_arms.py final --arm mix --run runs/arms-final  # one arm, seeds 10 to 14, other films, all test sets
    python scripts/grpo_arms.py page                                   # the page, from docs/results/grpo_arms.json

`dev` and `final` keep what they find in that file, `dev` arm by arm; the page is made from it alone. Arms are chosen by
`dev`, never by `final`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from generated_page import with_part

from vlmalign.config import load_config
from vlmalign.evaluation.over_seeds import over_seeds
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import read_numbers
from vlmalign.studies.engine.seeds import sibling

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "chexreason" / "arms.yaml"
RESULTS = REPOSITORY / "docs" / "results" / "grpo_arms.json"
PAGE = REPOSITORY / "docs" / "grpo_arms.md"
MARKS = {
    part: (f"<!-- {part}: written by scripts/grpo_arms.py -->", f"<!-- end of {part} -->") for part in ("dev", "final")
}

FINAL_SEEDS = (10, 11, 12, 13, 14)
#: what is watched while an arm trains: on films that it has not seen yet, where each is seen once
WATCHED = ("reward", "entropy", "length", "kl", "valid")


def run(command: Sequence[str]) -> None:
    print(" ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "vlmalign.cli", "run", str(CONFIG), *command], check=True)


def dev_settings(arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Some arms, each with the SFT that it goes on from, and some seeds; nothing given: all of the study."""
    chosen = [f"seeds={json.dumps(seeds)}"] if seeds else []
    if arms:
        chosen.append(f"answers.dev.stages={json.dumps(with_parents(arms))}")
    return chosen


def final_settings(arm: str) -> list[str]:
    """The same study with one arm, other seeds, other films, and the three test sets."""
    films = {"mimic": 11, "chexpert-test": 12, "nih-test": 13}
    return [
        f"seeds={json.dumps(FINAL_SEEDS)}",
        "seed=10",
        *(f"sources.{name}.phantom.seed={seed}" for name, seed in films.items()),
        f"answers.dev.stages={json.dumps(with_parents([arm]))}",
        'answers.dev.sets=["mimic-like", "chexpert-like", "nih-like"]',
    ]


def with_parents(arms: Sequence[str]) -> list[str]:
    stages = load_config(StudyConfig, CONFIG).stages
    return list(dict.fromkeys(name for arm in arms for name in (stages[arm].from_, arm)))


def collect(folder: Path, part: str, **more: Any) -> None:
    """Keep what a finished run found over seeds, what was watched, versions and hardware; of dev, arm by arm."""
    scores = json.loads((folder / "scores" / "dev" / "results.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    earlier = known.get(part, {}) if part == "dev" else {}
    rows = {kind: {_place(row): row for row in earlier.get(kind, [])} for kind in ("results", "differences")}
    for kind, own in rows.items():
        own |= {_place(row): row for row in scores["seeds"][kind]}
    known[part] = {
        "datasets": scores["datasets"],
        **{kind: list(own.values()) for kind, own in rows.items()},
        "watched": {**earlier.get("watched", {}), **watched(folder, scores["seeds"]["differences"])},
        "environment": environment,
        **more,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row.get("to", row.get("stage")), row["dataset"], row["subset"]


def watched(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> number, and which fifth of the updates -> seed -> its mean there."""
    told: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for seed in row["numbers"]["macro"]["seeds"]:
            metrics = folder / "stages" / sibling(row["to"], int(seed)) / "metrics.jsonl"
            for name in WATCHED:
                known = [value for value in read_numbers(metrics, name) if value is not None]
                fifth = max(1, len(known) // 5)
                for end, values in (("first", known[:fifth]), ("last", known[-fifth:])) if known else ():
                    told.setdefault(row["to"], {}).setdefault(f"{name}, {end} fifth", {})[seed] = sum(values) / fifth
    return told


def page(text: str) -> str:
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    tables = {"dev": dev_table, "final": final_table}
    for part, table in tables.items():
        if part in known:
            text = with_part(text, PAGE, *MARKS[part], table(known[part]))
    return text


def dev_table(found: Mapping[str, Any]) -> str:
    """A row an arm: what it changes on the films of `dev` to the SFT that it goes on from, and what was watched."""
    lines = [
        "| arm | seeds | Jaccard | macro-F1 | micro-F1 | sampled reward, first and last fifth | entropy | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["differences"]:
        told = found["watched"][row["to"]]
        cells = [interval(row["numbers"][name]) for name in ("jaccard", "macro", "micro")]
        cells += [ends(told, name) for name in ("reward", "entropy", "length")]
        lines.append(f"| `{row['to']}` | {row['numbers']['macro']['n']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def final_table(found: Mapping[str, Any]) -> str:
    lines = ["| films | labels | measure | SFT | GRPO | GRPO - SFT, paired | seeds |", "|---|---|---|---|---|---|---|"]
    means = {(row["stage"], row["dataset"], row["subset"]): row["numbers"] for row in found["results"]}
    roles = {row["name"]: f"{row['name']}, {row['role']}, n = {row['n']}" for row in found["datasets"]}
    for row in found["differences"]:
        for name, title in (("jaccard", "Jaccard"), ("macro", "macro-F1"), ("micro", "micro-F1")):
            before, after = (means[row[end], row["dataset"], row["subset"]][name] for end in ("from", "to"))
            gap = row["numbers"][name]
            each = " ".join(f"{value:+.3f}" for value in gap["seeds"].values())
            lines.append(
                f"| {roles[row['dataset']]} | {row['subset']} | {title} | {before['value']:.3f} | {after['value']:.3f} "
                f"| {interval(gap)} | {each} |"
            )
    return "\n".join([*lines, ""])


def interval(gap: Mapping[str, Any]) -> str:
    """A mean difference over seeds with its t interval."""
    if gap["low"] is None:
        return f"{gap['value']:+.3f}"
    return f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"


def ends(told: Mapping[str, Mapping[str, float]], name: str) -> str:
    """Means over seeds of the first and the last fifth of a number that was watched."""
    first, last = (
        over_seeds(dict(enumerate(told[f"{name}, {end} fifth"].values())))["value"] for end in ("first", "last")
    )
    return f"{first:.3g} → {last:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("dev", "final", "page"))
    parser.add_argument("--run", type=Path, help="the run folder of dev or final")
    parser.add_argument("--arm", help="of final: the arm that was chosen")
    parser.add_argument("--arms", nargs="+", default=[], help="of dev: only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of dev: only these")
    given = parser.parse_args()
    if given.part != "page":
        if given.run is None or (given.part == "final") != (given.arm is not None):
            parser.error("dev needs --run, final needs --run and --arm")
        settings = final_settings(given.arm) if given.part == "final" else dev_settings(given.arms, given.seeds)
        run(["--run", str(given.run), *(["--set", *settings] if settings else []), "--only", "scores/dev"])
        collect(given.run, given.part, **({"arm": given.arm} if given.arm else {}))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
