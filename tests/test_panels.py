"""Heads whose matrix is converted panel by panel: float32 products of 16-bit tensors, and quantized matrices.

Each is compared with dense torch over the converted matrix: in float64, or it is no worse than torch in the same
dtype. No panel is larger than its bound, and nothing is as large as the matrix or the logits.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_xent.losses import EMO, CrossEntropy
from hf_xent.losses.reduction import Reduction
from hf_xent.ops import DIFFERENTIABLE, STATISTICS, Head, map_logits, panels, vocab_loss, vocab_stats
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


# ---- rows with factors, and matrices that are stored in another form ------------------------------------------------


class Stored:
    """A matrix that gives rows of float64 tensors, and counts the largest panel."""

    def __init__(self, dense):
        self.dense, self.shape, self.dtype, self.device, self.largest = dense, dense.shape, dense.dtype, dense.device, 0

    def rows(self, start, stop):
        self.largest = max(self.largest, stop - start)
        return self.dense[start:stop].clone()

    def tensors(self):
        return (self.dense,)


@pytest.mark.parametrize("trained", ["all", "gain", "weight"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("way", ["eager", "recompute", "reference", "tail"])
def test_rows_with_factors(way, adapter, trained):
    """gain_j (h . W_j) + b_j: statistics, gradients and second ones equal those of the scaled matrix, in float64."""
    make_leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    tensors = {"hidden": make_leaf(29, 24 + 3 * adapter), "weight": make_leaf(70, 24) / 3, "bias": make_leaf(70)}
    tensors |= {"gain": make_leaf(70)} | ({"adapter": make_leaf(70, 3)} if adapter else {})
    leaves = [x.requires_grad_() for name, x in tensors.items() if trained in ("all", name)]
    matrix = tensors["weight"] * tensors["gain"][:, None]
    if adapter:
        matrix = torch.cat([matrix, tensors["adapter"]], 1)
    case = make(29, 70, 24)
    case = replace(case, tensors={"hidden": tensors["hidden"], "weight": matrix, "bias": tensors["bias"]})
    loss = Polynomial(("lse", "target") if way == "tail" else DIFFERENTIABLE[:-1])
    values, _ = case.dense()
    truth = (loss.of(type("Values", (), values)) * case.weight).sum()
    head = Head(**{name: x for name, x in tensors.items() if name != "hidden"})
    options = {"impl": "reference" if way == "reference" else "chunked", "memory_budget": 7 * 70 * 8}
    if way in ("recompute", "reference"):
        stats = vocab_stats(tensors["hidden"], head, case.labels, outputs=loss.uses, **options)
        total = (loss.of(stats) * case.weight).sum()
    else:
        tail = 1e-9 if way == "tail" else 0.0
        weight = case.weight
        total, stats = vocab_loss(loss, tensors["hidden"], head, case.labels, token_weight=weight, tail=tail, **options)
    for name in loss.uses:
        torch.testing.assert_close(stats.values[name], values[name])
    expected, found = (torch.autograd.grad(x, leaves, create_graph=True) for x in (truth, total))
    torch.testing.assert_close(found, expected)
    plain = torch.autograd.grad(total, leaves, retain_graph=True)
    torch.testing.assert_close(plain, tuple(g.detach() for g in expected))
    again = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in (found, expected)]
    torch.testing.assert_close(*again)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_stored_matrix_is_read_by_panels(impl, mode, gain, softcap):
    """Statistics and the other tensors' gradients equal those of the dense matrix, in float64."""
    case = make(33, 70, 24, softcap=softcap, ignore=lambda i: i % 4 == 0).frozen("weight")
    stored = Stored(case.tensors["weight"])
    factor = torch.randn(70, dtype=torch.float64) if gain else None
    dense = case if factor is None else replace(
        case, tensors=case.tensors | {"weight": case.tensors["weight"] * factor[:, None]})  # fmt: skip
    head = replace(case.head, weight=panels.Panels.of(stored), gain=factor)
    uses = DIFFERENTIABLE[:-1]
    values, grads = solved(case, head, Polynomial(uses), mode, impl=impl, memory_budget=7 * 70 * 8)
    true_values, true_grads = dense.solve(Polynomial(uses))
    for name in uses:
        torch.testing.assert_close(values[name], true_values[name])
    torch.testing.assert_close(grads, true_grads)
    forward_only = vocab_stats(case.tensors["hidden"], head, case.labels, outputs=STATISTICS[:5] + STATISTICS[6:])
    for name in ("top", "rank", "log_sum_sq"):
        torch.testing.assert_close(forward_only.values[name][forward_only.mask], dense.dense()[0][name])
    if impl == "chunked":
        assert stored.largest <= 16


def test_what_a_head_of_panels_can_do():
    """Rows by ids, slices, logits, temperature, dtype, EMO's cosines and double backward."""
    case = make(12, 70, 24).frozen("weight")
    dense, hidden = case.head, case.tensors["hidden"]
    head = replace(dense, weight=panels.Panels.of(Stored(case.tensors["weight"])))
    ids = torch.tensor([[3, 69], [0, 3]])
    torch.testing.assert_close(head[ids].weight, dense[ids].weight)
    torch.testing.assert_close(head[10:30].logits(hidden), dense[10:30].logits(hidden))
    torch.testing.assert_close(head[10:30][5:7].weight.rows(slice(None)), dense.weight[15:17])
    torch.testing.assert_close(head.detach().tempered(0.7).logits(hidden), dense.tempered(0.7).logits(hidden))
    assert head.to(torch.float32).weight.rows(slice(0, 2)).dtype == torch.float32
    assert (head.size, head.features, head.weight.ndim, len(head.weight)) == (70, 24, 2, 70)
    with pytest.raises(ValueError, match="step 2"):
        head[::2]
    tails = [vocab_loss(CrossEntropy(), hidden, h, case.labels, tail=1e-9)[0] for h in (dense, head)]
    torch.testing.assert_close(*(torch.autograd.grad(t, hidden)[0] for t in tails))
    emo = EMO(cost="current", variant="emo2")
    sums = [emo.reduced(hidden, h, case.labels, Request(), Reduction())[0] for h in (dense, head)]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(*(torch.autograd.grad(s, hidden, retain_graph=True)[0] for s in sums))
    first = [torch.autograd.grad(s, hidden, create_graph=True)[0] for s in sums]
    torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), hidden)[0] for g in first))
    rows = [map_logits(lambda z: z.logsumexp(-1), hidden, h, memory_budget=3000).sum() for h in (dense, head)]
    torch.testing.assert_close(*(torch.autograd.grad(r, hidden)[0] for r in rows))
