"""What TRL's preference trainers need to run without logits: policy and reference model patched, whoever loads them."""

from __future__ import annotations

from typing import Any

from ..hub import Carded
from ..patching import ensure_patched, seam_of

Mixin: Any = object  # its methods call those of a trainer that stands after it, which type checkers cannot know


class Streamed(Carded, Mixin):
    """Goes before a TRL trainer in a class's bases: both of its models answer TRL's fused head by hf_xent's kernels.

    They push our card. A model that is patched already keeps its patch; a reference model that is not gets the options
    of the policy's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._patch_models()

    def _patch_models(self) -> None:
        ensure_patched(self.model)
        reference = getattr(self, "ref_model", None)  # ORPO has none
        if reference is not None:
            ensure_patched(reference, **seam_of(self.model).options)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._patch_models()  # TRL computes them before its __init__ returns
        return super()._precompute_ref_logps(*args, **kwargs)
