"""Class weights: torch's F.cross_entropy of dense logits, with smoothing, z-loss, every reduction and split heads.

The z-loss has no class weights and its mean is over tokens, as in Liger-Kernel's tests of its `ce_weight`
(test/transformers/test_cross_entropy.py, `CrossEntropyWithZLoss`), whose settings are among those here.
"""

import json

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from hf_xent import losses
from hf_xent.lazy import LazyLogits, PatchState
from hf_xent.losses import CrossEntropy, linear_cross_entropy
from hf_xent.ops import Head, Shard, vocab_loss
from hf_xent.patching import patch, patch_state
from hf_xent.trainers.xent import XentConfig, XentTrainer
from support.models import V as MODEL_V
from support.models import batch, gradients, tiny
from support.oracle import Largest, assert_close_at_scale, assert_no_worse
from support.ranks import run_ranks

N, D, V = 23, 6, 37
IMPLS = pytest.mark.parametrize("impl", ["reference", "chunked"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
SETTINGS = {  # label smoothing, z-loss, softcap; the last is Liger's
    "plain": (0.0, 0.0, None),
    "smoothing": (0.1, 0.0, None),
    "z-loss": (0.0, 1e-2, None),
    "smoothing and softcap": (0.2, 0.0, 3.0),
    "all": (0.1, 1e-4, 30.0),
}
SETTING = pytest.mark.parametrize("setting", SETTINGS)
BUDGET = {"memory_budget": 5 * V * 8}  # chunks of five rows, panels of a few columns


def operands(dtype=torch.float64, ignored=-100):
    """Hidden states, weight and bias as leaves, labels of which some are ignored, and class weights, one of them 0."""
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((N, D), (V, D), (V,))]
    labels = torch.randint(V, (N,))
    labels[::5] = ignored
    weights = torch.rand(V, dtype=torch.float64) * 3
    weights[labels[1]] = 0
    return [x.to(dtype).requires_grad_() for x in leaves], labels, weights.to(dtype)


def capped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense(leaves, labels, weights, setting, reduction, ignored=-100):
    """Torch's cross-entropy of dense logits, and the z-loss of the tokens that count."""
    smoothing, z_loss, softcap = SETTINGS[setting]
    hidden, weight, bias = leaves
    logits = capped(F.linear(hidden, weight, bias), softcap)
    loss = F.cross_entropy(
        logits, labels, weights, reduction=reduction, label_smoothing=smoothing, ignore_index=ignored
    )
    squares = torch.where(labels != ignored, z_loss * logits.logsumexp(-1) ** 2, 0.0)
    return loss + {"mean": squares.sum() / (labels != ignored).sum(), "sum": squares.sum(), "none": squares}[reduction]


def streamed(leaves, labels, weights, setting, **options):
    smoothing, z_loss, softcap = SETTINGS[setting]
    hidden, weight, bias = leaves
    return linear_cross_entropy(
        hidden, weight, labels, bias=bias, softcap=softcap, class_weight=weights, label_smoothing=smoothing,
        z_loss=z_loss, **options,
    )  # fmt: skip


@IMPLS
@REDUCTIONS
@SETTING
@pytest.mark.parametrize("ignored", [-100, 3])
def test_equals_torch(impl, reduction, setting, ignored):
    leaves, labels, weights = operands(ignored=ignored)
    expected = dense(leaves, labels, weights, setting, reduction, ignored)
    for budget in ({}, BUDGET):
        found = streamed(
            leaves, labels, weights, setting, reduction=reduction, ignore_index=ignored, impl=impl, **budget
        )
        torch.testing.assert_close(found, expected)
        upstream = torch.rand_like(expected)
        ours, torchs = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@SETTING
def test_second_derivatives_equal_torchs(reduction, setting):
    leaves, labels, weights = operands()
    directions = [torch.randn_like(x) for x in leaves]
    found = []
    for loss in (
        dense(leaves, labels, weights, setting, reduction),
        streamed(leaves, labels, weights, setting, reduction=reduction, **BUDGET),
    ):
        first = torch.autograd.grad(loss.square().sum(), leaves, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        found.append(torch.autograd.grad(product, leaves))
    torch.testing.assert_close(*found[::-1])


@SETTING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_torch(setting, dtype):
    leaves, labels, weights = operands(dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = dense(exact, labels, weights.double(), setting, "mean")
    torchs, ours = dense(leaves, labels, weights, setting, "mean"), streamed(leaves, labels, weights, setting)
    assert ours.dtype == torch.float32
    assert_no_worse(ours.detach(), torchs.detach(), truth.detach(), what="loss")
    grads = (torch.autograd.grad(loss, x) for loss, x in ((ours, leaves), (torchs, leaves), (truth, exact)))
    for name, own, other, true in zip(("hidden", "weight", "bias"), *grads, strict=True):
        assert_no_worse(own, other, true, what=name)


@REDUCTIONS
def test_token_weights_multiply_class_weights(reduction):
    """The mean divides by the sum of the products, that of the z-loss by the sum of token weights."""
    leaves, labels, weights = operands()
    token_weight = torch.rand(N, dtype=torch.float64)
    losses_of_tokens = dense(leaves, labels, weights, "smoothing", "none")
    valid = labels != -100
    squares = (F.linear(*leaves).logsumexp(-1) ** 2)[valid]
    counted, of_label = token_weight[valid], weights[labels[valid]]
    sums = (losses_of_tokens[valid] * counted).sum(), 0.1 * (squares * counted).sum()
    expected = {
        "mean": sums[0] / (counted * of_label).sum() + sums[1] / counted.sum(),
        "sum": sum(sums),
        "none": (losses_of_tokens + torch.zeros(N).double().masked_scatter(valid, 0.1 * squares)) * token_weight,
    }[reduction]
    loss = CrossEntropy(label_smoothing=0.1, z_loss=0.1, class_weight=weights)
    hidden, weight, bias = leaves
    found = loss(hidden, Head(weight, bias), labels, token_weight=token_weight, reduction=reduction)
    torch.testing.assert_close(found, expected)
    ours, torchs = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(ours, torchs)


def test_num_items_take_the_place_of_all_sums():
    leaves, labels, weights = operands()
    found = streamed(leaves, labels, weights, "all", num_items=torch.tensor(50))
    torch.testing.assert_close(found, dense(leaves, labels, weights, "all", "sum") / 50)


@SETTING
def test_sums_and_logits_that_exist(setting):
    """`vocab_loss` with the loss itself, and `on_logits`."""
    leaves, labels, weights = operands()
    hidden, weight, bias = leaves
    smoothing, z_loss, softcap = SETTINGS[setting]
    loss = CrossEntropy(smoothing, z_loss, weights)
    total, stats = vocab_loss(loss, hidden, Head(weight, bias, softcap=softcap), labels)
    torch.testing.assert_close(total, dense(leaves, labels, weights, setting, "sum"))
    torch.testing.assert_close(stats.loss, dense(leaves, labels, weights, setting, "none").detach())
    logits = capped(F.linear(hidden, weight, bias), softcap)
    for reduction in ("mean", "sum", "none"):
        expected = dense(leaves, labels, weights, setting, reduction)
        torch.testing.assert_close(loss.on_logits(logits, labels, reduction=reduction), expected)


@pytest.mark.parametrize("setting", ["plain", "smoothing", "z-loss"])
def test_where_no_label_counts_the_loss_is_zero(setting):
    """Torch's is NaN, which would reach every parameter."""
    leaves, labels, weights = operands()
    for ids, w in ((torch.full_like(labels, -100), weights), (labels[:0], weights)):
        loss = streamed([leaves[0][: len(ids)], *leaves[1:]], ids, w, setting)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))
    if setting == "plain":
        assert streamed(leaves, labels, torch.zeros_like(weights), setting) == 0


def test_the_gradient_is_of_the_weights_of_the_forward():
    leaves, labels, weights = operands()
    expected = torch.autograd.grad(dense(leaves, labels, weights, "smoothing", "none").sum(), leaves)
    found = streamed(leaves, labels, weights, "smoothing", reduction="none").sum()
    weights.zero_()
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected)


@SETTING
def test_nothing_is_as_large_as_the_logits(setting):
    leaves, labels, weights = [torch.randn(s).requires_grad_() for s in ((96, 4), (640, 4), (640,))], *operands()[1:]
    labels, weights = torch.randint(640, (96,)), torch.rand(640)
    with Largest() as largest:
        streamed(leaves, labels, weights, setting, memory_budget=16 * 640 * 4).backward()
    assert largest.numel <= 96 * 640 // 4


def test_the_sparse_tail_is_for_losses_without_smoothing():
    leaves, labels, weights = operands()
    exact, sparse = (
        torch.autograd.grad(streamed(leaves, labels, weights, "plain", tail=tail), leaves) for tail in (0.0, 1e-6)
    )
    for found, expected in zip(sparse, exact, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    with pytest.raises(ValueError, match="loss CrossEntropy differentiates 'mean'"):
        streamed(leaves, labels, weights, "smoothing", tail=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_over_lazy_logits(reduction, smoothing):
    """Also weights that torch takes and `linear_cross_entropy` refuses."""
    (hidden, weight, bias), labels, weights = operands()
    leaves = [hidden, weight, bias]
    weights[5] = -0.5
    options = {"weight": weights, "reduction": reduction, "label_smoothing": smoothing}
    expected = F.cross_entropy(F.linear(*leaves), labels, **options)
    state = PatchState()
    found = F.cross_entropy(LazyLogits.of(hidden, Head(weight, bias), state), labels, **options)
    torch.testing.assert_close(found, expected)
    upstream = torch.rand_like(expected)
    ours, torchs = (torch.autograd.grad(x, leaves, upstream) for x in (found, expected))
    torch.testing.assert_close(ours, torchs)
    assert (state.streamed, state.materialized) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_over_lazy_logits_in_low_precision(dtype):
    (hidden, weight, bias), labels, weights = operands(dtype)
    leaves = [hidden, weight, bias]
    options = {"label_smoothing": 0.1}
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = F.cross_entropy(F.linear(*exact), labels, weights.double(), **options)
    torchs = F.cross_entropy(F.linear(*leaves), labels, weights, **options)
    ours = F.cross_entropy(LazyLogits.of(hidden, Head(weight, bias)), labels, weights, **options)
    assert ours.dtype == torchs.dtype == dtype
    assert_no_worse(ours.detach(), torchs.detach(), truth.detach(), what="loss")
    grads = (torch.autograd.grad(loss, x) for loss, x in ((ours, leaves), (torchs, leaves), (truth, exact)))
    for name, *three in zip(("hidden", "weight", "bias"), *grads, strict=True):
        assert_no_worse(*three, what=name)


def test_weights_that_torch_refuses_are_its_error_over_lazy_logits():
    leaves, labels, weights = operands()
    lazy = LazyLogits.of(leaves[0], Head(*leaves[1:]))
    for refused in (weights.clone().requires_grad_(), weights[:-1], weights.long(), weights.to("meta")):
        with pytest.raises(RuntimeError):
            F.cross_entropy(lazy, labels, weight=refused, label_smoothing=0.1)


REFUSED = {
    "negative": (lambda w: w.index_fill(0, torch.tensor([2]), -1.5), r"class_weight\[2\] is -1.5: pass finite numbers"),
    "NaN": (lambda w: w.index_fill(0, torch.tensor([4]), torch.nan), r"class_weight\[4\] is nan: pass finite numbers"),
    "infinite": (lambda w: w.index_fill(0, torch.tensor([0]), torch.inf), r"class_weight\[0\] is inf"),
    "too long": (lambda w: torch.cat([w, w[:1]]), r"class_weight has shape \(38,\) on cpu: pass one number per row of"),
    "too short": (
        lambda w: w[:-1],
        r"class_weight has shape \(36,\) on cpu: pass one number per row of weight, \[37\]",
    ),
    "a matrix": (lambda w: w[None], r"class_weight has shape \(1, 37\)"),
    "device": (lambda w: w.to("meta"), r"class_weight has shape \(37,\) on meta: pass .*, on cpu"),
    "gradient": (lambda w: w.requires_grad_(), r"class_weight requires a gradient, but gets none: pass .*detach\(\)"),
    "flags": (lambda w: w > 1, r"class_weight is torch.bool of shape \(37,\) on cpu: pass a number per token"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("setting", ["plain", "smoothing"])
def test_refusals_are_one_line(name, setting):
    change, message = REFUSED[name]
    leaves, labels, weights = operands()
    with pytest.raises(ValueError, match=message) as error:
        streamed(leaves, labels, change(weights), setting)
    assert "\n" not in str(error.value)


def test_refusals_of_the_loss_itself():
    leaves, labels, weights = operands()
    hidden, head = leaves[0], Head(*leaves[1:])
    for numbers, message in (
        (["one"], r"class_weight is \['one'\]: pass a number per token of the vocabulary"),
        (1.0, r"class_weight is torch.float32 of shape \(\) on cpu: pass a number per token"),
        (
            torch.ones(3, device="meta"),
            "class_weight is torch.float32 of shape \\(3,\\) on meta: pass a number per token",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            CrossEntropy(class_weight=numbers)
    short = CrossEntropy(class_weight=weights[:-1])
    for call in (
        lambda: short(hidden, head, labels),
        lambda: vocab_loss(short, hidden, head, labels),
        lambda: short.on_logits(torch.randn(N, V), labels),
    ):
        with pytest.raises(ValueError, match=r"class_weight has shape \(36,\) on cpu"):
            call()
    with pytest.raises(ValueError, match="impl is 'triton' but class_weight is given with label smoothing"):
        CrossEntropy(0.1, class_weight=weights)(
            hidden.float(), Head(*(x.float() for x in leaves[1:])), labels, impl="triton"
        )
    short = CrossEntropy(class_weight=weights)(hidden, head, labels, impl="triton")  # without smoothing they suffice
    torch.testing.assert_close(short, dense(leaves, labels, weights, "plain", "mean"))


def test_the_loss_stays_a_frozen_dataclass():
    weights = [0.5, 1, 2]
    loss, same = CrossEntropy(0.1, class_weight=weights), CrossEntropy(0.1, class_weight=torch.tensor(weights))
    assert loss == same and hash(loss) == hash(same) and loss != CrossEntropy(0.1)
    assert loss != CrossEntropy(0.1, class_weight=[1, 1, 1]) and CrossEntropy() == losses.get(None)
    assert repr(loss) == "CrossEntropy(label_smoothing=0.1, z_loss=0.0, class_weight=<3 weights>)"
    assert repr(CrossEntropy(0.1)) == "CrossEntropy(label_smoothing=0.1, z_loss=0.0)"
    assert json.loads(json.dumps(loss.describe())) == {
        "loss": "cross_entropy", "label_smoothing": 0.1, "z_loss": 0.0, "class_weight": "tensor[3]",
    }  # fmt: skip
    assert losses.get("cross_entropy:label_smoothing=0.1") == CrossEntropy(0.1)
    assert losses.get("cross_entropy:label_smoothing=0.1, class_weight=[0.5, 1, 2]") == loss
    with pytest.raises(AttributeError, match="cannot assign"):
        loss.label_smoothing = 0.2


def test_a_patched_model_and_its_trainer(tmp_path):
    (ids, labels), weights = batch(), torch.rand(MODEL_V)
    model = tiny()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), weights, label_smoothing=0.1)
    expected.backward()
    stock = gradients(model)
    patch(model, loss=CrossEntropy(label_smoothing=0.1, class_weight=weights))
    loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected.detach())
    loss.backward()
    torch.testing.assert_close(gradients(model), stock)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)
    config = XentConfig(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    trainer = XentTrainer(tiny(), config, loss=CrossEntropy(class_weight=weights))
    assert trainer.objective == CrossEntropy(label_smoothing=0.1, class_weight=weights)


def split_operands():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    return draw(N, D), draw(V, D), draw(V), labels, torch.rand(V, generator=generator, dtype=torch.float64)


def split_losses(setting, shard=None):
    hidden, weight, bias, labels, weights = split_operands()
    rows = slice(None) if shard is None else slice(shard.start, shard.start + shard.width)
    leaves = [x.requires_grad_() for x in (hidden, weight[rows].clone(), bias[rows].clone())]
    smoothing, z_loss, softcap = SETTINGS[setting]
    loss, head = CrossEntropy(smoothing, z_loss, weights), Head(*leaves[1:], softcap=softcap, shard=shard)
    mean = loss(hidden, head, labels, **BUDGET)
    each = loss(hidden, head, labels, reduction="none", **BUDGET)
    found = [mean.detach(), each.detach(), *torch.autograd.grad(mean, leaves)]
    found += torch.autograd.grad(each.square().sum(), leaves)
    first = torch.autograd.grad(loss(hidden, head, labels, **BUDGET), leaves, create_graph=True)
    return found + list(torch.autograd.grad(sum(g.square().sum() for g in first[:1]), leaves))


def on_a_rank(rank):
    shard = Shard(dist.group.WORLD, rank * -(-V // dist.get_world_size()), V)
    return {setting: split_losses(setting, shard) for setting in SETTINGS}


def test_a_split_vocabulary_equals_a_whole_one(tmp_path):
    """Two gloo processes, each with its rows of the head and the weights of all classes."""
    ranks = run_ranks(2, on_a_rank, tmp_path)
    for setting in SETTINGS:
        for i, expected in enumerate(split_losses(setting)):
            parts = [rank[setting][i] for rank in ranks]
            whole = parts[0] if parts[0].shape == expected.shape else torch.cat(parts)
            assert_close_at_scale(whole, expected, 1e-10, f"{setting}, result {i}")
