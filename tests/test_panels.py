"""Heads whose matrix is converted panel by panel: float32 products of 16-bit tensors, and quantized matrices.

Each is compared with dense torch over the converted matrix: in float64, or it is no worse than torch in the same
dtype. No panel is larger than its bound, and nothing is as large as the matrix or the logits.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_xent.losses import CrossEntropy
from hf_xent.ops import DIFFERENTIABLE, map_logits, panels, vocab_loss, vocab_stats
from hf_xent.ops.dispatch import stream_loss
from hf_xent.ops.request import Request
from support.oracle import Allocations, Largest, Polynomial, assert_no_worse, gradients, make

IMPLS, MODES = ("chunked", "reference"), ("eager", "recompute")
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch):
    """Panels of 16 rows of 24 float32 numbers, so that tiny matrices have several."""
    monkeypatch.setattr(panels, "PANEL_BYTES", 16 * 24 * 4)


def solved(case, head, loss, mode, **options):
    """Statistics of the valid rows, and every gradient of the weighted sum of the loss."""
    hidden, payload = case.tensors["hidden"], case.payload
    if mode == "eager":
        total, stats = vocab_loss(loss, hidden, head, case.labels, token_weight=case.weight, payload=payload, **options)
    else:
        stats = vocab_stats(hidden, head, case.labels, outputs=loss.uses, payload=payload, **options)
        total = (loss.of(stats) * case.weight)[stats.mask].sum()
    return {name: stats.values[name][stats.mask] for name in loss.uses}, gradients(total, case.leaves)


def float32_solution(case, loss):
    """What plain torch computes with float32 copies of the 16-bit tensors, whose gradients are rounded at the end."""
    leaves = {name: t.float() for name, t in case.tensors.items()}
    wide = replace(case, tensors=leaves)
    values, weight = wide.dense()
    total = (loss.of(type("Values", (), values)) * weight).sum()
    return values, gradients(total, case.leaves)


@pytest.mark.parametrize("uses", [("lse", "target"), DIFFERENTIABLE], ids=("cross-entropy", "all"))
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_float32_head_over_16_bit_tensors(impl, mode, dtype, uses, softcap):
    """Statistics and gradients are those of float32 copies, and gradients have the tensors' own dtypes."""
    payload = {"D2": 10} if "payload" in uses else {}
    case = make(33, 70, 24, dtype=dtype, softcap=softcap, ignore=lambda i: i % 5 == 0, **payload)
    loss = Polynomial(uses)
    options = {"impl": impl, "memory_budget": 7 * 70 * 4}
    values, grads = solved(case, replace(case.head, fp32=True), loss, mode, **options)
    dense_values, dense_grads = float32_solution(case, loss)
    truth, true_grads = case.to(torch.float64).solve(loss)
    for name in uses:
        if "payload" not in uses:  # the payload's own head is not in float32
            assert_no_worse(values[name], dense_values[name], truth[name], what=name)
        assert values[name].dtype == torch.float32
    plain_grads = case.solve(loss)[1]
    for found, dense, true, plain_grad in zip(grads, dense_grads, true_grads, plain_grads, strict=True):
        assert found.dtype == dtype
        assert_no_worse(found, plain_grad if "payload" in uses else dense, true, what="gradient")
    if impl == "chunked" and not payload:
        _, without = solved(case, case.head, loss, mode, **options)
        errors = [
            sum((g.double() - t).norm() for g, t in zip(found, true_grads, strict=True)) for found in (grads, without)
        ]
        assert errors[0] < errors[1], "16-bit products are worse"


def test_float32_products_are_not_those_of_16_bits():
    """Statistics have the precision of float32, which 16-bit products miss a thousandfold."""
    case = make(20, 90, 48, dtype=torch.bfloat16, bias=False)
    truth = case.to(torch.float64).dense()[0]["lse"]
    error = {
        fp32: (vocab_stats(case.tensors["hidden"], replace(case.head, fp32=fp32), case.labels).lse - truth).abs().max()
        for fp32 in (False, True)
    }
    assert error[True] < 2e-6 < 100 * error[True] < error[False]


def test_the_weight_gradient_is_rounded_once():
    """Sums over many chunks of rows are made in float32: each column equals the rounded float32 gradient."""
    case = make(64, 40, 24, dtype=torch.bfloat16, bias=False)
    hidden, weight = case.leaves
    loss = CrossEntropy()
    request = Request(memory_budget=2 * 40 * 4)
    total, _ = stream_loss(loss, hidden, replace(case.head, fp32=True), case.labels, request)
    found = torch.autograd.grad(total, [hidden, weight])
    wide = [t.detach().float().requires_grad_() for t in case.leaves]
    dense = F.cross_entropy(F.linear(*wide), case.labels, reduction="sum")
    for ours, exact, half_ulp in zip(found, torch.autograd.grad(dense, wide), (2**-8, 2**-8), strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=half_ulp * 1.01, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_float32_head_makes_no_float_copy(mode, trained):
    """Neither logits nor a float32 weight: a panel at a time."""
    N, V, D = 120, 640, 24
    case = make(N, V, D, dtype=torch.bfloat16, bias=False).frozen("weight" if trained == "hidden" else "hidden")
    with Allocations() as made:
        solved(case, replace(case.head, fp32=True), Polynomial(), mode, memory_budget=8 * V * 4)
    panel = panels.PANEL_BYTES // 4
    bound = max(8 * V, N * D, panel)  # the buffer of logits, hidden states, a panel
    larger = {shape: count for shape, count in made.shapes.items() if math.prod(shape) > bound}
    assert larger == ({} if trained == "hidden" else {(V, D): 1}), "of the matrix's size there is its gradient alone"
    with Largest() as largest:
        solved(case, replace(case.head, fp32=True), Polynomial(), mode, impl="reference")
    assert largest.numel >= N * V, "the meter works"


def test_float32_head_with_an_adapter_tail_autocast_and_double_backward():
    """The other parts of a head, and the other ways through it, in float32 too."""
    case = make(30, 70, 24, dtype=torch.bfloat16)
    adapter = torch.randn(70, 4).bfloat16().requires_grad_()
    hidden = torch.randn(30, 28).bfloat16().requires_grad_()
    head = replace(case.head, adapter=adapter, fp32=True)
    leaves = [hidden, head.weight, head.bias, adapter]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = F.linear(wide[0], torch.cat([wide[1], wide[3]], 1), wide[2])
    truth = F.cross_entropy(logits, case.labels, reduction="sum")
    expected = torch.autograd.grad(truth, wide, create_graph=True)
    penalty = torch.autograd.grad(expected[0].square().sum(), wide, retain_graph=True)
    loss = CrossEntropy()
    for tail in (0.0, 1e-6):
        request = Request(memory_budget=4 * 70 * 4, tail=tail)
        with torch.autocast("cpu", torch.bfloat16):  # a head in float32 is not cast
            total, _ = stream_loss(loss, hidden, head, case.labels, request)
        torch.testing.assert_close(total.double(), truth, rtol=1e-6, atol=1e-6)
        for found, true in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            assert (found.double() - true).norm() <= 2**-8 * true.norm()
    total, _ = stream_loss(loss, hidden, head, case.labels, Request(memory_budget=4 * 70 * 4))
    first = torch.autograd.grad(total, hidden, create_graph=True)[0]
    for found, true in zip(torch.autograd.grad(first.float().square().sum(), leaves), penalty, strict=True):
        assert (found.double() - true).norm() <= 2**-6 * true.norm()
    rows = map_logits(lambda z: z.logsumexp(-1), hidden, head, memory_budget=4 * 70 * 4)
    logits = F.linear(wide[0], torch.cat([wide[1], wide[3]], 1), wide[2])
    torch.testing.assert_close(rows.double(), logits.logsumexp(-1).detach(), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(rows.sum(), leaves)
    for ours, true in zip(found, torch.autograd.grad(logits.logsumexp(-1).sum(), wide), strict=True):
        assert (ours.double() - true).norm() <= 2**-7 * true.norm()


def test_a_triton_head_is_refused_by_name():
    case = make(3, 40, 24, dtype=torch.bfloat16)
    pytest.importorskip("triton", reason="the backend is refused before it runs, but has to be imported")
    with pytest.raises(ValueError, match=r"impl is 'triton' but the head has fp32=True.*pass impl='chunked'"):
        vocab_stats(case.tensors["hidden"], replace(case.head, fp32=True), case.labels, impl="triton")
