"""Random keys are derived, never carried: from (seed, optimiser step, purpose), then from what the draw is for."""

from __future__ import annotations

import jax

from vlmalign.shapes import Array, Int, Key

#: what a key is for; numbers are part of every run's record and never change meaning
PURPOSES = {"adapter": 0, "rollout": 1, "init": 2, "dropout": 3}


def key_for(seed: int, step: int | Int[Array, ""], purpose: str) -> Key[Array, ""]:
    """The key of one purpose at one optimiser step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose]), step)


def sample_keys(key: Key[Array, ""], prompt_id: Int[Array, "n"], sample_id: Int[Array, "k"]) -> Key[Array, "n k"]:
    """One key per (prompt, sample): the same whatever the row, the batch or the neighbours."""

    def one(prompt: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

    return jax.vmap(lambda prompt: jax.vmap(lambda sample: one(prompt, sample))(sample_id))(prompt_id)
