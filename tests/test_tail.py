"""The sparse tail against a dense one written from its formula, its bound, its sums, and where it is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hf_xent
from hf_xent import losses
from hf_xent.losses import CrossEntropy, Focal
from hf_xent.ops import Head
from hf_xent.ops.problem import pieces
from hf_xent.ops.tail import GROUPS, _sums_at_most
from support.oracle import Largest, assert_close_at_scale, gradients

IMPLS = ("chunked", "triton")  # the reference is exact


def peaked(
    N: int, V: int, D: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as uneven as a trained model's: some certain, some not, and a direction common to all of the head."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) + 0.3 * torch.randn(
        D, generator=g, dtype=torch.float64
    )
    labels = torch.randint(V, (N,), generator=g)
    pull = 6 * torch.rand(N, 1, generator=g, dtype=torch.float64)
    hidden = (pull * weight[labels] + 2 * torch.randn(N, D, generator=g, dtype=torch.float64)) / D**0.5
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def compressed(
    hidden: Tensor, head: Head, labels: Tensor, a: Tensor, o: Tensor, tail: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dz' [N, V] from the module's formula, dense: kept columns, and rank one a group; dz; the kept columns' mask."""
    z = head.logits(hidden)
    p = z.softmax(-1)
    spike = F.one_hot(labels, head.size) * o[:, None]
    dz = a[:, None] * p + spike
    energy = (a[:, None] * p).square().sum(0)
    total, spent, kept = dz.square().sum(), 0.0, torch.ones(head.size, dtype=torch.bool, device=z.device)
    for j in energy.argsort().tolist():
        spent += float(energy[j])
        if spent > tail**2 * total:
            break
        kept[j] = False
    kept[labels] = True
    if kept.sum() > head.size // 2:
        return dz, dz, kept
    rest = torch.where(kept, 0.0, p)
    for group in pieces(len(labels), max(1, math.ceil(len(labels) / GROUPS))):
        mass = (a[group].abs()[:, None] * rest[group]).sum(0)
        rest[group] = rest[group].sum(-1, keepdim=True) * mass / mass.sum()
    return a[:, None] * torch.where(kept, p, rest) + spike, dz, kept


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize(
    ("N", "V", "D", "budget", "bias"),
    [
        (37, 301, 19, None, False),
        (37, 301, 19, None, True),
        (5, 1000, 8, None, False),
        (61, 517, 40, 20_000, True),
        (3, 64, 4, 1, False),
        (3, 64, 4, 1, True),
        (1, 97, 5, None, False),
    ],
)
def test_gradients_are_those_of_the_formula(
    impl: str, device: str, N: int, V: int, D: int, budget: int | None, bias: bool
) -> None:
    hidden, weight, labels = peaked(N, V, D, device=device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    ramp = torch.linspace(-1, 1, V, dtype=torch.float64, device=device).requires_grad_()
    head = Head(weight, ramp if bias else None, scale=1.3)
    found = CrossEntropy()(hidden, head, labels, tail=0.03, impl=impl, memory_budget=budget)
    exact = F.cross_entropy(head.logits(hidden), labels)
    ones = torch.full((N,), 1 / N, dtype=torch.float64, device=device)
    with torch.no_grad():
        dz, _, kept = compressed(hidden, head, labels, ones, -ones, 0.03)
    assert torch.allclose(found, exact)
    assert N == 3 or kept.sum() <= V // 2  # the case is one of compression
    raw = F.linear(hidden, weight, head.bias)
    for got, want in zip(
        gradients(found, [x for x in (hidden, weight, head.bias) if x is not None]),
        torch.autograd.grad(raw, [x for x in (hidden, weight, head.bias) if x is not None], dz * head.scale),
        strict=True,
    ):
        assert_close_at_scale(got, want, 1e-9)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize(
    "loss", [CrossEntropy(z_loss=0.01), Focal(gamma=2.0), losses.get("tailr"), losses.get("comp_sum:tau=2")]
)
def test_any_loss_of_log_p_with_weights_of_either_sign(impl: str, device: str, loss: losses.Loss) -> None:
    hidden, weight, labels = peaked(29, 403, 12, device=device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    token_weight = torch.linspace(-1, 2, 29, dtype=torch.float64, device=device)
    token_weight[4] = 0
    labels[7] = -100
    kept = labels != -100
    head = Head(weight)
    stats = hf_xent.vocab_stats(hidden, head, labels, outputs=("lse", "target"))
    stats.values = {name: value.detach().requires_grad_() for name, value in stats.values.items()}
    (loss.of(stats) * token_weight)[kept].sum().backward()
    a, o = (stats.values[name].grad[kept] for name in ("lse", "target"))
    with torch.no_grad():
        dz, exact, mask = compressed(hidden[kept], head, labels[kept], a, o, 0.05)
    assert mask.sum() <= 201 and not torch.equal(dz, exact)
    found = loss(
        hidden, head, labels, token_weight=token_weight, reduction="sum", tail=0.05, impl=impl, memory_budget=30_000
    )
    dh, dw = gradients(found, [hidden, weight])
    assert_close_at_scale(dh[kept], dz @ weight, 1e-9)
    assert_close_at_scale(dw, dz.T @ hidden[kept], 1e-9)
    assert not dh[7].any()


@pytest.mark.parametrize("tail", [0.1, 0.01, 1e-3])
def test_the_bound_holds_and_rows_sum_to_zero(tail: float) -> None:
    """With the identity for a head the hidden gradient is the logits' own."""
    hidden, weight, labels = peaked(64, 800, 24)
    logits = (hidden @ weight.T).requires_grad_()
    [dz] = gradients(F.cross_entropy(logits, labels, reduction="sum"), [logits])
    head = Head(torch.eye(800, dtype=torch.float64))
    [found] = gradients(CrossEntropy()(logits, head, labels, reduction="sum", tail=tail), [logits])
    assert 0 < (found - dz).norm() <= tail * dz.norm()
    assert found.sum(-1).abs().max() < 1e-12
    for group in pieces(64, 4):  # equal weights: a group's tail has its own mass in every column
        assert_close_at_scale(found[group].sum(0), dz[group].sum(0), 1e-9)


def test_dropping_the_same_columns_is_at_least_twice_as_wrong() -> None:
    hidden, weight, labels = peaked(128, 3000, 48)
    hidden.requires_grad_()
    head, ones = Head(weight), torch.ones(128, dtype=torch.float64)
    found = gradients(CrossEntropy()(hidden, head, labels, reduction="sum", tail=0.02), [hidden])[0]
    with torch.no_grad():
        _, dz, kept = compressed(hidden, head, labels, ones, -ones, 0.02)
        exact, dropped = dz @ weight, torch.where(kept, dz, 0.0) @ weight
    assert (found - exact).norm() < 0.5 * (dropped - exact).norm()


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_flat_rows_and_a_tiny_tolerance_are_exact(impl: str, device: str) -> None:
    hidden, weight, labels = peaked(20, 150, 6, device=device)
    for h, tail in ((1e-4 * hidden, 1e-3), (hidden, 1e-12)):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        found = gradients(CrossEntropy()(h, Head(w), labels, tail=tail, impl=impl), [h, w])
        want = gradients(F.cross_entropy(h @ w.T, labels), [h, w])
        for x, y in zip(found, want, strict=True):
            assert_close_at_scale(x, y, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_low_precision_is_no_worse_than_torch_and_the_tolerance(impl: str, device: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = peaked(20, 200, 17, dtype=dtype, device=device)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    truth = gradients(F.cross_entropy(h @ w.T, labels), [h, w])
    wide = gradients(CrossEntropy()(h, Head(w), labels, tail=0.03), [h, w])
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    dense = gradients(F.cross_entropy(h @ w.T, labels), [h, w])
    found = gradients(CrossEntropy()(h, Head(w), labels, tail=0.03, impl=impl, memory_budget=7_000), [h, w])
    for got, plain, approximate, want in zip(found, dense, wide, truth, strict=True):
        error, rounding, compression = ((x.double() - want).norm() / want.norm() for x in (got, plain, approximate))
        assert compression > 1e-3  # something was compressed
        assert error <= 2 * rounding + 1.5 * compression


@pytest.mark.parametrize("N", [200, 800])
def test_memory_is_the_budget_and_a_few_rows_of_the_vocabulary(N: int) -> None:
    hidden, weight, labels = peaked(N, 600, 4)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        loss = CrossEntropy()(hidden, Head(weight), labels, tail=0.1, memory_budget=20 * 600 * 8)
        gradients(loss, [hidden, weight])
    assert largest.numel <= 20 * 600  # and N D <= 16 V here; GROUPS V are fewer


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_and_gets_nothing(frozen: str) -> None:
    hidden, weight, labels = peaked(30, 400, 10)
    hidden.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")
    loss = CrossEntropy()(hidden, Head(weight), labels, tail=0.02)
    loss.backward()
    both = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    want = gradients(CrossEntropy()(both[0], Head(both[1]), labels, tail=0.02), both)
    for x, grad in zip((hidden, weight), want, strict=True):
        if x.grad is not None:
            assert_close_at_scale(x.grad, grad, 1e-9)
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_nan_is_not_hidden_and_no_token_is_zero() -> None:
    hidden, weight, labels = peaked(12, 300, 6)
    hidden[3] = float("nan")
    hidden.requires_grad_()
    assert gradients(CrossEntropy()(hidden, Head(weight), labels, tail=0.01), [hidden])[0][3].isnan().all()
    none = CrossEntropy()(hidden, Head(weight), torch.full_like(labels, -100), tail=0.01)
    assert none == 0 and not gradients(none, [hidden])[0].any()


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_running_sums_against_a_bound(device: str, size: int) -> None:
    terms = torch.rand(size, dtype=torch.float64, device=device).pow(8).sort().values
    sums, number = terms.cumsum(0), lambda x: torch.tensor(x, dtype=torch.float64, device=device)
    for at in range(0, size, max(1, size // 10)):
        for bound in (0.999 * sums[at], 1.001 * sums[at], 1e-30 * sums[at]):
            assert torch.equal(_sums_at_most(terms, bound), sums <= bound)
    assert _sums_at_most(terms, number(1e300)).all()
    assert not _sums_at_most(terms, number(float("nan"))).any()
    assert not _sums_at_most(terms * 1e300, number(0.0)).any()
    if size > 1:
        terms[: size // 2] = 0
        terms[-1] = float("nan")
        assert _sums_at_most(terms, number(0.0)).tolist() == [j < size // 2 for j in range(size)]


DETERMINISTIC = """
import torch
from hf_xent.losses import CrossEntropy
from hf_xent.ops import Head

torch.use_deterministic_algorithms(True)
def run(device, tail):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 64, generator=generator, dtype=torch.float64)
    labels = torch.randint(2000, (300,), generator=generator)
    hidden = 0.1 * torch.randn(300, 64, generator=generator, dtype=torch.float64) + 0.3 * weight[labels]
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
    loss = CrossEntropy()(leaves[0], Head(leaves[1]), labels.to(device), tail=tail, memory_budget=1_000_000)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

for tail in (0.0, 1e-2):
    first, second, cpu = run("cuda", tail), run("cuda", tail), run("cpu", tail)
    for one, other, expected in zip(first, second, cpu):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.cpu(), expected)
"""


def test_deterministic_algorithms_on_a_gpu(gpu: str) -> None:
    """No operation is refused, and each run gives the same bits; cuBLAS reads its variable when it starts."""
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC], check=False, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        ("cross_entropy", {"tail": 1.0}, r"tail is 1.0: pass a relative error in \[0, 1\)"),
        ("cross_entropy", {"tail": -0.1}, "tail is -0.1"),
        ("cross_entropy:label_smoothing=0.1", {"tail": 1e-3}, "CrossEntropy differentiates 'mean'"),
        ("emo", {"tail": 1e-3}, "EMO differentiates 'payload'"),
        ("eisl", {"tail": 1e-3}, "EISL is more than a sum over tokens"),
    ],
)
def test_refused_where_it_does_not_hold(loss: str, options: dict[str, float], match: str) -> None:
    hidden, weight, labels = peaked(4, 10, 3)
    with pytest.raises(ValueError, match=match):
        losses.get(loss)(hidden.requires_grad_(), Head(weight), labels, **options)


def test_refused_with_a_softcap() -> None:
    hidden, weight, labels = peaked(4, 10, 3)
    with pytest.raises(ValueError, match="the head has softcap 30"):
        CrossEntropy()(hidden.requires_grad_(), Head(weight, softcap=30.0), labels, tail=1e-3)
