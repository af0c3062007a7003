"""What a person sees while a long job runs: a live bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as LiveBars


class Progress:
    """Progress of one job, stage after stage; use as a context manager.

        with Progress() as progress:
            progress.stage("sft", total=400)
            for step in range(400):
                progress.update(step + 1, loss=loss)

    On a terminal each stage is a live bar. Elsewhere the first and the last step and one every `line_seconds` are
    plain lines: `sft 120/400  loss 2.314  1.9 steps/s  2:27 left`. Metrics are floats: handing over a JAX array
    would make every step wait for the device. Of the processes of one run one speaks; the others are `quiet`.
    """

    def __init__(
        self,
        *,
        stream: io.TextIOBase | None = None,
        line_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ):
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._line_seconds = line_seconds
        self._clock = clock
        self._stage, self._total, self._start, self._step = "", 0, 0, 0
        self._began = self._last_line = clock()
        self._unsaid = ""  # the newest line that was held back
        self._bar: TaskID | None = None
        self._live: LiveBars | None = None
        if self._stream.isatty() and not quiet:
            self._live = LiveBars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tail]}"),
                console=Console(file=self._stream),
            )

    def stage(self, name: str, total: int, *, start: int = 0) -> None:
        """Begin a stage of `total` steps, of which `start` were done in an earlier life of the run."""
        self._finish_stage()
        self._stage, self._total, self._start, self._step = name, total, start, start
        self._began = self._clock()
        self._last_line = self._began - self._line_seconds  # the first step is always said
        if self._live is not None:
            self._bar = self._live.add_task(name, total=total, completed=start, tail="")

    def update(self, step: int, **metrics: float) -> None:
        """Step `step` (counted from 1) of the stage is done."""
        self._step = step
        now = self._clock()
        tail = "  ".join([*(f"{name} {value:.4g}" for name, value in metrics.items()), *self._pace(now)])
        if self._live is not None and self._bar is not None:
            self._live.update(self._bar, completed=step, tail=tail)
            return
        self._unsaid = f"{self._stage} {step}/{self._total}  {tail}".rstrip()
        if step >= self._total or now - self._last_line >= self._line_seconds:
            self._last_line = now
            self._finish_stage()

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_stage()
        if self._live is not None:
            self._live.stop()

    def _finish_stage(self) -> None:
        if self._unsaid:
            self.say(self._unsaid)
            self._unsaid = ""

    def _pace(self, now: float) -> list[str]:
        done, seconds = self._step - self._start, now - self._began
        if done <= 0 or seconds <= 0:
            return []
        rate = done / seconds
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        return [speed, f"{_clock_text((self._total - self._step) / rate)} left"]


def _clock_text(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours too.

    >>> _clock_text(147), _clock_text(3725)
    ('2:27', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
