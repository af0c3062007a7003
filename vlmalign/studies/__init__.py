"""Studies: the engine that makes their artefacts, and what each study adds to it."""
