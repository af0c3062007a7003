"""Prompts through few rows: the same completions whatever the neighbours, less work, no compilation after warm-up."""

from functools import cache

import jax
import numpy as np
import pytest
from tiny_checkpoints import QUICK, adapted, assert_close, group, put, read, scores, text, text_model, vlm, write

from vlmalign.models.lora import is_adapter, merge_adapter
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.engine import generate
from vlmalign.rollout.merge_check import logp_gap
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Completion
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.types import Group, Layout, Segment

KEY = jax.random.key(3)
#: of different lengths; the draws differ by id
PROMPTS = [group(40 + i, list(range(3 + i, 3 + i + 2 + 5 * i % 13))) for i in range(9)]
STOP = (1, 7, 9, 20, 30, 50)


def generator(**changes) -> Generator:
    fields = {
        "model": text().model,
        "features": None,
        "stop_ids": STOP,
        "rows": 2,
        "group": 3,
        "completion": 60,
        "sampling": Sampling(temperature=0.9),
        "multiple": 16,
    }
    return Generator(**{**fields, **changes})


def run(made: Generator, prompts=PROMPTS) -> tuple[list[list[Completion]], RolloutStats]:
    stats: list[RolloutStats] = []
    found = made.run(text().params, prompts, KEY, report=stats.append)
    return found, stats[0]


def identical(a: Completion, b: Completion) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "logp", "kept_logp", "stopped"))


@pytest.fixture(scope="module")
def flowed() -> tuple[list[list[Completion]], RolloutStats]:
    return run(generator())


def test_rows_are_filled_again_and_every_bit_stays(flowed):
    """Nine prompts through two rows, and each of them alone."""
    found, stats = flowed
    for item, together in zip(PROMPTS, found, strict=True):
        (alone,), _ = run(generator(), [item])
        assert all(map(identical, together, alone))
    assert stats.prompts == len(PROMPTS)
    assert stats.completions == 27
    assert stats.tokens == sum(len(c.tokens) for answers in found for c in answers)
    assert len({len(c.tokens) for answers in found for c in answers}) > 5, "lengths that differ are what is tested"


def test_rows_that_end_early_make_way(flowed):
    """Batches of two that wait for their longest completion would decode more."""
    order = [0, 6, 1, 5, 2, 3, 4, 7, 8]
    found, stats = run(generator(), [PROMPTS[i] for i in order])
    assert all(
        identical(a, b) for i, own in zip(order, found, strict=True) for a, b in zip(flowed[0][i], own, strict=True)
    )
    steps = generator().steps
    longest = [max(len(c.tokens) for answers in found[i : i + 2] for c in answers) for i in range(0, len(found), 2)]
    waiting = sum(-(-length // steps) * steps * 6 for length in longest)
    assert stats.tokens <= stats.decoded < waiting
    assert stats.decoded_per_token == stats.decoded / stats.tokens
    assert stats.columns_per_prompt_token == len(PROMPTS) * 16 / sum(len(p.prompt) for p in PROMPTS)


def plain(prompts: list[Group], made: Generator):
    """The engine's one program, whose cache has its full length from the start."""
    static = ("model", "group", "completion", "stop_ids", "sampling")
    program = jax.jit(generate.__wrapped__, static_argnames=static, compiler_options=QUICK)
    batch = put(prompts, Layout(16, 0, 0), images=None)
    return jax.device_get(
        program(
            made.model,
            text().params,
            batch,
            KEY,
            group=made.group,
            completion=made.completion,
            stop_ids=made.stop_ids,
            sampling=made.sampling,
        )
    )


@pytest.mark.full
def test_growing_and_shrinking_caches_give_the_same_samples():
    """Long completions: the cache doubles, then those that go on move into smaller shapes."""
    made = generator(rows=4, group=4, completion=150, prompt_lengths=(16,), smaller=2)
    assert [tuple(s) for s in made.shapes] == [(4, 4, 75), (4, 4, 150), (4, 2, 150), (2, 2, 150)]
    prompts = PROMPTS[:4]
    found, stats = run(made, prompts)
    expected = plain(prompts, made)
    assert stats.moves >= 2
    assert stats.blocks == -(-expected.length.max() // 15) >= 6
    assert stats.decoded < stats.blocks * 15 * 16, "no shape became smaller"
    equal = total = 0
    for row, answers in enumerate(found):
        for k, completion in enumerate(answers):
            length = expected.length[row, k]
            total += max(length, len(completion.tokens))
            same = completion.tokens[:length] == expected.tokens[row, k, : len(completion.tokens)]
            equal += int(same.sum())
            assert completion.stopped == expected.stopped[row, k]
            assert_close(completion.logp, expected.logp[row, k, :length], 1e-4)
    assert total > 500
    assert equal >= 0.999 * total


def test_stop_strings_cut_what_the_plain_run_wrote(flowed):
    """Text in which token t reads as a letter: the same samples, cut behind the first match."""

    def decode(tokens: np.ndarray) -> str:
        return "".join(chr(ord("a") + int(t) % 8) for t in tokens)

    stop = ("bad", "cafe", "gg")
    found, _ = run(generator(stop=stop, decode=decode))
    cut = 0
    for answers, whole in zip(found, flowed[0], strict=True):
        for a, b in zip(answers, whole, strict=True):
            length = len(a.tokens)
            assert np.array_equal(a.tokens, b.tokens[:length])
            assert np.array_equal(a.logp, b.logp[:length])
            inside = [s in decode(a.tokens) for s in stop]
            assert not any(s in decode(a.tokens[:-1]) for s in stop)
            if any(inside):
                assert a.stopped
                cut += length < len(b.tokens)
            else:
                assert length == len(b.tokens)
                assert a.stopped == b.stopped
    assert cut > 3


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="give decode"):
        generator(stop=("x",))
    with pytest.raises(ValueError, match="empty stop string"):
        generator(stop=("",), decode=str)


class Compilations:
    """Counts the programs that XLA is asked for."""

    def __init__(self):
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, seconds: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(more.get("fun_name")))


@cache
def one_layer():
    """What is compiled, and when, does not depend on the number of layers."""
    module = text_model(5, num_hidden_layers=1, layer_types=["sliding_attention"])
    return read(write(module, "one-layer-flow"), module)


@pytest.mark.full
def test_nothing_compiles_after_warm_up():
    made = generator(
        model=one_layer().model, rows=4, group=2, completion=70, prompt_lengths=(8, 24), prefill_rows=2, smaller=1,
        sampling=Sampling(top_k=20, top_p=0.9),
    )  # fmt: skip
    seen = Compilations()
    assert made.warm_up(one_layer().params) == 2 * len(made.shapes) == 4
    assert sum("decode_block" in name for name in seen.names) == 4, "compiled side by side, and found where they run"
    key, rng = jax.random.key(0), np.random.default_rng(0)
    keys = list(jax.random.split(key, 50))
    seen.names.clear()
    lengths, moves = set(), 0
    for number in range(50):
        prompts = []
        for i in range(int(rng.integers(1, 7))):
            tokens = rng.integers(3, 90, rng.integers(1, 25)).astype(np.int32)
            blank = np.full(len(tokens), -1, np.int32)
            prompts.append(Group(100 * number + i, Segment(tokens, blank, np.ones(len(tokens), np.float32)), (), ()))
        stats: list[RolloutStats] = []
        found = made.run(one_layer().params, prompts, keys[number], report=stats.append)
        lengths |= {len(c.tokens) for answers in found for c in answers}
        moves += stats[0].moves
    assert seen.names == []
    assert len(lengths) > 20
    assert moves > 20
    jax.jit(lambda x: x + 41.5)(np.float32(1))
    assert len(seen.names) == 1, "the counter counts"


def test_warm_up_needs_lengths():
    with pytest.raises(ValueError, match="set prompt_lengths"):
        generator().warm_up(text().params)


@pytest.mark.full
def test_merged_and_unmerged_policies_agree_on_the_sampled_tokens():
    """The check finds rounding where the copy is right, and a copy that is one update behind."""
    whole = adapted()
    adapter = {name: value for name, value in whole.params.items() if is_adapter(name)}
    base = {name: value for name, value in whole.params.items() if name not in adapter}
    merged = merge_adapter(base, adapter, whole.model.lora.scale)
    made = generator(model=vlm().model, rows=2, group=2, completion=5, stop_ids=(1,))
    prompts = [group(1, [5, 6, 7]), group(2, [8, 9])]
    gaps = []
    for params in (merged, base):
        found = made.run(params, prompts, KEY)
        groups = [
            Group(
                p.id,
                p.prompt,
                tuple(
                    Segment(c.tokens, np.full(len(c.tokens), -1, np.int32), np.ones(len(c.tokens), np.float32))
                    for c in answers
                ),
                (),
            )
            for p, answers in zip(prompts, found, strict=True)
        ]
        batch = put(groups, Layout(16, 2, 5), images=None)
        sampled = np.zeros(batch.weight.shape, np.float32)
        for row, answers in enumerate(found):
            for k, c in enumerate(answers):
                sampled[row, k, : len(c.tokens)] = c.logp
        scored = np.asarray(scores(whole.model, whole.params, batch, temperature=0.9).logp)
        gaps.append(logp_gap([sampled], [scored], [batch.weight > 0]))
    right, stale = gaps
    assert right.largest < 1e-4
    assert stale.largest > 0.05
    assert stale.mean > 100 * right.mean
