"""Reads a run folder and nothing else; writes tables, figures and the HTML report."""
