"""Expressions over lazy logits: losses of two models' logits as users write them, without either model's logits."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from hf_xent.lazy import LazyExpression, LazyLogits, PatchState
from hf_xent.lazy.source import shape_of
from hf_xent.lazy.values import LazyTensor
from hf_xent.ops import Head
from hf_xent.ops.request import Request
from support.oracle import Largest, assert_no_worse, gradients

B, T, V, D, D2 = 2, 9, 61, 5, 4
LABELS = torch.tensor([[-100, -100, 3, 60, 0, 7, 7, -100, 9], [1, 2, -100, 4, 5, 6, 7, 8, -100]])
VALID = LABELS != -100


def jensen_shannon(s, t, weight=0.3):
    p, q = F.log_softmax(s / 2.0, dim=-1), F.log_softmax(t / 2.0, dim=-1)
    weight = torch.tensor(weight, dtype=p.dtype)
    m = torch.logsumexp(torch.stack([p + torch.log1p(-weight), q + torch.log(weight)]), dim=0)
    first, second = (F.kl_div(m, x, reduction="none", log_target=True) for x in (q, p))
    return (weight * first + (1 - weight) * second)[VALID].sum() / 7


def skewed(s, t):
    """Masks of infinite logits, probabilities in a mixture, and a mask that is multiplied after the sum."""
    p, q = F.softmax(s, dim=-1, dtype=torch.float64), t.softmax(-1)
    mixed = torch.log(0.1 * q + 0.9 * p)
    each = torch.masked_fill(q * mixed, torch.isinf(s), 0)
    return -(each.sum(dim=-1).view(-1) * VALID.reshape(-1)).sum() / VALID.sum()


def topk(s, t):
    found = t.detach().argmax(-1, keepdim=True)
    ids = torch.cat([found, (found + 1) % V], -1)
    p, q = s.log_softmax(-1).gather(-1, ids), torch.softmax(t * 0.5, -1).gather(-1, ids)
    return -(p * q)[VALID].sum()


LOSSES = {
    "forward kl": lambda s, t: F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True),
    "kl of probabilities": lambda s, t: F.kl_div(s.log_softmax(-1)[VALID], t[VALID].softmax(-1), reduction="batchmean"),
    "reverse kl": lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)[VALID].mean(),
    "jensen-shannon": jensen_shannon,
    "skewed": skewed,
    "total variation": lambda s, t: 0.5 * (s.softmax(-1) - t.softmax(-1)).abs().flatten(0, 1).sum(-1)[3:].sum(),
    "mean of squares": lambda s, t: F.mse_loss(s[:, 1:], t[:, 1:] * 3),
    "entropy and temperature": lambda s, t: -((s / 3).softmax(-1) * (s / 3).log_softmax(-1)).sum(-1).pow(2).sum(),
    "token weights": lambda s, t: (torch.where(VALID[..., None], (s - 1).exp() / t.exp(), 0) * VALID[..., None]).mean(),
    "column weights": lambda s, t: (torch.sigmoid(s) * t.tanh() * torch.linspace(-1, 1, V)).amax(-1).sum(),
    "centered": lambda s, t: ((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))).square().sum(),
    "masked before": lambda s, t: (s[VALID].log_softmax(-1) * t[VALID].softmax(-1)).sum(),
    "in another dtype": lambda s, t: (s.float().softmax(-1) * t.double().exp().log1p()).double().sum(),
    "a mixture": lambda s, t: torch.logaddexp(s.log_softmax(-1) - 1, t.log_softmax(-1)).logsumexp(-1).sum(),
    "a stack of both": lambda s, t: (torch.stack([s.exp(), t.exp()]) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)).sum(),
    "its own teacher": lambda s, t: (s.detach().softmax(-1) * (s * 2).log_softmax(-1)).sum(),
    "cross-entropy": lambda s, t: F.cross_entropy(
        (s.masked_fill(t < -1.5, -1e4) + 0.5 * t).view(-1, V), LABELS.view(-1), label_smoothing=0.1
    ),
    "negative log-likelihood": lambda s, t: F.nll_loss(
        torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1))[0], LABELS[0], reduction="none"
    ).sum(),
    "no token": lambda s, t: (s.log_softmax(-1) * t.softmax(-1))[torch.zeros(B, T, dtype=torch.bool)].sum(),
    "a few columns": topk,
    "shapes": lambda s, t: (s.exp() * t.exp()).view(-1, V).unsqueeze(0)[0].reshape(T, B, V)[1:].transpose(0, 1).sum(),
}


@pytest.fixture
def leaves():
    shapes = ((B, T, D), (V, D), (V,), (B, T, D2), (V, D2))
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense_of(hidden, weight, bias, hidden2, weight2):
    return hidden @ weight.T + bias, 2 * torch.tanh(hidden2 @ weight2.T / 2)


def lazy_of(hidden, weight, bias, hidden2, weight2, **options):
    """Lazy logits whose products are computed a few rows at a time."""
    states = [PatchState(Request(memory_budget=8 * 8 * V), always=1) for _ in range(2)]
    second = LazyLogits.of(hidden2, Head(weight2), states[1], **options)
    return [LazyLogits.of(hidden, Head(weight, bias), states[0]), torch.tanh(second / 2) * 2]


def assert_gradients(found, expected, leaves):
    for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_two_models_are_those_of_dense_logits(name, leaves):
    lazy = lazy_of(*leaves)
    with Largest() as largest:
        found = LOSSES[name](*lazy)
        torch.autograd.grad(found, leaves, retain_graph=True, allow_unused=True)
    expected = LOSSES[name](*dense_of(*leaves))
    assert type(found) is torch.Tensor and found.dtype == expected.dtype
    exact = {"rtol": 1e-5, "atol": 1e-5} if name == "in another dtype" else {}
    torch.testing.assert_close(found, expected, **exact)
    if not exact:
        assert_gradients(found, expected, leaves)
    assert [x.state.materialized for x in lazy] == [0, 0] and lazy[0].state.streamed
    assert largest.numel < B * T * V / 2


@pytest.mark.parametrize("kind", ["no_grad", "dense", "frozen", "freed"])
def test_teachers_of_any_kind(kind, leaves):
    """Without a graph, as an ordinary tensor, with frozen weights, or with a head that is there in its call only."""
    for x in leaves[3:]:
        x.requires_grad_(kind == "dense")
    student, teacher = lazy_of(*leaves)
    expected = jensen_shannon(*dense_of(*leaves))
    if kind == "dense":
        teacher = dense_of(*leaves)[1]
    elif kind == "no_grad":
        for x in leaves[3:]:
            x.requires_grad_()
        with torch.no_grad():
            teacher = lazy_of(*leaves)[1]
        leaves = leaves[:3]
    elif kind == "freed":
        head = Head(leaves[4])
        source = lambda hidden, compute: compute(hidden, head)  # noqa: E731  a head's call
        state = PatchState(always=1)
        teacher = torch.tanh(LazyLogits.of(leaves[3], shape_of(head), state, source=source) / 2) * 2
    found = jensen_shannon(student, teacher)
    torch.testing.assert_close(found, expected)
    wanted = [x for x in leaves if x.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))
    assert student.state.materialized == 0
    if kind != "dense":
        assert teacher.state.materialized == (kind == "freed")


def test_second_derivatives_of_a_divergence(leaves):
    def curvature(student, teacher):
        each = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)
        first = torch.autograd.grad(each.pow(2).sum() + jensen_shannon(student, teacher), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(curvature(*lazy_of(*leaves)), curvature(*dense_of(*leaves)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("total", [True, False])
def test_low_precision_is_no_worse_than_torch(dtype, total, leaves):
    def solve(make, dtype):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        student, teacher = make(*own)
        each = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1)))[VALID]
        loss = each.sum() if total else each.sum(-1).sum()
        return [loss, *torch.autograd.grad(loss, own)]

    leaves = [x.detach().to(dtype) for x in leaves]  # so that the truth is of the same numbers
    found, same, truth = solve(lazy_of, dtype), solve(dense_of, dtype), solve(dense_of, torch.float64)
    for ours, theirs, exact in zip(found, same, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours, theirs, exact)


def test_autocast_gives_the_dtype_of_torch():
    hidden, weight = torch.randn(4, D), torch.randn(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        dense = F.linear(hidden, weight)
        head = Head(weight.bfloat16())
        lazy = LazyLogits.of(hidden.bfloat16(), head, PatchState(always=1))
        for use in (lambda z: F.softmax(z, -1), lambda z: z.exp(), lambda z: F.mse_loss(z.exp(), z.softmax(-1))):
            assert use(lazy).dtype == use(dense).dtype


def test_values_are_made_once_and_have_a_graph(leaves):
    student, teacher = lazy_of(*leaves)
    each = student.softmax(-1) - teacher.softmax(-1)
    assert isinstance(each, LazyExpression) and "not computed" in repr(each) and not each.is_dense
    expected = (lambda s, t: s.softmax(-1) - t.softmax(-1))(*dense_of(*leaves))
    first = each.cumsum(-1)
    assert each.is_dense and student.state.materialized == 1
    torch.testing.assert_close(first, expected.cumsum(-1))
    assert_gradients(each.cumsum(-1)[0].sin().sum(), expected.cumsum(-1)[0].sin().sum(), leaves)
    assert student.state.materialized == 1 and not student.is_dense


def test_writes_are_seen_as_in_torch(leaves):
    """By views of the same memory, and not by what was computed from the values before."""
    results = []
    for student, teacher in (lazy_of(*leaves), dense_of(*leaves)):
        each = student.softmax(-1) * teacher.exp()
        part, double = each[:, 2:], each * 2
        before = double.sum()
        part[..., 0] = 7.0
        each.mul_(3)
        student.mul_(2)  # what was recorded of it keeps its values
        results.append((before, each.sum(), part.sum(-1), double.sum(), (each + student).sum()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operands_that_change_are_an_error(leaves):
    mask, full = torch.ones(B, T, 1), torch.ones(B, T, V)
    student, teacher = lazy_of(*leaves)
    each, beside = student.exp() * teacher.exp() * mask, student.exp() * full
    mask.zero_()
    assert each.sum() > 0, "small tensors are copied"
    full.zero_()
    with pytest.raises(RuntimeError, match=r"shape \(2, 9, 61\).*modified in place.*pass a clone"):
        beside.sum()
    with torch.no_grad():
        leaves[4].add_(1.0)
    for read in (lambda: each.sum(), lambda: each.sum(-1), lambda: each.cumsum(0)):
        with pytest.raises(RuntimeError, match="weight was modified in place"):
            read()


def test_gradients_that_will_not_come_are_refused(leaves):
    student, teacher = lazy_of(*leaves)
    each = student.softmax(-1) * teacher.softmax(-1)
    loss = each.sum()
    for ask in (each.retain_grad, student.retain_grad, lambda: each.register_hook(print)):
        with pytest.raises(RuntimeError, match="without making these logits"):
            ask()
    for x in (each, student, teacher):
        with pytest.raises(RuntimeError, match="without making these logits"):
            torch.autograd.grad(loss, x)
    found = []
    for student, teacher in (lazy_of(*leaves), dense_of(*leaves)):
        each = student.softmax(-1) * teacher.softmax(-1)
        each.retain_grad()
        (each * 2).square().sum().backward(inputs=[leaves[0], each])
        found.append(each.grad)
    torch.testing.assert_close(*found)


class Doubled(torch.autograd.Function):
    """A custom function: it gets the values of an expression below Python."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, upstream):
        return upstream * 2


def test_custom_functions_of_an_expression(leaves):
    def use(student, teacher):
        return Doubled.apply(student.softmax(-1) * teacher).sin().sum()

    assert_gradients(use(*lazy_of(*leaves)), use(*dense_of(*leaves)), leaves)


def test_a_mean_divergence_warns_as_in_torch(leaves):
    found = []
    for student, teacher in (lazy_of(*leaves), dense_of(*leaves)):
        with pytest.warns(UserWarning, match="batchmean"):
            found.append(F.kl_div(student.log_softmax(-1), teacher.softmax(-1)))
    torch.testing.assert_close(*found)


def test_a_graph_is_made_where_torch_makes_one(leaves):
    student, teacher = lazy_of(*leaves)
    with torch.no_grad():
        constant = student.softmax(-1) * teacher.softmax(-1)
    assert not constant.requires_grad and not constant.sum().requires_grad
    each = student.softmax(-1) * teacher.softmax(-1)
    assert each.requires_grad and not each.detach().requires_grad and not (each > 0.1).requires_grad
    with torch.no_grad():
        assert not each.sum().requires_grad
    assert (each > 0.01).sum() == (each.dense() > 0.01).sum()


def test_nothing_waits_for_the_garbage_collector(leaves):
    """Neither what a step was computed from nor what it had in between: cycles would keep both."""
    gc.collect()
    gc.disable()
    try:
        hidden = leaves[0] * 1
        student, teacher = lazy_of(hidden, *leaves[1:])
        each = student.softmax(-1)[VALID] * teacher[VALID].softmax(-1)
        (each.sum() + each.sum(-1).square().sum()).backward()
        kept, before = weakref.ref(hidden), len(gc.get_objects())
        del hidden, student, teacher, each
        assert kept() is None and len(gc.get_objects()) < before
    finally:
        gc.enable()


def test_logits_of_a_model_that_computes_its_own_loss_are_not_recorded():
    lazy = LazyLogits.of(torch.randn(3, D), Head(torch.randn(V, D)))
    assert not isinstance(lazy.softmax(-1), LazyTensor) and lazy.is_dense
