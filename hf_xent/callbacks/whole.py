"""Whether the main process alone can run a model: the check of callbacks that measure on it."""

from __future__ import annotations

from typing import Any


def check_whole(model: Any, use: str) -> None:
    """Check that this process has all weights.

    Args:
        model: The model.
        use: What the main process alone does with it, and what to do instead, for the message.

    Raises:
        ValueError: Weights are split over processes.
    """
    # a DTensor of FSDP2, and what ZeRO-3 marks
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            f"model is a {type(model).__name__} whose weights are split over processes, and the main process alone"
            f" {use}"
        )
