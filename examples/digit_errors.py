"""For digit_head.py: what digits lose of vectors, by their bits, and pictures of samples."""

from pathlib import Path

import numpy as np
import torch
from digit_baselines import TOP, patches
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from hf_xent.continuous import Quantiles


def reconstruction(images: np.ndarray, bits: tuple[int, ...] = (1, 2, 3, 4, 6)) -> str:
    """A table of the mean squared error of test images [N, 64], 0 to 1, from 16 principal components as digits."""
    train, test = images[:1400] / TOP, images[1400:] / TOP
    pca = PCA(16, random_state=0).fit(train)
    x, z = pca.transform(train), pca.transform(test)
    error = lambda codes: float(((pca.inverse_transform(codes) - test) ** 2).mean())  # noqa: E731
    what = (
        f"Mean squared error of images from 16 components as digits, by bits of a digit; {error(z):.5f} if not rounded."
    )
    lines = [what, "", "| bits | normal | fit | Lloyd-Max | uniform |", "|---|---|---|---|---|"]
    for b in bits:
        fit = Quantiles.fit(x, 2**b)
        means = [KMeans(2**b, init=v[:, None], n_init=1).fit(column[:, None]).cluster_centers_
                 for v, column in zip(fit.values.numpy(), x.T, strict=True)]  # fmt: skip
        lloyd, steps = Quantiles(np.sort(np.hstack(means).T)), (np.arange(2**b) + 0.5) / 2**b
        uniform = Quantiles(x.min(0)[:, None] + (x.max(0) - x.min(0))[:, None] * steps)
        normal = Quantiles.gaussian(2**b, None).round(z / x.std(0)) * x.std(0)
        errors = [error(normal), *(error(q.round(z)) for q in (fit, lloyd, uniform))]
        lines.append(f"| {b} | " + " | ".join(f"{e:.5f}" for e in errors) + " |")
    return "\n".join(lines)


def pictures(drawn: Tensor, classes: Tensor, path: Path) -> None:
    """Up to twelve images of each class, a row for each."""
    columns = min(12, int(classes.bincount(minlength=10).min()))
    images = torch.nn.functional.pad(patches(drawn, back=True), (0, 1, 0, 1), value=TOP / 2)
    rows = [torch.cat([*images[classes == c][:columns]], 1) for c in range(10)]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(torch.cat(rows).numpy(), cmap="gray_r", vmin=0, vmax=TOP)
    axes.set_axis_off()
    figure.savefig(path, dpi=110)
