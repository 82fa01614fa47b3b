"""Floor 4: how much memory a training step takes, from the configuration of a model alone."""
