"""Train state, optimiser step, the one loop for all objectives, checkpoints with exact resume."""
