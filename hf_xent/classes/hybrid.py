"""Hybrid loss of segmentation: cross-entropy of pixels, structural similarity of patches, and overlap of the masks.

    BCE(p, y) + 1 - SSIM(p, y) + 1 - (sum py + s) / (sum (p + y - py) + s),  each an average over an image

p is the map of probabilities, y the mask. One output is a logit of the foreground (class 1); with two outputs p is the
softmax of class 1; with more, the loss is the mean over classes, each against all others. SSIM has a Gaussian window of
11 x 11 pixels, with zeros beyond the border as the authors have it: they lower it there, 'valid' leaves the border out.

Ignored pixels (-100) change nothing: they are 0 in both images, count in no average, and no window is centred at one.
So an image that is padded with them has the loss that it had before. Images without any labelled pixel are left out of
the mean over the batch. The authors' overlap is 0 / 0 for an empty mask; here s mends that, and lets an empty mask
lower p. For side outputs at several depths, as BASNet has, add up the losses of each, interpolated to the mask's size.

Source: Qin et al. 2019, BASNet: Boundary-Aware Salient Object Detection, CVPR; code at
github.com/xuebinqin/BASNet. SSIM is that of Wang et al. 2004, with values in [0, 1].
Relations: the overlap is the soft Jaccard index, `dice` its sibling; with terms 'bce' and two classes the loss is
cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count
from .base import ClassLoss
from .structure import similarity, ssim

TERMS = {"bce": (), "ssim": ("window", "sigma", "padding"), "iou": ("smooth",)}
"""Term -> the options that it has."""
IGNORED = -100


@dataclass(frozen=True)
class Hybrid(ClassLoss):
    """BCE, SSIM and IoU of masks; see the module's docstring."""

    terms: str = "bce+ssim+iou"
    """The terms that are added, joined by +."""
    window: int = 11
    """The number of pixels of a side of SSIM's window, odd."""
    sigma: float = 1.5
    """The standard deviation of the window in pixels."""
    padding: str = "zero"
    """What windows see beyond the border: 'zero'; with 'valid' there are none that reach over it."""
    smooth: float = 1e-6
    """s, in pixels."""
    labels: ClassVar[str] = "masks"
    per_row: ClassVar[bool] = False
    least_classes: ClassVar[int] = 1
    ranges: ClassVar[dict[str, str]] = {"sigma": "(0, inf)", "smooth": "(0, inf)"}

    def __post_init__(self) -> None:
        chosen = [term.strip() for term in str(self.terms).split("+")]
        if not set(chosen) <= set(TERMS) or len(chosen) != len(set(chosen)):
            raise ValueError(f"terms is {self.terms!r}: join some of {', '.join(TERMS)} by +, each once")
        object.__setattr__(self, "terms", "+".join(chosen))  # without the spaces that options as text come with
        check_count("window", self.window, 1)
        if self.window % 2 == 0:
            raise ValueError(f"window is {self.window}: choose an odd number, so that a window has a centre")
        if self.padding not in ("zero", "valid"):
            raise ValueError(f"padding is {self.padding!r}: choose 'zero' or 'valid'")
        defaults = {option.name: option.default for option in fields(self)}
        for term, options in TERMS.items():
            for name in options:
                if term not in chosen and getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, an option of {term}: add {term} to terms")
        super().__post_init__()

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss, a scalar, of logits [B, K or 1, H, W] and masks [B, H, W] of ids, or -100; 0 without labels.

        Raises:
            ValueError: Logits and masks differ in size, or images are smaller than a window of padding 'valid'.
        """
        if logits.shape[-2:] != labels.shape[-2:]:
            raise ValueError(
                f"logits has images of {tuple(logits.shape[-2:])} and labels of {tuple(labels.shape[-2:])} pixels:"
                " interpolate the logits to the size of the labels"
            )
        known = (labels != IGNORED)[:, None]
        margins = _margins(logits).masked_fill(~known, 0)
        ids = torch.arange(logits.shape[1], device=labels.device) if logits.shape[1] > 2 else labels.new_tensor([1])
        y = (labels[:, None] == ids[:, None, None]).to(margins.dtype)
        p, count = margins.sigmoid() * known, known.sum((-2, -1))
        total = torch.zeros_like(p[..., 0, 0])
        if "bce" in self.terms:
            bce = F.binary_cross_entropy_with_logits(margins, y, reduction="none") * known
            total = total + bce.sum((-2, -1)) / count.clamp(min=1)
        if "ssim" in self.terms:
            total = total + (1 - ssim(p, y, self.window, self.sigma, self.padding, known))
        if "iou" in self.terms:
            both = (p * y).sum((-2, -1))
            either = (p + y - p * y).sum((-2, -1))
            total = total + 1 - (both + self.smooth) / (either + self.smooth)
        images = count[:, 0] > 0
        return (total.mean(1) * images).sum() / images.sum().clamp(min=1)

    def scores(self, logits: Tensor) -> Tensor:
        """The probabilities of the classes; two for one output."""
        if logits.shape[-1] > 1:
            return logits.softmax(-1)
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], -1)

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The terms of each image and class by their formulas, with windows that are cut out one by one."""
        z, labels = np.asarray(logits, np.float64), np.asarray(labels)
        z = np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z
        q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        losses = []
        for image, mask in zip(q, labels, strict=True):
            known = mask != IGNORED
            for k in range(len(q[0])) if len(q[0]) > 2 and known.any() else [1] * known.any():
                p, y = image[k] * known, 1.0 * (mask == k)
                bce = -np.log(np.where(y, image[k], 1 - image[k]))[known].mean()
                iou = 1 - ((p * y).sum() + self.smooth) / ((p + y - p * y).sum() + self.smooth)
                terms = {
                    "bce": bce,
                    "ssim": 1 - similarity(p, y, known, self.window, self.sigma, self.padding)
                    if "ssim" in self.terms
                    else 0,
                }
                losses.append(sum(({**terms, "iou": iou})[term] for term in self.terms.split("+")))
        return np.asarray(np.mean(losses) if losses else 0.0)


def _margins(logits: Tensor) -> Tensor:
    """log p - log(1 - p) of the foreground, or of each class where there are more than two, [B, C, H, W]."""
    if logits.shape[1] <= 2:
        return logits[:, -1:] - logits[:, :-1] if logits.shape[1] == 2 else logits
    largest = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(1, keepdim=True), True)
    log_p = logits.log_softmax(1)
    rest = log_p.exp().masked_fill(largest, 0).neg().log1p()  # log(1 - p), which is exact where p is at most 1/2
    others = log_p.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True)
    return log_p - torch.where(largest, others, rest)
