"""Steps on rollouts of real (tiny) models: equal rewards change nothing, every cut is the same step, also with images,
and a stage that is killed goes on to the same bits and the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoints import QUICK, SOFT_TOKENS, TEXT, VISION, VLM_TEXT, assert_close, picture, random_adapter

from vlmalign.models.families import read_config
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model, Params
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.ppo import PpoSettings, ppo_counts, ppo_loss
from vlmalign.progress import Progress
from vlmalign.rewards.contract import MemoryReward
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.runner import RewardRunner, ScoredBatch
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Stage, train
from vlmalign.training.policy import PolicySource
from vlmalign.training.preference import preference_objective
from vlmalign.training.recorded_rewards import RecordedRewards
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.training.value_head import init_value_head
from vlmalign.types import Grid, Group, Patches, Segment

VOCAB, STOP, LONGEST, GROUP = 96, tuple(range(60, 90)), 6, 3
BEGIN, END, SOFT = 90, 91, 92
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}  #: compiling is what these tests pay for


def quick(build: Callable):
    """What `build` jits is compiled without LLVM's optimisations."""
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        return build()


def grpo(**settings) -> Objective:
    loss = GrpoSettings(max_completion=LONGEST, **settings)
    return Objective("grpo", partial(grpo_loss, settings=loss), partial(grpo_counts, settings=loss))


def ppo() -> Objective:
    loss, counts = partial(ppo_loss, settings=PpoSettings()), partial(ppo_counts, settings=PpoSettings())
    return Objective("ppo", loss, counts, needs_values=True)


class Parts(NamedTuple):
    """A model with an adapter, its frozen parameters, and where its images come from."""

    model: Model
    base: Params
    adapter: Params
    features: FeatureStore | None


def parts(config: dict, pictures=None) -> Parts:
    model = Model(read_config(config), lora=LoraSpec(rank=2, alpha=4.0))
    whole = model.without_lora()
    rng = np.random.default_rng(0)
    # By NumPy: JAX would compile a program for every shape. Wide enough that the answers differ.
    base = {
        name: jnp.asarray(rng.normal(size=s.shape, scale=0.15 if "embed" in name else s.shape[-1] ** -0.5), s.dtype)
        for name, s in whole.shapes.items()
    }
    features = None if pictures is None else FeatureStore(whole, base, pictures, chunk=2)
    return Parts(model, base, random_adapter(model, seed=1), features)


@cache
def text() -> Parts:
    """One layer of Gemma 3."""
    return parts({"model_type": "gemma3_text", **TEXT, **ONE_LAYER})


def segment(pieces, images=(), grids=None) -> Segment:
    """Tokens, with a whole image for every name among `pieces`."""
    tokens, image = [], []
    for piece in pieces:
        if isinstance(piece, str):
            soft = grids[piece].tokens
            tokens += [BEGIN, *[SOFT] * soft, END]
            image += [-1, *[images.index(piece)] * soft, -1]
        else:
            tokens.append(piece)
            image.append(-1)
    return Segment(np.asarray(tokens, np.int32), np.asarray(image, np.int32), np.ones(len(tokens), np.float32))


def group(number: int, grids, prompt, *continuations) -> Group:
    images = tuple(dict.fromkeys(x for piece in (prompt, *continuations) for x in piece if isinstance(x, str)))
    own = [segment(piece, images, grids) for piece in (prompt, *continuations)]
    return Group(number, own[0], tuple(own[1:]), images)


def words(number: int) -> list[int]:
    return np.random.default_rng(number).integers(3, 60, 1 + number % 7).tolist()


def reward(prompt: int, sample: int) -> float:
    return float(np.random.default_rng([prompt, sample]).random())


def source(own: Parts, trainer: Trainer, groups: list[Group], *, shapes: Shapes, reward=reward, **more) -> PolicySource:
    options = {name: more.pop(name) for name in ("score", "memory", "log") if name in more}

    def score(number, keys, *rest):
        return ScoredBatch([reward(*key) for key in keys], {}, ())

    generator = Generator(
        own.model.without_lora(), own.features, STOP, rows=4, group=GROUP, completion=LONGEST, sampling=Sampling(),
        multiple=8, images=2,
    )  # fmt: skip
    settings = RolloutSettings(**{"prompts": len(groups), "seed": 5} | more)
    return PolicySource(
        [Task(g, f"prompt {g.id}", {}) for g in groups], generator=generator, trainer=trainer, base=own.base,
        decode=lambda tokens: " ".join(map(str, tokens.tolist())), shapes=shapes, settings=settings,
        **{"score": score} | options,
    )  # fmt: skip


def fresh(params: Params) -> dict[str, jax.Array]:
    """A copy, since a step gives its buffers back."""
    return {name: jnp.array(value) for name, value in params.items()}


# ------------------------------------------------------------------------------------------- any cut of a rollout

CUTS = {"8x1": 1, "4x2": 2, "1x8": 8}
#: compiled for every run of the tests; the others of their family differ in how they weigh, and follow in the full one
LOSSES = ("grpo", "dapo", *(pytest.param(loss, marks=pytest.mark.full) for loss in ("dr_grpo", "gspo")))


@cache
def trainer(loss: str) -> Trainer:
    objective = ppo() if loss == "ppo" else grpo(loss=loss)
    return quick(lambda: Trainer(text().model, objective, optax.sgd(0.5)))


def start(loss: str) -> Params:
    head = {name: value + 0.1 for name, value in init_value_head(32).items()} if loss == "ppo" else {}
    return {**text().adapter, **head}


@cache
def two_updates(loss: str, cut: str) -> list[Params]:
    """Parameters after each of two SGD updates on one rollout: the second is off-policy."""
    shapes = Shapes(rows=CUTS[cut], prompt_multiple=8, completion_multiple=LONGEST)
    advantage = "token" if loss == "ppo" else "group"
    policy = source(
        text(), trainer(loss), [group(i, {}, words(i)) for i in range(8)], shapes=shapes, updates=2, advantage=advantage
    )
    state, found = trainer(loss).init(fresh(start(loss))), []
    for step in range(2):
        work = policy.work(step, state.params)
        assert [b.groups.group_id.shape for b in work.batches] == [(CUTS[cut],)] * (8 // CUTS[cut])
        state, _ = trainer(loss).step(state, text().base, work.batches)
        found.append(jax.device_get(state.params))
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("loss", "cut"),
    [
        *((loss, cut) for loss in ("grpo", "dapo", "dr_grpo", "gspo") for cut in ("4x2", "8x1")),
        ("ppo", "8x1"),
    ],
)
def test_every_cut_of_a_rollout_is_the_same_step(loss, cut):
    before = start(loss)
    for found, expected in zip(two_updates(loss, cut), two_updates(loss, "1x8"), strict=True):
        for name, value in found.items():
            assert_close(value, expected[name], 1e-5, name)
            assert np.abs(value - np.asarray(before[name])).max() > 1e-5, f"{name} did not move"
        before = expected


# ------------------------------------------------------------------------------------------------ equal rewards


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("advantage", [{}, {"scale": "group"}, {"scale": "batch"}, {"advantage": "leave_one_out"}])
def test_equal_rewards_change_no_bit(loss, advantage):
    """0.7 for all: means of eight of them are not 0.7, and deviations not 0."""
    prompts = [group(i, {}, words(i)) for i in range(8)]
    shapes = Shapes(rows=8, prompt_multiple=8, completion_multiple=LONGEST)
    policy = source(text(), trainer(loss), prompts, shapes=shapes, updates=2, reward=lambda p, s: 0.7, **advantage)
    state = trainer(loss).init(fresh(text().adapter))
    for step in range(2):
        work = policy.work(step, state.params)
        state, found = trainer(loss).step(state, text().base, work.batches)
        assert float(found.grad_norm) == 0
    for name, value in text().adapter.items():
        assert np.asarray(state.params[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.full
def test_equal_rewards_change_no_bit_under_adamw_and_clipping():
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.0))
    adam = quick(lambda: Trainer(text().model, grpo(), optimiser))
    shapes = Shapes(rows=8, prompt_multiple=8, completion_multiple=LONGEST)
    prompts = [group(i, {}, words(i)) for i in range(8)]
    state = adam.init(fresh(text().adapter))
    state, _ = adam.step(
        state,
        text().base,
        source(text(), adam, prompts, shapes=shapes, reward=lambda p, s: 0.7).work(0, state.params).batches,
    )
    for name, value in text().adapter.items():
        assert np.asarray(state.params[name]).tobytes() == np.asarray(value).tobytes(), name


# ------------------------------------------------------------------------------------------------------- images


class Films:
    """Gemma's pictures: one size."""

    def grid(self, key):
        return Grid(1, SOFT_TOKENS)

    def read(self, keys):
        return [picture(key) for key in keys]


SIZES = {"square": Grid(2, 2), "wide": Grid(1, 5), "tall": Grid(3, 2)}


class Patched:
    """Qwen's pictures, of several sizes: two patches of 2 x 2 pixels per soft token and side, in two frames."""

    def grid(self, key):
        return SIZES[key]

    def read(self, keys):
        return [self.one(key) for key in keys]

    def one(self, key) -> Patches:
        rows, columns = 2 * SIZES[key].rows, 2 * SIZES[key].columns
        rng = np.random.default_rng([ord(c) for c in key])
        return Patches(rng.normal(size=(rows * columns, 3 * 2 * 2 * 2)).astype(np.float32), rows, columns)


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VLMS = {
    "gemma3": lambda: parts(
        {
            "model_type": "gemma3", "mm_tokens_per_image": SOFT_TOKENS,
            "text_config": {**VLM_TEXT, **ONE_LAYER}, "vision_config": {**VISION, "num_hidden_layers": 1},
            "boi_token_index": BEGIN, "eoi_token_index": END, "image_token_index": SOFT,
        },
        Films(),
    ),
    "qwen2_5_vl": lambda: parts(
        {
            "model_type": "qwen2_5_vl", "image_token_id": SOFT, "vision_start_token_id": BEGIN,
            "vision_end_token_id": END,
            "text_config": {
                "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": ROPE,
            },
            "vision_config": {
                "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 2,
                "window_size": 8, "out_hidden_size": 32, "fullatt_block_indexes": [],
            },
        },
        Patched(),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(request) -> Parts:
    """A tiny VLM; its feature store counts what went through the tower."""
    return VLMS[request.param]()


def one_of(always: str, later: str):
    """One family in every run of the tests, the other in the full one."""
    return pytest.mark.parametrize("images", [always, pytest.param(later, marks=pytest.mark.full)], indirect=True)


def sgd_gradients(own: Parts, kind: Trainer, batches) -> dict[str, np.ndarray]:
    """Of the step: what SGD at rate 1 took away."""
    state = kind.init(fresh(own.adapter))
    state, metrics = kind.step(state, own.base, batches)
    assert not bool(metrics.skipped)
    return {name: np.asarray(own.adapter[name]) - np.asarray(value) for name, value in state.params.items()}


def same_and_real(found: list[dict[str, np.ndarray]]) -> None:
    one, other = found
    for name, value in one.items():
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() > 1e-6, name
        assert_close(value, other[name], 1e-5, name)


@pytest.mark.full
@pytest.mark.parametrize("images", ["qwen2_5_vl", "gemma3"], indirect=True)
def test_a_grpo_step_with_images(images):
    """Three prompts, three pictures, one of them shown by two: encoded once for sampling and for every cut."""
    grids = SIZES
    if images.model.config.family == "gemma3":
        grids = dict.fromkeys(SIZES, Grid(1, SOFT_TOKENS))
    prompts = [
        group(0, grids, [5, "wide", 7]),
        group(1, grids, ["square", 20, "tall", 21, 22]),
        group(2, grids, [30, "wide", 33]),
    ]
    kind = quick(lambda: Trainer(images.model, grpo(loss="dapo"), optax.sgd(1.0)))
    found = []
    for rows in (1, 3):
        shapes = Shapes(rows=rows, prompt_multiple=24, completion_multiple=LONGEST, images=2)
        work = source(images, kind, prompts, shapes=shapes).work(0, images.adapter)
        assert len(work.batches) == 3 // rows
        assert all(b.groups.features is not None and b.groups.pixels is None for b in work.batches)
        found.append(sgd_gradients(images, kind, work.batches))
    same_and_real(found)
    assert images.features.encoded == 3


@pytest.mark.full
@one_of("gemma3", "qwen2_5_vl")
def test_a_dpo_step_with_images(images):
    """Pictures in prompts and in answers."""
    grids = SIZES
    if images.model.config.family == "gemma3":
        grids = dict.fromkeys(SIZES, Grid(1, SOFT_TOKENS))
    pairs = [
        group(0, grids, [5, 6, "wide", 7], [8, 9, 10], [11, 12, 13, 14]),
        group(1, grids, ["square", 20, "tall", 21, 22], [23, "square", 24], [25]),
        group(2, grids, [30, 31, 32, 33], [34, 35], [36, "wide", 37, 38]),
    ]
    objective = preference_objective(DpoSettings(), recorded=False)
    reference = (images.model.without_lora(), {})
    kind = quick(lambda: Trainer(images.model, objective, optax.sgd(1.0), reference=reference))
    found = []
    for rows in (1, 3):
        shapes = Shapes(rows=rows, prompt_multiple=24, completion_multiple=12, images=2)
        batches = [MicroBatch(b, {}) for b in micro_batches(pairs, shapes, images.features)]
        found.append(sgd_gradients(images, kind, batches))
    same_and_real(found)
    assert images.features.encoded == 3


# ------------------------------------------------------------------------------------------------ killed and continued


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class StopAt:
    """The source of a process that dies before update number `step`."""

    waits = True

    def __init__(self, inner: PolicySource, step: int | None):
        self.inner, self.step = inner, step
        self.observe, self.get_state, self.set_state = inner.observe, inner.get_state, inner.set_state

    def work(self, step, params):
        if step == self.step:
            raise Interrupted
        return self.inner.work(step, params)


def whims():
    """A judge that never says the same twice, and a reward that remembers."""
    rng = np.random.default_rng()

    def judge(prompts, completions, **columns):
        return [float(rng.integers(2)) for _ in completions]

    def remember(rows, state):
        return [float((state["seen"] + i) % 2) for i in range(len(rows))], {"seen": state["seen"] + len(rows)}

    rewards = {"judge": (judge, 1.0), "memory": (MemoryReward(lambda: {"seen": 1}, remember), 0.25)}
    return RewardRunner(rewards, workers=0)


def run(folder, *, stop: int | None = None) -> Params:
    """Eight updates, two on each rollout, of at most three rounds of sampling; a checkpoint every four."""
    rewards = RecordedRewards(whims(), OutcomeFile(folder / "outcomes.jsonl"))
    kind = trainer("dapo")
    policy = source(
        text(), kind, [group(i, {}, words(i)) for i in range(10)],
        shapes=Shapes(rows=2, prompt_multiple=8, completion_multiple=LONGEST), prompts=4, updates=2, attempts=3,
        score=rewards, memory=rewards, log=CompletionLog(folder / "completions.jsonl"),
    )  # fmt: skip
    stage = Stage("grpo", folder, 8, 4, lambda step: 0.5)
    return jax.device_get(train(stage, kind, fresh(text().adapter), text().base, StopAt(policy, stop), Progress()))


@pytest.mark.full
@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.full) for stop in (4, 6, 7))])
def test_a_killed_stage_goes_on_to_the_same_bits_and_files(tmp_path, stop):
    """Rewards that differ from call to call come from the file; what was asked anew went into both."""
    with pytest.raises(Interrupted):
        run(tmp_path, stop=stop)
    cut = {name: (tmp_path / name).read_bytes() for name in ("completions.jsonl", "outcomes.jsonl")}
    again = run(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in (*cut, "metrics.jsonl")}
    for name, old in cut.items():
        assert files[name].startswith(old), f"{name}: rounds before the kill are as they were"
    assert files["completions.jsonl"].count(b"\n") == 4 * 4 * GROUP
    assert files["metrics.jsonl"].count(b"\n") == 8
    # The whole stage, never killed, on the outcomes of the one that was.
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "outcomes.jsonl").write_bytes(files["outcomes.jsonl"])
    expected = run(whole)
    for name, value in expected.items():
        assert np.array_equal(again[name], value), name
    for name in files:
        assert (whole / name).read_bytes() == files[name], name
