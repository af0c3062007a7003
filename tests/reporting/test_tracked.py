"""The figure of what a stage tracked: a panel for each number, a line for each set, all over the same steps."""

from __future__ import annotations

import re

import pytest
from run_folders import write_lines, write_study

from vlmalign.reporting.html import write_report
from vlmalign.reporting.record import Stage
from vlmalign.reporting.tracked import tracked

SETS = ("validation", "away", "nih & co")


def lines(steps: int = 40, every: int = 10, **more) -> list[dict]:
    found = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "reward": 0.4 + 0.005 * step,
            "kl": 0.001 * step,
            "entropy": 0.6,
            "grad_norm": 1.0,
            **more,
        }
        if step % every == 0:
            for place, name in enumerate(SETS):
                line |= {
                    f"{name}/macro_f1": 0.3 + (0.1 - 0.1 * place) * step / steps,
                    f"{name}/micro_f1": 0.5,
                    f"{name}/reasoning_named": 0.9 if step > every else None,
                    f"{name}/valid": 1.0,
                    f"{name}/length": 40.0 + step,
                    f"{name}/n": 60,
                }
        found.append(line)
    return found


def test_a_panel_for_every_number_that_was_measured():
    found = tracked(Stage("hard", "grpo", "sft", "stages/hard", lines()), "var(--grpo)")
    assert list(found.legend) == list(SETS)
    assert len({str(mark) for mark in found.legend.values()}) == len(SETS)
    titles = [panel.title for panel in found.panels]
    assert titles == ["macro-F1", "micro-F1", "reasoning: named", "valid", "length", "reward", "KL", "entropy"]
    first, *_, last = (panel.svg for panel in found.panels)
    assert "validation 0.325 to 0.4, away 0.3 to 0.3, nih &amp; co 0.275 to 0.2" in first
    assert (first.count("<circle"), last.count("<circle")) == (4 * len(SETS), 0)
    assert {"away/macro_f1", "kl"} <= found.columns
    assert not {"away/n", "grad_norm"} & found.columns


def test_all_panels_share_the_steps():
    """Also those of what was measured now and then."""
    found = tracked(Stage("hard", "grpo", "sft", "stages/hard", lines()), "red")
    ticks = [re.findall(r'text-anchor="middle">(\d+)<', panel.svg) for panel in found.panels]
    assert all(each == ticks[0] for each in ticks)
    starts = {panel.title: re.search(r'<path d="M([\d.]+)', panel.svg.split("step</text>")[1].split("/>", 1)[1])[1]
              for panel in found.panels}  # fmt: skip
    assert float(starts["macro-F1"]) > float(starts["KL"]), "the first evaluation is at update 10"


@pytest.mark.parametrize("more", [{}, {"validation/loss": 1.0}])
def test_a_stage_that_answers_no_label_lists_has_no_such_figure(more):
    rows = [{"step": 1, "reward": 0.5, "kl": 0.1, **more}]
    assert tracked(Stage("hard", "grpo", "sft", "stages/hard", rows), "red") is None
    assert tracked(Stage("hard", "grpo", "sft", "stages/hard", []), "red") is None


def test_the_page_draws_it_once_and_each_number_in_one_place(tmp_path):
    run = write_study(tmp_path / "run", films=10, steps=10)
    write_lines(run / "stages" / "dpo" / "metrics.jsonl", lines())
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count('<figure class="tracked">') == 1
    assert text.count(" macro-F1 over 40 steps, first and last: ") == 1
    assert "dpo: away/macro_f1" not in text
    assert "</svg>nih &amp; co</li>" in text
