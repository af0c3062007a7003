"""Conversations to tokens through a checkpoint's own chat template."""
