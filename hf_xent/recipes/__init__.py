"""Floor 4: how each trainer is run from the command line, one file each: its data, its options, its measures."""
