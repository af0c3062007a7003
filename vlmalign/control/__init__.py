"""Feedback on training: (init, update) pairs whose state is in the checkpoint."""
