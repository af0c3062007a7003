"""Run by test_processes.py as one of several processes of a run, each with one device: all objectives are trained.

    processes_program.py train FOLDER      every case, from its beginning or its last checkpoint
    processes_program.py sft FOLDER        the first of them alone
    processes_program.py killed FOLDER     the same; process 1 is killed in the midst of an update
    processes_program.py restored FOLDER   what the first case saved last, on several meshes, beside what was written

The mesh is of the devices of all processes; a start of one process with one device is what the others are held against.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from vlmalign import distributed, exchange
from vlmalign.mesh import MeshSettings, Placement, build_mesh, placement
from vlmalign.models.config import DecoderConfig, LayerSpec, ModelConfig, Rope
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.objectives.advantages import group_advantages
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.runner import RewardRunner
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.best import Best
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Stage, Work, train
from vlmalign.training.merged import merged_policy
from vlmalign.training.preference import PreferenceSource, preference_objective
from vlmalign.training.recorded_rewards import RecordedRewards
from vlmalign.training.rollout_batches import rollout_batches, with_advantage
from vlmalign.training.rollouts import Prompts, Sampler, Task
from vlmalign.training.shared_rollouts import local_mesh, local_policy
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource, micro_batches
from vlmalign.types import Group, Segment

STEPS, KILLED_AT, VOCAB, GROUP, LONGEST = 5, 3, 40, 3, 6
SHAPES = Shapes(rows=4, prompt_multiple=8, completion_multiple=8)
GRPO = GrpoSettings(clip_low=0.2, clip_high=0.2, beta=0.1, max_completion=LONGEST)
#: kind -> the mesh, and whether an adapter is trained on a whole base or all is trained and cut over the processes
CASES = {
    "sft": (MeshSettings(data=1, fsdp=-1), False),
    "dpo": (MeshSettings(), True),
    "grpo": (MeshSettings(fsdp=2), False),
}


def shape() -> ModelConfig:
    decoder = DecoderConfig(
        vocab=VOCAB, embed=16, ffn=32, heads=2, kv_heads=1, head_dim=8, layers=(LayerSpec(Rope(10_000.0), None),),
        norm_eps=1e-6, norm_offset=1.0, sandwich_norm=True, qk_norm=True, qkv_bias=False, out_bias=False, ffn_bias=False,
        activation="gelu_tanh", query_scale=8**-0.5, embed_scale=4.0, tied_head=True,
    )  # fmt: skip
    return ModelConfig("gemma3", decoder, None, None)


def values(model: Model, where: Placement) -> dict:
    """Drawn by NumPy, the same in every process, each part put where it belongs."""
    rng = np.random.default_rng(0)
    drawn = {name: 0.3 * rng.normal(size=s.shape).astype(np.float32) for name, s in sorted(model.shapes.items())}
    return {
        name: jax.make_array_from_callback(value.shape, where(name), lambda index, value=value: value[index])
        for name, value in drawn.items()
    }


def segment(rng, length: int, weight: float) -> Segment:
    tokens = rng.integers(2, VOCAB, length).astype(np.int32)
    return Segment(tokens, np.full(length, -1, np.int32), np.full(length, weight, np.float32))


def groups(count: int, continuations: int) -> list[Group]:
    rng = np.random.default_rng(continuations)
    return [
        Group(
            i, segment(rng, 3 + i % 5, 0.0), tuple(segment(rng, 4 + (i + k) % 4, 1.0) for k in range(continuations)), ()
        )
        for i in range(count)
    ]


class Rolled:
    """Groups answered by the current policy, each process answering its share; group-normalised rewards."""

    waits = True

    def __init__(self, folder: Path, trainer: Trainer):
        self.trainer, self.mesh, self.policy = trainer, local_mesh(), {}
        model = trainer.model.without_lora()
        self.merge = jax.jit(lambda trained: merged_policy(trainer.model, {}, trained))
        self.generator = Generator(
            model=model, features=None, stop_ids=(0, 1), rows=4, group=GROUP, completion=LONGEST,
            sampling=Sampling(temperature=1.0), multiple=8, mesh=self.mesh, smaller=0,
        )  # fmt: skip
        self.prompts = Prompts([Task(g, f"prompt {g.id}", {"wanted": g.id}) for g in groups(12, 0)], most=5, seed=1)
        runner = RewardRunner({"near": (near, 1.0), "long": (long, 0.2)}, workers=0)
        self.rewards = RecordedRewards(runner, OutcomeFile(folder / "rewards.jsonl", exchange))
        self.log = CompletionLog(folder / "completions.jsonl")
        self.scored = 0
        self.sampler = Sampler(
            generate=self.generate, decode=lambda tokens: " ".join(map(str, tokens)), score=self.rewards,
            flat=lambda rollouts: np.zeros(len(rollouts), bool), wanted=5, attempts=1, longest=LONGEST,
            overlong_buffer=None,
        )  # fmt: skip

    def generate(self, prompts, number):
        return self.generator.run(self.policy, prompts, key_for(0, number, "rollout"))

    def work(self, step, params):
        self.policy = local_policy(self.merge(params), self.mesh)
        sampled = self.sampler.draw(step, self.prompts)
        rewards = np.stack([rollout.rewards for rollout in sampled.rollouts])
        advantages = group_advantages(rewards).value
        self.log.write(step + 1, sampled.rollouts, advantages)
        batches = rollout_batches(sampled.rollouts, SHAPES, None)
        measured = {"reward": float(np.nanmean(rewards)), "faults": sampled.faults}
        return Work([with_advantage(batch, advantages) for batch in batches], measured)

    def observe(self, line):
        pass

    def get_state(self):
        return {"prompts": self.prompts.get_state(), "log": self.log.position(), "rewards": self.rewards.get_state()}

    def set_state(self, state):
        self.prompts.set_state(state["prompts"])
        self.log.rewind(state["log"])
        self.rewards.set_state(state["rewards"])


def near(prompts, completions, wanted, **columns):
    """Fails for one prompt, so that a fault crosses from the process that found it to the others."""
    return [
        None if w == 7 else 1 / (1 + abs(w - len(set(c.split())))) for w, c in zip(wanted, completions, strict=True)
    ]


def long(prompts, completions, completion_ids, **columns):
    if any(ids[-1] % 8 == 2 for ids in completion_ids):
        raise RuntimeError("some completions cannot be scored")
    return [float(len(ids)) for ids in completion_ids]


class Dies:
    """Process 1 is killed as the others begin the update; when, stands in a file of the folder."""

    def __init__(self, inner, folder: Path):
        self.inner, self.folder = inner, folder

    def work(self, step, params):
        found = self.inner.work(step, params)
        if step == KILLED_AT and distributed.process_index() == 1:
            (self.folder / "killed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def __getattr__(self, name):
        return getattr(self.inner, name)


def case(kind: str, folder: Path, mesh: Mesh | None = None):
    """(stage, trainer, trained parameters, frozen ones, source, evaluation)"""
    settings, adapter = CASES[kind]
    if len(jax.devices()) == 1:
        settings = MeshSettings()
    model = Model(shape(), lora=LoraSpec(rank=2, alpha=4.0) if adapter else None)
    mesh = mesh or build_mesh(settings)
    where = placement(
        mesh, model.shapes, model.dims, pieces={"heads": 2, "kv_heads": 1}, over=() if adapter else ("fsdp",)
    )
    params = values(model, where)
    trained = {name: value for name, value in params.items() if ".lora_" in name or not adapter}
    frozen = {name: value for name, value in params.items() if name not in trained}
    objective, reference = Objective("sft", sft_loss, sft_counts), None
    if kind == "dpo":
        objective, reference = preference_objective(DpoSettings(), recorded=False), (model.without_lora(), {})
    if kind == "grpo":
        loss, counts = partial(grpo_loss, settings=GRPO), partial(grpo_counts, settings=GRPO)
        objective, reference = Objective("grpo", loss, counts, needs_reference=True), (model, values(model, where))
    trainer = Trainer(model, objective, optax.adamw(1e-3, eps=1e-6), reference=reference, placement=where)
    folder = folder / kind
    source, evaluate, best = None, None, None
    if kind == "sft":
        source = SupervisedSource(groups(12, 1), batch=6, shapes=SHAPES, features=None, seed=3)
        held_out = [MicroBatch(batch, {}) for batch in micro_batches(groups(4, 1), SHAPES, None)]
        best = Best("validation/loss")

        def evaluate(step, params):
            total, count = trainer.evaluate(params, frozen, held_out)["loss"]
            return {"validation/loss": float(total) / float(count)}

    elif kind == "dpo":
        source = PreferenceSource(groups(12, 2), batch=6, shapes=SHAPES, features=None, seed=3, reference=None)
    else:
        source = Rolled(folder, trainer)
    every = 2 if evaluate is not None else 0
    stage = Stage(kind, folder, STEPS, 2, lambda step: 1e-3, evaluate_every=every, best=best)
    return stage, trainer, trained, frozen, source, evaluate


def run(kind: str, folder: Path, wrap=lambda source: source) -> None:
    stage, trainer, trained, frozen, source, evaluate = case(kind, folder)
    quiet = not distributed.is_writer()
    with patch.object(Checkpoints, "save", keep_a_copy(Checkpoints.save, stage.folder)):
        found = train(stage, trainer, trained, frozen, wrap(source), Progress(quiet=quiet), evaluate)
    found = exchange.fetch(found)
    if distributed.is_writer():
        np.savez(stage.folder / "params.npz", **found)


def keep_a_copy(save, folder: Path):
    """`save`, after which `state.npz` holds what it was given."""

    def saved(self, state, position):
        save(self, state, position)
        found = flat(exchange.fetch(state))
        if distributed.is_writer():
            np.savez(folder / "state.npz", **found)

    return saved


def flat(state) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state._asdict())
    return {jax.tree_util.keystr(path): value for path, value in leaves}


def restored(folder: Path) -> None:
    """Prints, mesh by mesh, how many arrays of the checkpoint are what was written, and how many are cut."""
    with np.load(folder / "sft" / "state.npz") as file:
        written = {name: file[name] for name in file.files}
    devices = jax.devices()
    meshes = {
        "fsdp 4": build_mesh(MeshSettings(data=1, fsdp=4)),
        "data 2 fsdp 2": build_mesh(MeshSettings(data=2, fsdp=2)),
        "one device": build_mesh(MeshSettings(), devices[:1]),
    }
    results = {}
    for name, mesh in meshes.items():
        _, trainer, trained, *_ = case("sft", folder, mesh)
        like = trainer.init(trained)
        with Checkpoints(folder / "sft" / "checkpoints") as checkpoints:
            state = checkpoints.restore(like).state
        for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim), name
        found = flat(exchange.fetch(state))
        same = [np.array_equal(found[key], written[key]) for key in found.keys() | written.keys()]
        cut = sum(not array.is_fully_replicated for array in jax.tree.leaves(state))
        results[name] = {"arrays": len(same), "same": sum(same), "cut": cut}
    print(json.dumps(results))


def main(what: str, folder: Path) -> None:
    distributed.start()
    if what == "train":
        for kind in CASES:
            run(kind, folder)
    elif what == "restored":
        restored(folder)
    else:
        run("sft", folder, partial(Dies, folder=folder) if what == "killed" else lambda source: source)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
