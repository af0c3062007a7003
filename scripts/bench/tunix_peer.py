"""google-tunix's side of `grpo_tunix.py`: its GRPO learner on a random Gemma 3, one step for every line that comes in.

    python scripts/bench/tunix_peer.py '{"layers": 4, ...}'      # with an interpreter that has google-tunix

The learner owns its loop, but asks for rewards once per step: there this process prints the seconds since it was last let
go, as one JSON line, and waits for the next line. A step is so an update and the rollout after it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma3 import model as gemma3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

logging.disable(logging.WARNING)
#: where this process speaks; whatever the libraries print goes elsewhere
SPEAK = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(**line: object) -> None:
    SPEAK.write(json.dumps(line) + "\n")
    SPEAK.flush()


class Numbers:
    """A tokenizer of whole numbers: "12 34" is [12, 34]. No id ends a text: every rollout has its full length."""

    def __init__(self, vocab: int):
        self._never = vocab + 7

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self._never

    def pad_id(self) -> int:
        return 0


def main() -> None:
    sizes = json.loads(sys.argv[1])
    config = gemma3.ModelConfig(
        num_layers=sizes["layers"], num_embed=sizes["vocab"], embed_dim=sizes["embed"], hidden_dim=sizes["ffn"],
        num_heads=sizes["heads"], head_dim=sizes["head_dim"], num_kv_heads=sizes["kv_heads"],
        sliding_window_size=sizes["window"], local_base_frequency=10_000, global_base_frequency=1_000_000,
        param_dtype=jnp.dtype("float32"),
    )  # fmt: skip
    actor, reference = (gemma3.Gemma3(config, rngs=nnx.Rngs(0)) for _ in range(2))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    prompts, steps = sizes["prompts"], sizes["steps"]
    tokenizer = Numbers(sizes["vocab"])
    settings = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(
            (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
        ),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-4), eval_every_n_steps=10**6, max_steps=steps, mini_batch_size=prompts,
            train_micro_batch_size=prompts, checkpoint_root_directory=None, max_inflight_computations=1,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=sizes["completion"], max_prompt_length=sizes["prompt"],
            kv_cache_size=sizes["prompt"] + sizes["completion"], temperature=1.0, top_p=1.0, return_logprobs=True,
            eos_tokens=[tokenizer.eos_id()],
        ),
    )  # fmt: skip
    began = time.perf_counter()

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        nonlocal began
        del prompts
        say(seconds=time.perf_counter() - began, completions=len(completions))
        sys.stdin.readline()
        began = time.perf_counter()
        return [float(len(set(c.split()))) + 0.01 * i for i, c in enumerate(completions)]

    rng = np.random.default_rng(0)

    def batch() -> dict[str, np.ndarray]:
        rows = rng.integers(5, sizes["vocab"], (prompts, sizes["prompt"]))
        return {"prompts": np.array([" ".join(map(str, row)) for row in rows])}

    say(versions={name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "jaxlib", "flax")})
    with mesh:
        cluster = rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=tokenizer, cluster_config=settings)
        learner = grpo_learner.GRPOLearner(
            cluster,
            algo_config=grpo_learner.GRPOConfig(
                num_generations=sizes["group"], num_iterations=1, beta=sizes["beta"], epsilon=0.2
            ),
            reward_fns=[reward],
        )
        learner.train([batch() for _ in range(steps)])


if __name__ == "__main__":
    main()
