"""Sampling: each image encoded once, each prompt prefilled once, its completions decoded against it."""
