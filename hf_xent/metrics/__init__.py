"""Floor 1: measures of predictions: rankings, identification, calibration, consistency, diversity; and modules for
`evaluate`.
"""
