"""The analysis of a reader study: preferences, ratings and agreement, with errors that count both readers and cases."""
