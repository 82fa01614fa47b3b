"""The plugin for axolotl: its models compute their loss without logits.

    plugins:
      - hf_xent.integrations.axolotl.XentPlugin
    xent_loss: focal:gamma=2
    xent_tail: 1e-3

Data: what axolotl trains on, packed or not. Written for axolotl 0.19.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, model_validator

from .. import losses
from ..patching import patch, patch_state, unpatch

if TYPE_CHECKING:
    from axolotl.integrations.base import BasePlugin
    from torch import nn
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ModuleNotFoundError:  # its documentation is written, and its arguments are checked, without axolotl
        BasePlugin = object

OTHERS = {
    "cut_cross_entropy": "plugin CutCrossEntropyPlugin",
    "liger_cross_entropy": "plugin LigerPlugin",
    "liger_fused_linear_cross_entropy": "plugin LigerPlugin",
    "chunked_cross_entropy": "cross-entropy of axolotl",
    "use_eaft": "loss EAFT of axolotl",
    "kd_trainer": "plugin KDPlugin",
}
"""Options of axolotl that also decide how the loss is computed -> whose they are."""


class XentArgs(BaseModel):
    """The options that the plugin adds to axolotl's YAML.

    Raises:
        ValueError: The loss or the tail is none that `hf_xent.patch` takes, or another option of axolotl computes the
            loss as well.
    """

    xent_loss: str | None = None
    """The loss: a registry name, with options after it as in 'focal:gamma=3'; cross-entropy if it is left out."""
    xent_tail: float = 0.0
    """The relative error allowed in the gradient of the logits; 0 is exact (see `hf_xent.patch`)."""

    @model_validator(mode="after")
    def check_xent(self) -> XentArgs:
        """Refuse what cannot take effect before a model is loaded."""
        objective = losses.get(self.xent_loss)
        if objective.needs_teacher:
            raise ValueError(
                f"xent_loss is {self.xent_loss!r}: it compares with a teacher, which axolotl's model does not have:"
                " choose a loss without one (`hf-xent losses`)"
            )
        objective.check_tail(self.xent_tail)
        for name, owner in OTHERS.items():
            if value := getattr(self, name, None):
                raise ValueError(f"{name} is {value} ({owner}) and hf_xent computes the loss, too: set {name}: false")
        return self


class XentPlugin(BasePlugin):
    """Patches the model that axolotl has loaded, with its adapters, and takes the patch back after the training.

    It warns after the training if no loss was computed without logits, and says why.
    """

    _patched = False  # axolotl calls `post_train` twice, before and after it saves the model

    def get_input_args(self) -> str:
        """The class of the plugin's options, as axolotl imports it."""
        return f"{XentArgs.__module__}.{XentArgs.__name__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Patch the model.

        Args:
            cfg: Axolotl's configuration, with the options of `XentArgs`.
            model: The model with its adapters.

        Raises:
            ValueError: What `hf_xent.patch` refuses.
        """
        patch(model, cfg.xent_loss, tail=cfg.xent_tail or 0.0)
        self._patched = True

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Warn if the patch had no effect, and take it back; a second call does nothing.

        Args:
            cfg: Axolotl's configuration.
            model: The model that was trained.
        """
        if not self._patched:
            return
        self._patched = False
        if reason := patch_state(model).why_dense:
            warnings.warn(f"XentPlugin had no effect: {reason}", stacklevel=2)
        unpatch(model)
