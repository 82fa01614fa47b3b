"""Floor 4: the cross-entropy method: search of options, and probabilities of rare events."""
