"""The engine of every study: a graph of artefacts that is made, continued, skipped or refused by name."""
