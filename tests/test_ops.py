"""Floor 0: every backend and gradient mode against dense torch, in values, gradients, memory and error messages."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import reduce
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent.losses import CrossEntropy, linear_cross_entropy
from hf_xent.ops import (
    DIFFERENTIABLE,
    FORWARD_ONLY,
    STATISTICS,
    Head,
    State,
    Stats,
    algebra,
    chunked,
    dense_stats,
    map_logits,
    merge,
    tiles,
    vocab_loss,
    vocab_stats,
)
from hf_xent.ops.algebra import finish
from hf_xent.ops.buffers import Buffers
from hf_xent.ops.matmul import matmul_into
from hf_xent.ops.problem import Problem, pieces
from hf_xent.ops.request import IMPLS, Request, default_budget
from hf_xent.ops.rows import Rows, refuse_capture
from support.oracle import Case, Largest, Polynomial, assert_no_worse, gradients, make

MODES = ("recompute", "eager")
DTYPES = (torch.float64, torch.float32)
LOSSES = (("lse", "target"), ("lse", "target", "mean"), ("entropy", "variance"), DIFFERENTIABLE)
SOFT = {"scale": 0.7, "softcap": 4.0, "payload_scale": 1.3, "payload_softcap": 3.0}


def ours(case: Case, impl: str, loss: Polynomial, mode: str, *, outputs: tuple[str, ...] = (), **options):
    """Statistics and the weighted sum of `loss`, through one of the two doors."""
    asked = tuple(dict.fromkeys((*loss.uses, *outputs)))
    options |= {"impl": impl, "payload": case.payload if "payload" in asked else None}
    hidden = case.tensors["hidden"]
    if mode == "eager":
        total, stats = vocab_loss(
            loss, hidden, case.head, case.labels, token_weight=case.weight, observe=asked, **options
        )
        return stats, total
    stats = vocab_stats(hidden, case.head, case.labels, outputs=asked, **options)
    return stats, (loss.of(stats) * case.weight)[stats.mask].sum()


def verify(case: Case, impl: str, loss: Polynomial, mode: str = "recompute", **options) -> None:
    """Values and every gradient equal dense torch: in float64 exactly, else no worse than torch in the same dtype."""
    stats, total = ours(case, impl, loss, mode, **options)
    grads = gradients(total, case.leaves)
    true_values, true_grads = case.to(torch.float64).solve(loss)
    dtype = case.tensors["hidden"].dtype
    torch_values, torch_grads = (true_values, true_grads) if dtype == torch.float64 else case.solve(loss)
    found = {**{k: v[stats.mask] for k, v in stats.values.items() if k != "loss"}, **dict(enumerate(grads))}
    truth = {**true_values, **dict(enumerate(true_grads))}
    plain = {**torch_values, **dict(enumerate(torch_grads))}
    for name, value in found.items():
        if name in ("top", "rank"):
            assert torch.equal(value, plain[name]), name
        elif dtype == torch.float64:
            torch.testing.assert_close(value, truth[name].to(value.dtype), msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert_no_worse(value, plain[name], truth[name], what=str(name))
    assert all(g.dtype == dtype for g in grads)
    assert not any(v[~stats.mask].any() for v in stats.values.values()), "ignored positions hold 0"


# ---- values and gradients -------------------------------------------------------------------------------------------

SHAPES = {
    "tiles": {"N": 21, "V": 70, "D": 40, "D2": 24},
    "small vocabulary": {"N": 5, "V": 7, "D": 50, "D2": 3},
    "one token": {"N": 1, "V": 40, "D": 20, "D2": 20},
    "no token": {"N": 0, "V": 40, "D": 20, "D2": 20},
    "all ignored": {"N": 6, "V": 40, "D": 20, "D2": 20, "ignore": lambda rows: rows >= 0},
    "half ignored": {"N": 35, "V": 33, "D": 17, "D2": 20, "ignore": lambda rows: rows % 2 == 0},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_statistic_and_gradient(impl, device, mode, dtype, shape):
    """All statistics at once, softcapped heads with bias, several chunks."""
    case = make(**SHAPES[shape], **SOFT, dtype=dtype, device=device)
    verify(case, impl, Polynomial(DIFFERENTIABLE), mode, outputs=STATISTICS, memory_budget=8 * case.head.size * 8)


@pytest.mark.parametrize("uses", LOSSES, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ("plain", "bias", "scale", "softcap"))
def test_every_kind_of_loss_and_head(impl, device, mode, uses, head):
    """What a loss does not use gets no gradient from it; every branch of the head's chain rule."""
    options = {"scale": {"scale": -0.5}, "softcap": SOFT}.get(head, {})
    case = make(19, 37, 18, D2=5 if "payload" in uses else None, bias=head == "bias", device=device, **options)
    verify(case, impl, Polynomial(uses), mode, memory_budget=5 * 37 * 8)


@pytest.mark.parametrize("name", STATISTICS)
def test_one_statistic_alone(impl, device, name):
    """Asked for alone, a statistic is what it is among others, and so is its gradient."""
    case = make(18, 40, 17, D2=3 if name == "payload" else None, device=device)
    uses = (name,) if name in DIFFERENTIABLE else ("lse",)
    verify(case, impl, Polynomial(uses), outputs=(name,))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_one_among_all(impl, device, mode, name):
    """Statistics that are there but unused upstream leave every gradient alone, the payload's too."""
    case = make(9, 35, 6, D2=4, device=device)
    verify(case, impl, Polynomial((name,)), mode, outputs=DIFFERENTIABLE)


@pytest.mark.parametrize("kind", ("plain", "softcap", "payload"))
def test_gradcheck(impl, device, kind):
    """Finite differences in float64 of every differentiable statistic in every trained tensor."""
    case = make(
        3,
        5,
        4,
        D2=2 if kind == "payload" else None,
        bias=kind != "plain",
        device=device,
        **(SOFT if kind != "plain" else {}),
    )
    outputs = DIFFERENTIABLE if kind == "payload" else DIFFERENTIABLE[:-1]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        again = replace(case, tensors=dict(zip(case.tensors, tensors, strict=True)))
        hidden = again.tensors["hidden"]
        stats = vocab_stats(hidden, again.head, case.labels, outputs=outputs, payload=again.payload, impl=impl)
        return tuple(stats.values[name] for name in outputs)

    # the order of atomic sums on a GPU is not fixed: float64 rounding may differ from call to call
    assert torch.autograd.gradcheck(run, tuple(case.tensors.values()), nondet_tol=1e-12)


@pytest.mark.parametrize("trained", ("hidden", "weight", "bias", "payload_hidden", "payload_weight", "payload_bias"))
@pytest.mark.parametrize("mode", MODES)
def test_frozen_tensors(impl, device, mode, trained):
    """One trained tensor: its gradient is right; all others have no gradient."""
    case = make(17, 36, 18, D2=6, device=device, **SOFT)
    case = case.frozen(*(name for name in case.tensors if name != trained))
    verify(case, impl, Polynomial(DIFFERENTIABLE), mode)
    total = ours(case, impl, Polynomial(DIFFERENTIABLE), mode)[1]
    total.backward()
    assert [name for name, t in case.tensors.items() if t.grad is not None] == [trained]


def test_backends_compute_what_is_needed(impl, device, monkeypatch):
    """A backend's backward is told what trains, and returns that and nothing else."""
    case = make(5, 9, 4, D2=3, device=device).frozen("weight", "payload_hidden")
    backend = Request(impl=impl).backend()
    found, backward = [], backend.backward
    monkeypatch.setattr(backend, "backward", lambda *problem: found.append(backward(*problem)) or found[-1])
    gradients(ours(case, impl, Polynomial(DIFFERENTIABLE), "recompute")[1], case.leaves)
    assert [set(out) for out in found] == [{"hidden", "bias", "payload_weight", "payload_bias"}]


def tied(case: Case) -> Case:
    """The same problem with a payload whose head has the very tensors of the first."""
    shared = {f"payload_{name}": case.tensors[name] for name in ("weight", "bias") if name in case.tensors}
    return replace(case, tensors={**case.tensors, **shared})


@pytest.mark.parametrize(
    "frozen", [(), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "payload_hidden")], ids=str
)
@pytest.mark.parametrize("uses", [("payload",), ("lse",), DIFFERENTIABLE], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_payload_with_the_same_head(impl, device, mode, uses, frozen):
    """First and second derivatives of several chunks and panels; both heads add to one gradient."""
    N, V = 9, 50
    case = tied(make(N, V, 6, D2=6, device=device, ignore=lambda rows: rows == 2, **SOFT).frozen(*frozen))
    loss, leaves = Polynomial(uses), list(dict.fromkeys(case.leaves))
    values, weight = case.dense()
    dense = (loss.of(Stats(values, case.labels, weight != 0)) * weight).sum()
    total = ours(case, impl, loss, mode, outputs=("payload",), memory_budget=2 * 4 * V * 8)[1]
    torch.testing.assert_close(gradients(total, leaves, retain_graph=True), gradients(dense, leaves, retain_graph=True))
    first = [torch.autograd.grad(x, leaves, create_graph=True, allow_unused=True) for x in (total, dense)]
    penalties = [sum(g.square().sum() for g in grads if g is not None) for grads in first]
    found, truth = (gradients(penalty, leaves) for penalty in penalties)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_train(impl, device, mode):
    """Frozen throughout, or without grad mode: values, and no graph."""
    case = make(5, 9, 4, device=device)
    frozen = case.frozen(*case.tensors)
    assert not ours(frozen, impl, Polynomial(), mode)[1].requires_grad
    with torch.no_grad():
        total = ours(case, impl, Polynomial(), mode)[1]
    assert not total.requires_grad
    torch.testing.assert_close(total, ours(case, impl, Polynomial(), mode)[1].detach())


def test_shapes_and_strides(impl, device):
    """Labels [B, T], hidden states and a weight that are not contiguous: the same numbers in the labels' shape."""
    case = make(12, 35, 18, device=device)
    hidden, weight = case.tensors["hidden"].detach(), case.tensors["weight"].detach()
    spread = hidden.reshape(3, 4, 18).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = weight.T.contiguous().T.requires_grad_()
    assert not spread.is_contiguous() and not turned.is_contiguous()
    labels = case.labels.reshape(4, 3).T.contiguous().T.reshape(3, 4)
    stats = vocab_stats(spread, Head(turned, case.head.bias), labels, outputs=STATISTICS[:5], impl=impl)
    flat = vocab_stats(case.tensors["hidden"], case.head, labels.reshape(-1), outputs=STATISTICS[:5], impl=impl)
    assert stats.lse.shape == (3, 4)
    for name, value in flat.values.items():
        torch.testing.assert_close(stats.values[name], value.reshape(3, 4))
    found = torch.autograd.grad(stats.nll.sum() + stats.entropy.sum(), (spread, turned))
    wanted = torch.autograd.grad(flat.nll.sum() + flat.entropy.sum(), (case.tensors["hidden"], case.tensors["weight"]))
    torch.testing.assert_close(found[0].reshape(12, 18), wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_transposed_weight_of_more_than_31_bits(impl, device, mode):
    """Strides of D reach past 2^31 elements; of the memory between, no page is ever touched."""
    if device != "cpu" and (impl != "triton" or torch.cuda.mem_get_info()[0] < 6 << 30):
        pytest.skip("other backends leave this to torch" if impl != "triton" else "needs 6 GB of the device's memory")
    N, V, D, stride = 4, 5, 3, 1 << 30
    memory = torch.empty((D - 1) * stride + V, dtype=torch.float16, device=device)
    weight, small = memory.as_strided((V, D), (1, stride)), torch.randn(V, D).half()
    weight.copy_(small)
    hidden, labels = torch.randn(N, D, device=device).half(), torch.randint(V, (N,), device=device)
    found = []
    for matrix in (weight, weight.contiguous()):
        leaves = [hidden.clone().requires_grad_(), matrix.detach().requires_grad_()]
        head = Head(leaves[1])
        if mode == "eager":
            total = CrossEntropy()(leaves[0], head, labels, impl=impl)
        else:
            total = vocab_stats(leaves[0], head, labels, outputs=("lse", "target"), impl=impl).nll.mean()
        found.append([total, *gradients(total, leaves)])
    truth = [hidden.double().requires_grad_(), weight.double().contiguous().requires_grad_()]
    total = F.cross_entropy(truth[0] @ truth[1].T, labels)
    for far, near, true in zip(*found, [total, *torch.autograd.grad(total, truth)], strict=True):
        assert_no_worse(far, near, true)


@pytest.mark.parametrize("mode", MODES)
def test_memory_budget_changes_nothing(impl, device, mode):
    """Chunks of one row give what one chunk gives."""
    case, loss = make(7, 20, 6, D2=3, device=device, **SOFT), Polynomial(DIFFERENTIABLE)
    (one, one_total), (all_, all_total) = (ours(case, impl, loss, mode, memory_budget=b) for b in (1, 1 << 30))
    torch.testing.assert_close(one.values, all_.values)
    torch.testing.assert_close(gradients(one_total, case.leaves), gradients(all_total, case.leaves))


# ---- the eager mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", LOSSES, ids="+".join)
def test_eager_equals_recompute(impl, device, uses):
    """`vocab_loss` is the weighted sum over `vocab_stats`, in value, per-token loss and all gradients."""
    case = make(13, 34, 6, D2=3 if "payload" in uses else None, device=device, ignore=lambda rows: rows % 4 == 1)
    loss = Polynomial(uses)
    (stats, total), (again, again_total) = (ours(case, impl, loss, mode, memory_budget=4 * 34 * 8) for mode in MODES)
    torch.testing.assert_close(again_total, total)
    torch.testing.assert_close(again.loss, loss.of(stats).detach())
    torch.testing.assert_close(gradients(again_total, case.leaves), gradients(total, case.leaves))
    assert not any(value.requires_grad for value in again.values.values())


def test_unreduced(impl, device):
    """Weighted per-token losses in the labels' shape, differentiable with any upstream gradient."""
    case, upstream = make(8, 34, 5, device=device, ignore=lambda rows: rows == 2), torch.randn(8, device=device)
    losses, stats = vocab_loss(
        Polynomial(),
        case.tensors["hidden"],
        case.head,
        case.labels,
        token_weight=case.weight,
        unreduced=True,
        impl=impl,
    )
    again, _ = ours(case, impl, Polynomial(), "recompute")
    wanted = Polynomial().of(again) * case.weight
    torch.testing.assert_close(losses, wanted)
    assert losses[2] == 0 and stats.loss.shape == (8,)
    torch.testing.assert_close(
        gradients((losses * upstream).sum(), case.leaves), gradients((wanted * upstream).sum(), case.leaves)
    )


@pytest.mark.parametrize("head", ({}, {"softcap": 3.0}), ids=("plain", "softcap"))
@pytest.mark.parametrize("mode", MODES)
def test_zero_token_weights(impl, device, mode, head):
    """Tokens of weight 0 are as if they were not there."""
    case = make(18, 34, 6, device=device, **head)
    weight = torch.where(torch.arange(18, device=device) % 3 == 0, 0.0, case.weight)
    fewer = replace(case, labels=torch.where(weight == 0, -100, case.labels))
    found, wanted = (
        gradients(ours(c, impl, Polynomial(), mode)[1], case.leaves) for c in (replace(case, weight=weight), fewer)
    )
    torch.testing.assert_close(found, wanted)
    assert not found[0][weight == 0].any()


def test_token_weight_may_be_a_number(impl, device):
    """A Python number or a 0-d tensor weighs every token."""
    case = make(5, 9, 4, device=device)
    hidden, head, labels = case.tensors["hidden"], case.head, case.labels
    wanted = 0.25 * vocab_loss(Polynomial(), hidden, head, labels, impl=impl)[0]
    for weight in (0.25, torch.tensor(0.25, device=device)):
        found = vocab_loss(Polynomial(), hidden, head, labels, token_weight=weight, impl=impl)[0]
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients(found, case.leaves), gradients(wanted, case.leaves, retain_graph=True))


@pytest.mark.parametrize("uses", ((), ("lse",)), ids=("uses nothing", "detaches"))
def test_constant_loss(impl, device, uses):
    """A loss without a gradient has gradient 0."""

    class Constant(Polynomial):
        def of(self, stats: Stats) -> Tensor:
            return stats.lse.detach()

    case = make(5, 9, 4, device=device)
    total = ours(case, impl, Constant(uses), "eager")[0].loss.sum()
    assert not total.requires_grad
    grads = gradients(ours(case, impl, Constant(uses), "eager")[1], case.leaves)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


# ---- autograd citizenship -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_upstream_gradient_and_retained_graph(impl, device, mode, dtype):
    """Upstream 1/3 scales gradients; a retained graph gives them again; a freed one says so."""
    case, loss = make(6, 34, 5, device=device, dtype=dtype), Polynomial()
    total = ours(case, impl, loss, mode)[1] / 3
    first = [g.clone() for g in gradients(total, case.leaves, retain_graph=True)]
    second = gradients(total, case.leaves)
    atomic = impl == "triton" and device != "cpu"  # sums in an order that is not fixed
    torch.testing.assert_close(second, first, **({} if atomic else {"rtol": 0, "atol": 0}))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(total, case.leaves)
    true = [g / 3 for g in case.to(torch.float64).solve(loss)[1]]
    plain = case.solve(loss)[1]
    for found, dense, truth in zip(first, plain, true, strict=True):
        assert_no_worse(found, dense / 3, truth)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate(impl, device, mode):
    """Two backwards into .grad add up, and no buffer is shared between them."""
    case, loss = make(6, 34, 5, device=device), Polynomial()
    total = ours(case, impl, loss, mode)[1]
    once = gradients(total, case.leaves, retain_graph=True)
    once = [g.clone() for g in once]
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close([t.grad for t in case.leaves], [2 * g for g in once])


@pytest.mark.parametrize("kind", ("plain", "adapter", "everything"))
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(impl, device, mode, kind):
    """Finite differences of every gradient, in every tensor and upstream: one token a chunk, one ignored."""
    if impl == "triton":
        pytest.skip("only first derivatives depend on the backend, and its kernels are slow to interpret")
    options = {**SOFT, "D2": 2} if kind == "everything" else {"bias": False}
    case = make(3, 5, 3, device=device, ignore=lambda rows: rows == 1, **options)
    uses = {"plain": ("lse", "target"), "adapter": ("entropy", "mean"), "everything": DIFFERENTIABLE}[kind]
    tensors = dict(case.tensors)
    if kind == "adapter":
        tensors["adapter"] = torch.randn(5, 1, dtype=torch.float64, device=device, requires_grad=True)
        tensors["hidden"] = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)

    def run(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = dict(zip(tensors, given, strict=True))
        again = replace(case, tensors={name: t for name, t in found.items() if name != "adapter"})
        head, hidden = replace(again.head, adapter=found.get("adapter")), found["hidden"]
        call = {"impl": impl, "payload": again.payload, "memory_budget": 1}
        if mode == "eager":
            loss = Polynomial(uses)
            return vocab_loss(loss, hidden, head, case.labels, token_weight=case.weight, **call)[0]
        stats = vocab_stats(hidden, head, case.labels, outputs=uses, **call)
        return tuple(stats.values[name] for name in uses)

    # the order of atomic sums on a GPU is not fixed: float64 rounding may differ from call to call
    given = tuple(tensors.values())
    assert torch.autograd.gradgradcheck(run, given, atol=1e-4, nondet_tol=1e-12, fast_mode=True)


def small(dtype=torch.float64):
    """Hidden states, a head's weight and labels, and the mean cross-entropy of a weight, dense and ours."""
    hidden, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((5, 3), (7, 3)))
    labels = torch.tensor([0, 6, -100, 2, 2])
    dense = lambda h, w: F.cross_entropy(h @ w.T, labels)  # noqa: E731
    lean = lambda h, w: linear_cross_entropy(h, w, labels, memory_budget=60)  # noqa: E731
    return hidden, weight, dense, lean


def test_gradient_penalty_and_beyond():
    """A penalty on gradients, a penalty on the penalty's, and weights tied to the hidden states."""

    def penalties(loss):
        rows = (hidden * weight[:5].tanh()).sin()  # tied: one tensor on both ways
        total, found = loss(rows, weight), []
        for _ in range(3):
            grads = torch.autograd.grad(total, (hidden, weight), create_graph=True)
            found += grads
            total = total.square() + sum((10 * g).square().sum() for g in grads)
        return found

    hidden, weight, dense, lean = small()
    torch.testing.assert_close(penalties(lean), penalties(dense))


def test_second_derivatives_of_a_sparse_tail_are_exact():
    """Gradients that will be differentiated are not compressed."""
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), 9 * torch.randn(64, 4, dtype=torch.float64)
    hidden, weight, labels = hidden.requires_grad_(), weight.requires_grad_(), torch.arange(6)
    totals = [vocab_loss(CrossEntropy(), hidden, Head(weight), labels, tail=tail)[0] for tail in (0.0, 0.3)]
    totals.append(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    grads = [torch.autograd.grad(total, (hidden, weight), create_graph=True) for total in totals]
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in found), (hidden, weight)) for found in grads]
    for exact, sparse, dense in (grads, seconds):
        torch.testing.assert_close(sparse, exact)
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_stay_lean(mode):
    """No more than a chunk of logits at a time, and the first derivatives of a usual backward are as lean as ever."""
    N, V = 120, 60
    case = make(N, V, 6, dtype=torch.float32)
    with Largest() as largest:
        total = ours(case, "chunked", Polynomial(), mode, memory_budget=20 * V * 4)[1]
        grads = torch.autograd.grad(total, case.leaves, create_graph=True)
        gradients(sum(g.square().sum() for g in grads), case.leaves)
    assert largest.numel <= 20 * V


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_under_autocast(mode):
    """Against torch under the same autocast; mode eager keeps no copy of the head for them."""
    case = make(20, 90, 33, dtype=torch.float32)

    def penalty(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return gradients(sum(g.square().sum() for g in grads), leaves)

    def dense(of: Case) -> Tensor:
        logits = F.linear(of.tensors["hidden"], of.head.weight, of.head.bias)
        return (F.cross_entropy(logits, case.labels, reduction="none") * case.weight).sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = ours(case, "chunked", CrossEntropy(), mode)[1]
        plain = penalty(dense(case), case.leaves)
    if mode == "eager":
        kept = [t for t in total.grad_fn.saved_tensors if t is not None and t.shape == (90, 33)]
        assert {t.dtype for t in kept} == {torch.bfloat16, torch.float32} and len(kept) == 2  # its gradient, the head
    exact = case.to(torch.float64)
    truth = penalty(dense(exact), exact.leaves)
    for found, theirs, true in zip(penalty(total, case.leaves), plain, truth, strict=True):
        assert_no_worse(found, theirs, true)


FUNC = {
    "grad": lambda f, h, w, v: torch.func.grad(f, argnums=(0, 1))(h, w),
    "hessian": lambda f, h, w, v: torch.func.hessian(f)(h, w),
    "jvp": lambda f, h, w, v: torch.func.jvp(f, (h, w), v),
    "vmap of grad over hidden": lambda f, h, w, v: torch.func.vmap(torch.func.grad(f), (0, None))(
        torch.stack([h, 2 * h]), w
    ),
    "forward over reverse": lambda f, h, w, v: torch.func.jvp(torch.func.grad(f, argnums=(0, 1)), (h, w), v)[1],
    "autograd.functional.hvp": lambda f, h, w, v: torch.autograd.functional.hvp(f, (h, w), v),
    "autograd.functional.jvp": lambda f, h, w, v: torch.autograd.functional.jvp(f, (h, w), v),
    "vectorized hessian": lambda f, h, w, v: torch.autograd.functional.hessian(f, (h, w), vectorize=True),
}


FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, by forward mode


@FORWARD_MODE
@pytest.mark.parametrize("name", FUNC)
@pytest.mark.parametrize("door", ("loss", "stats", "map_logits"))
def test_other_ways_to_differentiate(name, door):
    """torch.func, forward mode and torch.autograd.functional give what they give of dense logits."""
    hidden, weight, dense, lean = small()
    if door != "loss":
        dense = lambda h, w: (h @ w.T).logsumexp(-1).sin().sum()  # noqa: E731
    if door == "stats":
        lean = lambda h, w: vocab_stats(h, Head(w), torch.zeros(5, dtype=torch.long)).lse.sin().sum()  # noqa: E731
    if door == "map_logits":
        lean = lambda h, w: map_logits(lambda z: z.logsumexp(-1).sin(), h, Head(w), memory_budget=500).sum()  # noqa: E731
    hidden, weight = hidden.detach(), weight.detach()
    along = (torch.randn_like(hidden), torch.randn_like(weight))
    torch.testing.assert_close(FUNC[name](lean, hidden, weight, along), FUNC[name](dense, hidden, weight, along))


@FORWARD_MODE
@pytest.mark.parametrize("create_graph", (False, True))
def test_batched_gradients_and_dual_numbers(create_graph):
    """`is_grads_batched` and torch.autograd.forward_ad, through the statistics and through a loss."""
    hidden, weight, dense, lean = small()

    def batched(total):
        several = torch.eye(max(1, total.numel()), dtype=total.dtype).reshape(-1, *total.shape) * 3
        options = {"is_grads_batched": True, "create_graph": create_graph}
        grads = torch.autograd.grad(total, (hidden, weight), several, **options)
        return [*grads, *(torch.autograd.grad(grads[0].square().sum(), (hidden, weight)) if create_graph else ())]

    def dual(function):
        with torch.autograd.forward_ad.dual_level():
            first = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
            out = function(first.requires_grad_(create_graph), weight.detach())
            return torch.autograd.forward_ad.unpack_dual(out).tangent.detach()

    torch.testing.assert_close(batched(lean(hidden, weight)), batched(dense(hidden, weight)))
    lse = vocab_stats(hidden, Head(weight), torch.zeros(5, dtype=torch.long)).lse
    torch.testing.assert_close(batched(lse), batched((hidden @ weight.T).logsumexp(-1)))
    torch.testing.assert_close(dual(lean), dual(dense))


# ---- low precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("uses", (("lse", "target"), DIFFERENTIABLE), ids=("cross-entropy", "all"))
def test_low_precision(impl, device, mode, dtype, uses):
    """No worse than plain torch in the dtype, in several chunks."""
    options = SOFT if "payload" in uses else {}
    case = make(48, 150, 40, D2=12 if "payload" in uses else None, dtype=dtype, device=device, **options)
    verify(case, impl, Polynomial(uses), mode, memory_budget=13 * 150 * 2)


@pytest.mark.parametrize("mode", MODES)
def test_float16_with_a_scaled_loss(impl, device, mode):
    """A mean over tokens under a GradScaler: small gradients must not be rounded before the scale reaches them."""
    case, loss = make(32, 200, 24, dtype=torch.float16, device=device), Polynomial()
    case = replace(case, weight=torch.full((32,), 1e-4, device=device))
    found = gradients(ours(case, impl, loss, mode, memory_budget=9 * 200 * 2)[1] * 2.0**12, case.leaves)
    larger = replace(case, weight=case.weight * 2.0**12)
    for ours_, plain, truth in zip(found, larger.solve(loss)[1], larger.to(torch.float64).solve(loss)[1], strict=True):
        assert_no_worse(ours_, plain, truth)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward_inside", (True, False))
def test_autocast(impl, device, mode, backward_inside):
    """Under torch.autocast: F.linear and F.cross_entropy under the same autocast, values and float32 gradients."""
    case = make(20, 90, 33, dtype=torch.float32, device=device)

    class CrossEntropy(Polynomial):
        def of(self, stats: Stats) -> Tensor:
            return stats.nll

    def run(dense: bool) -> tuple[Tensor, list[Tensor]]:
        hidden, head = case.tensors["hidden"], case.head
        with torch.autocast(device, dtype=torch.bfloat16):
            if dense:
                each = F.cross_entropy(F.linear(hidden, head.weight, head.bias), case.labels, reduction="none")
                total = (each * case.weight).sum()
            else:
                total = ours(case, impl, CrossEntropy(), mode, memory_budget=7 * 90 * 2)[1]
            if backward_inside:
                return total, gradients(total, case.leaves)
        return total, gradients(total, case.leaves)

    (total, grads), (plain_total, plain) = run(False), run(True)
    exact = case.to(torch.float64)
    logits = F.linear(exact.tensors["hidden"], exact.head.weight, exact.head.bias)
    true_total = (F.cross_entropy(logits, case.labels, reduction="none") * case.weight).sum()
    assert total.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    assert_no_worse(total, plain_total, true_total, atol=1e-3 * true_total.item())
    for found, dense, truth in zip(grads, plain, gradients(true_total, exact.leaves), strict=True):
        assert_no_worse(found, dense, truth)


# ---- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(impl, device, mode, dtype):
    """Logits of +-1e4: finite, and right."""
    case = make(6, 40, 5, dtype=dtype, device=device)
    large = case.tensors["weight"].detach() * 1e4 / 3
    case = replace(case, tensors={**case.tensors, "weight": large.requires_grad_()})
    stats, total = ours(
        case, impl, Polynomial(("lse", "target", "entropy", "variance", "mean")), mode, outputs=STATISTICS[6:]
    )
    assert stats.lse.abs().max() > 5e3 and stats.target.abs().max() > 5e3
    assert all(torch.isfinite(value).all() for value in stats.values.values())
    values, grads = case.solve(Polynomial(("lse", "target", "entropy", "variance", "mean")))
    for name in ("entropy", "variance", "log_sum_sq"):
        torch.testing.assert_close(stats.values[name], values[name])
    torch.testing.assert_close(gradients(total, case.leaves), grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", (-5e3, 5e3))
def test_shifted_logits(impl, device, mode, shift):
    """A shift of all logits moves lse and target and nothing else; the vocabulary's ragged end has no logit of 0."""
    case = make(19, 45, 6, device=device)
    loss = Polynomial(("entropy", "variance"))
    moved = {**case.tensors, "bias": (case.tensors["bias"].detach() + shift).requires_grad_()}
    moved = replace(case, tensors=moved)
    (stats, total), (far, far_total) = (ours(c, impl, loss, mode) for c in (case, moved))
    torch.testing.assert_close(far.lse, stats.lse + shift)
    torch.testing.assert_close(far.nll, stats.nll)
    torch.testing.assert_close(far_total, total)
    torch.testing.assert_close(gradients(far_total, moved.leaves), gradients(total, case.leaves))


@pytest.mark.parametrize("mode", MODES)
def test_banned_tokens(impl, device, mode):
    """A bias of -inf removes its token from lse, entropy and variance, and gets no gradient."""
    case = make(9, 45, 6, device=device)
    banned = torch.arange(45, device=device) % 3 == 0
    banned |= torch.arange(45, device=device) >= 32  # a whole tile
    keep = ~banned
    labels = keep.nonzero().squeeze(-1)[torch.randint(int(keep.sum()), (9,), device=device)]
    bias = case.tensors["bias"].detach().masked_fill(banned, float("-inf"))
    case = replace(case, labels=labels, tensors={**case.tensors, "bias": bias.requires_grad_()})
    loss = Polynomial(("lse", "target", "entropy", "variance"))
    stats, total = ours(case, impl, loss, mode, outputs=("log_sum_sq", "rank"))
    fewer = {"hidden": case.tensors["hidden"], "weight": case.tensors["weight"][keep], "bias": bias[keep]}
    few = replace(case, tensors=fewer, labels=(keep.cumsum(0) - 1)[labels])
    values = few.dense()[0]
    for name in ("lse", "target", "entropy", "variance", "log_sum_sq", "rank"):
        torch.testing.assert_close(stats.values[name], values[name].detach())
    wanted = gradients((loss.of(Stats(values, few.labels, stats.mask)) * case.weight).sum(), case.leaves)
    torch.testing.assert_close(gradients(total, case.leaves), wanted)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, inside Triton's interpreter
def test_nan_stays_in_its_row(impl, device):
    """A NaN hidden state makes its own token's statistics NaN and nobody else's."""
    case = make(18, 40, 5, D2=3, device=device)
    clean, _ = ours(case, impl, Polynomial(DIFFERENTIABLE), "recompute")
    hidden = case.tensors["hidden"].detach().clone()
    hidden[7, 2] = float("nan")
    stats, _ = ours(
        replace(case, tensors={**case.tensors, "hidden": hidden}), impl, Polynomial(DIFFERENTIABLE), "eager"
    )
    others = torch.arange(18, device=device) != 7
    for name in DIFFERENTIABLE:
        assert stats.values[name][7].isnan(), name
        torch.testing.assert_close(stats.values[name][others], clean.values[name][others].detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(impl, device, dtype):
    """Of equal logits the first is `top`; a copy of the label's row does not outrank it. Integers: logits are exact."""
    hidden = torch.randint(-3, 4, (20, 33), device=device).to(dtype)
    weight = torch.randint(-3, 4, (35, 33), device=device).to(dtype).repeat(2, 1)
    labels = torch.randint(70, (20,), device=device)
    stats = vocab_stats(hidden, Head(weight), labels, outputs=("top", "rank"), impl=impl)
    z = hidden @ weight[:35].T
    assert torch.equal(stats.top, z.argmax(-1))
    assert torch.equal(stats.rank, 2 * (z > z.gather(1, labels[:, None] % 35)).sum(-1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", (1, 511, 1023, 1024, 1025, 3 * 512 + 7))
def test_argmax_by_blocks(size, dtype):
    """The maximum and its first column, as torch's argmax: ties within and across blocks, NaN, rows of -inf."""
    z = torch.randint(-3, 4, (64, size)).to(dtype)
    z[0], z[1, size // 2], z[2, -1], z[3] = -torch.inf, torch.nan, 9.0, 5.0
    m, top = tiles._argmax(z)
    assert torch.equal(top, z.argmax(-1))
    assert torch.equal(m.nan_to_num(nan=99.0), z.amax(-1).nan_to_num(nan=99.0))


def test_a_long_row_is_summed_precisely():
    """Gemma's vocabulary in float32: torch's softmax alone, which sums in order, errs ten times as much."""
    hidden, weight = torch.randn(4, 3), torch.randn(262144, 3) * 0.1
    exact = vocab_stats(hidden.double(), Head(weight.double()), torch.arange(4), outputs=("lse",), impl="reference").lse
    found = vocab_stats(hidden, Head(weight), torch.arange(4), outputs=("lse",), impl="chunked").lse
    assert (found - exact).abs().max() < 4e-6


def test_rows_of_extreme_logits():
    """Labels whose probability underflows, and a logit that leaves nothing to the others."""
    weight = torch.tensor([[200.0], [0.0], [-200.0]])
    hidden = torch.tensor([[1.0], [1.0], [-1.0], [0.0]])
    labels = torch.tensor([2, 0, 0, 1])
    nll = vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target"), impl="chunked").nll
    torch.testing.assert_close(nll, torch.tensor([400.0, 0.0, 400.0, 1.0986123]))


# ---- the monoid -----------------------------------------------------------------------------------------------------


def fold(z: Tensor, pay: Tensor, target: Tensor, first: int) -> State:
    """The state of some columns of logits, from its definition."""
    m = z.amax(-1) if z.shape[1] else z.new_full(z.shape[:1], float("-inf"))
    u = z - m[:, None]
    e = u.exp()
    top = z.argmax(-1) + first if z.shape[1] else target.long() * 0
    moments = {"s1": (e * u).sum(-1), "s2": (e * u * u).sum(-1), "sp": (e * pay).sum(-1), "sq": (e * e).sum(-1)}
    return State(m=m, l=e.sum(-1), sz=z.sum(-1), top=top, rank=(z > target[:, None]).sum(-1), **moments)


def same(x: State, y: State) -> None:
    for f in fields(State):
        torch.testing.assert_close(getattr(x, f.name), getattr(y, f.name), msg=lambda m, f=f: f"{f.name}: {m}")


def parts() -> tuple[State, list[State], Tensor]:
    """A row-block's state, its states over ragged parts (one of them empty, one far below), and the target logits."""
    z, pay = 3 * torch.randn(6, 20, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    z[:, 5:9] -= 800
    z[0, 3] = z[0, 15] = 30.0  # a tie of the maximum across parts
    target, cuts = z[:, 12].clone(), (0, 5, 9, 9, 17, 20)
    pieces = [fold(z[:, a:b], pay[:, a:b], target, a) for a, b in pairwise(cuts)]
    return fold(z, pay, target, 0), pieces, target


def test_merge_folds_the_row():
    """Parts fold to the whole in every bracketing; the first of tied maxima wins."""
    whole, pieces, target = parts()
    same(reduce(merge, pieces), whole)
    same(reduce(lambda right, left: merge(left, right), reversed(pieces)), whole)
    assert whole.top[0] == 3
    for name, value in finish(reduce(merge, pieces), target, 20).items():
        assert torch.isfinite(value).all(), name


def test_merge_is_associative_with_identity():
    """(x y) z = x (y z); an empty part changes nothing on either side, nor meets itself badly."""
    _, (x, y, empty, z, _), _ = parts()
    same(merge(merge(x, y), z), merge(x, merge(y, z)))
    for state in (merge(x, empty), merge(empty, x)):
        same(state, x)
    assert merge(empty, empty).l.eq(0).all() and merge(empty, empty).m.eq(float("-inf")).all()


def test_splits_fold_in_order():
    """The streaming backend's tree over 8 splits, some empty: the row's state, and the first of tied maxima."""
    streaming = pytest.importorskip("hf_xent.ops.gpu.streaming", reason="Triton is not installed")
    whole, pieces, _ = parts()
    splits = [*pieces, pieces[2], pieces[2], pieces[2]]
    stacked = {f.name: torch.stack([getattr(state, f.name) for state in splits]) for f in fields(State)}
    same(streaming._fold(State(**stacked)), whole)


def test_merge_keeps_what_both_sides_have():
    """A moment one side did not compute is not invented."""
    _, (x, y, *_), _ = parts()
    bare = State(m=x.m, l=x.l)
    assert merge(bare, y).s1 is None and merge(y, bare).top is None


# ---- full rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", (None, 1))
@pytest.mark.parametrize("rows", (7, 0))
def test_map_logits(device, rows, budget):
    """A function of full rows, with per-row tensors and a closure that all get gradients."""
    case = make(rows, 30, 5, device=device, scale=0.5, softcap=5.0)
    extra = torch.randn(rows, 30, dtype=torch.float64, device=device, requires_grad=True)
    temperature = torch.tensor(1.7, dtype=torch.float64, device=device, requires_grad=True)

    def divergence(z: Tensor, other: Tensor, labels: Tensor) -> Tensor:
        p, q = (z / temperature).softmax(-1), other.softmax(-1)
        return (p - q).abs().sum(-1) - z.gather(-1, labels[:, None]).squeeze(-1)

    leaves = [*case.leaves, extra, temperature]
    found = map_logits(divergence, case.tensors["hidden"], case.head, extra, case.labels, memory_budget=budget)
    wanted = divergence(case.head.logits(case.tensors["hidden"]), extra, case.labels)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found.square().sum(), leaves), gradients(wanted.square().sum(), leaves))


# ---- other people's answers -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="F.linear_cross_entropy came with torch 2.13")
@pytest.mark.parametrize("mode", MODES)
def test_torch_linear_cross_entropy(impl, device, mode):
    """Torch's own fused loss, with label smoothing, is one line over the statistics."""

    class Smoothed(Polynomial):
        def of(self, stats: Stats) -> Tensor:
            return 0.9 * stats.nll + 0.1 * (stats.lse - stats.mean)

    case = make(20, 70, 18, device=device, ignore=lambda rows: rows % 5 == 0)
    case = replace(case, weight=torch.ones(20, device=device))
    found = ours(case, impl, Smoothed(("lse", "target", "mean")), mode)[1]
    hidden, head = case.tensors["hidden"], case.head
    wanted = F.linear_cross_entropy(
        hidden, head.weight, case.labels, linear_bias=head.bias, reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, case.leaves), gradients(wanted, case.leaves))


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", (("lse", "target"), DIFFERENTIABLE), ids=("cross-entropy", "all"))
@pytest.mark.parametrize("mode", MODES)
def test_no_logits_are_ever_allocated(impl, device, mode, uses):
    """Forward and backward stay below N V elements; the dense backend shows that the meter works."""
    N, V = 120, 64  # rows of a GPU's buffer are not padded then
    case = make(N, V, 6, D2=3 if "payload" in uses else None, dtype=torch.float32, device=device)
    with Largest() as largest:
        total = ours(case, impl, Polynomial(uses), mode, outputs=FORWARD_ONLY, memory_budget=20 * V * 4)[1]
        gradients(total, case.leaves)
    assert (largest.numel >= N * V) == (impl == "reference"), largest.numel
    if impl == "chunked":
        assert largest.numel <= 20 * V
    if impl == "triton":
        assert largest.numel <= max(N * 6, V * 6, 2 * N)  # gradients, and the states of two splits


def test_default_budget_grows_with_the_head():
    """Half a byte a number, and at least what keeps a matmul busy; on a GPU one budget, and at most 32 chunks."""
    small, large = (Head(torch.empty(rows, 1024, device="meta")) for rows in (100, 1 << 20))
    assert default_budget(small, 8192, 4) == default_budget(large, 64, 4) == 395_000_000
    assert default_budget(large, 8192, 4) == 8192 // 32 * (1 << 20) * 4
    wide, narrow = (Head(torch.zeros(1, 1).expand(1 << 20, D)) for D in (4096, 512))
    for tokens in (0, 64, 1 << 20):  # on a CPU they change nothing
        assert default_budget(wide, tokens, 4) == (1 << 20) * 4096 * 4 // 8
        assert default_budget(narrow, tokens, 4) == 256 * (1 << 20) * 4
        assert default_budget(Head(torch.zeros(2, 2)), tokens, 4) == 24 << 20


def planned(N, V, D, *, dtype=torch.bfloat16, device="meta", payload=False, budget=None):
    """The problem of a call with the default budget, on a device that holds no numbers."""
    hidden, weight = torch.empty(N, D, dtype=dtype, device=device), torch.empty(V, D, dtype=dtype, device=device)
    head, labels = Head(weight), torch.empty(N, dtype=torch.int64, device=device)
    budget = Request(memory_budget=budget).budget(head, N, dtype.itemsize * (2 if payload else 1))
    second = (hidden, head) if payload else None
    return Problem(hidden, head, labels, frozenset({"lse", "target"}), second, memory_budget=budget)


PLANS = {  # N, V, D: rows of all chunks but the last
    (8192, 256000, 2304): 768,
    (16384, 248320, 2048): 768,
    (8192, 151936, 2048): 1280,
    (8192, 128256, 4096): 1408,
    (16383, 248320, 2048): 768,
    (200_000, 50257, 768): 6272,
    (3000, 262144, 1152): 640,
    (1500, 262144, 1152): 640,
    (300, 262144, 1152): 300,
}


@pytest.mark.parametrize("shape", PLANS, ids=str)
@pytest.mark.parametrize("payload", [False, True])
def test_chunks_on_a_gpu_are_whole_tiles_and_never_too_many(shape, payload):
    """One visit of the logits, and at most a thirty-second of them, or 400 MB, in memory."""
    N, V, D = shape
    problem = planned(N, V, D, payload=payload)
    heights = [rows.stop - rows.start for rows in problem.rows()]
    assert sum(heights) == N and len(heights) <= chunked.GPU_LOW_PRECISION_SUMS
    assert all(height % 128 == 0 for height in heights[:-1]) and set(heights[:-1]) <= {heights[0]}
    assert payload or heights[0] == PLANS[shape]
    part = -(-N // (32 * 128)) * 128
    assert max(heights) * V * 2 * (1 + payload) <= max(4e8, part * V * 2 * (1 + payload))


def test_rows_of_a_gpu_are_padded_where_its_loads_need_it():
    """GPT-2's 50257 columns take rows of 50304; multiples of 16 stay as they are, and so does all on a CPU."""
    for V, stride in ((50257, 50304), (50400, 50400), (131, 192), (48, 48)):
        problem = planned(300, V, 8, payload=True, budget=200 * V * 4)
        rows = problem.rows()
        assert len(rows) == 3
        for part in rows:
            for z in Buffers(problem, rows).load(part):
                assert z.shape == (part.stop - part.start, V) and z.stride() == (stride, 1)
    panels = planned(300, 777, 8, budget=300 * 300 * 2)
    tiles = [
        Buffers(panels, [slice(0, 300)], panels.columns()).load(slice(0, 300), cols)[0] for cols in panels.columns()
    ]
    assert [(*z.shape, *z.stride()) for z in tiles] == [(300, 256, 256, 1)] * 3 + [(300, 9, 256, 1)]
    on_cpu = planned(6, 131, 8, device="cpu", payload=True)
    assert all(z.is_contiguous() for z in Buffers(on_cpu, on_cpu.rows()).load(slice(0, 6)))


@pytest.mark.parametrize("uses", LOSSES, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("head", ("plain", "bias", "softcap"))
def test_padded_rows_change_nothing(monkeypatch, device, mode, dtype, uses, head):
    """What lies between the rows is NaN, and comes into no number."""
    monkeypatch.setattr(Buffers, "_stride", lambda self, width: width + 27)
    payload = 5 if "payload" in uses else None
    case = make(
        19, 37, 18, D2=payload, bias=head == "bias", dtype=dtype, device=device, **(SOFT if head == "softcap" else {})
    )
    verify(case, "chunked", Polynomial(uses), mode, memory_budget=5 * 37 * dtype.itemsize)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ((7, 300, 5), (128, 64, 33)), ids=str)
def test_products_for_a_wider_sum(device, dtype, shape):
    """On a GPU they are not rounded to 16 bits on the way, on a CPU they are what they were."""
    n, inner, m = shape
    x, y = (torch.randn(*size, device=device).to(dtype) for size in ((inner, n), (inner, m)))
    for left in (x.T, x.T.contiguous()):
        total = torch.full((n, m), float("nan"), device=device)
        matmul_into(total, left, y, first=True)
        matmul_into(total, left, y, first=False)
        exact, rounded = 2 * (left.double() @ y.double()), 2 * (left @ y).float()
        if device == "cpu":
            assert torch.equal(total, rounded)
        else:
            assert (total - exact).norm() < 0.05 * (rounded - exact).norm()


def test_pieces():
    """Few, about equal and multiples of 16 where that fits; with tiles, whole tiles above all."""
    lengths = lambda *plan: [part.stop - part.start for part in pieces(*plan)]  # noqa: E731
    assert lengths(100, 40) == [34, 34, 32]
    assert lengths(100, 48) == [48, 48, 4] and lengths(0, 5) == [] and lengths(7, 1) == [1] * 7
    assert lengths(1000, 300, 128) == [256, 256, 256, 232]  # not 250 each
    assert lengths(1000, 600, 128) == [512, 488]
    assert lengths(1000, 1000, 128) == [1000] and lengths(1000, 2000, 128) == [1000]
    assert lengths(1000, 100, 128) == lengths(1000, 100)  # not even one tile fits
    assert lengths(1000, 130, 128) == [128] * 7 + [104]


def test_plans_on_a_cpu_know_no_tiles():
    """The same chunks as ever: multiples of 16 at best."""
    problem = planned(1000, 50, 4, dtype=torch.float32, device="cpu", budget=300 * 50 * 4)
    assert problem.rows() == pieces(1000, 300) and problem.rows()[0].stop == 256
    problem = planned(1000, 50, 4, dtype=torch.float32, device="cpu", budget=250 * 50 * 4)
    assert problem.rows()[0].stop == 250


# ---- Stats ----------------------------------------------------------------------------------------------------------


def test_stats_are_what_was_asked_for():
    """Names, derived values, shape, printing; what was not computed says how to ask for it."""
    case = make(6, 9, 4, ignore=lambda rows: rows == 1)
    stats = vocab_stats(case.tensors["hidden"], case.head, case.labels, outputs=("top",))
    assert set(stats.values) == {"lse", "target", "top"}
    torch.testing.assert_close(stats.logp, -stats.nll)
    assert torch.equal(stats.is_top1, (stats.top == case.labels) & (case.labels >= 0)) and stats.mask.sum() == 5
    square = stats.reshape(2, 3)
    assert square.lse.shape == square.mask.shape == square.labels.shape == (2, 3)
    assert stats.lse.requires_grad and not stats.detach().lse.requires_grad
    assert repr(square) == f"Stats({', '.join(stats.values)}; shape=(2, 3), tokens=5)"
    with pytest.raises(AttributeError, match=r"entropy was not computed: ask for it with outputs=\('entropy', ...\)"):
        _ = stats.entropy
    with pytest.raises(AttributeError, match=r"Stats has no 'perplexity'; statistics are lse, target, .*log_sum_sq"):
        _ = stats.perplexity


# ---- errors ---------------------------------------------------------------------------------------------------------


def arguments(**changes) -> dict:
    """Good arguments of vocab_stats, but for the changes."""
    good = {"hidden": torch.randn(4, 3), "head": Head(torch.randn(7, 3)), "labels": torch.tensor([0, 6, -100, 2])}
    return good | changes


def second(*shape: int, vocabulary: int = 7, device: str = "cpu") -> dict:
    """A payload with hidden states of this shape and a head of hidden size 2."""
    return {"payload": (torch.randn(*shape, device=device), Head(torch.randn(vocabulary, 2, device=device)))}


PAYLOAD = {"outputs": ("payload",)}
WRONG = {
    "labels shape": (
        {"labels": torch.zeros(5).long()},
        r"labels has shape \(5,\) but hidden \(4, 3\): pass one label per row of hidden, \(4,\)",
    ),
    "labels too high": (
        {"labels": torch.tensor([0, 1, 7, 2])},
        r"labels range over \[0, 7\] but the head has 7 tokens: pass ids in \[0, 6\], or ignore_index=-100",
    ),
    "labels too low": (
        {"labels": torch.tensor([0, 1, -1, 2])},
        r"labels range over \[-1, 2\] but the head has 7 tokens: pass ids in \[0, 6\]",
    ),
    "labels float": ({"labels": torch.zeros(4)}, "labels is torch.float32: pass token ids as int64"),
    "labels bool": ({"labels": torch.zeros(4).bool()}, "labels is torch.bool: pass token ids as int64"),
    "labels device": (
        {"labels": torch.zeros(4, device="meta").long()},
        "labels is on meta but hidden on cpu: move one of them",
    ),
    "labels list": ({"labels": [0, 1, 2, 3]}, "labels is a list: pass a tensor of token ids"),
    "labels complex": ({"labels": torch.zeros(4, dtype=torch.cfloat)}, "labels is torch.complex64: pass token ids"),
    "labels uint8 too high": (
        {"labels": torch.tensor([0, 1, 156, 2], dtype=torch.uint8)},
        r"labels range over \[0, 156\] but the head has 7 tokens: pass ids in \[0, 6\]",
    ),
    "ignore_index": ({"ignore_index": None}, "ignore_index is None: pass an integer, such as -100"),
    "ignore_index float": ({"ignore_index": 0.5}, "ignore_index is 0.5: pass an integer"),
    "hidden integers": (
        {"hidden": torch.ones(4, 3).long(), "head": Head(torch.ones(7, 3).long())},
        "hidden is torch.int64: pass one of torch.float16, torch.bfloat16, torch.float32, torch.float64",
    ),
    "scale": ({"head": Head(torch.randn(7, 3), scale=float("nan"))}, "scale is nan: pass a finite number"),
    "softcap infinite": ({"head": Head(torch.randn(7, 3), softcap=float("inf"))}, "softcap is inf: pass a finite"),
    "adapter shape": (
        {"head": Head(torch.randn(7, 2), adapter=torch.randn(6, 1))},
        r"adapter has shape \(6, 1\): pass a row per row of weight, \[7, rank\]",
    ),
    "bias device": (
        {"head": Head(torch.randn(7, 3), torch.randn(7, device="meta"))},
        "bias is on meta but weight on cpu: move one of them",
    ),
    "weight shape": (
        {"head": Head(torch.randn(7))},
        r"weight has shape \(7,\): a head needs a non-empty \[vocabulary, hidden\] matrix \(gather a sharded weight",
    ),
    "weight empty": ({"head": Head(torch.randn(0, 3))}, r"weight has shape \(0, 3\): a head needs a non-empty"),
    "bias shape": (
        {"head": Head(torch.randn(7, 3), torch.randn(3))},
        r"bias has shape \(3,\): pass one value per row of weight, \[7\]",
    ),
    "bias dtype": (
        {"head": Head(torch.randn(7, 3), torch.randn(7).double())},
        "bias is torch.float64 but weight torch.float32: cast one of them, or use torch.autocast",
    ),
    "softcap": ({"head": Head(torch.randn(7, 3), softcap=0)}, "softcap is 0: pass None for a head without a softcap"),
    "hidden size": (
        {"hidden": torch.randn(4, 5)},
        r"hidden has shape \(4, 5\): its last dimension must be the head's hidden size, 3",
    ),
    "hidden scalar": (
        {"hidden": torch.randn(()), "labels": torch.tensor(0)},
        r"hidden has shape \(\): its last dimension must be the head's hidden size, 3",
    ),
    "device": (
        {"hidden": torch.randn(4, 3, device="meta")},
        "hidden is on meta but weight on cpu: move one of them",
    ),
    "dtype": (
        {"hidden": torch.randn(4, 3).double()},
        "hidden is torch.float64 but weight torch.float32: cast one of them, or use torch.autocast",
    ),
    "impl": (
        {"impl": "cuda"},
        r"impl is 'cuda': choose one of reference, chunked, triton \(argument impl, or HF_XENT_IMPL\)",
    ),
    "statistic": (
        {"outputs": ("lse", "perplexity")},
        "outputs has 'perplexity': choose among lse, target, mean, entropy, variance, payload, top, rank, log_sum_sq",
    ),
    "budget": ({"memory_budget": 0}, "memory_budget is 0: pass a positive number of bytes"),
    "budget nan": ({"memory_budget": float("nan")}, "memory_budget is nan: pass a positive number of bytes"),
    "budget text": ({"memory_budget": "1GB"}, "memory_budget is '1GB': pass a positive number of bytes"),
    "payload alone": (
        second(4, 2),
        r"outputs with 'payload' and the argument payload=\(hidden, head\) belong together: pass both or neither",
    ),
    "payload missing": (
        PAYLOAD,
        r"outputs with 'payload' and the argument payload=\(hidden, head\) belong together: pass both or neither",
    ),
    "payload vocabulary": (
        PAYLOAD | second(4, 2, vocabulary=8),
        "payload's head has 8 tokens but the head 7: both need the same vocabulary",
    ),
    "payload rows": (
        PAYLOAD | second(3, 2),
        r"a per-token tensor has shape \(3, 2\): its rows must be shaped like labels, \(4,\)",
    ),
    "payload size": (
        PAYLOAD | second(4, 9),
        r"hidden has shape \(4, 9\): its last dimension must be the head's hidden size, 2",
    ),
    "payload device": (
        PAYLOAD | second(4, 2, device="meta"),
        "payload is on meta but hidden on cpu: move one of them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_argument_value_and_remedy(name):
    """Every refusal is one ValueError that says what was passed and what to do."""
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        vocab_stats(**arguments(**changes))


def test_errors_of_the_other_doors():
    """Token weights of another shape, and heads that do not fit in map_logits."""
    with pytest.raises(
        ValueError, match=r"a per-token tensor has shape \(3,\): its rows must be shaped like labels, \(4,\)"
    ):
        vocab_loss(Polynomial(), **arguments(), token_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"hidden has shape \(4, 5\)"):
        map_logits(lambda z: z, torch.randn(4, 5), Head(torch.randn(7, 3)))

    with pytest.raises(ValueError, match=r"labels has shape \(4,\) but logits \(5, 7\)"):
        dense_stats(torch.randn(5, 7), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"labels range over \[0, 9\] but the head has 7 tokens"):
        dense_stats(torch.randn(2, 7), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="outputs has 'payload': choose among lse"):
        dense_stats(torch.randn(2, 7), torch.tensor([0, 1]), outputs=("payload",))
    with pytest.raises(
        ValueError, match=r"class_weight has shape \(6,\) on cpu: pass one number per row of weight, \[7\]"
    ):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(7, 3), torch.zeros(2).long(), class_weight=torch.ones(6))
    with pytest.raises(ValueError, match="memory_budget is -1: pass a positive number of bytes"):
        map_logits(lambda z: z, torch.randn(4, 3), Head(torch.randn(7, 3)), memory_budget=-1)
    for tail in (-0.1, 1, float("nan"), True, "1e-3"):
        with pytest.raises(ValueError, match=rf"tail is {tail!r}: pass a relative error in \[0, 1\)"):
            vocab_loss(Polynomial(), **arguments(), tail=tail)
    with pytest.raises(ValueError, match=r"labels is batched by torch.vmap"):
        torch.func.vmap(lambda h, y: linear_cross_entropy(h, torch.ones(7, 3), y))(
            torch.randn(2, 4, 3), torch.zeros(2, 4).long()
        )
    message = r"hidden is torch\.float64 but weight torch\.float32: cast one of them$"
    with torch.autocast("cpu"), pytest.raises(ValueError, match=message):
        vocab_stats(**arguments(hidden=torch.randn(4, 3).double()))


@pytest.mark.parametrize("ignore", [(), (0, 3), (5,), range(6)], ids=str)
def test_labels_are_read_on_the_host_once(device, monkeypatch, ignore):
    """Which labels are valid, and their range, in one transfer; ids outside of the vocabulary are refused."""
    labels = torch.tensor([4, 0, 6, 2, 6, 1], device=device)
    labels[list(ignore)] = -100
    hidden, head = torch.arange(6.0, device=device)[:, None], Head(torch.ones(7, 1, device=device))
    looks = []
    for name in ("tolist", "item", "nonzero", "__int__", "__bool__", "__index__", "__float__"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, real=real, name=name: looks.append(name) or real(x))
    rows = Rows(hidden, head, labels, -100)
    monkeypatch.undo()
    assert looks == ["tolist"]
    kept = [i for i in range(6) if i not in ignore]
    assert rows.hidden.flatten().tolist() == kept and (rows.index is None) == (not ignore)
    assert rows.flat.tolist() == labels[kept].tolist()
    for wrong in (7, -1):
        labels[1] = wrong
        found = rf"\[{labels[labels != -100].min()}, {labels.max()}\]"
        message = rf"labels range over {found} but the head has 7 tokens: pass ids in \[0, 6\], or ignore_index=-100"
        with pytest.raises(ValueError, match=message):
            Rows(hidden, head, labels, -100)


def test_a_graph_is_not_captured(monkeypatch):
    """The host reads the labels: one error that says so, in place of CUDA's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    vocab_stats(**arguments())  # nothing is captured on a CPU
    with pytest.raises(RuntimeError, match="read on the host: capture the model up to its hidden states"):
        refuse_capture(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture(torch.device("cuda"))


def test_a_capture_is_refused_and_leaves_the_device_usable(gpu):
    hidden, head = torch.randn(4, 3, device=gpu), Head(torch.randn(7, 3, device=gpu))
    labels = torch.zeros(4, dtype=torch.int64, device=gpu)
    want = F.cross_entropy(hidden @ head.weight.T, labels)
    for call in (
        lambda: vocab_loss(CrossEntropy(), hidden, head, labels),
        lambda: dense_stats(hidden @ head.weight.T, labels),
    ):
        with pytest.raises(RuntimeError, match="read on the host"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros_like(hidden)  # a graph that records nothing warns
            call()
        torch.testing.assert_close(vocab_stats(hidden, head, labels).nll.mean(), want)


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_dtype(dtype):
    """What the labels mean depends on their values alone: no id is taken for ignore_index, none is lost."""
    hidden, weight = torch.randn(6, 8), torch.randn(256, 8)
    labels = torch.tensor([156, 3, 255, 200, 0, 156] if dtype not in (torch.int8,) else [-100, 3, 127, 100, 0, -100])
    narrow = labels.to(dtype)
    assert torch.equal(narrow.long(), labels)
    wanted = F.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, narrow), wanted)
    stats, logits = vocab_stats(hidden, Head(weight), narrow), hidden @ weight.T
    assert torch.equal(stats.mask, labels != -100)
    torch.testing.assert_close(dense_stats(logits, narrow).nll, stats.nll)
    class_weight = torch.rand(256)
    found = linear_cross_entropy(hidden, weight, narrow, class_weight=class_weight)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, class_weight))
    kept = labels >= 0  # and an ignore_index that the dtype can hold
    found = linear_cross_entropy(hidden[kept], weight, labels[kept].to(dtype), ignore_index=3)
    torch.testing.assert_close(found, F.cross_entropy(logits[kept], labels[kept], ignore_index=3))


@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("parts", ((), ("bias",), ("adapter",), ("bias", "adapter")), ids="+".join)
def test_heads_of_some_tokens_tempered_and_detached(parts, softcap):
    """Each is still all of the head, bias, adapter, scale and softcap: logits and gradients against a formula."""
    shapes = {"weight": (9, 4), "bias": (9,), "adapter": (9, 2)}
    tensors = {name: torch.randn(*shapes[name]).requires_grad_() for name in ("weight", *parts)}
    hidden = torch.randn(5, 6 if "adapter" in parts else 4, requires_grad=True)
    head, leaves = Head(**tensors, scale=0.7, softcap=softcap), [hidden, *tensors.values()]

    def dense(temperature: float = 1.0) -> Tensor:
        matrix = torch.cat([tensors[name] for name in ("weight", "adapter") if name in tensors], 1)
        z = 0.7 * (hidden @ matrix.T + tensors.get("bias", torch.zeros(9)))
        return (z if softcap is None else softcap * (z / softcap).tanh()) / temperature

    def compare(logits: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(logits, expected)
        totals = (logits.square().sum(), expected.square().sum())
        for got, want in zip(*(torch.autograd.grad(x, leaves) for x in totals), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    for tokens in (torch.tensor([3, 0, 3]), slice(2, 5)):
        compare(head[tokens].logits(hidden), dense()[:, tokens])
        compare(head.tempered(2.5)[tokens].logits(hidden), dense(2.5)[:, tokens])
    for temperature in (0.5, 2.5):
        compare(head.tempered(temperature).logits(hidden), dense(temperature))
    compare(head.joined().logits(hidden), dense())
    for frozen in (head.detach(), head.tempered(2.0).detach(), head.detach().tempered(2.0)[1:4]):
        assert not any(getattr(frozen, name).requires_grad for name in tensors)
        assert not frozen.logits(hidden.detach()).requires_grad
    torch.testing.assert_close(head.detach().logits(hidden), dense())
    doubled = head.to(torch.float64)
    assert all(getattr(doubled, name).dtype == torch.float64 for name in tensors)
    torch.testing.assert_close(doubled.logits(hidden.double()), dense().double(), atol=1e-5, rtol=1e-5)
    for changed in (head[1:3], head.tempered(2.0), head.detach(), head.to(torch.float64)):
        assert {name for name in shapes if getattr(changed, name) is not None} == set(tensors)


def test_impl_from_the_environment(monkeypatch):
    """HF_XENT_IMPL chooses the backend; the argument wins over it."""
    monkeypatch.setenv("HF_XENT_IMPL", "torch")
    with pytest.raises(ValueError, match="impl is 'torch'"):
        vocab_stats(**arguments())
    by_name = [
        vocab_stats(**arguments(hidden=torch.ones(4, 3), head=Head(torch.eye(7, 3))), impl=impl).lse
        for impl in IMPLS[:2]
    ]
    torch.testing.assert_close(*by_name)


def test_other_ignore_index(impl, device):
    """Any id can mean 'no label', also one inside the vocabulary."""
    case = make(6, 9, 4, device=device)
    case = replace(case, labels=torch.tensor([0, 1, 2, 0, 4, 8], device=device))
    stats = vocab_stats(case.tensors["hidden"], case.head, case.labels, ignore_index=0, impl=impl)
    values = case.dense(ignore_index=0)[0]
    torch.testing.assert_close(stats.nll[stats.mask], values["lse"] - values["target"])
    assert stats.mask.tolist() == [False, True, True, False, True, True] and not stats.lse[~stats.mask].any()


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms, set back after the test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("mode", MODES)
def test_sums_in_no_fixed_order_are_refused_if_torch_is_told_to(impl, device, mode, deterministic):
    """impl='triton' raises where it computes gradients, or warns with warn_only; its statistics have a fixed order."""
    if impl != "triton" and device != "cpu":
        pytest.skip("cuBLAS asks for an environment variable at its start: test_deterministic_algorithms_on_a_gpu")
    case = make(5, 9, 4, device=device)
    deterministic(True)
    if impl == "triton":
        with pytest.raises(RuntimeError, match="impl is 'triton', whose gradients are summed in no fixed order"):
            gradients(ours(case, impl, Polynomial(), mode)[1], case.leaves)
        with torch.no_grad():
            vocab_stats(case.tensors["hidden"], case.head, case.labels, impl=impl)
        deterministic(True, warn_only=True)
        with pytest.warns(UserWarning, match="choose impl='chunked', or set it with warn_only=True"):
            found = gradients(ours(case, impl, Polynomial(), mode)[1], case.leaves)
    else:
        found = gradients(ours(case, impl, Polynomial(), mode)[1], case.leaves)
    deterministic(False)
    torch.testing.assert_close(found, gradients(ours(case, impl, Polynomial(), mode)[1], case.leaves))


# ---- Triton without a GPU -------------------------------------------------------------------------------------------


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a fresh interpreter where Triton compiles."""
    root = str(Path(__file__).parents[1])
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": root} | environment,
    )


def test_triton_needs_a_gpu_or_the_interpreter():
    """On a CPU without TRITON_INTERPRET: one clear error."""
    script = (
        "import torch, hf_xent.ops as o\n"
        "o.vocab_stats(torch.ones(2, 3), o.Head(torch.ones(4, 3)), torch.zeros(2).long(), impl='triton')"
    )
    found = python(script, CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 1
    error = found.stderr.strip().splitlines()[-1]
    assert error.startswith(
        "ValueError: impl is 'triton' but hidden is on cpu: move hidden and weight to a CUDA device"
    )
    assert "choose impl='chunked'" in error and "TRITON_INTERPRET=1" in error


def test_names_that_lived_in_algebra_are_found_where_they_are_now():
    """All that `hf_xent.ops.algebra` once defined; a DeprecationWarning names the new home of what has left."""
    assert algebra.Head is Head and {"State", "merge", "finish", "Coefficients", "coefficients"} <= set(vars(algebra))
    for name, module in (("Stats", "statistics"), ("wide", "statistics"), ("TENSORS", "problem"), ("Survey", "tail")):
        with pytest.warns(DeprecationWarning, match=rf"ops\.algebra\.{name} is now hf_xent\.ops\.{module}\.{name}"):
            found = getattr(algebra, name)
        assert found is getattr(import_module(f"hf_xent.ops.{module}"), name)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = algebra.nonesuch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, 1500])
def test_an_adapter_is_the_last_columns_of_a_wider_matrix(impl, device, dtype, frozen, budget):
    """Against the same head in one piece: statistics, a loss of them all, and cross-entropy, exact and with a tail."""
    torch.manual_seed(0)
    hidden, weight, adapter, bias = (
        torch.randn(*shape).to(device, dtype).requires_grad_() for shape in ((9, 20), (53, 16), (53, 4), (53,))
    )
    weight.requires_grad_(not frozen)
    labels = torch.randint(53, (9,)).to(device)
    labels[2] = -100
    whole = torch.cat([weight, adapter], 1).detach().requires_grad_()
    pieces, joined = Head(weight, bias, 0.7, adapter=adapter), Head(whole, bias, 0.7)
    leaves = [hidden, bias, adapter, *([] if frozen else [weight])]
    uses = ("lse", "target", "entropy", "mean")

    def answers(head, wanted):
        stats = vocab_stats(hidden, head, labels, outputs=uses, impl=impl, memory_budget=budget)
        found = [*stats.values.values(), *torch.autograd.grad(Polynomial(uses).of(stats).sum(), wanted)]
        for tail in (0.0, 1e-2):
            loss = vocab_loss(CrossEntropy(), hidden, head, labels, impl=impl, memory_budget=budget, tail=tail)[0]
            found += [loss, *torch.autograd.grad(loss, wanted)]
        return [t.detach() for t in found]

    ours, theirs = answers(pieces, leaves), iter(answers(joined, [hidden, bias, whole]))
    ours, rtol = iter(ours), 1e-4 if dtype == torch.float32 else 4e-2
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)  # noqa: E731
    for count in (len(uses), 1, 1):
        for _ in range(count):
            close(next(ours), next(theirs))
        close(next(ours), next(theirs))  # hidden
        close(next(ours), next(theirs))  # bias
        expected = next(theirs)
        close(next(ours), expected[:, 16:])
        if not frozen:
            close(next(ours), expected[:, :16])
    with pytest.raises(ValueError, match=r"must be the head's hidden size, 20"):
        vocab_stats(hidden[:, :16], pieces, labels)
