"""DPO on text and on images: a step is TRL's on the two sequences apart; the reference is computed once and never stale."""

import os
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import jax
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from tiny_checkpoints import (
    QUICK,
    SOFT,
    SOFT_TOKENS,
    adapted,
    assert_close,
    group,
    occurrences,
    pictures,
    random_adapter,
    text,
    vlm,
    vlm_model,
)
from trl.trainer.utils import add_fused_lm_head
from trl_preference import trl_dpo_loss

from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.rollout.features import FeatureStore
from vlmalign.training import reference_cache
from vlmalign.training.loop import Source
from vlmalign.training.preference import PreferenceSource, precompute_reference, preference_objective
from vlmalign.training.reference_cache import ReferenceCache, group_digest, picture_digest, scorer_identity
from vlmalign.training.step import Trainer
from vlmalign.training.supervised import Shapes
from vlmalign.types import Grid, Group, Patches

SHAPES = Shapes(rows=2, prompt_multiple=16, completion_multiple=8, images=1)
SETTINGS = DpoSettings(("sigmoid", "sft"), (1.0, 0.5), beta=0.3)

#: text alone, an image in the prompt, an image in one answer, and one more of each
PAIRS = (
    group(0, [2, 50, 51], [52, 53, 54, 55, 56, 57], [58, 59]),
    group(1, [2, "b", 30, 31], [33, 34, 35], [36, 37, 38, 39]),
    group(2, [2, 5, "a", 8, 9], [11, 12], [13, "a", 14]),
    group(3, [2, 60], [61, 62, 63], [64]),
    group(4, [2, "a", 70], [71], [72, 73, 74, 75, 76]),
)


class Pictures:
    """The pictures of `tiny_checkpoints` by name; counts what is read."""

    def __init__(self, change=lambda pixels: pixels):
        self.read_keys, self._change = [], change

    def grid(self, key: str) -> Grid:
        return Grid(1, SOFT_TOKENS)

    def read(self, keys: list[str]) -> list[np.ndarray]:
        self.read_keys += keys
        return [self._change(picture.copy()) for picture in pictures(keys)]


@cache
def features() -> FeatureStore:
    return FeatureStore(vlm().model, vlm().params, Pictures(), chunk=2)


def quick():
    """The product's own programs, compiled without LLVM's optimisations."""
    return patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK))


def precompute(folder, groups=PAIRS, *, pictures=None, per_file=2, temperature=1.0, seen=None):
    with quick():
        return precompute_reference(
            folder,
            groups,
            model=vlm().model,
            params=vlm().params,
            temperature=temperature,
            shapes=SHAPES,
            features=features(),
            pictures=pictures or Pictures(),
            per_file=per_file,
            progress=None if seen is None else lambda done, todo: seen.append((done, todo)),
        )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return precompute(tmp_path_factory.mktemp("reference"))


def source(groups, *, reference, batch=None) -> PreferenceSource:
    return PreferenceSource(
        groups, batch=batch or len(groups), shapes=SHAPES, features=features(), seed=0, reference=reference
    )


def adapter() -> dict[str, jax.Array]:
    return {name: value for name, value in adapted().params.items() if is_adapter(name)}


@cache
def trainer(runs_reference: bool, settings: DpoSettings = SETTINGS) -> Trainer:
    with quick():
        return Trainer(
            adapted().model,
            preference_objective(settings, recorded=not runs_reference),
            optax.sgd(1.0),
            reference=(vlm().model, {}) if runs_reference else None,
        )


def step(groups, reference, settings: DpoSettings = SETTINGS):
    """(gradient of the adapter, metrics) of one update."""
    runs = trainer(reference is None, settings)
    state = runs.init({name: jax.numpy.array(value) for name, value in adapter().items()})
    work = source(groups, reference=reference).work(0, state.params)
    state, metrics = runs.step(state, vlm().params, work.batches)
    return {name: adapter()[name] - value for name, value in jax.device_get(state.params).items()}, metrics


# ------------------------------------------------------------------------------- the step against TRL


@cache
def peft():
    """The same weights and adapter in transformers and PEFT, with TRL's head."""
    spec = adapted().model.lora
    module = vlm_model()
    add_fused_lm_head(module, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=rf".*language_model.*\.({'|'.join(spec.targets)})"
    )
    module = get_peft_model(module, config).train()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_" in name:
                value.copy_(torch.from_numpy(np.array(adapter()[our_name(name)])))
    return module


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.model.").replace(".default.", ".")


def as_trl_batch(groups) -> dict[str, torch.Tensor]:
    """Prompt and answer in one row each, chosen rows first, padded on the right."""
    rows = [(g, k) for k in (0, 1) for g in groups]
    width = max(len(g.prompt) + len(g.continuations[k]) for g, k in rows)
    ids, attention, completion = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    for row, (g, k) in enumerate(rows):
        start, end = len(g.prompt), len(g.prompt) + len(g.continuations[k])
        ids[row, :end] = np.concatenate([g.prompt.tokens, g.continuations[k].tokens])
        attention[row, :end] = 1
        completion[row, start:end] = g.continuations[k].weight > 0
    found = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    found["token_type_ids"] = (ids == SOFT).astype(np.int64)
    keys = [key for g, k in rows for key in occurrences(g, k)]
    if keys:
        found["pixel_values"] = pictures(keys)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def without_image_labels(item: Group) -> Group:
    pieces = [replace(c, weight=(c.image < 0).astype(np.float32)) for c in item.continuations]
    return replace(item, continuations=tuple(pieces))


TEXT, IMAGE = (PAIRS[0], PAIRS[3]), (PAIRS[1], without_image_labels(PAIRS[2]))
CASES = {
    "text": (TEXT, SETTINGS),
    "image": (IMAGE, SETTINGS),
    # TRL's weighting cannot be had beside its sft term. Its weights of these pairs are about 1e-3.
    "image, WPO": (IMAGE, DpoSettings(loss_weights=(300.0,), beta=0.3, wpo=True)),
}


@pytest.mark.parametrize("case", ["text", "image", pytest.param("image, WPO", marks=pytest.mark.full)])
def test_a_step_on_groups_is_trls_on_separate_sequences(case, recorded):
    groups, settings = CASES[case]
    module = peft()
    module.zero_grad()
    options = {"loss_types": list(settings.losses), "loss_weights": list(settings.weights.values())}
    options |= {"beta": settings.beta, "use_weighting": settings.wpo}
    loss, logged = trl_dpo_loss(module, None, as_trl_batch(groups), **options)
    loss.backward()
    gradients, metrics = step(groups, recorded, settings)
    assert_close(metrics.loss, loss.item(), 1e-5)
    assert {our_name(n) for n, p in module.named_parameters() if p.requires_grad} == set(gradients)
    for name, value in module.named_parameters():
        if value.requires_grad:
            assert_close(gradients[our_name(name)], value.grad.numpy(), 1e-5, name)
            assert value.grad.abs().max() > 1e-4, f"{name} does not move"
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"):
        total, count = metrics.parts[name]
        assert_close(total / count, logged[name], 1e-5, name)
    assert abs(logged["rewards/margins"]) > 1e-2


@pytest.mark.full
def test_a_recorded_reference_is_the_one_the_trainer_would_run(recorded):
    (gradients, metrics), (expected, known) = step(PAIRS, recorded), step(PAIRS, None)
    assert_close(metrics.loss, known.loss, 1e-6)
    for name, value in expected.items():
        assert_close(gradients[name], value, 1e-6, name)


# ----------------------------------------------------------------------------------------- the source


def test_a_source_carries_each_rows_reference_and_can_be_set_back(recorded):
    def read(runs, step):
        work = runs.work(step, {})
        assert work.metrics == {"loss_tokens": sum(b.groups.weight.sum() for b in work.batches)}
        return [(b.groups.group_id, b.groups.tokens, b.recorded["ref_logp"]) for b in work.batches]

    runs = source(PAIRS, reference=recorded, batch=3)
    assert isinstance(runs, Source)
    read(runs, 0)
    state = runs.get_state()
    later = [read(runs, i) for i in (1, 2)]
    again = source(PAIRS, reference=recorded, batch=3)
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, [read(again, i) for i in (1, 2)], later)
    by_id = {g.id: g for g in PAIRS}
    for numbers, _, logp in [part for parts in later for part in parts]:
        for row, number in enumerate(numbers):
            if number < 0:
                assert not logp[row].any()
                continue
            for k, continuation in enumerate(by_id[int(number)].continuations):
                expected = recorded(by_id[int(number)])[k]
                assert np.array_equal(logp[row, k, : len(continuation)], expected[: len(continuation)])
                assert not logp[row, k, len(continuation) :].any()
                assert logp[row, k, : len(continuation)].all()


# ------------------------------------------------------------------------------------------ the cache


def test_only_what_is_missing_is_scored_in_whole_files(tmp_path):
    seen = []
    first = precompute(tmp_path, PAIRS[:3], seen=seen)
    assert seen == [(2, 3), (3, 3)]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    seen.clear()
    read = Pictures()
    again = precompute(tmp_path, [replace(PAIRS[1], id=7), *PAIRS[2:]], seen=seen, pictures=read)
    assert seen == [(2, 2)], "the id is no part of what a group is"
    assert read.read_keys == ["b", "a"], "each image is read once"
    assert np.array_equal(first(PAIRS[1]), again(replace(PAIRS[1], id=7)))


def identity(**changes):
    options = {"model": vlm().model, "params": vlm().params, "temperature": 1.0, **changes}
    return scorer_identity(options["model"], options["params"], temperature=options["temperature"])


def changed(params, name: str):
    value = np.array(params[name])
    value.flat[-1] = np.nextafter(value.flat[-1], np.float32(np.inf))
    return {**params, name: jax.numpy.asarray(value)}


def test_whatever_changes_a_score_changes_the_scorers_key(tmp_path):
    with_adapter = {"model": adapted().model, "params": adapted().params}
    a_weight = "language_model.layers.1.mlp.up_proj.weight"
    others = {
        "another weight": {"params": changed(vlm().params, a_weight)},
        "another weight of the tower": {"params": changed(vlm().params, sorted(vlm().params)[-1])},
        "a name": {"params": {name.replace("layers.1", "layers.7"): v for name, v in vlm().params.items()}},
        "temperature": {"temperature": 0.9},
        "dtype": {"model": replace(vlm().model, dtype="bfloat16")},
        "attention": {"model": replace(vlm().model, attention="chunked")},
        "configuration": {"model": Model(text().model.config)},
        "an adapter": with_adapter,
        "its scale": {**with_adapter, "model": replace(adapted().model, lora=LoraSpec(rank=2, alpha=4.0))},
        "its weight": {**with_adapter, "params": {**adapted().params, **random_adapter(adapted().model, seed=4)}},
    }
    keys = {name: ReferenceCache(tmp_path, identity(**changes)).key for name, changes in others.items()}
    keys["as it was"] = ReferenceCache(tmp_path, identity()).key
    assert len(set(keys.values())) == len(others) + 1
    assert ReferenceCache(tmp_path, identity(params=dict(reversed(vlm().params.items())))).key == keys["as it was"]
    with jax.default_matmul_precision("bfloat16"):
        assert ReferenceCache(tmp_path, identity()).key not in keys.values()


def test_whatever_changes_a_score_changes_the_groups_key():
    def key(item: Group, change=lambda pixels: pixels) -> str:
        shown = Pictures(change)
        return group_digest(item, lambda name: picture_digest(shown.read([name])[0]))

    def brighter(pixels):
        pixels[0, 3, 5] += 1e-3
        return pixels

    base = PAIRS[2]
    same = [
        base,
        replace(base, id=9),
        without_image_labels(base),  # weights say what is learnt, not what is scored
    ]
    assert len({key(item) for item in same}) == 1
    others = [
        group(2, [2, 5, "a", 8, 10], [11, 12], [13, "a", 14]),
        group(2, [2, 5, "a", 8, 9], [11, 15], [13, "a", 14]),
        group(2, [2, 5, "a", 8, 9], [11, 12], [13, "a", 15]),
        group(2, [2, 5, "a", 8, 9], [13, "a", 14], [11, 12]),
        group(2, [2, 5, "b", 8, 9], [11, 12], [13, "b", 14]),
        group(2, [2, 5, "a", 8, 9], [11, 12], [13, "b", 14]),
        group(2, [2, 5, "a", 8], [9, 11, 12], [9, 13, "a", 14]),
        group(2, [2, 5, "a", 8, 9], [11, 12]),
    ]
    assert len({key(base), key(base, brighter), *map(key, others)}) == len(others) + 2
    patches = np.arange(24, dtype=np.float32).reshape(4, 6)
    keys = {picture_digest(x) for x in (Patches(patches, 2, 2), Patches(patches, 1, 4), Patches(patches + 1, 2, 2))}
    assert len(keys) == 3


def records(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{seed}-{i}": -rng.random((2, i + 1)).astype(np.float32) for i in range(count)}


def test_records_come_back_bit_for_bit(tmp_path):
    cache = ReferenceCache(tmp_path, {"scorer": 1})
    cache.fill(records(3))
    cache.fill(records(2, seed=1))
    cache.fill({})
    for found in (cache, ReferenceCache(tmp_path, {"scorer": 1})):
        assert len(found) == 5
        for name, value in {**records(3), **records(2, seed=1)}.items():
            assert name in found
            assert np.array_equal(found.get(name), value)
        with pytest.raises(KeyError):
            found.get("another")
    assert len(ReferenceCache(tmp_path, {"scorer": 2})) == 0


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_scores_that_are_not_finite_are_never_kept(tmp_path, wrong):
    cache = ReferenceCache(tmp_path, {})
    bad = records(2)
    bad["0-1"][1, 0] = wrong
    with pytest.raises(ValueError, match="must be finite float32"):
        cache.fill(bad)
    with pytest.raises(ValueError, match="must be finite float32"):
        cache.fill({"x": np.zeros((2, 3), np.float16)})
    assert len(cache) == len(ReferenceCache(tmp_path, {})) == 0


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_killed_write_leaves_what_was_there(tmp_path, monkeypatch, at):
    cache = ReferenceCache(tmp_path, {})
    cache.fill(records(2))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reference_cache.os, at, killed)
        with pytest.raises(KeyboardInterrupt):
            cache.fill(records(2, seed=1))
    again = ReferenceCache(tmp_path, {})
    assert len(again) == len(cache) == 2
    again.fill(records(2, seed=1))
    assert len(ReferenceCache(tmp_path, {})) == 4


def test_foreign_and_damaged_files_are_named(tmp_path):
    ours, theirs = (ReferenceCache(tmp_path, {"scorer": i}) for i in (1, 2))
    theirs.fill(records(2))
    (path,) = theirs.folder.glob("*.safetensors")
    assert set(load_file(path)) == set(records(2))
    (ours.folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"{path.name} holds log-probabilities of another scorer"):
        ReferenceCache(tmp_path, {"scorer": 1})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        ReferenceCache(tmp_path, {"scorer": 2})


def test_images_without_pictures_are_named(tmp_path):
    options = {"model": vlm().model, "params": vlm().params, "temperature": 1.0, "shapes": SHAPES}
    with pytest.raises(ValueError, match="holds image b; give the pictures"):
        precompute_reference(tmp_path, PAIRS[1:2], **options, features=features())
