"""Background activation suppression: the loss that teaches a classifier where its class is, from labels alone.

A mask M of features, between 0 and 1, is good if what it keeps is enough for the class, if what it erases holds no
activation of the class any more, and if it is small:

    L    = CE(s, y) + alpha CE(s', y) + mean BAS + beta mean area
    BAS  = relu(b_y) / (relu(sg[s_y]) + 1e-8), and 1 where b_y > s_y;     area = mean of M

    s, s', b    logits of all features F, of F M (what the mask keeps) and of F (1 - M) (what it erases)
    sg          no gradient; b is computed by a frozen network (`frozen_call`), so BAS moves the mask alone

Why activations and not a cross-entropy alone: CE(s', y) is near 0 as soon as the mask holds a part that tells the
class; the activation outside of the mask still falls until the mask reaches the object's boundary.

Where b_y > s_y the authors set BAS to the constant 1, so such rows teach the mask nothing. Here the value is the same,
and the gradient is kept, with b_y in place of s_y as its scale, so that it stays bounded where s_y is near 0:

    BAS = relu(b_y) / relu(sg[b_y])      where b_y > s_y;     `saturate=True` is the authors' form

Logits count from 0: where the class has no positive activation, BAS has no gradient. The file imports torch alone; it
is saved beside the networks that use it.

Source: Zhai, Wu, Zhai, Cao and Zha 2023, arXiv:2309.12943 (BAS), and 2022, arXiv:2112.00580; formulas alone, as the
authors' code is for research use only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-8


def suppression_loss(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    *,
    masked: Tensor | None = None,  # [B, C]
    background: Tensor | None = None,  # [B]
    area: Tensor | None = None,  # [B]
    alpha: float = 0.5,
    beta: float = 1.5,
) -> Tensor:
    """CE(logits, y) + alpha CE(masked, y) + mean background + beta mean area; a term that is None is left out.

    Args:
        logits: Logits of the whole features [B, C].
        labels: Ids of classes [B].
        masked: Logits of what the mask keeps [B, C].
        background: `background_activation` [B].
        area: `mask_area` [B].
        alpha: The weight of the cross-entropy of what the mask keeps.
        beta: The weight of the area.

    Returns:
        The loss in nats, one number, in float32 or wider.
    """
    loss = nn.functional.cross_entropy(_wide(logits), labels)
    if masked is not None and alpha:
        loss = loss + alpha * nn.functional.cross_entropy(_wide(masked), labels)
    if background is not None:
        loss = loss + _wide(background).mean()
    if area is not None and beta:
        loss = loss + beta * _wide(area).mean()
    return loss


def background_activation(
    logits: Tensor,  # [B, C]
    erased: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    *,
    saturate: bool = False,
) -> Tensor:
    """The share of the class's activation that remains outside of the mask, BAS, from 0 to 1.

    Args:
        logits: Logits of the whole features [B, C]; they get no gradient.
        erased: Logits of features times 1 - M, by a frozen network [B, C].
        labels: Ids of classes [B].
        saturate: Whether rows with more activation outside of the mask than in the whole have no gradient, as in the
            authors' code; otherwise they have that of log b_y.

    Returns:
        BAS of each row [B], in float32 or wider.
    """
    whole, outside = (_wide(x).gather(1, labels[:, None])[:, 0] for x in (logits.detach(), erased))
    beyond = outside > whole
    scale = torch.where(beyond, outside.detach(), whole).relu() + EPSILON
    ratio = outside.relu() / scale
    # a difference of 0 that has the gradient of the ratio: the value is 1 exactly
    return torch.where(beyond, torch.ones_like(ratio) if saturate else 1 + (ratio - ratio.detach()), ratio)


def mask_area(masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of each mask.

    Args:
        masks: Masks from 0 to 1 [B, ...].
        valid: True where a position counts [B, ...], such as the tokens that are no padding; all if None.

    Returns:
        The area of each mask [B], 0 for a mask without positions that count.
    """
    masks = _wide(masks.flatten(1))
    if valid is None:
        return masks.mean(1)
    valid = valid.flatten(1).bool()
    return masks.where(valid, 0).sum(1) / valid.sum(1).clamp(min=1)


def frozen_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs) with constants for parameters: gradients reach the inputs and nothing else.

    No parameter gets a gradient of it, and no buffer changes: batch norm in training takes the statistics of the batch,
    and leaves the running ones as they are. Nothing is copied but buffers. Gradient checkpointing of transformers' is
    off meanwhile, since it would run the module again in the backward pass, with its parameters. Call it inside the
    forward of the model that owns the module: under DistributedDataParallel a parameter may be used there alone.

    Args:
        module: The network.
        *args: Its inputs.
        **kwargs: Its inputs by name.

    Returns:
        What the module returns.
    """
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    constants |= {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with no_checkpoints(module):
        return torch.func.functional_call(module, constants, args, kwargs)


def _wide(x: Tensor) -> Tensor:
    """In float32, if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def no_checkpoints(module: nn.Module) -> Iterator[None]:
    """A context in which transformers' layers keep what they compute: none is computed again in the backward pass."""
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", False) is True]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
