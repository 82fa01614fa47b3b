"""Floor 1: caches of keys and values with fewer bits for older tokens."""
