"""Floor 0: checks of the ranges and types of the options that users set, in one place."""
