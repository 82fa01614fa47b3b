"""Every registered loss against its paper's formula on dense float64 logits, and each loss's own identities."""

import inspect
import json
import math
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn import functional as F

from hf_xent import losses
from hf_xent.losses import (
    EISL,
    EMO,
    JSD,
    LOSSES,
    CompSum,
    CrossEntropy,
    Focal,
    ForwardKL,
    MixCE,
    ReverseKL,
    SkewKL,
    TaiLr,
    TotalVariation,
    sequence,
)
from hf_xent.losses.base import Loss
from hf_xent.losses.comp_sum import TANGENT_FROM
from hf_xent.ops import STATISTICS, Head, Stats, divergences, vocab_loss, vocab_stats
from hf_xent.ops.chunked import MAX_LOW_PRECISION_SUMS
from hf_xent.ops.dispatch import unit_of
from hf_xent.ops.divergences import stream_divergence
from hf_xent.ops.request import Request
from hf_xent.ops.row_loss import RowLoss
from support.oracle import Largest, assert_close_at_scale, assert_no_worse

V, D = 37, 6
SETTINGS = {  # more than the defaults, with which every registered loss is tried
    "cross_entropy": [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}],
    "focal": [{}, {"gamma": 0.0}, {"gamma": 0.5}],
    "comp_sum": [{}, {"tau": 0.0}, {"tau": 0.5}, {"tau": 1.0}, {"tau": 2.0}],
    "tailr": [{}, {"gamma": 0.1, "w_min": 0.3, "label_smoothing": 0.1}, {"gamma": 0.0}],
    "mixce": [{}, {"eta": 0.0}],
    "emo": [
        {},
        {"gt_detach": True},
        {"ratio_clamp": 1.2},
        {"variant": "emo2", "cost": "current"},
        {"variant": "emo2", "gt_detach": True},
        {"variant": "emo"},
        {"variant": "emo", "gt_detach": True},
    ],
    "eisl": [{}, {"ngrams": (1, 3, 0, -1), "weights": (0.4, 0.3, 0.2, 0.1), "ngram_factor": 0.7, "ce_factor": 0.5}],
    "forward_kl": [{}, {"temperature": 2.0}, {"ce_weight": 0.25}],
    "reverse_kl": [{}, {"temperature": 2.0}],
    "jsd": [{}, {"beta": 0.1, "temperature": 2.0}, {"temperature": 0.5, "ce_weight": 0.6}],
    "skew_kl": [{}, {"temperature": 2.0, "ce_weight": 0.3}, {"alpha": 0.4, "reverse": True}],
    "total_variation": [{}, {"temperature": 2.0, "ce_weight": 1.0}],
}
CASES = [(name, options) for name in LOSSES for options in SETTINGS.get(name, [{}])]
every = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{','.join(f'{k}={v}' for k, v in o.items())}" for n, o in CASES]
)
registered = pytest.mark.parametrize("name", LOSSES)


def problem(dtype=torch.float64, device="cpu", labels=None, plain=False):
    """Hidden states, a head that does everything, labels [2, 7] ignored at the ends, and a teacher of another width."""
    shape = (2, 7)
    if labels is None:
        labels = torch.randint(V, shape)
        labels[0, :2], labels[0, 6], labels[1] = -100, -100, -100  # one run, for the losses of sequences
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((*labels.shape, D), (V, D), (V,)))
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
    head = Head(leaves[1], leaves[2]) if plain else Head(leaves[1], leaves[2], scale=0.8, softcap=6.0)
    teacher_hidden, teacher_weight = (
        torch.randn(*s, dtype=torch.float64).to(device, dtype) for s in ((*labels.shape, 4), (V, 4))
    )
    return SimpleNamespace(
        hidden=leaves[0],
        head=head,
        labels=labels.to(device),
        leaves=leaves,
        teacher=(teacher_hidden, Head(teacher_weight, softcap=5.0)),
    )


def build(name, options, p):
    """A registered loss, ready for a problem, and the keywords its call needs."""
    loss = losses.get(name, **options).bind(p.head.weight)
    return loss, {"teacher": p.teacher} if loss.needs_teacher else {}


def dense(loss, p, keep=None):
    """The reference per valid token."""
    keep = p.labels != -100 if keep is None else keep
    logits, teacher = p.head.logits(p.hidden[keep]), p.teacher[1].logits(p.teacher[0][keep])
    return loss.reference(logits, p.labels[keep], weight=p.head.weight, teacher=teacher)


def gradients(total, p, **options):
    return torch.autograd.grad(total, p.leaves, **options)


def stats_of(**values):
    """Stats by hand, float64."""
    values = {name: torch.as_tensor(value, dtype=torch.float64).reshape(-1) for name, value in values.items()}
    count = len(next(iter(values.values())))
    return Stats(values, torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool))


def at(loss, p_y):
    """A loss of log p_y at a probability."""
    return float(loss.of(stats_of(lse=-math.log(p_y), target=0.0)))


# --- every entry of the registry -------------------------------------------------------------------------------------


def test_settings_are_of_registered_losses():
    assert set(SETTINGS) <= set(LOSSES) and all({} in found for found in SETTINGS.values())


@every
def test_mean_equals_reference(name, options, impl, device):
    p = problem(device=device)
    loss, call = build(name, options, p)
    found = loss(p.hidden, p.head, p.labels, impl=impl, **call)
    expected = dense(loss, p).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, p), gradients(expected, p))


@every
def test_unreduced_equals_reference(name, options, impl, device):
    p = problem(device=device)
    loss, call = build(name, options, p)
    found = loss(p.hidden, p.head, p.labels, reduction="none", impl=impl, **call)
    expected, upstream = dense(loss, p), torch.randn_like(found)
    assert found.shape == p.labels.shape
    assert not found[p.labels == -100].any()
    torch.testing.assert_close(found[p.labels != -100], expected)
    wanted = gradients((expected * upstream[p.labels != -100]).sum(), p)
    torch.testing.assert_close(gradients((found * upstream).sum(), p), wanted)


@every
def test_reductions(name, options):
    p = problem()
    loss, call = build(name, options, p)
    weight, mask = torch.rand(p.labels.shape), p.labels != -100
    with torch.no_grad():
        each = loss(p.hidden, p.head, p.labels, reduction="none", **call)
        sum_, mean, items, weighted, unreduced = (
            loss(p.hidden, p.head, p.labels, **call, **how)
            for how in (
                {"reduction": "sum"},
                {},
                {"num_items": torch.tensor(11)},
                {"token_weight": weight},
                {"token_weight": weight, "reduction": "none"},
            )
        )
        _, stats = loss.compute(p.hidden, p.head, p.labels, observe=("entropy", "top"), **call)
    torch.testing.assert_close(sum_, each.sum())
    torch.testing.assert_close(mean, each.sum() / mask.sum())
    torch.testing.assert_close(items, each.sum() / 11)
    torch.testing.assert_close(unreduced, each * weight)
    torch.testing.assert_close(weighted, (each * weight).sum() / weight[mask].sum())
    torch.testing.assert_close(stats.loss, each)
    torch.testing.assert_close(
        stats.logp[mask], p.head.logits(p.hidden[mask]).log_softmax(-1).gather(-1, p.labels[mask, None])[:, 0]
    )
    assert stats.entropy.shape == stats.top.shape == p.labels.shape
    assert not stats.loss.requires_grad


@every
def test_uses_is_exact(name, options, monkeypatch):
    p = problem()
    loss, _ = build(name, options, p)
    values = {"lse": 3.0, "target": 1.0, "mean": -1.0, "entropy": 2.0, "variance": 1.5, "payload": 0.3}
    values |= {"top": 4.0, "rank": 2.0, "log_sum_sq": -1.0}
    assert set(values) == set(STATISTICS)
    assert set(loss.uses) <= set(values)
    if type(loss).of is Loss.of:  # full rows, no statistics
        assert loss.uses == ()
        return
    undeclared = dict.fromkeys(set(values) - set(loss.uses), math.nan)
    assert float(loss.of(stats_of(**values | undeclared))) == float(loss.of(stats_of(**values)))
    for used in loss.uses:
        assert math.isnan(float(loss.of(stats_of(**values | {used: math.nan}))))


@every
def test_extremes_are_finite(name, options, impl, device):
    """Logits of +-50 in float32: the label has all the mass, none of it, or ties with everything."""
    z = torch.full((4, V), -50.0)
    z[0, 3], z[1], z[1, 3], z[2], z[3, 5] = 50, 50, -50, 0, 50
    p = problem(torch.float32, device, labels=torch.full((1, 4), 3))
    hidden = z[None].to(device).requires_grad_()
    weight = torch.eye(V, device=device, requires_grad=True)
    p.head, p.hidden, p.teacher = Head(weight), hidden, (hidden.detach().flip(1), Head(weight.detach()))
    loss, call = build(name, options, p)
    for reduction in ("mean", "none"):
        found = loss(hidden, p.head, p.labels, reduction=reduction, impl=impl, **call)
        assert found.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (hidden, weight)))


@every
def test_any_memory_budget(name, options):
    p = problem()
    loss, call = build(name, options, p)
    one, many = (loss(p.hidden, p.head, p.labels, memory_budget=b, **call) for b in (None, 1))
    torch.testing.assert_close(many, one)
    torch.testing.assert_close(gradients(many, p), gradients(one, p))


@every
def test_masked_equals_removed(name, options):
    p = problem()
    loss, call = build(name, options, p)
    keep = p.labels != -100
    found = loss(p.hidden, p.head, p.labels, **call)
    if call:
        call = {"teacher": (p.teacher[0][keep], p.teacher[1])}
    removed = loss(p.hidden[keep], p.head, p.labels[keep], **call)
    torch.testing.assert_close(found, removed)
    torch.testing.assert_close(gradients(found, p), gradients(removed, p))


@every
def test_nothing_to_learn_is_a_connected_zero(name, options, impl, device):
    p = problem(device=device, labels=torch.full((2, 3), -100))
    loss, call = build(name, options, p)
    for reduction in ("mean", "sum", "none"):
        found = loss(p.hidden, p.head, p.labels, reduction=reduction, impl=impl, **call)
        assert not found.any()
        assert all(not g.any() for g in gradients(found.sum(), p))


@every
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0), (0, 3), ()], ids=str)
def test_no_token_is_a_zero_however_it_is_counted(name, options, shape):
    """Also divided by a batch's count of 0 tokens: 0 and gradients of 0, not nan."""
    p = problem(torch.float32, labels=torch.full(shape, -100))
    loss, call = build(name, options, p)
    for count in (None, 0, torch.tensor(0)):
        found = loss(p.hidden, p.head, p.labels, num_items=count, **call)
        assert found.item() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(found, p))


@every
def test_second_derivatives_equal_the_references(name, options):
    """Of a gradient penalty: all that a loss holds constant is constant in it too."""
    p = problem()
    loss, call = build(name, options, p)
    found = [loss(p.hidden, p.head, p.labels, memory_budget=1, **call), dense(loss, p).mean()]
    grads = [gradients(total, p, create_graph=True) for total in found]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(*(gradients(sum(g.square().sum() for g in of), p) for of in grads))


@every
def test_an_adapter_is_a_part_of_the_head(name, options):
    """LoRA on the head: the last columns of the matrix in a tensor of their own change nothing."""
    p = problem()
    loss, call = build(name, options, p)
    weight, adapter = (x.detach().requires_grad_() for x in p.head.weight.split([D - 2, 2], 1))
    head = replace(p.head, weight=weight, adapter=adapter)
    current = getattr(loss, "cost", None) == "current"  # the embeddings of the base model, which are narrower here
    expected = (replace(loss, cost=weight.detach()) if current else loss)(p.hidden, p.head, p.labels, **call)
    found = loss(p.hidden, head, p.labels, **call)
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad(found, [p.hidden, weight, adapter, p.head.bias])
    hidden, matrix, bias = gradients(expected, p)
    torch.testing.assert_close((own[0], torch.cat(own[1:3], 1), own[3]), (hidden, matrix, bias))


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(name, options, dtype):
    labels = torch.randint(V, (2, 7))
    p = problem(labels=labels)
    loss, call = build(name, options, p)
    for ignore_index in (-100, int(labels[0, 0])):
        call["ignore_index"] = ignore_index
        found = loss(p.hidden, p.head, labels.to(dtype), **call)
        torch.testing.assert_close(found, loss(p.hidden, p.head, labels, **call))


@every
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_tensors(name, options, frozen):
    p = problem()
    loss, call = build(name, options, p)
    expected = gradients(loss(p.hidden, p.head, p.labels, **call), p)
    p.leaves[frozen].requires_grad_(False)
    loss(p.hidden, p.head, p.labels, **call).backward()
    assert p.leaves[frozen].grad is None
    torch.testing.assert_close(p.leaves[1 - frozen].grad, expected[1 - frozen])


@every
def test_bfloat16_is_no_worse_than_torch(name, options, impl, device):
    p = problem(torch.bfloat16, device, plain=True)
    loss, call = build(name, options, p)
    exact = problem(torch.float64, device, plain=True)
    for low, high in zip(p.leaves, exact.leaves, strict=True):
        high.data = low.detach().double()
    exact.teacher, exact.labels = (p.teacher[0].double(), Head(p.teacher[1].weight.double(), softcap=5.0)), p.labels
    found = loss(p.hidden, p.head, p.labels, impl=impl, **call)
    plain, truth = dense(loss, p).mean(), dense(loss, exact).mean()
    assert found.dtype == torch.float32
    assert_no_worse(found.detach(), plain.detach(), truth.detach(), atol=2e-3)
    for ours, theirs, wanted in zip(gradients(found, p), gradients(plain, p), gradients(truth, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert_no_worse(ours, theirs, wanted, atol=2e-3)


@every
def test_autocast(name, options):
    p = problem(torch.float32)
    loss, call = build(name, options, p)
    exact = loss(p.hidden, p.head, p.labels, **call)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(p.hidden, p.head, p.labels, **call)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(found, p))


@every
def test_describes_itself_as_json(name, options):
    loss = losses.get(name, **options)
    told = json.loads(json.dumps(loss.describe()))
    assert told.pop("loss") == name
    assert losses.get(name, **told).describe() == loss.describe()


def test_table_is_complete_and_json():
    rows = json.loads(json.dumps(losses.table()))
    assert [row["name"] for row in rows] == list(LOSSES)
    for row in rows:
        cls = LOSSES[row["name"]]
        assert row["class"] == cls.__name__ in losses.__all__
        assert all(row[key] for key in ("summary", "formula", "source", "statistics"))
        assert row["formula"].startswith("loss = ")
        assert list(row["options"]) == list(row["help"]) == list(cls.__dataclass_fields__)
        assert all(row["help"].values())


@registered
def test_key_is_the_file_name(name):
    assert LOSSES[name].__module__ == f"hf_xent.losses.{name}"


# --- golden values of the method sheets ------------------------------------------------------------------------------

E = torch.tensor([[3.0, 0], [0, 2], [1, 1], [-2, 0]], dtype=torch.float64)
EMO_GOLDEN = [  # label, options, value, gradient
    (0, {}, 0.440190, [-0.319765, 0.225977, 0.041597, 0.052192]),
    (0, {"gt_detach": True}, 0.440190, [-0.225728, 0.154624, 0.042907, 0.028197]),
    (0, {"variant": "emo2"}, 0.653048, [-0.474391, 0.335250, 0.061711, 0.077430]),
    (0, {"variant": "emo2", "gt_detach": True}, 1.940877, [-0.995277, 0.681765, 0.189187, 0.124325]),
    (3, {}, 3.440190, [0.538068, -0.045538, 0.046585, -0.539115]),
    (3, {"gt_detach": True}, 3.440190, [0.534006, -0.042455, 0.046528, -0.538078]),
    (3, {"variant": "emo2"}, 3.346952, [0.523485, -0.044304, 0.045322, -0.524503]),
    (3, {"variant": "emo2", "gt_detach": True}, 3.411069, [0.529485, -0.042096, 0.046134, -0.533523]),
    (0, {"variant": "emo"}, 0.326524, None),
    (3, {"variant": "emo"}, 1.673476, None),
    (0, {"variant": "emo", "gt_detach": True}, 0.970438, None),
    (3, {"variant": "emo", "gt_detach": True}, 1.705535, None),
]


def on_logits(loss, z, label, impl=None):
    """Value and gradient at given logits."""
    z = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    value = loss(z, Head(torch.eye(z.shape[1], dtype=torch.float64)), torch.tensor([label]), impl=impl)
    return float(value.detach()), torch.autograd.grad(value, z)[0][0]


@pytest.mark.parametrize(("label", "options", "value", "gradient"), EMO_GOLDEN)
def test_emo_golden(label, options, value, gradient):
    found, dz = on_logits(EMO(cost=E, **options), [2.0, 1, 0, -1], label)
    assert found == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        assert dz.tolist() == pytest.approx(gradient, abs=1e-6)


def test_emo_golden_clamp():
    stats = stats_of(lse=5.3, target=0.0, payload=1 - 1.11)
    assert float(EMO(ratio_clamp=3.0).of(stats)) == pytest.approx(4.315)
    assert float(EMO(ratio_clamp=5.0).of(stats)) == pytest.approx(5.3)


COMP_SUM_AT = {
    0.25: {0: 3, 0.5: 2, 1: 1.386294, 1.5: 1, 1.7: 0.887244, 2: 0.75},
    0.9: {0: 0.111111, 0.5: 0.108185, 1: 0.105361, 1.5: 0.102633, 1.7: 0.101569, 2: 0.1},
}
POINTS = [
    *(
        (TaiLr(gamma=g, w_min=w), p, value)
        for p, g, w, value in (
            (0.25, 0.1, 0.3, 1.066380),
            (0.25, 1.0, 0, 0.346574),
            (0.05, 0.1, 0.3, 1.033011),
            (0.25, 1e-7, 0.2, 1.386294),
            (0.25, 0.8, 0.2, 0.407734),
        )
    ),
    *((MixCE(eta=eta), 0.25, value) for eta, value in ((0.1, 0.450546), (0.7, 1.074378), (1, 1.386294), (0, 0.346574))),
    *((CompSum(tau=tau), p, value) for p, row in COMP_SUM_AT.items() for tau, value in row.items()),
]


@pytest.mark.parametrize(("loss", "p_y", "value"), POINTS)
def test_golden_at_a_probability(loss, p_y, value):
    assert at(loss, p_y) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("tau", "value", "gradient"),
    [
        (0, 3.086161, [2.718282, -3.086161, 0.367879]),
        (0.5, 2.042851, [1.344735, -1.526725, 0.181990]),
        (1.5, 1.010599, [0.329095, -0.373633, 0.044538]),
        (2, 0.755272, [0.162803, -0.184836, 0.022033]),
    ],
)
def test_comp_sum_golden(tau, value, gradient):
    found, dz = on_logits(CompSum(tau=tau), [2.0, 1, 0], 1)
    assert found == pytest.approx(value, abs=1e-6)
    assert dz.tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(("n", "value"), [(1, 0.556891), (2, 0.471204), (3, 0.2), (0, 0.2), (-1, 0.471204)])
def test_eisl_golden(n, value):
    logp = torch.tensor([[-0.1, -2, -3], [-2.5, -0.2, -1.5], [-4, -1, -0.3]], dtype=torch.float64)
    assert float(EISL(ngrams=(n,)).of_run(logp).mean()) == pytest.approx(value, abs=1e-6)


# --- EMO -------------------------------------------------------------------------------------------------------------


def per_token(loss, p, **call):
    return loss(p.hidden, p.head, p.labels, reduction="none", **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gt_detach", [False, True])
def test_emo1_is_worth_the_nll(dtype, gt_detach):
    p = problem(dtype)
    p.hidden.data *= torch.linspace(0, 30, 7)[None, :, None]  # from unsure to certain
    emo1 = EMO(gt_detach=gt_detach).bind(p.head.weight)
    torch.testing.assert_close(per_token(emo1, p), per_token(CrossEntropy(), p))
    clamped = replace(emo1, ratio_clamp=0.5)
    assert (per_token(clamped, p) <= per_token(emo1, p)).all()


def test_emo2_is_worth_twice_the_distance_and_gt_detach_changes_the_value_alone():
    p = problem()
    pure = EMO(variant="emo").bind(p.head.weight)
    distance, nll = per_token(pure, p), per_token(CrossEntropy(), p)
    torch.testing.assert_close(per_token(replace(pure, variant="emo2"), p), 2 * distance)
    detached = per_token(replace(pure, gt_detach=True), p)
    torch.testing.assert_close(detached, (distance + (-nll).exp()) * (p.labels != -100))
    torch.testing.assert_close(gradients(detached.sum(), p), gradients(distance.sum(), p))


@pytest.mark.parametrize("label", range(5))
def test_emo_is_the_earth_movers_distance(label):
    """Against the linear program: min sum_ij plan_ij cost_ij with the prediction and a one-hot label as marginals."""
    rows = torch.randn(5, 3, dtype=torch.float64)
    z = torch.randn(5, dtype=torch.float64)
    units = F.normalize(rows, dim=-1)
    cost = (1 - units @ units.T).numpy()
    marginals = numpy.vstack([numpy.kron(numpy.eye(5), numpy.ones(5)), numpy.kron(numpy.ones(5), numpy.eye(5))])
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy")
    exact = optimize.linprog(cost.ravel(), A_eq=marginals, b_eq=[*z.softmax(0).tolist(), *numpy.eye(5)[label]])
    value, dz = on_logits(EMO(variant="emo", cost=rows), z.tolist(), label)
    assert value == pytest.approx(exact.fun, abs=1e-9)
    s, q = units @ units[label], z.softmax(0)
    torch.testing.assert_close(dz, -q * (s - q @ s))
    shifts = 1e-5 * torch.eye(5, dtype=torch.float64)
    ends = [
        [on_logits(EMO(variant="emo", cost=rows), (z + way * d).tolist(), label)[0] for way in (1, -1)] for d in shifts
    ]
    assert dz.tolist() == pytest.approx([(up - down) / 2e-5 for up, down in ends], abs=1e-8)  # finite differences


def test_emo_frozen_stays_current_follows_and_neither_trains():
    p = problem()
    frozen, current = EMO().bind(p.head.weight), EMO(variant="emo2", cost="current").bind(p.head.weight)
    before = frozen.cost.clone()
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(V, dtype=torch.float64))
    optimizer = torch.optim.SGD(p.leaves, lr=1.0)
    frozen(p.hidden, p.head, p.labels).backward()
    optimizer.step()
    assert torch.equal(frozen.cost, before)
    assert not frozen.cost.requires_grad
    units, head = current.second(p.head, p.labels, None)
    torch.testing.assert_close(head.weight, F.normalize(p.head.weight, dim=-1))
    assert not head.weight.requires_grad
    assert torch.equal(units[p.labels != -100], head.weight[p.labels[p.labels != -100]])


@pytest.mark.parametrize("variant", ["emo1", "emo2", "emo"])
def test_emo_zero_rows_and_another_width(variant, impl, device):
    p = problem(device=device)
    cost = torch.randn(V, 9, dtype=torch.float64, device=device)
    cost[: V // 2] = 0  # among them labels
    found = EMO(variant=variant, cost=cost)(p.hidden, p.head, p.labels, impl=impl)
    assert found.isfinite()
    assert all(g.isfinite().all() for g in gradients(found, p))
    torch.testing.assert_close(found, dense(EMO(variant=variant, cost=cost), p).mean())


def test_emo_float32_cost_beside_a_bfloat16_head(impl, device):
    p = problem(torch.bfloat16, device)
    found = EMO(cost=torch.randn(V, 5, device=device))(p.hidden, p.head, p.labels, impl=impl)
    torch.testing.assert_close(found, CrossEntropy()(p.hidden, p.head, p.labels, impl=impl), rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in gradients(found, p))


def test_emo_survives_rounding_of_the_distance():
    """A certain token's distance comes out of bfloat16 embeddings as noise of either sign: no spike, no NaN."""
    for loss in (EMO(), EMO(variant="emo2"), EMO(gt_detach=True), EMO(variant="emo2", gt_detach=True)):
        nll = torch.tensor([0.0, 1e-7, 1e-4, 1e-4, 1e-4], requires_grad=True)
        pay = torch.tensor([1.0003, 0.9997, 1.0003, 0.9999, 1.0], requires_grad=True)
        labels = torch.zeros(5, dtype=torch.long)
        value = loss.of(Stats({"lse": nll, "target": torch.zeros(5), "payload": pay}, labels, labels == 0))
        found = torch.autograd.grad(value.sum(), (nll, pay))
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in found)
        if not loss.gt_detach:
            assert (found[0] >= 0).all()
            assert float(found[1].abs().max()) <= 129


# --- functions of log p_y --------------------------------------------------------------------------------------------


def test_comp_sum_family():
    p = problem()
    nll = per_token(CrossEntropy(), p)
    mask = p.labels != -100
    torch.testing.assert_close(per_token(CompSum(tau=1), p), nll)
    torch.testing.assert_close(per_token(CompSum(tau=2), p)[mask], 1 - (-nll[mask]).exp())
    torch.testing.assert_close(per_token(CompSum(tau=1.7), p)[mask], (1 - (-nll[mask]).exp() ** 0.7) / 0.7)
    for tau in (1 - 1e-9, 1 + 1e-9):
        torch.testing.assert_close(per_token(CompSum(tau=tau), p), nll)
    single = stats_of(lse=[1e-3, 1.0, 30.0], target=[0.0, 0, 0])
    values = {k: v.float() for k, v in single.values.items()}
    near = CompSum(tau=1 - 1e-7).of(Stats(values, single.labels, single.mask))
    torch.testing.assert_close(near, values["lse"])


def test_comp_sum_goes_on_along_its_tangent():
    nll = torch.tensor([TANGENT_FROM - 1e-3, TANGENT_FROM + 1e-3, 100.0, 1e4], requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    value = CompSum(tau=0).of(Stats({"lse": nll, "target": torch.zeros(4)}, labels, labels == 0))
    slope = torch.autograd.grad(value.sum(), nll)[0]
    assert value.isfinite().all()
    assert (value.diff() > 0).all()
    torch.testing.assert_close(slope / math.exp(TANGENT_FROM), torch.ones(4), rtol=2e-3, atol=0)


def test_tailr_and_mixce_identities():
    p = problem()
    nll = per_token(CrossEntropy(), p)
    for loss in (TaiLr(gamma=0), TaiLr(gamma=1e-12), TaiLr(w_min=1), MixCE(eta=1), Focal(gamma=0)):
        found = per_token(loss, p)
        torch.testing.assert_close(found, nll)
        torch.testing.assert_close(gradients(found.sum(), p), gradients(nll.sum(), p, retain_graph=True))
    tailr, mixce = per_token(TaiLr(gamma=1, w_min=0), p), per_token(MixCE(eta=0), p)
    torch.testing.assert_close(tailr, mixce)
    found = gradients(tailr.sum(), p)
    torch.testing.assert_close(found, gradients(mixce.sum(), p))
    torch.testing.assert_close(found, gradients(((-nll).exp().detach() * nll).sum(), p))


DIVERGENCES = (ForwardKL(), ReverseKL(), JSD(), SkewKL(), SkewKL(reverse=True), TotalVariation())


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*DIVERGENCES, ForwardKL(temperature=3.0), JSD(beta=0.2)], ids=repr)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(loss, impl, device):
    p = problem(torch.float32, device)
    found = per_token(loss, p, teacher=(p.hidden, p.head), impl=impl)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=2e-5 * loss.temperature**2)
    for g in gradients(found.sum(), p):  # a teacher that got a gradient would not cancel it
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", DIVERGENCES, ids=repr)
def test_the_teacher_gets_no_gradient(loss):
    p = problem()
    teacher = problem(labels=p.labels)
    weight, adapter = (x.detach().requires_grad_() for x in teacher.head.weight.split([D - 2, 2], 1))
    head = replace(teacher.head, weight=weight, adapter=adapter)
    loss(p.hidden, p.head, p.labels, teacher=(teacher.hidden, head)).backward()
    assert all(x.grad is not None for x in p.leaves)
    assert all(x.grad is None for x in (*teacher.leaves, weight, adapter))


def test_jsd_is_symmetric_at_one_half_and_ends_in_the_kls():
    p, other = problem(), problem()
    other.labels = p.labels
    with torch.no_grad():
        both = [per_token(JSD(), x, teacher=(y.hidden, y.head)) for x, y in ((p, other), (other, p))]
        torch.testing.assert_close(*both)
        assert (both[0] <= math.log(2)).all()
        mirrored = per_token(JSD(beta=0.3), p, teacher=p.teacher), per_token(JSD(beta=0.7), p, teacher=p.teacher)
        assert not torch.allclose(*mirrored)
        forward, reverse = (per_token(loss, p, teacher=p.teacher) for loss in (ForwardKL(), ReverseKL()))
        torch.testing.assert_close(
            per_token(JSD(beta=1e-7), p, teacher=p.teacher) / 1e-7, forward, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            per_token(JSD(beta=1 - 1e-7), p, teacher=p.teacher) / 1e-7, reverse, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_skewed_divergences_end_in_the_kls_and_add_up_to_jsd(temperature):
    p, same = problem(), {"temperature": temperature}

    def solved(*terms):
        each = sum(factor * per_token(loss, p, teacher=p.teacher) for factor, loss in terms)
        return each, *gradients(each.sum(), p)

    for reverse, limit in ((False, ForwardKL(**same)), (True, ReverseKL(**same))):
        found = solved((1.0, SkewKL(alpha=1e-9, reverse=reverse, **same)))
        torch.testing.assert_close(found, solved((1.0, limit)), rtol=1e-5, atol=1e-7)
        # a teacher that rules out all but one token, so that a KL is nearly all of its logits
        sure = 40 * p.teacher[0], p.teacher[1]
        for loss in (SkewKL(alpha=0.2, reverse=reverse, **same), SkewKL(alpha=0.2, reverse=reverse)):
            bound = -math.log(0.2) * loss.temperature**2
            assert (per_token(loss, p, teacher=sure) <= bound).all()
    halves = (0.3, SkewKL(alpha=0.3, **same)), (0.7, SkewKL(alpha=0.7, reverse=True, **same))
    torch.testing.assert_close(solved(*halves), solved((1.0, JSD(beta=0.3, **same))))


@pytest.mark.parametrize("loss", DIVERGENCES, ids=repr)
def test_cross_entropy_is_mixed_in_at_temperature_one(loss):
    """Against autograd on dense logits, with banned tokens, for one visit, none of the tokens twice, and no graph."""
    p, w = problem(), 0.3
    mixed = replace(loss, temperature=2.5, ce_weight=w)
    one, other = CrossEntropy(), replace(loss, temperature=2.5)
    call = {"teacher": p.teacher}
    expected = w * one(p.hidden, p.head, p.labels) + (1 - w) * other(p.hidden, p.head, p.labels, **call)
    found, stats = mixed.compute(p.hidden, p.head, p.labels, observe=("entropy",), **call)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, p), gradients(expected, p))
    plain = vocab_stats(p.hidden, p.head, p.labels, outputs=("lse", "target", "entropy"))
    for name in ("lse", "target", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name).detach())
    with torch.no_grad():
        torch.testing.assert_close(mixed(p.hidden, p.head, p.labels, **call), expected.detach())
    only = replace(loss, ce_weight=1.0)(p.hidden, p.head, p.labels, **call)
    torch.testing.assert_close(only, one(p.hidden, p.head, p.labels))


@pytest.mark.parametrize("loss", DIVERGENCES, ids=repr)
def test_banned_tokens_add_nothing_to_a_divergence(loss):
    """A bias of -inf on both sides equals a vocabulary without these tokens."""
    p = problem()
    banned = torch.zeros(V, dtype=torch.bool).index_fill_(0, torch.tensor([3, V - 1]), True)
    p.labels[p.labels == 3] = p.labels[p.labels == V - 1] = 5
    hidden, teacher = p.teacher
    other = torch.randn(V, dtype=torch.float64)

    def solved(keep, *biases):
        head = Head(p.head.weight[keep], biases[0][keep])
        labels = torch.where(p.labels == -100, p.labels, keep.cumsum(0)[p.labels.clamp(min=0)] - 1)
        call = {"teacher": (hidden, Head(teacher.weight[keep], biases[1][keep]))}
        total = replace(loss, ce_weight=0.2)(p.hidden, head, labels, **call)
        return total, *torch.autograd.grad(total, [p.hidden, p.head.weight])

    everything = torch.ones(V, dtype=torch.bool)
    biases = [x.detach().masked_fill(banned, -math.inf) for x in (p.head.bias, other)]
    torch.testing.assert_close(solved(everything, *biases), solved(~banned, p.head.bias.detach(), other))


# --- EISL ------------------------------------------------------------------------------------------------------------


def full(shape=(3, 5)):
    return problem(labels=torch.randint(V, shape))


def test_eisl_of_whole_runs_is_cross_entropy(impl, device):
    p = problem(device=device, labels=torch.randint(V, (3, 6)))
    p.labels[0, :2], p.labels[1, 3], p.labels[2, 4:] = -100, -100, -100  # padding left and right, and a gap
    whole = EISL(ngrams=(0,), floor=-1e4)
    torch.testing.assert_close(per_token(whole, p, impl=impl), per_token(CrossEntropy(), p, impl=impl))
    found, wanted = (loss(p.hidden, p.head, p.labels, impl=impl) for loss in (whole, CrossEntropy()))
    torch.testing.assert_close(gradients(found, p), gradients(wanted, p))


@pytest.mark.parametrize("loss", [EISL(), EISL(ngrams=(1, 2, 0), ce_factor=0.3), EISL(ngrams=(4, -1))], ids=repr)
def test_eisl_padding_and_gaps(loss):
    """Rows padded to one length, and two answers in one row, are each as good as on their own."""
    p = full()
    p.labels[0, 3:], p.labels[1, 2] = -100, -100
    found = per_token(loss, p)
    for row, part in ((0, slice(0, 3)), (1, slice(0, 2)), (1, slice(3, 5)), (2, slice(0, 5))):
        alone = loss(p.hidden[row, part], p.head, p.labels[row, part], reduction="none")
        torch.testing.assert_close(found[row, part], alone)


def test_eisl_unigrams_do_not_mind_the_order_of_the_output():
    p = full((1, 6))
    shuffled = p.hidden[:, torch.randperm(6)]
    for n, same in ((1, True), (2, False)):
        found, moved = (EISL(ngrams=(n,))(h, p.head, p.labels) for h in (p.hidden, shuffled))
        assert torch.allclose(found, moved) is same


def test_eisl_gumbel_obeys_the_global_generator():
    p = full()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(per_token(EISL(gumbel=True), p).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_eisl_sizes():
    assert EISL(ngrams=(1, 2)).sizes(1) == {1: 1.0}  # a dropped n leaves its share
    assert EISL(ngrams=(1, 2), weights=(0.8, 0.4)).sizes(5) == pytest.approx({1: 0.8, 2: 0.4})
    assert EISL(ngrams=(1, 2, 9), weights=(0.6, 0.2, 0.2)).sizes(5) == pytest.approx({1: 0.75, 2: 0.25})
    assert EISL(ngrams=()).sizes(5) == EISL(ngrams=(7, -9)).sizes(5) == {5: 1.0}
    assert EISL(ngrams=(0, -1)).sizes(5) == {5: 0.5, 4: 0.5}


def test_eisl_reads_declared_statistics_alone(monkeypatch):
    p, computed = problem(), sequence.stream_stats

    def poisoned(*args, **kwargs):
        stats = computed(*args, **kwargs)
        stats.values |= {k: v * math.nan for k, v in stats.values.items() if k not in loss.uses}
        return stats

    for loss in (EISL(), EISL(ce_factor=0.5)):
        expected = loss(p.hidden, p.head, p.labels)
        with monkeypatch.context() as patched:
            patched.setattr(sequence, "stream_stats", poisoned)
            torch.testing.assert_close(loss(p.hidden, p.head, p.labels), expected)


# --- logits that exist already ---------------------------------------------------------------------------------------

ON_LOGITS = [(name, options) for name, options in CASES if not LOSSES[name].needs_teacher]
without_teacher = pytest.mark.parametrize(
    ("name", "options"), ON_LOGITS, ids=[f"{n}-{','.join(f'{k}={v}' for k, v in o.items())}" for n, o in ON_LOGITS]
)


def classes(name, options, dtype=torch.float64, labels=None):
    """A registered loss, class logits [2, 7, V], and labels ignored at the ends; EMO gets embeddings of the classes."""
    loss, labels = losses.get(name, **options), problem().labels if labels is None else labels
    if isinstance(loss, EMO):
        loss = replace(loss, cost=torch.randn(V, 5, dtype=torch.float64).to(dtype))
    return loss, (2 * torch.randn(*labels.shape, V, dtype=torch.float64)).to(dtype).requires_grad_(), labels


def literal(loss, logits, labels):
    """The paper's formula for the classes with a label."""
    return loss.reference(logits[labels != -100], labels[labels != -100])


@without_teacher
def test_on_logits_equals_reference(name, options):
    """Value and gradient, and the gradient of a gradient penalty."""
    loss, logits, labels = classes(name, options)
    pair = [loss.on_logits(logits, labels), literal(loss, logits, labels).mean()]
    grads = [torch.autograd.grad(total, logits, create_graph=True)[0] for total in pair]
    for found, expected in (pair, grads, [torch.autograd.grad(g.square().sum(), logits)[0] for g in grads]):
        torch.testing.assert_close(found, expected)


@without_teacher
def test_on_logits_equals_the_loss_through_an_identity_head(name, options):
    """In float32, each class's loss and the gradient of a weighted mean."""
    loss, logits, labels = classes(name, options, torch.float32)
    weight, eye = torch.rand(labels.shape), Head(torch.eye(V))
    pair = [
        [
            call(reduction="none"),
            call(token_weight=weight),
            torch.autograd.grad(call(token_weight=weight), logits)[0],
        ]
        for call in (partial(loss.on_logits, logits, labels), partial(loss, logits, eye, labels))
    ]
    for found, expected in zip(*pair, strict=True):
        assert_close_at_scale(found, expected, 3e-7)


@without_teacher
def test_on_logits_reduces_as_the_loss_does(name, options):
    loss, logits, labels = classes(name, options)
    each, expected = loss.on_logits(logits, labels, reduction="none"), literal(loss, logits, labels)
    weight, mask = torch.rand(labels.shape), labels != -100
    assert each.shape == labels.shape and not each[~mask].any()
    torch.testing.assert_close(each[mask], expected)
    for how, divisor in (({"reduction": "sum"}, 1), ({}, mask.sum()), ({"num_items": torch.tensor(11)}, 11)):
        torch.testing.assert_close(loss.on_logits(logits, labels, **how), expected.sum() / divisor)
    weighted = (expected * weight[mask]).sum()
    torch.testing.assert_close(loss.on_logits(logits, labels, token_weight=weight), weighted / weight[mask].sum())
    torch.testing.assert_close(loss.on_logits(logits, labels, token_weight=weight, reduction="sum"), weighted)
    other = labels.where(mask, 255).to(torch.uint8)
    torch.testing.assert_close(loss.on_logits(logits, other, ignore_index=255), expected.mean())
    torch.testing.assert_close(loss.on_logits(logits[0], labels[0]), expected.mean())  # the second row has no label


@without_teacher
def test_on_logits_of_nothing_is_a_connected_zero(name, options):
    loss, logits, labels = classes(name, options, torch.float32, torch.full((2, 3), -100))
    for how in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 0}):
        found = loss.on_logits(logits, labels, **how)
        assert not found.any()
        assert torch.equal(torch.autograd.grad(found.sum(), logits)[0], torch.zeros_like(logits))


@without_teacher
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_logits_in_low_precision_is_no_worse_than_torch(name, options, dtype):
    loss, logits, labels = classes(name, options, dtype)
    exact = logits.detach().double().requires_grad_()
    truth, plain = literal(loss, exact, labels).mean(), literal(loss, logits, labels).mean()
    found = loss.on_logits(logits, labels)
    assert found.dtype == torch.float32
    assert_no_worse(found, plain, truth)
    of = [torch.autograd.grad(total, z)[0] for total, z in ((found, logits), (plain, logits), (truth, exact))]
    assert of[0].dtype == dtype
    assert_no_worse(*of)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, by forward mode
@without_teacher
def test_on_logits_under_torch_func(name, options):
    """Reverse mode and forward mode give what a backward does."""
    if name == "eisl" and torch.__version__ < "2.10":
        pytest.skip("torch 2.9 cannot read the runs of valid tokens under torch.func")
    loss, logits, labels = classes(name, options)
    value, z, along = partial(loss.on_logits, labels=labels), logits.detach(), torch.randn_like(logits)
    expected = torch.autograd.grad(value(logits), logits)[0]
    torch.testing.assert_close(torch.func.grad(value)(z), expected)
    torch.testing.assert_close(torch.func.jvp(value, (z,), (along,))[1], (expected * along).sum())


def test_on_logits_refuses_what_logits_do_not_say():
    z, labels = torch.randn(4, V), torch.arange(4)
    for loss in DIVERGENCES:
        with pytest.raises(ValueError, match=f"{type(loss).__name__} compares with a teacher"):
            loss.on_logits(z, labels)
    for cost in ("frozen", "current"):
        with pytest.raises(ValueError, match=f"cost is '{cost}', but logits come without a head"):
            EMO(cost=cost).on_logits(z, labels)
    with pytest.raises(ValueError, match=f"cost has 5 rows but there are {V} classes"):
        EMO(cost=torch.randn(5, 2)).on_logits(z, labels)
    loss = Focal()
    with pytest.raises(ValueError, match="reduction is 'median': choose 'mean', 'sum' or 'none'"):
        loss.on_logits(z, labels, reduction="median")
    with pytest.raises(ValueError, match=r"token_weight has shape \(3,\) but labels \(4,\)"):
        loss.on_logits(z, labels, token_weight=torch.ones(3))
    with pytest.raises(ValueError, match="pass one label per row of logits"):
        loss.on_logits(z.T, labels)
    with pytest.raises(ValueError, match=rf"labels range over \[0, {V}\]"):
        loss.on_logits(z, torch.tensor([0, 1, 2, V]))


# --- options and errors ----------------------------------------------------------------------------------------------


OF_LOSSES = ("observe", "tail", "unreduced")  # `vocab_stats` has `outputs`, and computes no loss


def test_public_functions_take_what_a_request_holds():
    """The fields of a Request are their keywords, with the same defaults."""
    public = {f.name: f.default for f in fields(Request)}
    for function, others in ((vocab_loss, set()), (Loss.compute, {"unreduced"}), (vocab_stats, set(OF_LOSSES))):
        parameters = inspect.signature(function).parameters
        keywords = {name: parameters[name].default for name in public if name not in others}
        assert keywords == {name: default for name, default in public.items() if name not in others}


def test_get():
    assert losses.get(None) == losses.get("cross_entropy") == CrossEntropy()
    assert losses.get("focal:gamma=3") == losses.get("focal", gamma="3") == losses.get("focal", gamma=3) == Focal(3)
    assert losses.get("eisl:ngrams=(1, 2, 0), ce_factor=.5") == EISL(ngrams=(1, 2, 0), ce_factor=0.5)
    assert losses.get("emo:variant=emo2,gt_detach=True").describe() == EMO("emo2", gt_detach=True).describe()
    assert losses.get("emo", ratio_clamp="None").ratio_clamp is None
    assert losses.get("eisl:floor=-inf") == EISL(floor=-math.inf)
    assert losses.get(Focal(1.0)) == Focal(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.get("cross-entropy"), "loss is 'cross-entropy': choose one of cross_entropy, focal"),
        (lambda: losses.get("focal", alpha=1), "does not take alpha: its options are gamma"),
        (lambda: losses.get("focal:gamma"), "options are 'gamma': write them as key=value"),
        (lambda: losses.get("focal:gamma=much"), "cannot take {'gamma': 'much'}: gamma is 'much': choose a finite"),
        (
            lambda: losses.get("focal:gamma=-1"),
            "'focal' cannot take {'gamma': -1}: gamma is -1: choose",
        ),
        (lambda: losses.get("focal:gamma=nan"), "gamma is nan: choose a finite number >= 0"),
        (lambda: losses.get("focal:gamma=1, gamma=2"), "options are 'gamma=1, gamma=2': set gamma once"),
        (
            lambda: losses.get("focal:gamma=1", gamma=2),
            "'focal:gamma=1' with gamma=2 beside it: set gamma once",
        ),
        (lambda: losses.get("focal:gama=1"), "'focal' does not take gama: its options are gamma"),
        (lambda: losses.get("focal:3"), "options are '3': write them as key=value"),
        (lambda: losses.get("focal:**{'gamma': 3}"), "write them as key=value"),
        (lambda: losses.get("focal:gamma=1), dict(gamma=2"), "write them as key=value"),
        (lambda: losses.get("comp_sum:tau=inf"), "tau is inf: choose a finite number >= 0"),
        (
            lambda: losses.get("cross_entropy:label_smoothing=1.5"),
            r"label_smoothing is 1.5: choose a share in",
        ),
        (lambda: losses.get("cross_entropy:z_loss=nan"), "z_loss is nan: choose a finite weight"),
        (lambda: losses.get("jsd:beta=1.5"), r"beta is 1.5: choose a share in \(0, 1\)"),
        (lambda: losses.get("jsd:temperature=nan"), "temperature is nan: choose a positive number"),
        (lambda: losses.get("eisl:ngrams=2"), r"ngrams is 2: pass integers such as \(1, 2\)"),
        (lambda: losses.get("eisl:ngrams=(1, 1.5)"), r"ngrams is \(1, 1.5\): pass integers"),
        (lambda: losses.get("eisl:gumbel=maybe"), "gumbel is 'maybe': choose True or False"),
        (lambda: losses.get("eisl:weights=(1, inf)"), "weights is .*: pass one positive number for each of ngrams"),
        (lambda: losses.get("emo:gt_detach=1"), "gt_detach is 1: choose True or False"),
        (lambda: losses.get("emo:ratio_clamp=nan"), "ratio_clamp is .* in emo1: pass a number > 0"),
        (lambda: Focal(gamma=True), "gamma is True: choose a finite number >= 0"),
        (lambda: Focal(gamma=None), "gamma is None: choose a finite number >= 0"),
        (lambda: EISL(weights=1.0), "weights is 1.0: pass one positive number for each of ngrams"),
        (lambda: losses.get(Focal(), gamma=1), "loss is an object"),
        (lambda: Focal(gamma=-1), "gamma is -1: choose a finite number >= 0"),
        (lambda: Focal(gamma=math.nan), "gamma is nan"),
        (lambda: CompSum(tau=-0.5), "tau is -0.5: choose a finite number >= 0"),
        (lambda: TaiLr(gamma=2), r"gamma is 2: choose a number in \[0, 1\]"),
        (lambda: TaiLr(w_min=-1), "w_min is -1: choose"),
        (lambda: TaiLr(label_smoothing=1), "label_smoothing is 1: choose"),
        (lambda: CrossEntropy(z_loss=-1), "z_loss is -1: choose"),
        (lambda: MixCE(eta=1.5), "eta is 1.5: choose a share"),
        (lambda: EMO(variant="emo3"), "variant is 'emo3': choose 'emo1', 'emo2' or 'emo'"),
        (lambda: EMO(cost="head"), "cost is 'head': choose 'frozen', 'current' or a"),
        (lambda: EMO(cost=torch.zeros(3)), "cost is tensor"),
        (lambda: EMO(ratio_clamp=0), "ratio_clamp is 0 in emo1: pass a number > 0"),
        (lambda: EMO(variant="emo2", ratio_clamp=3), "ratio_clamp is 3 in emo2: pass a number > 0, to emo1 only"),
        (lambda: EISL(weights=(1.0,)), "weights is .*: pass one positive number for each of ngrams"),
        (lambda: EISL(ce_factor=-1), "ce_factor is -1: choose"),
        (lambda: EISL(ngram_factor=-1), "ngram_factor is -1: choose"),
        (lambda: EISL(floor=1), "floor is 1: choose"),
        (lambda: ForwardKL(temperature=0), "temperature is 0: choose a positive number"),
        (lambda: JSD(beta=1), "beta is 1: choose a share in"),
        (lambda: SkewKL(alpha=0), "alpha is 0: choose a share in .0, 1., or the forward_kl"),
        (lambda: SkewKL(reverse=1), "reverse is 1"),
        (lambda: TotalVariation(ce_weight=1.5), r"ce_weight is 1.5: choose a share in \[0, 1\]"),
    ],
)
def test_errors_of_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# teachers that do not fit
LARGER = (torch.zeros(2, 7, 3).double(), Head(torch.ones(V + 1, 3).double()))
SHORTER = (torch.zeros(2, 3, 3).double(), Head(torch.ones(V, 3).double()))


@pytest.mark.parametrize(
    ("loss", "call", "message"),
    [
        (EMO(), {}, r"cost is 'frozen' but no weight is bound: use loss.bind\(head.weight\), or cost='current'"),
        (EMO(cost=torch.ones(V + 1, 2, dtype=torch.float64)), {}, "cost has 38 rows but the head 37 tokens"),
        (ForwardKL(), {}, r"ForwardKL compares with a teacher: pass teacher=\(hidden, head\)"),
        *((loss, {"teacher": LARGER}, "teacher's head has 38 tokens") for loss in DIVERGENCES),
        *((loss, {"teacher": SHORTER}, r"shape \(2, ") for loss in DIVERGENCES),
        (Focal(), {"reduction": "average"}, "reduction is 'average': choose 'mean', 'sum' or 'none'"),
    ],
)
def test_errors_of_calls(loss, call, message):
    p = problem()
    with pytest.raises(ValueError, match=message):
        loss(p.hidden, p.head, p.labels, **call)


class Squared(CrossEntropy):
    """A loss with another formula, which inherits that its gradients were constants."""

    def of(self, stats):
        return stats.nll**2


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.2), CrossEntropy(z_loss=0.1), Squared()]
)
@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.5, dtype=torch.float32), None])
def test_gradients_that_are_constants_are_those_of_the_graph(monkeypatch, loss, weight):
    """A linear loss skips the graph of every chunk; values, gradients and the losses of tokens stay what they are."""
    assert loss.linear is (loss in (CrossEntropy(), CrossEntropy(label_smoothing=0.2)) and type(loss) is CrossEntropy)
    hidden = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(30, 8, dtype=torch.float64, requires_grad=True))
    labels = torch.randint(30, (50,))
    labels[::7] = -100
    weight = torch.rand(50) if weight is None else weight

    def answer():
        total, stats = vocab_loss(loss, hidden, head, labels, token_weight=weight, memory_budget=30 * 8 * 9)
        return total.detach(), stats.loss, *torch.autograd.grad(total, [hidden, head.weight])

    found = answer()
    monkeypatch.setattr(type(loss), "linear", False, raising=False)
    for value, want in zip(found, answer(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "weight", [0.3, 1 / 8190, 4.0, 0.0, torch.tensor([0.1, -0.7, 0.0]), torch.zeros(3), torch.empty(0)]
)
def test_float16_gradients_are_scaled_by_a_power_of_two(weight):
    """What token weights are divided by, and gradients multiplied by, rounds nothing; it is within a factor of 2."""
    unit = float(unit_of(weight, torch.float16))
    largest = float(torch.as_tensor(weight).abs().max()) if torch.as_tensor(weight).numel() else 0.0
    assert math.frexp(unit)[0] == 0.5 and (unit <= largest < 2 * unit or (unit == 1 and largest == 0))
    assert unit_of(weight, torch.bfloat16) == 1


# --- whole rows of two models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [replace(x, ce_weight=0.5, temperature=2.0) for x in DIVERGENCES], ids=repr)
def test_whole_rows_of_two_models_are_never_all_in_memory(loss, monkeypatch):
    """Of 200 tokens no tensor has more than a few rows of the vocabulary; each is computed once, without a graph."""
    p = problem(labels=torch.randint(V, (200,)))
    rows = []
    counted = lambda *args: rows.append(len(args[0])) or type(loss).slope(loss, *args)  # noqa: E731
    monkeypatch.setattr(divergences, "map_rows", None)  # which would compute them twice
    object.__setattr__(loss, "slope", counted)
    object.__setattr__(loss, "divergence", None)  # which autograd would differentiate
    with Largest() as largest:
        loss(p.hidden, p.head, p.labels, teacher=p.teacher, memory_budget=10 * V * 8).backward()
    assert sum(rows) == 200 and max(rows) <= 5
    assert largest.numel <= 200 * D


def test_low_precision_sums_of_whole_rows_are_few():
    """A weight gradient in bfloat16 is rounded at most 16 times, whatever the budget."""
    hidden, weight = (torch.randn(n, D).bfloat16() for n in (40, V))
    calls = []

    def squares(_, student, teacher):
        calls.append(len(student))
        return {"loss": (student - teacher).square().sum(-1)}

    args = [hidden.requires_grad_()], Head(weight.requires_grad_()), torch.zeros(40, dtype=torch.long)
    request = Request(("top",), memory_budget=1)
    loss = RowLoss(squares, ((0, 1.0), (1, 1.0)))
    total, stats = stream_divergence(loss, *args, request, second=(hidden, Head(weight)))
    assert sum(calls) == 40 and len(calls) <= MAX_LOW_PRECISION_SUMS
    assert total == 0 and torch.equal(stats.top, args[1].logits(hidden).argmax(-1))
