"""Models without LayerNorm: norms are removed one by one in fine-tuning, then folded into the layers that read them.

ln_free.wrap(model)                                      # norms become removable, nothing else changes
ln_free.sites(model)                                     # mlp.0 ... qk.0 ... v.0 ... final
trainer = hf_xent.LNRemovalTrainer(model, hf_xent.LNRemovalConfig(output_dir="out", max_steps=300), ...)
trainer.train()                                          # removes them on schedule
stock, true = ln_free.to_eps_trick(model), ln_free.to_true(model)
ln_free.save(stock, tokenizer, "stock")                  # a stock class loads it, like the released LN-free models
ln_free.save(true, tokenizer, "true")                    # has no norms at all; loads with trust_remote_code
ln_free.load("true"), ln_free.verify(true, model)        # both have a card, for `hf-xent publish`
ln_free.Report({"original": ln_free.analyze(original, blocks), "LN-free": ln_free.analyze(model, blocks)}).save(folder)
"""

from typing import Any

from ..system import renamed
from .analysis import Analysis, analyze
from .card import save
from .convert import to_eps_trick, to_true
from .forms import form_of, is_ln_free
from .loading import load
from .norms import FakeLayerNorm, FakeNorm, FakeRMSNorm, clipped
from .removal import Site, calibrate, remove, restore, sites
from .report import Report, draw_curves
from .schedule import Schedule
from .verification import Verification, parity, verify
from .wrapping import wrap

__all__ = [
    "Analysis",
    "FakeLayerNorm",
    "FakeNorm",
    "FakeRMSNorm",
    "Report",
    "Schedule",
    "Site",
    "Verification",
    "analyze",
    "calibrate",
    "clipped",
    "draw_curves",
    "form_of",
    "is_ln_free",
    "load",
    "parity",
    "remove",
    "restore",
    "save",
    "sites",
    "to_eps_trick",
    "to_true",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
