"""Inputs for every loss of classes, made from what it says that it needs, and the options it is tested with."""

import inspect

import torch
from torch import nn

from hf_xent import classes

VARIANTS = {
    "aspects": ["aspects:questions=1", "aspects:questions=5, alpha=0.5", "aspects:questions=7, alpha=0.0"],
    "bias": ["bias", "bias:mode=local, alpha=1.0, beta=0.1"],
    "dice": [
        "dice",
        "dice:smooth=0.1, alpha=0.7, squared=False",
        "dice:hard_negatives=0.4",
        "dice:alpha=0.0, hard_negatives=1.0",
    ],
    "pairs": ["pairs", "pairs:margin=0.5, weight=0.3"],
    "pairwise_gain": ["pairwise_gain", "pairwise_gain:top=2", "pairwise_gain:top=0, tanh=True"],
    "smooth_adversarial": [
        "smooth_adversarial:tau=1.5, rho=2.0, nu=0.5",
        "smooth_adversarial:distance=kl, tau=0.5",
        "smooth_adversarial:nu=0.0, norm=2",
    ],
    "symmetric_ce": ["symmetric_ce", "symmetric_ce:alpha=0.2, ce_weight=0.0"],
    "tversky": ["tversky", "tversky:alpha=0.3, beta=0.7, smooth=0.01"],
    "cross_entropy": ["cross_entropy", "cross_entropy:label_smoothing=0.1"],
    "comp_sum": ["comp_sum:tau=1.7", "comp_sum:tau=0.5"],
    "hl_gauss": ["hl_gauss:low=-1.5, high=1", "hl_gauss:low=-3, high=3, bins=7, sigma_ratio=2.0, padded=False"],
    "two_hot": ["two_hot:low=-1.5, high=1, bins=5", "two_hot:low=-3, high=3, bins=2"],
    "ordinal": [
        "ordinal", "ordinal:kind=softmax", "ordinal:kind=corn", "ordinal:kind=corn, normalize=K",
        "ordinal:kind=corn, normalize=pairs",
    ],
    "svm": ["svm", "svm:C=2.0, norm_weight=0.0"],
    "core_tuning": ["core_tuning", "core_tuning:eta=0.5, temperature=0.2, concentration=0.4, least=0.3, projection=5"],
    "hybrid": [
        "hybrid",
        "hybrid:padding=valid, window=7, sigma=1.0",
        "hybrid:terms=iou, smooth=1.0",
        "hybrid:terms=bce+ssim",
    ],
    "supcon": ["supcon", "supcon:eta=0.0, projection=3"],
    "forward_kl": ["forward_kl:temperature=2.0, ce_weight=0.3"],
}  # fmt: skip
"""Name -> the losses that are tested; those that are not named are tested with their defaults."""
COLUMNS = {
    "aspects": lambda loss, n: torch.rand(n, loss.questions),
    "list_id": lambda loss, n: torch.randint(2, (n,)),
}
"""Column -> its entries for a loss and n rows."""
NAMES = [text for name in (*classes.LOSSES, *classes.OF_STATISTICS) for text in VARIANTS.get(name, [name])]
N, K, D = 7, 4, 6


def example(text, dtype=torch.float64, rows=N, scale=2.0):
    """(loss, logits, labels, what else it needs), drawn anew in every call; logits and features are leaves."""
    torch.manual_seed(0)
    loss = classes.get(text)
    width = loss.outputs(K)
    if loss.labels == "masks":
        logits, labels = torch.randn(2, width, 13, 12), torch.randint(K, (2, 13, 12))
        labels[0, :2, 3:5] = -100
    else:
        logits = torch.randn(rows, width)
        labels = torch.randint(K, (rows,)) if loss.labels == "classes" else torch.randn(rows)
    head = nn.Linear(D, width)
    given = {
        "features": torch.randn(rows, D).to(dtype).requires_grad_(), "head": head.to(dtype).requires_grad_(False),
        "feature_map": torch.randn(rows, 3, D).to(dtype), "mask": torch.arange(3) < torch.randint(1, 4, (rows, 1)),
        "second": torch.randn(rows, width).to(dtype), "perturbed": torch.randn(rows, width).to(dtype),
        "state": loss.state(D, K),
    }  # fmt: skip
    if given["state"] is not None:
        given["state"] = given["state"].to(dtype).requires_grad_(False)
    needs = [*loss.needs, *(["mask"] if "feature_map" in loss.needs else [])]
    chosen = {name: given[name] for name in needs if name in given}
    chosen |= {name: _float(COLUMNS[name](loss, rows), dtype) for name in loss.columns}
    labels = labels if loss.labels != "values" else labels.to(dtype)
    return loss, (logits * scale).to(dtype).requires_grad_(), labels, chosen


def _float(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


def evaluated(loss, logits, labels, given):
    """The loss, with random numbers that are the same in every call."""
    torch.manual_seed(1)
    return loss(logits, labels, **given)


def referenced(loss, logits, labels, given):
    """Its reference, likewise."""
    torch.manual_seed(1)
    arrays = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return torch.as_tensor(loss.reference(logits.detach().numpy(), labels.numpy(), **arrays))


def is_random(loss):
    """Whether a loss draws random numbers."""
    return "torch.rand" in inspect.getsource(type(loss)) or "Beta" in inspect.getsource(type(loss))
