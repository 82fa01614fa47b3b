"""LazyLogits: every consumer gives what the dense tensor gives, value and gradients; the lean ones make no logits."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from hf_xent.lazy import LazyLogits, PatchState, next_token_labels
from hf_xent.ops import Head

V = 30


@pytest.fixture
def operands():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(V, 8, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    labels = torch.randint(0, V, (2, 5))
    labels[0, 0] = -100
    return hidden, weight, bias, labels


def moved(labels):
    return next_token_labels(labels).reshape(-1)


LEAN = {
    "model loss": lambda x, y: F.cross_entropy(x.float().view(-1, V), moved(y)),
    "sliced and flattened": lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "ellipsis": lambda x, y: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), y[:, 1:].reshape(-1)),
    "sum": lambda x, y: F.cross_entropy(x.reshape(-1, V), moved(y), reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x.reshape(-1, V), moved(y), reduction="none"),
    "label smoothing": lambda x, y: F.cross_entropy(x.view(10, V), y.view(-1), label_smoothing=0.2),
    "class weights": lambda x, y: F.cross_entropy(x.view(10, V), y.view(-1), torch.linspace(0.1, 2, V)),
    "smoothed class weights": lambda x, y: F.cross_entropy(
        x.view(10, V), y.view(-1), torch.ones(V), label_smoothing=0.1
    ),
    "other ignore_index": lambda x, y: F.cross_entropy(x.view(10, V), y.view(-1).clamp(min=3), ignore_index=3),
    "module": lambda x, y: torch.nn.CrossEntropyLoss()(x.view(10, V), y.view(-1)),
    "softcap": lambda x, y: F.cross_entropy((torch.tanh(x / 3.0) * 3.0).view(-1, V), moved(y)),
    "scaled softcap, vocabulary slice": lambda x, y: F.cross_entropy(
        ((x * 0.7 / 2.0).tanh() * 2.0)[..., : V - 1].reshape(-1, V - 1), moved(y).clamp(max=V - 2)
    ),
    "nll_loss": lambda x, y: F.nll_loss(F.log_softmax(x, dim=-1).view(-1, V), moved(y)),
    "log_softmax gather": lambda x, y: x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]),
    "gather": lambda x, y: x.gather(-1, y.clamp(min=0)[..., None]),
    "logsumexp": lambda x, y: x.logsumexp(-1),
    "logsumexp keepdim": lambda x, y: torch.logsumexp(x, dim=-1, keepdim=True),
    "argmax": lambda x, y: x.argmax(-1),
    "one row": lambda x, y: F.cross_entropy(x[:, -1], y[:, -1]),
    "mask": lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "index list": lambda x, y: x[:, [0, 2]].logsumexp(-1),
    "unsqueezed and squeezed": lambda x, y: x.unsqueeze(0).squeeze(0).logsumexp(-1),
    "rows transposed": lambda x, y: F.cross_entropy(x.transpose(0, 1).contiguous().view(-1, V), y.T.reshape(-1)),
    "keywords": lambda x, y: F.cross_entropy(input=torch.reshape(x, shape=(-1, V)), target=moved(y)),
    "argmax over an axis": lambda x, y: x.argmax(axis=-1),
    "gather by keywords": lambda x, y: torch.gather(input=x, dim=-1, index=y.clamp(min=0)[..., None]),
    "log_softmax in another dtype": lambda x, y: torch.log_softmax(x, -1, torch.float64).gather(
        -1, y.clamp(min=0)[..., None]
    ),
    "a bias of the vocabulary": lambda x, y: F.cross_entropy((x * 2 + torch.linspace(0, 1, V)).view(-1, V), moved(y)),
    "a bias in front": lambda x, y: F.cross_entropy((torch.linspace(0, 1, V) + x).view(-1, V), moved(y)),
    "a bias less": lambda x, y: F.cross_entropy((x - torch.linspace(0, 1, V)).view(-1, V), moved(y)),
    "a scale in front": lambda x, y: F.cross_entropy((torch.tensor(0.3) * x).view(-1, V), moved(y)),
    "cast there and back": lambda x, y: F.cross_entropy(x.double().to(torch.float32).view(10, V), y.view(-1)),
}
DENSE = {
    "softmax": lambda x, y: x.softmax(-1),
    "add": lambda x, y: x + 1.0,
    "varying scale": lambda x, y: x * torch.arange(V),
    "one column": lambda x, y: x[:, :, 3],
    "columns": lambda x, y: x[..., [1, 4]],
    "classes second": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "max": lambda x, y: x.max(-1).values,
    "soft targets": lambda x, y: F.cross_entropy(x.view(10, V), torch.full((10, V), 1 / V)),
    "scaled log-probabilities": lambda x, y: x.log_softmax(-1) * 2.0,
    "two tanhs": lambda x, y: x.tanh().tanh().sum(-1),
    "normalized twice": lambda x, y: x.log_softmax(-1).log_softmax(-1),
    "times zero": lambda x, y: ((x.tanh() * 0) + 1).logsumexp(-1),
    "softcap of zero": lambda x, y: (x.tanh() * 0).log_softmax(-1),
    "overflow": lambda x, y: (x * 1e38 * 10).argmax(-1),
    "integers": lambda x, y: x.tanh().to(torch.int64).argmax(-1),
    "eight bits": lambda x, y: x.to(torch.float8_e4m3fn).float().logsumexp(-1),
}


def consume(fn, operands, lazily):
    hidden, weight, bias, labels = operands
    state = PatchState()
    logits = LazyLogits.of(hidden, Head(weight, bias), state) if lazily else F.linear(hidden, weight, bias)
    out = fn(logits, labels)
    value = out.dense() if isinstance(out, LazyLogits) else out
    grads = None
    if value.requires_grad:
        torch.manual_seed(3)
        grads = torch.autograd.grad(value, operands[:3], torch.randn_like(value), allow_unused=True)
    return value, grads, state


@pytest.mark.parametrize("name", [*LEAN, *DENSE])
def test_consumers_agree_with_the_dense_tensor(name, operands):
    fn = {**LEAN, **DENSE}[name]
    value, grads, state = consume(fn, operands, lazily=True)
    expected, expected_grads, _ = consume(fn, operands, lazily=False)
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value.float(), expected.float())  # as exactly as the operands are
    assert (grads is None) == (expected_grads is None)
    if grads is not None:
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert (state.materialized == 0) == (name in LEAN)
    assert (state.streamed > 0) == (name in LEAN)


@pytest.mark.parametrize(
    "options",
    [{"reduction": "avg"}, {"label_smoothing": 1.5}, {"weight": torch.ones(V - 1)}, {"ignore_index": "none"}],
    ids=lambda options: next(iter(options)),
)
def test_arguments_that_torch_refuses_are_refused(options, operands):
    hidden, weight, bias, labels = operands
    for logits in (LazyLogits.of(hidden, Head(weight, bias)), F.linear(hidden, weight, bias)):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            F.cross_entropy(logits.view(-1, V), labels.view(-1), **options)


@pytest.mark.parametrize("label", [V, -1, -100, -(2**31)])
def test_a_column_that_does_not_exist_is_torchs_error(label, operands):
    hidden, weight, bias, labels = operands
    for logits in (LazyLogits.of(hidden, Head(weight, bias)), F.linear(hidden, weight, bias)):
        with pytest.raises(RuntimeError, match="out of bounds"):
            logits.log_softmax(-1).gather(-1, torch.full_like(labels, label)[..., None])


def test_weights_that_are_no_tensor_are_torchs_error(operands):
    hidden, weight, bias, labels = operands
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        F.cross_entropy(LazyLogits.of(hidden, Head(weight, bias)).view(-1, V), labels.view(-1), weight=[1.0] * V)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0, 1e-320, 1e39])
@pytest.mark.parametrize("change", [lambda x, f: x * f, lambda x, f: x / f, lambda x, f: x.tanh() * f])
def test_factors_that_are_not_finite(factor, change, operands):
    hidden, weight, bias, _ = operands
    lazy, dense = LazyLogits.of(hidden, Head(weight, bias)), F.linear(hidden, weight, bias)
    torch.testing.assert_close(change(lazy, factor) + 0.0, change(dense, factor), equal_nan=True)


def test_written_values_are_seen_by_views(operands):
    def write(x, labels):
        view = x.view(-1, V)
        x[:, :, :3] = 0.0
        return F.cross_entropy(view, moved(labels))

    value, grads, state = consume(write, operands, lazily=True)
    expected, expected_grads, _ = consume(write, operands, lazily=False)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, expected_grads)
    assert state.materialized == 1, "the view shares its base's dense tensor"


@pytest.mark.parametrize(
    "use",
    [
        lambda x: (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
        lambda x: x.tanh().double().sum(),
        lambda x: x.clone().mul_(2)[:, -1].exp().sum(),
        lambda x: F.cross_entropy(x.view(-1, V), torch.arange(10)),
    ],
    ids=["entropy", "casts", "writes", "loss"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch._dynamo looks at it
def test_compiled_functions_of_lazy_logits(use, operands):
    hidden, weight, bias, _ = operands
    compiled = torch.compile(use, backend="eager")
    ours, expected = compiled(LazyLogits.of(hidden, Head(weight, bias))), use(F.linear(hidden, weight, bias))
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(*(torch.autograd.grad(x, operands[:3]) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_materializes_once(operands):
    x = LazyLogits.of(operands[0], Head(*operands[1:3]), PatchState())
    first, second = x.dense(), (x + 0.0)
    assert x.state.materialized == 1 and x.is_dense
    torch.testing.assert_close(first, second)


def test_gradients_of_consumers_below_python(operands):
    """A custom autograd function never calls __torch_function__; its gradient must still reach the operands."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    value, grads, _ = consume(lambda x, y: Double.apply(x.tanh()).sum(-1), operands, lazily=True)
    expected, expected_grads, _ = consume(lambda x, y: Double.apply(x.tanh()).sum(-1), operands, lazily=False)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_every_label_ignored_is_a_connected_zero(operands):
    hidden, weight, bias, labels = operands
    for reduction in ("mean", "sum"):
        loss = F.cross_entropy(
            LazyLogits.of(hidden, Head(weight, bias)).view(-1, V),
            torch.full_like(labels.view(-1), -100),
            reduction=reduction,
        )
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss.item() == 0.0
        assert all(g.abs().max() == 0 for g in grads)


def test_metadata_costs_nothing(operands):
    x = LazyLogits.of(operands[0], Head(*operands[1:3]), PatchState())
    assert (
        isinstance(x, torch.Tensor) and x.shape == (2, 5, V) and x.size(-1) == V and x.numel() == 10 * V and len(x) == 2
    )
    assert (
        x.requires_grad and not x.is_leaf and x.grad_fn is not None and x.device.type == "cpu" and x.is_floating_point()
    )
    assert "not computed" in repr(x)
    assert x.state.materialized == 0


def test_detached_and_without_grad(operands):
    x = LazyLogits.of(operands[0], Head(*operands[1:3]), PatchState())
    assert not x.detach().requires_grad
    with torch.no_grad():
        loss = F.cross_entropy(LazyLogits.of(operands[0], Head(*operands[1:3])).view(-1, V), moved(operands[3]))
    assert not loss.requires_grad


def test_copies_and_files_are_ordinary_tensors(operands):
    hidden, weight, bias, _ = (t.detach() for t in operands)
    x, expected = LazyLogits.of(hidden, Head(weight, bias)), F.linear(hidden, weight, bias)
    torch.testing.assert_close(copy.deepcopy(x), expected)
    file = io.BytesIO()
    torch.save(LazyLogits.of(hidden, Head(weight, bias)), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), expected)
    torch.testing.assert_close(torch.from_numpy(LazyLogits.of(hidden, Head(weight, bias)).numpy()), expected)


def test_stats_of_labels_and_of_next_tokens(operands):
    hidden, weight, bias, labels = operands
    x = LazyLogits.of(hidden, Head(weight, bias))
    logp = F.linear(hidden, weight, bias).log_softmax(-1)
    aligned = x.stats(labels)
    expected = torch.where(labels == -100, 0, logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1))
    torch.testing.assert_close(aligned.logp, expected)
    shifted = x.stats(labels, shift=True, outputs=("lse", "target", "rank"))
    torch.testing.assert_close(shifted.logp[:, :-1], logp[:, :-1].gather(-1, labels[:, 1:, None]).squeeze(-1))
    assert not shifted.mask[:, -1].any() and shifted.logp[:, -1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(dtype, operands):
    hidden, weight, bias, labels = operands
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    exact = F.cross_entropy(F.linear(*(t.double() for t in low)).view(-1, V), moved(labels))
    dense = F.cross_entropy(F.linear(*low).float().view(-1, V), moved(labels))
    ours = F.cross_entropy(LazyLogits.of(low[0], Head(*low[1:])).float().view(-1, V), moved(labels))
    assert abs(ours - exact) <= 2 * abs(dense - exact) + 1e-5
    truth = torch.autograd.grad(exact, low)
    for mine, theirs, g in zip(torch.autograd.grad(ours, low), torch.autograd.grad(dense, low), truth, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - g.double()).norm() <= 2 * (theirs.double() - g.double()).norm() + 1e-5


def test_logits_moved_to_another_device_stay_lazy(operands):
    """As accelerate moves a split model's outputs: the answers are there, nothing was made on the way."""
    *tensors, labels = operands
    x = LazyLogits.of(tensors[0], Head(*tensors[1:]), state := PatchState())
    there = x.to("meta")[:, :-1]
    assert there.device.type == "meta" and there.shape == (2, 4, V) and x.device.type == "cpu"
    assert F.cross_entropy(there.flatten(0, 1), labels[:, 1:].flatten()).device.type == "meta"
    assert there.argmax(-1).device.type == there.stats(labels[:, 1:]).lse.device.type == "meta"
    assert state.materialized == 0 and there.dense().device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_values_and_gradients_of_moved_logits(operands):
    *tensors, labels = operands
    there = LazyLogits.of(tensors[0], Head(*tensors[1:]), state := PatchState()).to("cuda")
    loss = F.cross_entropy(there.view(-1, V), moved(labels).cuda())
    expected = F.cross_entropy(F.linear(*tensors).view(-1, V), moved(labels))
    torch.testing.assert_close(loss.cpu(), expected)
    found, truth = torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert loss.is_cuda and state.materialized == 0
    torch.testing.assert_close(there.dense().cpu(), F.linear(*tensors))
