"""Floor 3: callbacks for any trainer of transformers: patching a model, the curve of a run, and measures of membership
and of the geometry of representations as it trains.
"""
