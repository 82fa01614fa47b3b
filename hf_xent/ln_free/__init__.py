"""Models without LayerNorm: norms are removed one by one in fine-tuning, then folded away.

ln_free.wrap(model)                                           # norms become removable, nothing else changes
ln_free.sites(model)                                          # mlp.0 ... qk.0 ... v.0 ... final
trainer = hf_xent.LNRemovalTrainer(model, hf_xent.LNRemovalConfig(output_dir="out", max_steps=300), ...)
"""

from .norms import FakeLayerNorm, FakeNorm, FakeRMSNorm, Site, calibrate, is_ln_free, remove, restore, sites, wrap
from .schedule import Schedule

__all__ = [
    "FakeLayerNorm",
    "FakeNorm",
    "FakeRMSNorm",
    "Schedule",
    "Site",
    "calibrate",
    "is_ln_free",
    "remove",
    "restore",
    "sites",
    "wrap",
]
