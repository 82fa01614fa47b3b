"""Floor 0: what the package asks of the machine and of Python: figures as files, and modules under their old names."""
