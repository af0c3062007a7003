"""One question to one model, in the terminal."""
