"""Probes of a study, one module a kind: what is measured, and what results say of it."""
