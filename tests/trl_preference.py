"""TRL's own preference losses, run on models that the tests provide: DPOTrainer's method without its set-up."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

#: DPOConfig's defaults, as DPOTrainer keeps them on itself
DEFAULTS = {
    "beta": 0.1,
    "loss_types": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "use_weighting": False,
    "discopop_tau": 0.05,
}


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather_for_metrics(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather = gather_for_metrics

    def unwrap_model(self, model: Any) -> Any:
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class Scored(torch.nn.Module):
    """A model whose per-token outputs are given."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor, entropy: torch.Tensor, log_sum_sq: torch.Tensor):
        super().__init__()
        zeros = torch.zeros_like(entropy)
        self.output = FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            log_sum_sq_probs=log_sum_sq,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def forward(self, **inputs: Any) -> FusedCausalLMOutput:
        return self.output


def trl_dpo_loss(
    model: Any, reference: Any, inputs: dict[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """`DPOTrainer._compute_loss` and the metrics it logged. `reference` None: `model` is PEFT's, its adapter off."""
    settings = {**DEFAULTS, **options}
    settings["loss_weights"] = settings["loss_weights"] or [1.0] * len(settings["loss_types"])
    tau = settings.pop("discopop_tau")
    trainer = SimpleNamespace(
        **settings,
        model=model,
        ref_model=reference,
        args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    mode = "train" if model.training else "eval"
    return loss, {name: values[-1] for name, values in trainer._metrics[mode].items()}
