"""Floor 3: callbacks for any trainer of transformers: patching a model, and measuring membership as it trains."""
