"""One record whatever the rewards do: hangs, crashes and nonsense cost the culprits their number, and nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import odd_rewards as odd
import pytest

from vlmalign.rewards import pool
from vlmalign.rewards.contract import Fault, MemoryReward
from vlmalign.rewards.runner import RewardRunner, RowFault, ScoredBatch, combine

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "g"]
LENGTHS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1.0]


def score(rewards, texts, *, columns=None, **settings):
    """One call of a fresh runner; rewards without a weight weigh 1."""
    weighted = {name: reward if isinstance(reward, tuple) else (reward, 1.0) for name, reward in rewards.items()}
    with RewardRunner(weighted, **settings) as runner:
        return runner.score(["p"] * len(texts), texts, columns or {})


def with_culprit(word):
    """Seven completions, the culprit in the middle of a chunk, and what the others score."""
    texts = [*TEXTS[:3], word, *TEXTS[3:6]]
    return texts, [*LENGTHS[:3], None, *LENGTHS[3:6]]


# What a total is


def test_totals_by_truth_table():
    failed = Fault("timeout", "late")
    values = {
        "accuracy": [1.0, 1.0, None, None, failed, 1.0, failed],
        "style": [0.5, None, 0.5, None, 0.5, 0.5, failed],
        "logged": [9.0, 9.0, 9.0, 9.0, 9.0, failed, 9.0],
    }
    scored = combine(values, {"accuracy": 2.0, "style": -1.0, "logged": 0.0})
    #                          both  first  second  none  failed  only a logged one failed  all failed
    assert scored.rewards == [1.5, 2.0, -0.5, None, None, 1.5, None]
    assert scored.parts["accuracy"] == [1.0, 1.0, None, None, None, 1.0, None]
    assert scored.counts == {"accuracy/timeout": 2, "style/timeout": 1, "logged/timeout": 1}
    assert scored.faults[0] == RowFault("accuracy", 4, "timeout", "late")


def test_the_breakdown_is_kept_and_weights_apply_to_the_total_only():
    scored = score({"length": (odd.length, 0.5), "odd": (odd.odd_only, 2.0)}, ["a", "bb"], columns={"number": [3, 4]})
    assert scored == ScoredBatch([6.5, 1.0], {"length": [1.0, 2.0], "odd": [3.0, None]}, ())


# The same whatever the workers and chunks


@pytest.fixture(scope="module")
def mixed():
    """A batch with every kind of misfortune that ends at once, and what it scores in this process."""
    rewards = {
        "raises": (odd.raises, 1.0),
        "length": (odd.length, 0.5),
        "odd": (odd.odd_only, -1.0),
        "judge": (odd.judge, 1.0),
    }
    texts = ["a", "raise", "ccc", "quit", "eeeee", "raise", "g", "late", "i"]
    columns = {"number": list(range(9))}
    return rewards, texts, columns, score(rewards, texts, columns=columns, workers=0)


def test_in_process_by_hand(mixed):
    scored = mixed[3]
    assert scored.parts["raises"] == [1.0, None, 3.0, None, 5.0, None, 1.0, None, 1.0]
    assert scored.parts["odd"] == [None, 1.0, None, 3.0, None, 5.0, None, 7.0, None]
    assert scored.rewards == [2.5, None, 7.5, None, 12.5, None, 2.5, None, 2.5]
    assert scored.counts == {"raises/exception": 3, "raises/timeout": 1, "judge/exception": 2}
    # Where it arose, and none of its words: they may quote a patient's.
    line = next(n for n, text in enumerate(Path(odd.__file__).read_text().splitlines(), 1) if "raise KeyError" in text)
    assert scored.faults[0] == RowFault("raises", 1, "exception", f"KeyError (odd_rewards.py, line {line})")
    assert scored.faults[1].reason == f"SystemExit (odd_rewards.py, line {line + 2})"


@pytest.mark.parametrize(("workers", "chunk"), [(0, 1), (0, 4), (1, 3), (2, 1), (2, 4), (2, 100)])
def test_workers_and_chunks_change_nothing(mixed, workers, chunk):
    rewards, texts, columns, expected = mixed
    assert score(rewards, texts, columns=columns, workers=workers, chunk=chunk) == expected


# Hangs and crashes


@pytest.mark.parametrize(
    "reward",
    [odd.hangs, odd.spins, odd.chatters_for_ever],
    ids=["sleeps", "never returns to Python", "answers without end"],
)
def test_a_hang_costs_one_completion_and_bounded_time(reward):
    texts, expected = with_culprit("hang")
    start = time.monotonic()
    with RewardRunner({"hangs": (reward, 1.0)}, workers=1, chunk=4, timeout_s=0.5) as runner:
        scored = runner.score(["p"] * 7, texts, {})
        assert scored.parts["hangs"] == scored.rewards == expected
        assert scored.faults == (RowFault("hangs", 3, "timeout", "no answer within 0.5 s"),)
        assert time.monotonic() - start < 10  # two time-outs and three starts, not an hour
        assert runner.score(["p"] * 7, TEXTS, {}).rewards == LENGTHS  # and it is as good as new


def test_time_is_bounded_when_every_call_hangs():
    start = time.monotonic()
    scored = score({"hangs": odd.hangs_for_all}, TEXTS[:4], workers=2, chunk=2, timeout_s=0.3)
    assert scored.counts == {"hangs/timeout": 4}
    assert scored.rewards == [None] * 4
    # (n + n / chunk) x timeout / workers = 0.9 s, and six starts of workers on a machine that others use too
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("exit", "ended with exit code 3"),
        ("abort", "killed by SIGABRT"),
        ("kill", "killed by SIGKILL (out of memory?)"),
    ],
)
def test_a_crash_costs_one_completion(word, reason):
    texts, expected = with_culprit(word)
    scored = score({"crashes": odd.crashes, "length": odd.length}, texts, workers=2, chunk=4, timeout_s=10)
    assert scored.parts["crashes"] == expected
    assert None not in scored.parts["length"]  # another reward of the same completion
    assert scored.rewards[3] is None
    assert scored.faults == (RowFault("crashes", 3, "crash", f"the worker process {reason}"),)


def test_a_worker_that_dies_between_calls_is_replaced_and_nobody_blamed():
    with RewardRunner({"process": (odd.process, 1.0)}, workers=1) as runner:
        before = int(runner.score(["p"], ["a"], {}).rewards[0])
        os.kill(before, signal.SIGKILL)
        time.sleep(0.1)
        after = runner.score(["p"], ["a"], {})
    assert after.faults == ()
    assert after.rewards[0] not in (None, before)


# Async rewards


def test_async_rewards_run_at_the_same_time():
    odd.most_at_once = 0
    with RewardRunner({"one": (odd.judge, 1.0), "two": (odd.second_judge, 1.0)}, chunk=1) as runner:
        scored = runner.score(["p"] * 7, TEXTS, {})
        assert odd.most_at_once == 14
        assert scored.rewards == [2 * n for n in LENGTHS]


@pytest.mark.parametrize(
    ("word", "kind", "reason"),
    [
        ("hang", "timeout", "no answer within 0.4 s"),
        ("raise", "exception", r"RuntimeError \(odd_rewards.py, line \d+\)"),
    ],
)
def test_an_async_culprit_pays_alone(word, kind, reason):
    texts, expected = with_culprit(word)
    scored = score({"judge": odd.judge, "length": odd.length}, texts, workers=0, chunk=4, timeout_s=0.4)
    assert scored.parts["judge"] == expected
    (fault,) = scored.faults
    assert fault[:3] == ("judge", 3, kind)
    assert re.fullmatch(reason, fault.reason)


def test_an_async_reward_that_blocks_is_given_up_and_harms_no_other():
    texts = ["hang", "a"]
    start = time.monotonic()
    with RewardRunner({"blocks": (odd.blocks, 1.0), "judge": (odd.judge, 1.0)}, chunk=1, timeout_s=0.3) as runner:
        scored = runner.score(["p"] * 2, ["x", "a"], {})
        assert scored.faults == ()
        scored = runner.score(["p"] * 2, texts, {})
        assert time.monotonic() - start < 4.5  # it blocks for five seconds
        assert {fault.kind for fault in scored.faults if fault.reward == "blocks"} == {"timeout"}
        assert scored.parts["judge"][1] == 1.0
        assert runner.score(["p"], ["bb"], {}).parts["blocks"] == [2.0]


# What rewards return


@pytest.mark.parametrize("workers", [0, 1])
def test_entries_that_are_no_numbers_are_counted_and_the_others_kept(workers):
    scored = score({"entries": odd.entries}, list(odd.ENTRIES), workers=workers)
    assert scored.rewards == [None] * 7 + [2.0]
    kinds = [(fault.row, fault.kind) for fault in scored.faults]
    finite, number = "not finite", "not a number"
    assert kinds == [(0, finite), (1, finite), (2, finite), (3, number), (4, number), (5, number)]
    assert scored.faults[3].reason == "a str; return a float"
    assert type(scored.rewards[7]) is float


@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_that_cannot_be_matched_is_an_error_and_the_runner_lives_on(workers):
    rewards = {"length": (odd.length, 1.0), "wrong": (odd.too_few, 1.0), "memory": (counter(), 1.0)}
    with RewardRunner(rewards, workers=workers, chunk=4) as runner:
        with pytest.raises(ValueError, match=r"reward 'wrong' must return one .* expected 4, found 3"):
            runner.score(["p"] * 7, TEXTS, {})
        with pytest.raises(ValueError, match=r"reward 'wrong'"):
            runner.score(["p"] * 7, TEXTS, {})
        assert runner.get_state() == {"memory": {"seen": 0}}
    with pytest.raises(ValueError, match=r"'number' must return a list of 2 numbers or None, found float"):
        score({"number": odd.one_number}, ["a", "b"], workers=workers)


def test_answers_to_a_batch_that_failed_do_not_reach_the_next_one():
    rewards = {"slow": (odd.slow_if_told, 1.0), "few": (odd.too_few_if_told, 1.0), "judge": (odd.judge, 1.0)}
    with RewardRunner(rewards, workers=2, chunk=1) as runner:
        runner.score(
            ["p"] * 2, ["slow"] * 2, {}
        )  # time for both workers to start: one is to fail while the other works
        with pytest.raises(ValueError, match=r"reward 'few' must return one .* expected 1, found 0"):
            runner.score(["p"], ["few and slow"], {})
        scored = runner.score(["p"], ["bb"], {})
    assert scored == ScoredBatch([6.0], {"slow": [2.0], "few": [2.0], "judge": [2.0]}, ())


def test_an_async_list_that_cannot_be_matched_is_an_error():
    with pytest.raises(ValueError, match=r"reward 'few' must return one .* expected 2, found 1"):
        score({"few": odd.judge_of_few}, ["a", "b"], workers=0)


@pytest.mark.parametrize(
    ("reward", "text", "message"),
    [
        (odd.entries, "nan", "reward 'x', completion 1: not finite: nan"),
        (odd.raises, "raise", "reward 'x', completion 1: exception: KeyError"),
    ],
)
def test_strict_mode_raises_at_the_first_failure(reward, text, message):
    with pytest.raises(ValueError, match=message):
        score({"x": reward}, ["int" if reward is odd.entries else "a", text], workers=0, strict=True)


# What goes in


def test_columns_are_checked_before_anything_runs():
    with pytest.raises(ValueError, match=r"reward 'odd' needs the columns \['number'\], found \['ids'\]; add"):
        score({"odd": odd.odd_only}, ["a"], columns={"ids": [1]}, workers=0)
    with pytest.raises(ValueError, match=r"every column, found \{'prompts': 2, 'completions': 2, 'number': 1\}"):
        score({"odd": odd.odd_only}, ["a", "b"], columns={"number": [1]}, workers=0)


def test_token_counts_come_from_token_ids():
    def tokens(prompts, completions, *, completion_tokens, **columns):
        return [float(n) for n in completion_tokens]

    scored = score({"tokens": tokens}, ["a", "b"], columns={"completion_ids": [[1, 2], []]}, workers=0)
    assert scored.rewards == [2.0, 0.0]


def test_no_completions_give_an_empty_record():
    rewards = {"length": (odd.length, 1.0), "memory": (counter(), 1.0)}
    with RewardRunner(rewards, workers=0) as runner:
        assert runner.score([], [], {}) == ScoredBatch([], {"length": [], "memory": []}, ())


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ({}, {}, "at least one reward"),
        ({"a": odd.length}, {"workers": -1}, "workers must be >= 0, found -1"),
        ({"a": odd.length}, {"chunk": 0}, "chunk must be >= 1, found 0"),
        ({"a": odd.length}, {"timeout_s": 0.0}, "timeout_s must be a positive number of seconds, found 0"),
        ({"a": (odd.length, float("nan"))}, {}, "weight of reward 'a' must be a finite number, found nan"),
        ({"a": odd.no_columns}, {}, r"found \(prompts, completions\); add \*\*columns"),
        ({"a": lambda prompts, completions, **columns: []}, {}, "'a' cannot be sent to a worker process"),
        ({"a": odd.Unloadable()}, {}, "cannot load reward 'a': ImportError: no such module there"),
    ],
)
def test_mistakes_are_told(rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        score(rewards, ["a"], **({"workers": 1} | settings))


def test_columns_that_cannot_travel_are_told():
    with pytest.raises(
        ValueError, match=r"the columns \['number'\] of reward 'odd' hold something that cannot be sent"
    ):
        score({"odd": odd.odd_only}, ["a"], columns={"number": [lambda: 1]}, workers=1)


# Rewards with memory


def counter():
    """Rewards the n-th completion ever with n; "raise" makes it raise after it has changed its state."""

    def update(rows, state):
        numbers = []
        for row in rows:
            state["seen"] += 1
            numbers.append(float(state["seen"]))
            if row.completion == "raise":
                raise RuntimeError("in the middle")
        return numbers, state

    return MemoryReward(lambda: {"seen": 0}, update)


def test_memory_sees_rows_in_order_with_their_columns():
    seen = []

    def update(rows, state):
        seen.extend((row.prompt, row.completion, row.columns["number"]) for row in rows)
        return [None] * len(rows), state

    with RewardRunner({"memory": (MemoryReward(list, update), 1.0)}, workers=2, chunk=1) as runner:
        runner.score(["p", "p", "q"], ["a", "b", "a"], {"number": [1, 2, 3]})
    assert seen == [("p", "a", 1), ("p", "b", 2), ("q", "a", 3)]


def test_memory_continues_from_its_saved_state():
    rewards = {"count": (counter(), 1.0)}
    with RewardRunner(rewards) as runner:
        runner.score(["p"] * 3, ["a"] * 3, {})
        saved = json.loads(json.dumps(runner.get_state()))
        expected = runner.score(["p"], ["a"], {})
    with RewardRunner(rewards) as runner:
        runner.set_state(saved)
        assert runner.score(["p"], ["a"], {}) == expected
        assert expected.rewards == [4.0]


def test_memory_is_untouched_by_what_fails():
    with RewardRunner({"count": (counter(), 1.0)}) as runner:
        runner.score(["p"], ["a"], {})
        with pytest.raises(RuntimeError, match="in the middle"):
            runner.score(["p"] * 3, ["a", "raise", "a"], {})
        assert runner.get_state() == {"count": {"seen": 1}}
        assert runner.score(["p"], ["a"], {}).rewards == [2.0]


def test_memory_must_be_json_and_of_these_rewards():
    with RewardRunner({"m": (MemoryReward(dict, lambda rows, state: ([0.0], {"a": {1, 2}})), 1.0)}) as runner:
        with pytest.raises(ValueError, match="state of reward 'm' must be plain JSON"):
            runner.score(["p"], ["a"], {})
        with pytest.raises(ValueError, match=r"of rewards \['other'\], but those with memory are \['m'\]"):
            runner.set_state({"other": {}})


# The processes


def test_workers_start_quickly_without_jax_and_end_with_the_runner():
    start = time.monotonic()
    with RewardRunner({"jax": (odd.modules, 1.0), "process": (odd.process, 1.0)}, workers=1) as runner:
        scored = runner.score(["p"], ["a"], {})
        seconds = time.monotonic() - start
    assert scored.parts["jax"] == [0.0]
    pid = int(scored.parts["process"][0])
    assert pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert seconds < 5  # 0.1 to 0.2 s on an idle machine; importing JAX alone takes longer


def test_a_child_that_answers_too_is_heard_by_nobody():
    """Its numbers were once taken for those of the next call."""
    with RewardRunner({"forks": (odd.forks_and_both_answer, 1.0)}, workers=1, chunk=4) as runner:
        for _ in range(3):
            for texts, expected in ((TEXTS, LENGTHS), (TEXTS[::-1], LENGTHS[::-1])):
                assert runner.score(["p"] * 7, texts, {}) == ScoredBatch(expected, {"forks": expected}, ())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="children in other sessions are found by /proc")
def test_what_rewards_start_ends_with_the_run():
    with RewardRunner({"children": (odd.children, 1.0)}, workers=1) as runner:
        started = [int(pid) for pid in runner.score(["p"] * 4, TEXTS[:4], {}).rewards]
        assert all(running(pid) for pid in started)
    assert not any(running(pid) for pid in started)


@pytest.mark.parametrize("reward", [odd.writes_anywhere, odd.answers_by_itself])
def test_what_a_reward_writes_into_the_pipe_costs_it_its_number_at_most(reward):
    texts, expected = with_culprit("write")
    with RewardRunner({"writes": (reward, 1.0)}, workers=1, chunk=4, timeout_s=5) as runner:
        scored = runner.score(["p"] * 7, texts, {})
        assert [
            value if value != 5.0 or text != "write" else None
            for value, text in zip(scored.rewards, texts, strict=True)
        ] == expected
        assert all(fault.kind == "crash" for fault in scored.faults)
        assert runner.score(["p"] * 7, TEXTS, {}).rewards == LENGTHS


def test_what_rewards_print_is_kept_up_to_a_bound_and_never_shown(tmp_path, capfd):
    path = tmp_path / "printed.txt"
    with RewardRunner({"prints": (odd.prints, 1.0)}, workers=2, chunk=1, output=path) as runner:
        assert runner.score(["p"] * 2, TEXTS[:2], {}).rewards == LENGTHS[:2]
    kept = path.read_text()
    assert 2**20 < len(kept) < 2**20 + 100
    left = 2 * 40 * 100_000 - 2**20
    assert kept.endswith(f"[{left} more bytes were printed by rewards, and left out]\n")
    assert capfd.readouterr() == ("", "")


def test_a_reward_that_interrupts_ends_its_worker_alone():
    texts, expected = with_culprit("interrupt")
    scored = score({"interrupts": odd.interrupts}, texts, workers=1, chunk=4)
    assert scored.rewards == expected
    assert scored.counts == {"interrupts/crash": 1}


ORPHAN = """
import sys
sys.path[:0] = sys.argv[1:]
import odd_rewards
from vlmalign.rewards import pool
from vlmalign.rewards.runner import RewardRunner
runner = RewardRunner({"process": (odd_rewards.process, 1.0), "spins": (odd_rewards.spins, 1.0)}, workers=1, timeout_s=0.3)
print(int(runner.score(["p"], ["a"], {}).parts["process"][0]), flush=True)
runner.score(["p"], ["hang"], {})
"""


@pytest.mark.full
def test_a_hung_worker_does_not_outlive_a_killed_main_process(monkeypatch):
    """Also the main program may come from standard input, which a re-import of the main script could not survive."""
    paths = [str(Path(odd.__file__).parent), str(Path(pool.__file__).parents[2])]
    main = subprocess.Popen(
        [sys.executable, "-", *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    main.stdin.write(ORPHAN)
    main.stdin.close()
    worker = int(main.stdout.readline())
    time.sleep(0.3)  # now it hangs
    os.kill(main.pid, signal.SIGKILL)
    main.wait()
    deadline = time.monotonic() + 20  # the time-out and ORPHAN_GRACE_S: 5.3 s
    while running(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.1)


def running(pid):
    """Whether the process is there and not a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
