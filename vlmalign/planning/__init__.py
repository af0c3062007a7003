"""What a config needs and costs on a GPU that need not be there: its programs compiled for a description of it."""
