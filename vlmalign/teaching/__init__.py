"""Reasoning traces for SFT: written by a teacher who knows the labels, checked by rule, reviewed by experts."""
