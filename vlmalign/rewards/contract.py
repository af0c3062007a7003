"""What a reward is: its signature, what it may return, and what becomes of a completion that could not be scored.

    reward(prompts, completions, **columns) -> list[float | None]

is the signature TRL gives reward functions. All arguments come by keyword, with one entry per completion in every
list; the reward may be `async def`. None means "does not apply to this completion". A completion for which a reward
fails (it raises, returns NaN, hangs, kills its process) gets a `Fault` in place of a number: never a guess.
"""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Reward = Callable[..., Any]

#: why a completion has no number: kinds of `Fault`
FAULTS = ("timeout", "crash", "exception", "not finite", "not a number")


class Fault(NamedTuple):
    """A reward failed for one completion."""

    kind: str  #: one of `FAULTS`
    reason: str  #: without any text of the completion: an exception's type and place, never its words


Value = float | None | Fault


class WrongReturn(ValueError):
    """What a reward returned cannot be matched with the completions: a defect of the reward, whatever they say."""


class Row(NamedTuple):
    """One completion as a reward with memory sees it."""

    prompt: Any
    completion: Any
    columns: Mapping[str, Any]


class MemoryReward(NamedTuple):
    """A reward that remembers, as a pair of functions; it runs in the main process, in (prompt, sample) order.

    The state is plain JSON (it goes into the checkpoint) and passes through JSON after every update, so that a
    resumed run sees exactly what an uninterrupted one would. `update` may change the state it is given: it is a copy.
    """

    init: Callable[[], Any]  #: () -> state
    update: Callable[[list[Row], Any], tuple[list[float | None], Any]]  #: (rows, state) -> (rewards, state)


class Batch(NamedTuple):
    """Completions with what rewards may look at; one entry per completion in every list."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, rows: range) -> Batch:
        """Rows of consecutive completions."""
        piece = slice(rows.start, rows.stop)
        columns = {name: column[piece] for name, column in self.columns.items()}
        return Batch(self.prompts[piece], self.completions[piece], columns)

    def arguments(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "completions": self.completions, **self.columns}


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """A completion's text: itself, or what the assistant's messages say, joined by line breaks.

    >>> text_of([{"role": "assistant", "content": [{"type": "text", "text": "Edema"}]}])
    'Edema'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message["content"]) for message in completion if message["role"] == "assistant")


def _content(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def aligned(completions: Sequence[Any], **columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """(text, column entry, ...) of every completion. Raises ValueError when the columns differ in length."""
    lengths = {"completions": len(completions)} | {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one entry per completion, found {lengths}; repeat each prompt's entry")
    return zip(map(text_of, completions), *columns.values(), strict=True)


def score_each(
    score: Callable[..., float | None], completions: Sequence[Any], truth: Sequence[Iterable[str] | None]
) -> list[float | None]:
    """`score(text, truth=labels)` of every completion; None where its true labels are not known."""
    return [None if true is None else score(text, truth=true) for text, true in aligned(completions, truth=truth)]


def is_async(reward: Reward) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def required_columns(reward: Reward, name: str) -> tuple[str, ...]:
    """The columns a reward cannot be called without.

    Raises ValueError when it cannot be called as rewards are: with keywords `prompts`, `completions` and any column.
    """
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} has no Python signature ({error}); wrap it in a function") from error
    wanted = "expected reward(prompts, completions, **columns) -> list[float | None]"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        found = ", ".join(str(p) for p in parameters)
        raise ValueError(f"reward {name!r}: {wanted}, found ({found}); add **columns for the columns it does not use")
    if only := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise ValueError(f"reward {name!r}: {wanted}, found positional-only {only}; rewards are called by keyword")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in named if p.default is p.empty and p.name not in ("prompts", "completions"))


def attempt(
    name: str, reward: Reward, batch: Batch, tell: Callable[[BaseException], None] = lambda error: None
) -> list[Value] | Fault:
    """Call a reward once: a value per completion, or the one fault of the whole call; `tell` gets what it raised.

    Raises WrongReturn when the list it returns cannot be matched with the completions.
    """
    try:
        returned = reward(**batch.arguments())
    except (Exception, SystemExit) as error:  # SystemExit: a reward does not end training
        tell(error)
        return fault_of(error)
    return checked(name, returned, len(batch))


def fault_of(error: BaseException) -> Fault:
    """The fault of a call that raised: the exception's type, and where in the reward's own file it came from. What it says
    may quote a patient's text. A TimeoutError of the reward's own making counts as a time-out."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[1:] if frame.filename == frames[1].filename] or frames
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return Fault("timeout" if isinstance(error, TimeoutError) else "exception", f"{type(error).__name__}{where}")


def checked(name: str, returned: Any, expected: int) -> list[Value]:
    """What a reward returned, entry by entry: a finite float, None, or the fault that says what else was found.

    Raises WrongReturn when it is not a list (or tuple) of one entry per completion.
    """
    if not isinstance(returned, list | tuple):
        raise WrongReturn(
            f"reward {name!r} must return a list of {expected} numbers or None, found {type(returned).__name__}; "
            "return one entry per completion"
        )
    if len(returned) != expected:
        raise WrongReturn(
            f"reward {name!r} must return one number or None per completion, expected {expected}, found "
            f"{len(returned)}; return None where it does not apply"
        )
    return [_value(entry) for entry in returned]


def _value(entry: Any) -> Value:
    if entry is None:
        return None
    if isinstance(entry, bool) or not isinstance(entry, numbers.Real):
        return Fault("not a number", f"a {type(entry).__name__}; return a float")
    try:
        number = float(entry)
    except OverflowError:
        return Fault("not finite", "an integer beyond the range of floats")
    return number if math.isfinite(number) else Fault("not finite", str(number))
