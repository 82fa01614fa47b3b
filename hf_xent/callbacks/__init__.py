"""Floor 3: callbacks for any trainer of transformers: patching a model, the curve of a run, and measures of membership,
of the geometry of representations and of robust accuracy as it trains.
"""
