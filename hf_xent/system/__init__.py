"""Floor 0: the machine and Python: files, figures, processes, optional packages, and modules under their old names."""
