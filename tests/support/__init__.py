"""What the tests share: tiny models and their settings, oracles, real processes and a local Hub."""
