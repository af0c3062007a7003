"""Pure functions of `Scores`: supervised and policy losses, advantages, chunked log-probabilities."""
