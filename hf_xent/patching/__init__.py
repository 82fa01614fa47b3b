"""Floor 2: `patch(model)` makes a model compute its loss without logits, while its own forward runs unchanged."""

from .comparison import Comparison
from .heads import inner_of
from .patches import compare, ensure_patched, head_of, lazily, patch, patch_state, patched, seam_of, unpatch, unpatched

__all__ = [
    "Comparison",
    "compare",
    "ensure_patched",
    "head_of",
    "inner_of",
    "lazily",
    "patch",
    "patch_state",
    "patched",
    "seam_of",
    "unpatch",
    "unpatched",
]
