"""Checkpoint folders in and out: Hugging Face safetensors and adapters, with every tensor accounted for."""
