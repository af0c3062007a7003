"""Text -> facts -> named scores, shared by training and evaluation. Plain Python and numpy."""
