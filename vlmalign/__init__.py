"""vlmalign: align medical vision-language and text models with SFT, DPO and GRPO in JAX."""

__version__ = "0.1.0"
