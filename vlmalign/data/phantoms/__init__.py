"""Invented chest films with known truth, in the real on-disk formats."""
