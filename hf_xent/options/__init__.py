"""Floor 0: what users write as options: their ranges and types, checked in one place."""
