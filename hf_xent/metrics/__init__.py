"""Floor 1: measures of predictions: rankings, calibration, consistency, diversity; and modules for `evaluate`."""
