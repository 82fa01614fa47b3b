"""Floor 1: measures of predictions: rankings, identification, calibration, consistency, diversity, masks; and modules
for `evaluate`.
"""
