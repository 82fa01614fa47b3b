"""Floor 4: plugins for other trainers, in the form that each of them loads."""
