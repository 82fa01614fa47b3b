"""The divergence of two sets: golden values, closed forms, the optimal assignment, finite differences, padding."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from hf_xent.ops import sinkhorn_divergence, with_positions


def of(*rows):
    """Vectors of one set, [1, S, D], in float64."""
    return torch.tensor(rows, dtype=torch.float64).reshape(1, len(rows), -1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(x, y, blur=0.05, steps=400):
    """The formula in numpy for one pair of sets: the duals at eps alone, alternately until they have converged."""

    def transport(x, y):
        cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
        f, g = np.zeros(len(x)), np.zeros(len(y))
        for _ in range(steps):
            f = -(blur**2) * np.logaddexp.reduce((g - cost) / blur**2 - math.log(len(y)), axis=1)
            g = -(blur**2) * np.logaddexp.reduce((f[:, None] - cost) / blur**2 - math.log(len(x)), axis=0)
        return f.mean() + g.mean()

    return transport(x, y) - transport(x, x) / 2 - transport(y, y) / 2


E1, E2 = (1.0, 0.0), (0.0, 1.0)
GOLDEN = [
    (of(0.0), of(3.0), 4.5),
    (of(0.0, 1.0), of(2.0, 3.0), 2.0),
    (of(0.0, 1.0, 2.0), of(0.0, 2.0), 0.165582),
    (of(E1, E1, E2, E2), of(E2, E1), 0.0),
    (with_positions(of(E1, E1, E2, E2)), with_positions(of(E2, E1)), 0.360245),
]


@pytest.mark.parametrize(("x", "y", "value"), GOLDEN)
def test_golden_values(x, y, value):
    assert sinkhorn_divergence(x, y).item() == pytest.approx(value, abs=1e-6)
    assert sinkhorn_divergence(y, x).item() == pytest.approx(value, abs=1e-6)
    assert sinkhorn_divergence(x.float(), y.float()).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("sizes", "blur"), [((1, 1), 0.05), ((3, 5), 0.7), ((7, 4), 1.0), ((6, 6), 1.5)])
def test_it_is_the_formula(sizes, blur):
    x, y = draw(2, sizes[0], 3), draw(2, sizes[1], 3, seed=1) + 0.5
    found = sinkhorn_divergence(x, y, blur=blur, iterations=150)
    expected = [reference(a.numpy(), b.numpy(), blur) for a, b in zip(x, y, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.1, 2.0, 50.0])
def test_a_dirac_that_moves(t):
    x = draw(1, 1, 4)
    step = torch.full((4,), t / 2, dtype=torch.float64)  # of length t
    assert sinkhorn_divergence(x, x + step).item() == pytest.approx(t**2 / 2, abs=1e-12)


def test_a_set_has_no_distance_from_itself_nor_a_slope_there():
    x = draw(2, 6, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found = sinkhorn_divergence(x, y)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0, 0], abs=1e-15)
    assert x.grad.abs().max() < 1e-15 and y.grad.abs().max() < 1e-15
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert sinkhorn_divergence(x, x[:, order]).abs().max() < 1e-12
    assert (sinkhorn_divergence(with_positions(x), with_positions(x[:, order])) > 0.05).all()


def test_it_is_symmetric_and_does_not_see_where_both_are():
    x, y = draw(3, 5, 4), draw(3, 8, 4, seed=1)
    found = sinkhorn_divergence(x, y)
    torch.testing.assert_close(sinkhorn_divergence(y, x), found)
    torch.testing.assert_close(sinkhorn_divergence(x + 100, y + 100), found, rtol=1e-8, atol=1e-8)
    near = sinkhorn_divergence((x + 100).float(), (y + 100).float())
    torch.testing.assert_close(near.double(), found, rtol=1e-4, atol=1e-4)
    assert (found > 0).all()


def test_without_blur_it_is_the_best_assignment():
    x, y = draw(1, 5, 2), draw(1, 5, 2, seed=1)
    cost = ((x[0, :, None] - y[0]) ** 2).sum(-1).numpy() / 2
    best = cost[linear_sum_assignment(cost)].mean()
    gaps = [abs(sinkhorn_divergence(x, y, blur=blur, iterations=400).item() - best) for blur in (0.5, 0.15, 0.05)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-2 * best


def test_gradients_of_both_sides_by_finite_differences():
    x, y = draw(1, 4, 2).requires_grad_(), draw(1, 5, 2, seed=1).requires_grad_()
    masks = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1, 0]])

    def total(x, y):
        placed = with_positions(x, masks[0]), with_positions(y, masks[1])
        return sinkhorn_divergence(*placed, *masks, blur=1.0).sum()

    assert torch.autograd.gradcheck(total, (x, y), eps=1e-5, atol=1e-6)


def test_gradients_where_the_blur_is_small():
    """Along one direction, after enough iterations."""
    x, y, step = draw(1, 4, 3).requires_grad_(), draw(1, 6, 3, seed=1).requires_grad_(), 1e-5

    def total(x, y):
        return sinkhorn_divergence(x, y, blur=0.4, iterations=500).sum()

    slopes = torch.autograd.grad(total(x, y), (x, y))
    for side, slope in enumerate(slopes):
        way = draw(*slope.shape, seed=7)
        moved = [total(*(z + s * way if i == side else z for i, z in enumerate((x, y)))) for s in (step, -step)]
        difference = (moved[0] - moved[1]).item() / (2 * step)
        assert (slope * way).sum().item() == pytest.approx(difference, rel=1e-4, abs=1e-6)


FILLS = [0.0, 7.0, 1e9, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_changes_nothing(fill, dtype):
    """Of both sides, left or right, and of other lengths; the authors' code has a far cluster there."""
    x, y = draw(1, 5, 3, dtype=dtype).requires_grad_(), draw(1, 4, 3, seed=1, dtype=dtype).requires_grad_()
    alone = sinkhorn_divergence(with_positions(x), with_positions(y))
    expected = torch.autograd.grad(alone.sum(), (x, y))
    wide_x, x_mask = torch.full((1, 9, 3), fill, dtype=dtype), torch.zeros(1, 9)
    wide_y, y_mask = torch.full((1, 6, 3), fill, dtype=dtype), torch.zeros(1, 6, dtype=torch.long)
    wide_x[:, :5], x_mask[:, :5], wide_y[:, 2:], y_mask[:, 2:] = x.detach(), 1, y.detach(), 1
    wide_x.requires_grad_(), wide_y.requires_grad_()
    sides = with_positions(wide_x, x_mask), with_positions(wide_y, y_mask)
    padded = sinkhorn_divergence(*sides, x_mask, y_mask)
    found = torch.autograd.grad(padded.sum(), (wide_x, wide_y))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(padded, alone, **close)
    torch.testing.assert_close(found[0][:, :5], expected[0], **close)
    torch.testing.assert_close(found[1][:, 2:], expected[1], **close)
    assert found[0][:, 5:].abs().max() == 0 and found[1][:, :2].abs().max() == 0


def test_what_the_padding_holds_changes_no_bit():
    x, y, mask = draw(2, 6, 3), draw(2, 5, 3, seed=1), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    found = []
    for fill in FILLS:
        filled = torch.where(mask[..., None] == 0, fill, x).requires_grad_()
        values = sinkhorn_divergence(with_positions(filled, mask), with_positions(y), mask)
        values.sum().backward()
        found.append((values.detach(), filled.grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_positions():
    x = draw(2, 5, 3)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    placed = with_positions(x, mask, 2.0)
    assert torch.equal(placed[..., :3], x)
    assert placed[0, 1:4, 3].tolist() == [0.0, 1.0, 2.0] and placed[1, 2, 3] == 0
    assert with_positions(x)[0, :, 3].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert with_positions(x.bfloat16()).dtype == torch.float32 and with_positions(x).dtype == torch.float64
    fine = with_positions(torch.zeros(1, 301, 1, dtype=torch.bfloat16))[0, :, 1]
    torch.testing.assert_close(fine, torch.arange(301) / 300)  # positions have more digits than the states


def test_low_precision_and_autocast_use_float32():
    x, y = draw(2, 6, 4, dtype=torch.bfloat16), draw(2, 5, 4, seed=1, dtype=torch.bfloat16)
    expected = sinkhorn_divergence(x.float(), y.float())
    assert torch.equal(sinkhorn_divergence(x, y), expected) and expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_divergence(x.float(), y.float()), expected)
    x.requires_grad_()
    sinkhorn_divergence(x, y).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_more_iterations_than_the_annealing_takes_change_little():
    """Far points: the iterations begin at the diameter, so that few are enough."""
    x, y = 100 * draw(1, 5, 3), 100 * draw(1, 6, 3, seed=1)
    few, many = (sinkhorn_divergence(x, y, iterations=n).item() for n in (40, 600))
    assert few == pytest.approx(many, rel=0.02)


def test_refusals():
    x, y = draw(2, 3, 2), draw(2, 4, 2)
    empty = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="x has no position that counts in row 1: leave such rows out"):
        sinkhorn_divergence(x, y, empty)
    with pytest.raises(ValueError, match="y has no position that counts in row 0"):
        sinkhorn_divergence(x, y[:, :0])
    with pytest.raises(ValueError, match=r"x is \(2, 3, 2\) and y \(2, 4, 1\): give"):
        sinkhorn_divergence(x, y[..., :1])
    with pytest.raises(ValueError, match=r"y_mask is \(2, 3\), but y is \(2, 4, 2\): give one a position"):
        sinkhorn_divergence(x, y, None, empty)
    with pytest.raises(ValueError, match=r"blur is 0: choose a number in \(0, inf\)"):
        sinkhorn_divergence(x, y, blur=0)
    with pytest.raises(ValueError, match="iterations is 0: choose a whole number of at least 1"):
        sinkhorn_divergence(x, y, iterations=0)
    with pytest.raises(ValueError, match=r"weight is -1.0: choose a number in \[0, inf\)"):
        with_positions(x, None, -1.0)
