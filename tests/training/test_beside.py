"""Two sources as one: batches of both in a step, numbers of both in a line, places of both in a checkpoint."""

from __future__ import annotations

from vlmalign.training.beside import BesideSource
from vlmalign.training.loop import Source, Work


class Counting:
    """Gives its name and how often it was asked."""

    def __init__(self, name: str, *, waits: bool):
        self.name, self.waits, self.count, self.seen = name, waits, 0, []

    def work(self, step, params):
        self.count += 1
        return Work([f"{self.name} {self.count}"], {"tokens": float(self.count)}, {"option": self.name}, [self.count])

    def observe(self, line):
        self.seen.append(line)

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def test_a_step_learns_from_both_and_goes_on_with_both():
    policy, answers = Counting("policy", waits=True), Counting("answers", waits=False)
    source = BesideSource(policy, answers, prefix="sft")
    assert isinstance(source, Source)
    assert source.waits
    source.work(0, {})
    saved = source.get_state()
    work = source.work(1, {})
    assert (work.batches, work.beside) == (["policy 2"], ["answers 2"])
    assert work.metrics == {"tokens": 2.0, "sft/tokens": 2.0}
    assert (work.options, work.ids) == ({"option": "policy"}, [2])
    source.observe({"step": 2})
    assert (policy.seen, answers.seen) == ([{"step": 2}], [])
    again = BesideSource(Counting("policy", waits=True), Counting("answers", waits=False), prefix="sft")
    again.set_state(saved)
    assert again.work(1, {}) == work
