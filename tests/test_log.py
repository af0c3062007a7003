"""What a run writes down: metrics that resume exactly, stage times, readable progress, the machine's record."""

import io
import json
import math
import signal
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlmalign.log import EMPTY, MetricsWriter, stage_timer
from vlmalign.machine import environment_record, matmul_rate
from vlmalign.progress import Progress


def lines(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_scalars_of_every_kind_become_json_numbers(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            {
                "step": np.int64(3),
                "loss": jnp.float32(0.1),
                "half": ml_dtypes.bfloat16(1.5),
                "brain": jnp.bfloat16(2.5),
                "done": np.bool_(True),
                "text": "sft",
                "f1": {"Edema": np.float64(0.5), "Mass": None},
                "sizes": (1, 2),
            }
        )
    (line,) = lines(path)
    assert line == {
        "step": 3,
        "loss": float(np.float32(0.1)),
        "half": 1.5,
        "brain": 2.5,
        "done": True,
        "text": "sft",
        "f1": {"Edema": 0.5, "Mass": None},
        "sizes": [1, 2],
    }
    assert type(line["step"]) is int
    assert type(line["done"]) is bool


def test_nonfinite_numbers_are_null_and_named(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"loss": math.nan, "norm": jnp.float32(jnp.inf), "parts": {"kl": -math.inf, "ok": 1.0}})
        writer.write({"loss": 2.0})
        assert writer.nonfinite == 3
    first, second = lines(tmp_path / "m.jsonl")
    assert first == {
        "loss": None,
        "norm": None,
        "parts": {"kl": None, "ok": 1.0},
        "nonfinite": {"loss": "nan", "norm": "inf", "parts.kl": "-inf"},
    }
    assert second == {"loss": 2.0}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"loss": jnp.zeros(4)},
            r'metrics\["loss"\] must be a number, found an array of shape \(4,\) \(float32\)',
        ),
        (
            {"a": {"b": np.zeros((1, 1))}},
            r'metrics\["a.b"\] must be a number, found an array of shape \(1, 1\)',
        ),
        ({"loss": object()}, r'metrics\["loss"\] must be a number or text, found object'),
        ({"loss": 1j}, r'metrics\["loss"\] must be a number or text, found complex'),
        ({"nonfinite": 1}, "choose another name"),
    ],
)
def test_what_is_not_a_number_is_refused_and_nothing_is_written(tmp_path, metrics, message):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(metrics)
        assert writer.position() == EMPTY


def test_rewind_makes_the_resumed_file_equal_to_an_uninterrupted_one(tmp_path):
    def run(path, steps, position=None):
        with MetricsWriter(path) as writer:
            if position is not None:
                writer.rewind(position)
            for step in steps:
                writer.write({"step": step, "loss": 1 / (step + 1)})
            return writer.position()

    run(tmp_path / "whole.jsonl", range(10))
    checkpoint = run(tmp_path / "killed.jsonl", range(4))
    run(tmp_path / "killed.jsonl", range(4, 7))  # lost: the checkpoint is older
    run(tmp_path / "killed.jsonl", range(4, 10), checkpoint)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    run(tmp_path / "killed.jsonl", range(10), EMPTY)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_lines_survive_kill_9(tmp_path):
    path = tmp_path / "m.jsonl"
    program = (
        "import os, signal, sys\nfrom vlmalign.log import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(100): writer.write({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(path)] == list(range(100))


def test_torn_last_line_is_dropped_and_whole_lines_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    with MetricsWriter(path) as writer:
        writer.write({"step": 3})
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_rewind_refuses_a_file_that_was_changed(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(3):
            writer.write({"step": step})
        place = json.loads(json.dumps(writer.position()))  # as a checkpoint keeps it
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "24 bytes, but .* had 36"),
        (whole.replace(b"1", b"7"), "first 36 bytes are not"),
    ):
        path.write_bytes(damaged)
        with MetricsWriter(path) as writer, pytest.raises(ValueError, match=message):
            writer.rewind(place)
    path.write_bytes(whole + b'{"step": 3}\n')
    with MetricsWriter(path) as writer:
        writer.rewind(place)
        writer.write({"step": 9})
        assert writer.position() != place
        writer.rewind(place)
        assert writer.position() == tuple(place)
    assert path.read_bytes() == whole


def test_stage_times_are_appended_also_after_an_error(tmp_path):
    path = tmp_path / "timing.jsonl"
    with stage_timer(path, "data"):
        pass
    with pytest.raises(RuntimeError), stage_timer(path, "sft"):
        raise RuntimeError
    assert [line["stage"] for line in lines(path)] == ["data", "sft"]
    assert all(line["seconds"] >= 0 for line in lines(path))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_off_a_terminal_is_a_line_every_few_seconds():
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, line_seconds=5.0, clock=clock) as progress:
        progress.stage("sft", 10, start=2)
        for step in range(3, 11):
            clock.now += 2.0
            progress.update(step, loss=1 / step)
        progress.say("films skipped: 0")
        progress.stage("grpo", 100)
        for step in range(1, 4):
            clock.now += 0.1
            progress.update(step, reward=0.25)
    assert out.getvalue().splitlines() == [
        "sft 3/10  loss 0.3333  2.0 s/step  0:14 left",
        "sft 6/10  loss 0.1667  2.0 s/step  0:08 left",
        "sft 9/10  loss 0.1111  2.0 s/step  0:02 left",
        "sft 10/10  loss 0.1  2.0 s/step  0:00 left",
        "films skipped: 0",
        "grpo 1/100  reward 0.25  10.0 steps/s  0:10 left",
        "grpo 3/100  reward 0.25  10.0 steps/s  0:10 left",
    ]


def test_progress_on_a_terminal_is_a_bar():
    out = Terminal()
    with Progress(stream=out) as progress:
        progress.stage("sft", 4)
        progress.update(4, loss=0.5)
        progress.say("[bold] is text here")
    assert "4/4" in out.getvalue()
    assert "loss 0.5" in out.getvalue()
    assert "[bold] is text here" in out.getvalue()


def test_environment_record_is_json_with_versions_and_devices():
    record = json.loads(json.dumps(environment_record()))
    assert record["packages"]["jax"].startswith("0.1")
    assert record["packages"]["vlmalign"]
    assert record["cpu_count"] >= 1
    assert record["devices"]
    assert set(record["devices"][0]) == {"platform", "kind"}


def test_matmul_rate_is_of_a_plausible_size():
    assert 0.5 < matmul_rate(rounds=3, calls=2) < 1e6
