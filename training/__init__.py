"""What the training recipe names: which files and experts, one step, what is held out to watch it."""
