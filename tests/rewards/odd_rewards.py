"""Rewards that misbehave, in a module of their own: worker processes import it, so it must be light."""

import asyncio
import os
import subprocess
import sys
import time


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def negative(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def odd_only(prompts, completions, *, number, **columns):
    return [None if n % 2 == 0 else float(n) for n in number]


def hangs(prompts, completions, **columns):
    """On "hang" it sleeps for ever."""
    if "hang" in completions:
        time.sleep(3600)
    return length(prompts, completions)


def spins(prompts, completions, **columns):
    """On "hang" it stays inside one call that never lets Python run (a regular expression that backtracks)."""
    if "hang" in completions:
        import re

        re.fullmatch(r"(a+)+b", "a" * 64)
    return length(prompts, completions)


def hangs_for_all(prompts, completions, **columns):
    time.sleep(3600)


def crashes(prompts, completions, **columns):
    """On "exit", "abort" or "kill" it takes its process down."""
    if "exit" in completions:
        os._exit(3)
    if "abort" in completions:
        os.abort()
    if "kill" in completions:
        os.kill(os.getpid(), 9)
    return length(prompts, completions)


def raises(prompts, completions, **columns):
    if "raise" in completions:
        raise KeyError("no such thing")
    if "quit" in completions:
        sys.exit("bye")
    if "late" in completions:
        raise TimeoutError("the pattern took too long")
    return length(prompts, completions)


ENTRIES = {
    "nan": float("nan"),
    "inf": float("-inf"),
    "huge": 10**400,
    "text": "1.0",
    "bool": True,
    "list": [1.0],
    "none": None,
    "int": 2,
}


def entries(prompts, completions, **columns):
    return [ENTRIES[text] for text in completions]


def too_few(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)


def too_few_if_told(prompts, completions, **columns):
    return [] if "few" in completions[0] else length(prompts, completions)


def slow_if_told(prompts, completions, **columns):
    if "slow" in completions[0]:
        time.sleep(0.5)
    return length(prompts, completions)


def one_number(prompts, completions, **columns):
    return 1.0


def modules(prompts, completions, **columns):
    """1.0 if JAX is among the loaded modules, else 0.0; and it must not see a GPU."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    return [float("jax" in sys.modules) for _ in completions]


def process(prompts, completions, **columns):
    return [float(os.getpid()) for _ in completions]


at_once = most_at_once = 0  #: calls of `judge` that wait now, and the most that ever did


async def judge(prompts, completions, **columns):
    """Waits a fifth of a second; on "hang" for ever, on "raise" it raises."""
    global at_once, most_at_once
    at_once += 1
    most_at_once = max(most_at_once, at_once)
    try:
        await asyncio.sleep(3600 if "hang" in completions else 0.2)
    finally:
        at_once -= 1
    if "raise" in completions:
        raise RuntimeError("429 too many requests")
    return length(prompts, completions)


async def second_judge(prompts, completions, **columns):
    return await judge(prompts, completions, **columns)


async def blocks(prompts, completions, **columns):
    """An async function that does not await."""
    if "hang" in completions:
        time.sleep(5)
    return length(prompts, completions)


async def judge_of_few(prompts, completions, **columns):
    return too_few(prompts, completions)


class Unloadable:
    """Pickles, and cannot be unpickled."""

    def __call__(self, prompts, completions, **columns):
        return length(prompts, completions)

    def __reduce__(self):
        return (_refuse, ())


def _refuse():
    raise ImportError("no such module there")


def no_columns(prompts, completions):
    return length(prompts, completions)


def forks_and_both_answer(prompts, completions, **columns):
    """The child comes back as well."""
    os.fork()
    return length(prompts, completions)


def children(prompts, completions, **columns):
    """Leaves a child of a fork, a child process, a daemon in a session of its own, and one that has no parent and nothing
    in its environment; tells the process ids."""
    forked = os.fork()
    if not forked:
        time.sleep(3600)
        os._exit(0)
    started = subprocess.Popen(["sleep", "3600"]).pid
    daemon = subprocess.Popen(["sleep", "3600"], start_new_session=True).pid
    orphan = subprocess.run(
        ["sh", "-c", "env -i setsid sleep 3600 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True, check=True
    )
    return [float(pid) for pid in (forked, started, daemon, orphan.stdout)][: len(completions)]


def prints(prompts, completions, **columns):
    """On both streams, more than is kept."""
    for _ in range(40):
        print("o" * 49_999)
        print("e" * 49_999, file=sys.stderr)
    return length(prompts, completions)


def _write_everywhere(data):
    """To every file that is open."""
    for number in range(3, 64):
        try:
            os.write(number, data)
        except OSError:
            continue


def writes_anywhere(prompts, completions, **columns):
    """On "write" eight bytes that are no answer."""
    if "write" in completions:
        _write_everywhere(b"12345678")
    return length(prompts, completions)


def answers_by_itself(prompts, completions, **columns):
    """On "write" a line that looks like the answer to an earlier call."""
    if "write" in completions:
        _write_everywhere(b'[0, "scored", [7.0, 7.0, 7.0, 7.0], ""]\n')
    return length(prompts, completions)


def chatters_for_ever(prompts, completions, **columns):
    """On "hang" answers to earlier calls, without end."""
    while "hang" in completions:
        _write_everywhere(b'[0, "scored", [7.0], ""]\n')
        time.sleep(0.01)
    return length(prompts, completions)


def interrupts(prompts, completions, **columns):
    if "interrupt" in completions:
        raise KeyboardInterrupt
    return length(prompts, completions)
