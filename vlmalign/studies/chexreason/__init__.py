"""ChexReason (arXiv 2512.23090): SFT and GRPO of a medical vision-language model on a few thousand chest films."""
