"""Floor 1: measures of predictions: rankings, calibration, consistency, diversity, masks; modules for `evaluate`."""
