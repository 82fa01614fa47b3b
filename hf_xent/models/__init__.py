"""Floor 1: what the package knows of Hugging Face models: where they come from, their modes, and their parts."""
