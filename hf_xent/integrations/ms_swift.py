"""A callback for ms-swift, registered in a plugin file of a line.

    # xent_plugin.py
    from hf_xent.integrations import ms_swift
    ms_swift.register(loss="focal:gamma=2")

    swift sft --external_plugins xent_plugin.py --callbacks xent --model ...

Data: what ms-swift trains on. Written for ms-swift 4.6.
"""

from __future__ import annotations

from typing import Any

from ..callbacks.patching import PatchCallback
from ..losses.base import Loss

OTHERS = {
    "use_liger_kernel": "Liger's kernels compute the loss",
    "loss_type": "the loss is computed from logits outside of the model",
    "enable_dft_loss": "the loss is computed from logits outside of the model",
    "enable_channel_loss": "the loss is computed from logits outside of the model",
    "label_smoothing_factor": "the loss is computed from logits outside of the model",
}
"""Options of ms-swift that also decide how the loss is computed -> what they do."""


def register(name: str = "xent", loss: str | Loss | None = None, **options: Any) -> type[PatchCallback]:
    """Add a callback to ms-swift's `callbacks_map` that patches the model for as long as it trains.

    Args:
        name: What `--callbacks` calls it.
        loss: A registry name or a loss, as for `hf_xent.patch`; cross-entropy if it is left out.
        **options: Those of `hf_xent.patch`.

    Returns:
        The callback's class. ms-swift makes it of its arguments and its trainer, and it raises a ValueError if another
        option computes the loss as well.

    Raises:
        ValueError: ms-swift has a callback of that name.
    """
    from swift.callbacks import callbacks_map

    class XentCallback(PatchCallback):
        """Patches the model of a trainer of ms-swift for as long as it trains."""

        def __init__(self, args: Any, trainer: Any):
            check(args, trainer)
            super().__init__(loss, **options)

    known = callbacks_map.get(name)
    if known is not None and known.__module__ != __name__:
        raise ValueError(f"name is {name!r}, a callback that ms-swift has: choose another")
    callbacks_map[name] = XentCallback
    return XentCallback


def check(args: Any, trainer: Any) -> None:
    """Refuse options of ms-swift beside which a patch cannot take effect.

    Args:
        args: Its training arguments.
        trainer: Its trainer, whose template knows over how many ranks sequences are split.

    Raises:
        ValueError: One of them computes the loss, or sequences are split over ranks.
    """
    for name, cause in OTHERS.items():
        if value := getattr(args, name, None):
            raise ValueError(f"{name} is {value}: {cause}, so that hf_xent has no effect: leave it out")
    if (size := trainer.template.sequence_parallel_size) > 1:
        raise ValueError(
            f"sequence_parallel_size is {size}: ms-swift computes the loss of split sequences outside of the model, so"
            " that hf_xent has no effect: set it to 1"
        )
