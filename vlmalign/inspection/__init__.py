"""What a checkpoint or adapter folder holds, and what is wrong with it, before hours are spent on it."""
