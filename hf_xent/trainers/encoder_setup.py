"""What the calibration of an encoder checks before it starts, and its objectives, which compare rows of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.projection import ProjectionHead
from ..models.zero_shot import ZeroShot
from ..patching.heads import inner_of
from ..robust.inputs import PIXELS, bounds

OBJECTIVES = ("ce", "l2", "infonce")


def objective_rows(objective: str, moved: Tensor, clean: Tensor, labels: Tensor, zero_shot: ZeroShot) -> Tensor:
    """The objective of each row [B], of features h(f(x')) and f(x) of unit length [B, D]."""
    if objective == "l2":
        return (moved - clean).square().sum(-1)
    if objective == "ce":
        return F.cross_entropy(zero_shot.classify(moved), labels, reduction="none")
    every = torch.arange(len(clean), device=clean.device)
    return F.cross_entropy(zero_shot.scale * moved @ clean.T, every, reduction="none")


def zero_shot_of(model: Any) -> ZeroShot:
    """The classifier. Raises: ValueError for another model, or a head that cannot be saved and loaded."""
    inner = inner_of(model)
    if not isinstance(inner, ZeroShot):
        raise ValueError(
            f"model is a {type(inner).__name__}: pass a hf_xent.models.zero_shot.ZeroShot of the encoder and the"
            " centers of its classes"
        )
    if not isinstance(inner.head, ProjectionHead | None):
        raise ValueError(f"model has a {type(inner.head).__name__} as its head: pass a ProjectionHead, or none")
    return inner


def check_start(args: Any, zero_shot: ZeroShot, arguments: Mapping[str, Any]) -> None:
    """Raises: ValueError for options without effect, and for data or a processor that do not fit."""
    if zero_shot.head is not None and args.head_size is not None:
        raise ValueError(f"head_size is {args.head_size}, but model has a head already: leave it out")
    if args.objective == "infonce" and args.per_device_train_batch_size < 2:
        raise ValueError("per_device_train_batch_size is 1, but 'infonce' compares the rows of a batch: give more")
    dataset = arguments.get("train_dataset")
    known = getattr(dataset, "column_names", None) or ([*dataset[0]] if isinstance(dataset, list) else [])
    if known and args.objective == "ce" and "labels" not in known:
        raise ValueError(f"train_dataset has the columns {', '.join(known)}, but 'ce' needs labels: add the column")
    if PIXELS in known:
        try:
            bounds(arguments.get("processing_class"))
        except ValueError as error:
            raise ValueError(str(error).replace("processor", "processing_class", 1)) from None  # as it is called here
