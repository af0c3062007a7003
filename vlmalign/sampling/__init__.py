"""`vlmalign sample`: balanced sets of any table of labels, beside what other ways of drawing give."""
