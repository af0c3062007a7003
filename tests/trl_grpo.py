"""TRL's GRPO loss and advantages, run for real on given numbers: its own methods on a trainer without a model.

Nothing of TRL is written out again here: `_compute_loss` and `_generate_and_score_completions` are the installed
functions; only the model's log-probabilities, the generation and the reward functions are replaced by given arrays.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer


class OneProcess:
    """What TRL asks of accelerate, for one process on a CPU."""

    num_processes, process_index, is_main_process, sync_gradients = 1, 0, True, True
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def pad_across_processes(self, x, **_):
        return x

    def reduce(self, x, **_):
        return x


#: what GRPOConfig calls the options that `_compute_loss` reads from the trainer or from its `args`
DEFAULTS = {
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "max_completion_length": 9,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
}
ARGS = {
    "delta": None,
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": 1,
}


def bare_trainer(kind=GRPOTrainer, **options):
    """A trainer with nothing in it but the options its loss reads."""
    trainer = object.__new__(kind)
    unknown = set(options) - set(DEFAULTS) - set(ARGS)
    assert not unknown, unknown
    for name, value in DEFAULTS.items():
        setattr(trainer, name, options.get(name, value))
    trainer.args = SimpleNamespace(**{name: options.get(name, value) for name, value in ARGS.items()})
    trainer.accelerator = OneProcess()
    trainer.model = SimpleNamespace(training=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.aux_loss_enabled, trainer.use_adaptive_entropy = False, False
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def trl_loss(arrays: dict[str, np.ndarray], kind=GRPOTrainer, **options):
    """(loss, d loss / d logp, d loss / d entropy, metrics) of rows [b, t], float64 inside.

    `arrays`: logp, entropy, mask, advantage [b]; old, ref and ratio (the rollout's, [b, t] or [b, 1]) where used;
    sampling where the off-policy mask is to see it.
    """
    trainer = bare_trainer(kind, **options)
    given = {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in arrays.items()}
    logp, entropy = given["logp"].requires_grad_(), given["entropy"].requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
    mask = given["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": given["advantage"],
        "num_items_in_batch": mask.sum(),
    }
    for key, name in (
        ("old", "old_per_token_logps"),
        ("ref", "ref_per_token_logps"),
        ("ratio", "importance_sampling_ratio"),
        ("sampling", "sampling_per_token_logps"),
    ):
        if key in given:
            inputs[name] = given[key]
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    slope = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logp.grad.numpy(), slope.numpy(), metrics


def trl_batch(
    rewards: np.ndarray,
    *,
    group: int,
    kind=GRPOTrainer,
    weights: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    truncated: np.ndarray | None = None,
    logps: dict[str, np.ndarray] | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """What TRL hands to its loss after sampling: advantages, masks, the importance ratio to the rollout engine.

    `rewards` [b, m] with NaN where a reward function returned None; `lengths` and `truncated` [b] of the completions;
    `logps` [b, t] under "old", "ref" and "sampling". `options` are attributes of the trainer.
    """
    b, m = rewards.shape
    lengths = np.full(b, 2) if lengths is None else lengths
    truncated = np.zeros(b, bool) if truncated is None else truncated
    logps = {name: np.asarray(value)[:, : max(lengths)] for name, value in (logps or {}).items()}
    stop, other = 1, 5
    ids = [[other] * (n - 1) + [other if cut else stop] for n, cut in zip(lengths, truncated, strict=True)]
    sampled = (
        [list(row[:n]) for row, n in zip(logps["sampling"], lengths, strict=True)] if "sampling" in logps else None
    )
    reference = object()
    names = [f"r{k}" for k in range(m)]

    def score(model, *_, **__):
        return torch.tensor(logps["ref" if model is reference else "old"], dtype=torch.float64), None, None

    trainer = object.__new__(kind)
    given = {
        **DEFAULTS,
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "mask_truncated_completions": False,
        **options,
        "reward_weights": torch.tensor(np.ones(m) if weights is None else weights, dtype=torch.float64),
        "reward_funcs": names,
        "reward_func_names": names,
        "num_generations": group,
        "num_iterations": 1,
        "args": SimpleNamespace(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=b,
            gradient_checkpointing_kwargs=None,
        ),
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": reference,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "eos_token_ids": [stop],
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_calculate_rewards": lambda *_: torch.tensor(rewards, dtype=torch.float64),
        "_get_per_token_logps_and_entropies": score,
        **dict.fromkeys(("environment_factories", "environments", "tools", "pad_to_multiple_of")),
    }
    prompts, texts = [[3]] * b, [""] * b
    if kind is GRPOTrainer:
        given["_generate"] = lambda _: (prompts, ids, None, texts, sampled, {}, None, None)
        module = grpo_trainer
    else:
        given["_generate"] = lambda _: (prompts, ids, texts)
        module = rloo_trainer
    for name, value in given.items():
        setattr(trainer, name, value)
    with patch.multiple(module, gather_object=lambda x: x, gather=lambda x: x):
        return trainer._generate_and_score_completions([{"prompt": "?"}] * b)
