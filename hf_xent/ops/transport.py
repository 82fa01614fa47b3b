"""How far two sets of vectors are from one another: the debiased Sinkhorn divergence, in log space, with masks.

    OT(a, b) = min_P  sum_ij P_ij C_ij + eps KL(P | a b^T)        P has the marginals a and b
    S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2
    C_ij = |x_i - y_j|^2 / 2        eps = blur^2        a = 1 / S, b = 1 / T, uniform over the positions of each row

The dual potentials are f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps), and g likewise; OT = <a, f> + <b, g>. Updates
are symmetric, f <- (f + T(g)) / 2, so that f = g where x = y, and S(x, x) is 0. eps is annealed from the squared
diameter of both sets by a quarter a step; it stays at blur^2 for the rest of the iterations. Gradients are those of the
envelope theorem: the last update is differentiated with the potentials before it held fixed, which is exact where the
updates have converged. They cannot be differentiated again.

Numbers are float32, or float64 if the inputs are, also under autocast. Memory is that of the costs of all pairs,
O(B (S + T)^2). Padding takes no part: whatever it holds, nan included, it changes no value and gets no gradient.

Source: Feydy et al. 2019, Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, arXiv:1810.08278;
positions as coordinates, Le et al. 2023, arXiv:2301.11716, whose code lets padding take part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options.ranges import check_count, is_number
from .statistics import widened


def with_positions(
    states: Tensor,  # [B, S, D]
    mask: Tensor | None = None,  # [B, S]
    weight: float = 1.0,
) -> Tensor:  # [B, S, D + 1]
    """States with one more coordinate, weight i / (length - 1): a transport between them pays for a change of order.

    Args:
        states: Vectors of positions, [B, S, D].
        mask: Which positions count, [B, S]; None for all. i counts these alone, so padding may be on either side.
        weight: The coordinate of the last position; that of the first, and of an only one, is 0.

    Returns:
        [B, S, D + 1], in float32, or float64 if the states are.

    Raises:
        ValueError: The mask does not fit, or the weight is not a number >= 0.
    """
    _check("weight", weight, "[0, inf)")
    states = widened(states)
    kept = _kept("states", states, "mask", mask)
    index = (kept.cumsum(1) - 1).clamp(min=0)
    length = kept.sum(1, keepdim=True)
    position = weight * index / (length - 1).clamp(min=1)
    return torch.cat([states, position.to(states.dtype)[..., None]], dim=-1)


def sinkhorn_divergence(
    x: Tensor,  # [B, S, D]
    y: Tensor,  # [B, T, D]
    x_mask: Tensor | None = None,  # [B, S]
    y_mask: Tensor | None = None,  # [B, T]
    *,
    blur: float = 0.05,
    iterations: int = 50,
) -> Tensor:  # [B]
    """The debiased Sinkhorn divergence of each row; see the module's docstring.

    Args:
        x: Vectors, [B, S, D]; gradients reach both sides.
        y: Vectors, [B, T, D].
        x_mask: Which positions of x count, [B, S]: true or not 0. None for all.
        y_mask: Which positions of y count, [B, T].
        blur: The square root of eps, a distance: details below it are not resolved.
        iterations: The updates of the potentials. The annealing takes log_4(squared diameter / eps) of them.

    Returns:
        [B], >= 0 where the iterations suffice; the unit is that of the squared distance.

    Raises:
        ValueError: Shapes do not fit, a row has no position that counts, or an option is out of its range.

    Source: Feydy et al. 2019, arXiv:1810.08278.
    """
    _check("blur", blur, "(0, inf)")
    check_count("iterations", iterations, 1)
    if x.ndim != 3 or y.ndim != 3 or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}: give [B, S, D] and [B, T, D]")
    x_kept, y_kept = _kept("x", x, "x_mask", x_mask), _kept("y", y, "y_mask", y_mask)
    for name, kept in (("x", x_kept), ("y", y_kept)):
        empty = (~kept.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"{name} has no position that counts in row {empty[0]}: leave such rows out")
    with torch.autocast(x.device.type, enabled=False):
        x, y = widened(x).masked_fill(~x_kept[..., None], 0), widened(y).masked_fill(~y_kept[..., None], 0)
        x, y = _centered(x, y, x_kept, y_kept)
        return _divergence(x, y, _log_weights(x_kept, x), _log_weights(y_kept, y), (blur**2, iterations))


def _check(name: str, value: float, interval: str) -> None:
    if not is_number(value, interval):
        raise ValueError(f"{name} is {value!r}: choose a number in {interval}")


def _kept(name: str, states: Tensor, mask_name: str, mask: Tensor | None) -> Tensor:
    """The mask as booleans [B, S]. Raises: ValueError if it has another shape."""
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"{mask_name} is {tuple(mask.shape)}, but {name} is {tuple(states.shape)}: give one a position"
        )
    return mask.to(states.device) != 0


def _centered(x: Tensor, y: Tensor, x_kept: Tensor, y_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides without their common mean: no distance changes, and squares lose fewer digits."""
    count = x_kept.sum(1) + y_kept.sum(1)
    mean = ((x.detach().sum(1) + y.detach().sum(1)) / count[:, None])[:, None]
    return x - mean, y - mean


def _log_weights(kept: Tensor, like: Tensor) -> Tensor:
    """log 1/n for each of the n positions that count, -inf for others."""
    log = -kept.sum(1, keepdim=True).to(like.dtype).log()
    return torch.where(kept, log, torch.full_like(log, -math.inf))


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 / 2, [B, S, T], without a tensor of all differences."""
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[:, None]
    return squares / 2 - x @ y.mT


def _softmin(eps: Tensor, cost: Tensor, log_mass: Tensor) -> Tensor:
    """-eps log sum_j exp(log_mass_j - C_ij / eps), [B, S]."""
    terms = log_mass[:, None] - cost / eps[:, None, None]
    if terms.requires_grad:
        return -eps[:, None] * terms.logsumexp(-1)
    # e^-80 beside 1 is lost in either dtype, and on CPUs exp is tens of times slower where it underflows
    largest = terms.amax(-1, keepdim=True)
    return -eps[:, None] * (largest[..., 0] + (terms - largest).clamp_(min=-80).exp_().sum(-1).log_())


def _divergence(x: Tensor, y: Tensor, a: Tensor, b: Tensor, schedule: tuple[float, int]) -> Tensor:
    """S of rows whose weights have the logarithms a [B, S] and b [B, T]."""
    final, iterations = schedule
    with torch.no_grad():
        xy, xx, yy = _cost(x, y), _cost(x, x), _cost(y, y)
        eps = _squared_diameter(((xy, a, b), (xx, a, a), (yy, b, b))).clamp(min=final)
        f, g = _softmin(eps, xy, b), _softmin(eps, xy.mT, a)
        p, q = _softmin(eps, xx, a), _softmin(eps, yy, b)
        for _ in range(iterations):
            by = eps[:, None]
            f, g = (
                (f + _softmin(eps, xy, b + g / by)) / 2,
                (g + _softmin(eps, xy.mT, a + f / by)) / 2,
            )
            p, q = (p + _softmin(eps, xx, a + p / by)) / 2, (q + _softmin(eps, yy, b + q / by)) / 2
            eps = (eps / 4).clamp(min=final)
        by = eps[:, None]
        to_x, to_y, own_x, own_y = b + g / by, a + f / by, a + p / by, b + q / by
    fixed_x, fixed_y = x.detach(), y.detach()
    of_x = _softmin(eps, _cost(x, fixed_y), to_x) - _softmin(eps, _cost(x, fixed_x), own_x)
    of_y = _softmin(eps, _cost(y, fixed_x), to_y) - _softmin(eps, _cost(y, fixed_y), own_y)
    return (a.exp() * of_x).sum(1) + (b.exp() * of_y).sum(1)


def _squared_diameter(costs: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> Tensor:
    """The largest squared distance of two positions that count, [B]."""
    largest = [
        cost.masked_fill((left == -math.inf)[..., None] | (right == -math.inf)[:, None], 0).amax((1, 2))
        for cost, left, right in costs
    ]
    return 2 * torch.stack(largest).amax(0)
