"""Floor 2: attention with a bias by distance, or over blocks that are drawn by distance."""
