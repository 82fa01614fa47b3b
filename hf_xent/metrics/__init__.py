"""Floor 1: measures of predictions and representations: rankings, identification, calibration, consistency, diversity,
masks, the geometry of features; standard deviations by resampling; and modules for `evaluate`.
"""
