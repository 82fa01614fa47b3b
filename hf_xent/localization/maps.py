"""Where in images a classifier finds a class: class activation maps, masks, and boxes, in pixels.

    found = localize(model, pixel_values, threshold=0.4)           # a Localizer's masks, or any classifier's maps
    found.maps [B, H, W], found.masks [B, H, W], found.boxes [B, 4]

`cam` weighs features F by the gradient of the class's logit, and takes what is positive:

    A = relu(sum_d a_d F_d),  a_d = mean over positions of d logit_y / d F_d,        over the largest value of the image

With a head that averages the last features and is linear, a_d is the head's weight over the number of positions, and A
the class activation map of Zhou et al.; for other heads and layers it is Grad-CAM. Tokens of patches are a grid.

Source: Zhou et al. 2016, arXiv:1512.04150 (CAM); Selvaraju et al. 2017, arXiv:1610.02391 (Grad-CAM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.contexts import eval_mode
from ..options.ranges import check_count, is_number
from .localizer import Localizer
from .replay import as_grid, record, stack


@dataclass(frozen=True)
class Localization:
    """Where classes are in images.

    Args:
        classes: Ids of the classes whose maps were taken [B, k].
        maps: Their mean, from 0 to 1, in pixels [B, H, W].
        masks: Whether a map is above the threshold [B, H, W].
        boxes: Left, top, right and bottom edge of the largest connected part of each mask [B, 4]; right and bottom are
            the first pixels beyond it, and all are 0 for an empty mask.
    """

    classes: Tensor
    maps: Tensor
    masks: Tensor
    boxes: Tensor


def localize(
    model: nn.Module,
    pixel_values: Tensor,  # [B, channels, H, W]
    *,
    labels: Tensor | None = None,  # [B]
    threshold: float = 0.5,
    top_classes: int | None = None,
    layer: str | None = None,
) -> Localization:
    """Maps, masks and boxes of images, in evaluation mode and without gradients.

    Args:
        model: A `Localizer`, or another image classifier, whose `cam` is taken.
        pixel_values: Images [B, channels, H, W].
        labels: Ids of the classes to find [B]; what the model predicts if None.
        threshold: Which value a pixel of a mask is above, in [0, 1]. Choose it on images of validation with known
            masks or boxes: no other number decides as much.
        top_classes: Over the maps of how many predicted classes the mean is taken; that of the configuration if None, 1
            for another classifier.
        layer: The layer for `cam`, if the model is no `Localizer`.

    Returns:
        The maps, masks and boxes.

    Raises:
        ValueError: The threshold is out of range, top_classes is below 1 or given with labels, or a layer for a
            `Localizer`.
    """
    if not is_number(threshold, "[0, 1]"):
        raise ValueError(f"threshold is {threshold!r}: choose a number from 0 to 1")
    if labels is not None and top_classes is not None:
        raise ValueError(f"top_classes is {top_classes}, and labels are given: choose one of them")
    config: Any = model.config if isinstance(model, Localizer) else None
    if config and layer is not None:
        raise ValueError(f"layer is {layer!r}, but a Localizer's masks are of the layer it was made with: leave it out")
    if top_classes is None:
        top_classes = config.top_classes if config else 1
    check_count("top_classes", top_classes, 1)
    with eval_mode(model), torch.no_grad():
        outputs = model(pixel_values)
    classes = (
        outputs.logits.topk(min(top_classes, outputs.logits.shape[1])).indices if labels is None else labels[:, None]
    )
    if config:
        maps = outputs.maps[torch.arange(len(classes), device=classes.device)[:, None], classes].mean(1)
    else:
        maps = torch.stack([cam(model, pixel_values, column, layer=layer) for column in classes.unbind(1)]).mean(0)
    maps = in_pixels(maps, pixel_values)
    masks = maps > threshold
    return Localization(classes, maps, masks, largest_boxes(masks))


def cam(model: nn.Module, pixel_values: Tensor, classes: Tensor | None = None, *, layer: str | None = None) -> Tensor:
    """The class activation maps of any image classifier.

    Args:
        model: The classifier, or a `Localizer`, whose classifier is taken.
        pixel_values: Images [B, channels, H, W].
        classes: Ids of classes [B]; the predicted ones if None.
        layer: The name of the module whose features are weighed; the last stage or block from whose patches the logits
            are computed if None: for a head that reads the first token, the last block but one.

    Returns:
        The map of each image at the features' size [B, h, w], from 0 to 1; 0 where nothing is positive.

    Raises:
        ValueError: The logits do not depend on the features of patches of that layer.
    """
    net: Any = model.classifier if isinstance(model, Localizer) else model
    special = model.config.special_tokens if isinstance(model, Localizer) else None
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    with eval_mode(net), torch.enable_grad():
        for name in (layer,) if layer is not None else reversed(stack(net)):
            outputs, forward = record(net, name, pixel_values, return_dict=True)
            features = forward.features.detach().requires_grad_()
            chosen = outputs.logits.argmax(1) if classes is None else classes
            scores = forward.replay(features, frozen=True).logits.gather(1, chosen[:, None])
            slopes = as_grid(torch.autograd.grad(scores.sum(), features)[0], size, special).float()
            if slopes.any():
                maps = (slopes.mean((2, 3), keepdim=True) * as_grid(features.detach(), size, special)).sum(1).relu()
                return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    raise ValueError(f"layer is {layer!r}, from whose patches no logit is computed: choose an earlier one")


def in_pixels(maps: Tensor, pixel_values: Tensor) -> Tensor:
    """Maps [B, h, w] at the size of images, bilinearly [B, H, W]."""
    return nn.functional.interpolate(
        maps.float()[:, None], pixel_values.shape[-2:], mode="bilinear", align_corners=False
    )[:, 0]


def largest_boxes(masks: Tensor) -> Tensor:
    """The box of the largest part of each mask whose pixels touch at their edges.

    Args:
        masks: Masks [B, H, W].

    Returns:
        Left, top, right and bottom of each [B, 4], of int64 on the masks' device; zeros for an empty mask.
    """
    ids = torch.arange(1, masks[0].numel() + 1, device=masks.device).reshape(masks.shape[1:]) * masks
    while True:  # pixels take the largest id of their part, a step at a time
        rows, columns = nn.functional.pad(ids, (0, 0, 1, 1)), nn.functional.pad(ids, (1, 1))
        wider = torch.stack([ids, rows[:, 2:], rows[:, :-2], columns[..., 2:], columns[..., :-2]]).amax(0) * masks
        if torch.equal(wider, ids):
            break
        ids = wider
    boxes = torch.zeros(len(masks), 4, dtype=torch.long, device=masks.device)
    for box, parts in zip(boxes, ids, strict=True):
        sizes = parts.flatten().bincount()[1:]
        if len(sizes):
            y, x = (parts == sizes.argmax() + 1).nonzero().unbind(1)
            box[:] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes
