"""Out of training: `vlmalign export` turns a run's adapter, or anybody's, into a folder that other tools load."""
