"""For digit_head.py: images as patches, and its controls without a decoder."""

from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

TOP = 16


def patches(x: Tensor, back: bool = False) -> Tensor:
    """Images [N, 8, 8] as patches [N, 16, 4], row by row, or back."""
    x = x.reshape((-1, 4, 4, 2, 2) if back else (-1, 4, 2, 4, 2)).transpose(2, 3)
    return x.reshape((-1, 8, 8) if back else (-1, 16, 4))


def frequencies(_: str, seed: int, parts: Any, wanted: Tensor) -> tuple[dict[str, float], Tensor]:
    """Every pixel by itself: how often it had each value in its class, and 1/10 more."""
    (x, y), _, (tx, ty) = parts
    counts = torch.stack([torch.nn.functional.one_hot(x[y == c].long(), TOP + 1).sum(0) for c in range(10)]) + 0.1
    probs = (counts / counts.sum(-1, keepdim=True)).double()  # [10, 16, 4, 17]
    nats = -probs[ty].gather(-1, tx.long()[..., None]).log().mean()
    rows = probs[wanted].flatten(0, 2)
    drawn = torch.multinomial(rows, 1, generator=torch.Generator().manual_seed(seed)).view(len(wanted), *x.shape[1:])
    return {"nats": float(nats)}, drawn.float()


def linear(_: str, seed: int, parts: Any, wanted: Tensor) -> tuple[dict[str, float], Tensor]:
    """Pixel k is normal around a linear function of the class and the pixels before; its mass between k +- 1/2.

    Penalty and least standard deviation are those with the least nats of validation images.
    """
    rows = [(x.flatten(1).double().numpy(), np.eye(10)[y]) for x, y in parts]
    (x, c), valid, test = rows
    drawn, draw = np.zeros((len(wanted), 0)), np.random.default_rng(seed)
    tried = [(penalty, least) for penalty in (1, 10, 100, 1000) for least in (0.1, 0.3, 1.0)]

    def inputs(classes: Any, pixels: Any, k: int) -> Any:
        return np.concatenate([classes, pixels[:, :k]], 1)

    def nats(part: Any, weight: Any, sd: float, k: int) -> Any:
        mean, value = inputs(part[1], part[0], k) @ weight, part[0][:, k]
        high = np.where(value == TOP, np.inf, value + 0.5)
        mass = norm.cdf(high, mean, sd) - norm.cdf(np.where(value == 0, -np.inf, value - 0.5), mean, sd)
        return -np.log(0.999 * mass + 0.001 / (TOP + 1))  # a thousandth is uniform, so that nothing is impossible

    losses = []
    for k in range(x.shape[1]):
        a = inputs(c, x, k)
        found = []
        for penalty, least in tried:
            weight = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ x[:, k])
            sd = max(least, (x[:, k] - a @ weight).std())
            found.append((nats(valid, weight, sd, k).mean(), weight, sd))
        _, weight, sd = min(found, key=lambda one: one[0])
        losses.append(nats(test, weight, sd, k))
        new = draw.normal(inputs(np.eye(10)[wanted], drawn, k) @ weight, sd)
        drawn = np.concatenate([drawn, new.round().clip(0, TOP)[:, None]], 1)
    return {"nats": float(np.mean(losses))}, torch.tensor(drawn, dtype=torch.float32).view(-1, 16, 4)


FITTED = {"pixels of a class": frequencies, "linear Gaussian": linear}
