"""What lies on disk, read as examples: the real formats of chest-film data sets, tables and rows."""
