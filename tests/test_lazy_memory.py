"""Lazy logits share memory, refuse and differentiate as torch's tensors do, whatever is done to them in what order."""

import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_xent
from hf_xent.lazy import LazyLogits, PatchState
from hf_xent.ops import Head
from support.models import tiny

V = 5


def labels_of(t):
    return torch.zeros(t.numel() // t.shape[-1], dtype=torch.int64)


def ones_of(t):
    return torch.zeros((*t.shape[:-1], 1), dtype=torch.int64)


# Each gives a view in some shapes and a copy in others, or an error: what torch does is right.
STEPS = {
    "view": lambda t: t.view(-1, t.shape[-1]),
    "view of its shape": lambda t: t.view(t.shape),
    "view that does not fit": lambda t: t.view(7, 13),
    "view_as": lambda t: t.view_as(t.clone()),
    "reshape": lambda t: t.reshape(-1, t.shape[-1]),
    "reshape_as": lambda t: t.reshape_as(t.flatten()),
    "flatten rows": lambda t: t.flatten(0, 1),
    "flatten": lambda t: t.flatten(),
    "unflatten": lambda t: t.unflatten(0, (1, -1)),
    "first": lambda t: t[0],
    "last": lambda t: t[..., -1, :],
    "all but the last": lambda t: t[:-1],
    "columns": lambda t: t[..., 1:4],
    "every other column": lambda t: t[..., ::2],
    "one column": lambda t: t[..., 1],
    "index tensor": lambda t: t[torch.tensor([0, 0])],
    "index list": lambda t: t[[0, 0]],
    "scalar index": lambda t: t[torch.tensor(0)],
    "index True": lambda t: t[True],
    "index True and columns": lambda t: t[True, :1],
    "index None": lambda t: t[None],
    "index tensor and columns": lambda t: t[torch.tensor([0]), ..., :2],
    "mask": lambda t: t[torch.ones(t.shape[:1], dtype=torch.bool)],
    "index out of range": lambda t: t[99],
    "index of no kind": lambda t: t["a"],
    "squeeze": lambda t: t.squeeze(0),
    "squeeze all": lambda t: t.squeeze(),
    "unsqueeze": lambda t: torch.unsqueeze(t, dim=1),
    "transpose": lambda t: t.transpose(0, 1),
    "transpose vocabulary": lambda t: t.transpose(-1, -2),
    "swapaxes": lambda t: t.swapaxes(0, 1),
    "contiguous": lambda t: t.contiguous(),
    "clone": lambda t: t.clone(),
    "contiguous clone": lambda t: torch.clone(t, memory_format=torch.contiguous_format),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "float": lambda t: t.float(),
    "double": lambda t: t.double(),
    "to": lambda t: t.to(torch.float32),
    "to copy": lambda t: t.to(torch.float32, copy=True),
    "to copy by place": lambda t: t.to("cpu", torch.float32, False, True),
    "to device": lambda t: t.to("cpu"),
    "times": lambda t: torch.mul(t, other=0.5),
    "factor first": lambda t: 2.0 * t,
    "over": lambda t: t / 3,
    "floored": lambda t: torch.div(t, 3, rounding_mode="floor"),
    "tanh": lambda t: t.tanh(),
    "log_softmax": lambda t: t.log_softmax(-1),
    "log_softmax of rows": lambda t: t.log_softmax(0),
    "softmax": lambda t: F.softmax(t, dim=-1),
    "argmax of no dimension": lambda t: t.argmax(7),
    "argmax of all": lambda t: t.argmax(),
    "logsumexp": lambda t: torch.logsumexp(t, -1, True),
    "logsumexp of rows": lambda t: torch.logsumexp(t, dim=0, keepdim=True),
    "gather": lambda t: t.gather(-1, ones_of(t)),
    "bias": lambda t: t + torch.arange(float(t.shape[-1])),
    "bias times alpha": lambda t: torch.add(t, torch.arange(float(t.shape[-1]))[None], alpha=2),
    "added to itself": lambda t: t + t,
    "iterated": lambda t: next(iter(t)),
    "unbind": lambda t: t.unbind(0)[0],
    "expand": lambda t: t.expand(2, *t.shape),
    "exponentials": lambda t: t.exp(),
    "chosen numbers": lambda t: torch.where(t > 0, t.abs(), -0.5),
    "times its softmax": lambda t: t.softmax(-1) * t,
    "times a row": lambda t: t * torch.linspace(1, 2, t.numel() // t.shape[-1]).view(*t.shape[:-1], 1),
    "centered": lambda t: t - t.float().mean(-1, keepdim=True),
    "stack and sum": lambda t: torch.stack([t, t * t]).sum(0),
    "losses": lambda t: F.cross_entropy(t.reshape(-1, t.shape[-1]), labels_of(t), reduction="none"),
}
WRITES = {
    "column": lambda t: t.__setitem__((..., 0), 7.0),
    "row": lambda t: t.__setitem__(0, -3.0),
    "masked_fill_": lambda t: t.masked_fill_(torch.arange(t.shape[-1]) == 1, 2.0),
    "*=": lambda t: t.mul_(2),
    "+=": lambda t: t.__iadd__(1.0),
    "fill_": lambda t: torch.fill_(t, 1.5),
    "in-place relu": lambda t: F.relu(t, inplace=True),
    "out=": lambda t: torch.clamp(t, max=0.1, out=t),
}
READS = {
    "sum": lambda t: t.sum(),
    "softmax of a row": lambda t: t[0].softmax(-1),
    "list": lambda t: torch.tensor(t.tolist(), dtype=torch.float64),
    "loss": lambda t: F.cross_entropy(input=t.reshape(-1, t.shape[-1]), target=labels_of(t)),
}


def outcome(fn, t):
    try:
        return fn(t), None
    except Exception as error:  # whatever torch raises
        return None, type(error)


def assert_same(lazy, dense):
    (ours, refused), (expected, theirs) = (outcome(lambda t: t.double() + 0, t) for t in (lazy, dense))
    assert refused == theirs
    if theirs is None:
        assert lazy.dtype == dense.dtype and lazy.stride() == dense.stride()
        assert lazy.requires_grad == dense.requires_grad
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, check_stride=False)


def weighted_sum(tensors):
    differentiable = [t.double() for t in tensors if t.requires_grad]
    return sum((t * torch.arange(1.0, t.numel() + 1, dtype=t.dtype).view(t.shape)).sum() for t in differentiable)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("grad", [False, True], ids=["values", "gradients"])
def test_random_programs_of_views_copies_reads_and_writes(seed, grad):
    """Ten programs: after every step both sides raise the same, at the end all tensors and gradients are the same.

    In those of odd seeds, what is done to the logits is recorded.
    """
    rng = random.Random(seed)
    for _ in range(10):
        hidden, weight = torch.randn(2, 4, 3, requires_grad=grad), torch.randn(V, 3)
        dense, lazy = [hidden @ weight.T], [LazyLogits.of(hidden, Head(weight), PatchState(always=seed % 2))]
        for _ in range(rng.randint(2, 9)):
            i, table = rng.randrange(len(dense)), rng.choice([STEPS] * 4 + [WRITES] * 2 + [READS])
            name = rng.choice(list(table))
            if table is WRITES and not dense[i].is_floating_point():
                continue
            if name == "out=" and grad:
                continue  # torch refuses it where a graph is wanted, lazy logits write the values
            (expected, theirs), (ours, refused) = outcome(table[name], dense[i]), outcome(table[name], lazy[i])
            assert refused == theirs, (name, theirs, refused)
            if theirs is None and table is STEPS:
                assert ours.stride() == expected.stride(), name
                dense.append(expected)
                lazy.append(ours)
            elif theirs is None and table is READS:
                assert_same(ours, expected)
        for i in rng.sample(range(len(dense)), len(dense)):
            assert_same(lazy[i], dense[i])
        if grad:
            expected, theirs = outcome(lambda h, ts=dense: torch.autograd.grad(weighted_sum(ts), h)[0], hidden)
            if theirs is None:  # torch refuses to differentiate what it saved before it was written to
                [ours] = torch.autograd.grad(weighted_sum(lazy), hidden)
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def operands(**options):
    return torch.randn(2, 4, 3, **options), torch.randn(V, 3, **options)


def test_a_few_rows_are_read_without_the_others():
    hidden, weight = operands()
    x = LazyLogits.of(hidden, Head(weight))
    last = x[:, -1]
    torch.testing.assert_close(last.softmax(-1), (hidden[:, -1] @ weight.T).softmax(-1))
    assert not x.is_dense and x.state.materialized == 1
    last.topk(2)
    assert x.state.materialized == 1, "they are kept"


@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum(),
        lambda x: x.argmax(-1),
        lambda x: x[:, -1].softmax(-1),
        lambda x: (x.float() * 2).sum(),
        lambda x: F.cross_entropy(x.view(-1, V), labels_of(x)),
        lambda x: x.stats(labels_of(x).view(2, 4)),
    ],
    ids=["dense", "argmax", "rows", "derived", "loss", "stats"],
)
def test_operands_that_changed_since_are_an_error_that_says_what_to_do(name, read):
    hidden, weight = operands()
    x = LazyLogits.of(hidden, Head(weight))
    {"hidden": hidden, "weight": weight}[name].add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified in place.*optimizer\.step.*before that.*dense\(\)"):
        read(x)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: torch.optim.AdamW([w], fused=True).step(),
        lambda w: w.data.add_(1.0),
        lambda w: w.detach().numpy().fill(1.0),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: setattr(w, "data", w.data.double()),
    ],
    ids=["fused optimizer", "data", "NumPy", "other data", "other dtype"],
)
def test_operands_that_changed_unseen_are_an_error_too(write):
    """None of these raises a tensor's version."""
    hidden, weight = operands(requires_grad=True)
    weight.grad = torch.ones_like(weight)
    x, version = LazyLogits.of(hidden, Head(weight)), weight._version
    view = x[0].float()
    write(weight)
    assert weight._version == version
    for read in (lambda: x.sum(), lambda: view.argmax(-1), lambda: F.cross_entropy(x.view(-1, V), labels_of(x))):
        with pytest.raises(RuntimeError, match=r"weight was modified in place.*optimizer\.step"):
            read()


def test_a_training_step_does_not_wait_for_numbers_that_are_not_at_hand(monkeypatch):
    """As on a GPU: the loss compares nothing; what is read after the step, or has no graph, is found out as well."""
    monkeypatch.setattr("hf_xent.lazy.operands._SYNCHRONOUS_DEVICES", ())
    compared = []
    monkeypatch.setattr(torch, "equal", lambda *pair, equal=torch.equal: compared.append(pair) or equal(*pair))
    hidden, weight = operands(requires_grad=True)
    x, still = LazyLogits.of(hidden, Head(weight)), LazyLogits.of(hidden.detach(), Head(weight.detach()))
    F.cross_entropy(x.view(-1, V), labels_of(x)).backward()
    assert not compared
    torch.optim.AdamW([weight], fused=True).step()
    for late in (x, still):
        with pytest.raises(RuntimeError, match="weight was modified in place"):
            late.argmax(-1)


def test_values_read_before_the_operands_change_stay():
    hidden, weight = operands()
    x, expected = LazyLogits.of(hidden, Head(weight)), hidden @ weight.T
    x.dense()
    weight.add_(1.0)
    torch.testing.assert_close(x.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(x[:, -1].softmax(-1), expected[:, -1].softmax(-1))


class Reversed(torch.autograd.Function):
    """The same values, and gradients of the other sign: a custom autograd function decides on its own gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        return -upstream


@pytest.mark.parametrize(
    "use",
    [
        lambda t: F.cross_entropy(Reversed.apply(t).view(-1, V), labels_of(t)),
        lambda t: Reversed.apply(t * 2)[0].exp().sum(),
        lambda t: Reversed.apply(t.tanh()).logsumexp(-1).sum(),
    ],
    ids=["loss", "rows", "logsumexp"],
)
def test_gradients_of_custom_functions_are_theirs(use):
    hidden, weight = operands(requires_grad=True)
    ours = torch.autograd.grad(use(LazyLogits.of(hidden, Head(weight))), (hidden, weight))
    expected = torch.autograd.grad(use(hidden @ weight.T), (hidden, weight))
    torch.testing.assert_close(ours, expected)


def test_second_derivatives_through_custom_functions():
    hidden, weight = operands(requires_grad=True, dtype=torch.float64)

    def curvature(logits):
        first = torch.autograd.grad(Reversed.apply(logits.tanh()).pow(2).sum(), (hidden, weight), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (hidden, weight))

    torch.testing.assert_close(curvature(LazyLogits.of(hidden, Head(weight))), curvature(hidden @ weight.T))


def test_logits_written_to_below_python_are_refused_where_their_gradient_would_be_wrong():
    hidden, weight = operands(requires_grad=True)
    x = LazyLogits.of(hidden, Head(weight))
    x[..., 0] = 1.0
    out = Reversed.apply(x)
    with pytest.raises(RuntimeError, match=r"written to in place.*give the function out\.logits\.dense\(\)"):
        out.sum().backward()


def test_a_graph_made_below_python_is_kept():
    """torch.Tensor takes its values below autograd; what comes after has gradients as ever."""
    hidden, weight = operands(requires_grad=True)
    x = LazyLogits.of(hidden, Head(weight))
    torch.testing.assert_close(torch.Tensor(x).detach(), (hidden @ weight.T).detach())
    for ours, expected in ((x, hidden @ weight.T), (x[0], (hidden @ weight.T)[0])):
        found = torch.autograd.grad(ours.softmax(-1).pow(2).sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected.softmax(-1).pow(2).sum(), (hidden, weight)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2,
        lambda x: x[0],
        lambda x: x.float().view(-1, V)[1:].softmax(-1),
        lambda x: (x / 3).logsumexp(-1),
        lambda x: F.cross_entropy(x.view(-1, V), labels_of(x)),
        lambda x: x.log_softmax(-1).gather(-1, ones_of(x)),
    ],
    ids=["factor", "row", "rows", "logsumexp", "loss", "gather"],
)
def test_logits_made_without_a_graph_stay_without_one(context, use):
    hidden, weight = operands(requires_grad=True)
    with context():
        x, expected = LazyLogits.of(hidden, Head(weight)), hidden @ weight.T
    ours = use(x)
    assert not ours.requires_grad
    torch.testing.assert_close(ours + 0.0, use(expected))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "loss",
    [lambda t: t.softmax(-1).pow(2).sum(), lambda t: F.cross_entropy(t.view(-1, V), labels_of(t))],
    ids=["dense", "lean"],
)
def test_checkpoints(loss, reentrant):
    hidden, weight = operands(requires_grad=True)
    logits = LazyLogits.of(hidden, Head(weight))
    found = torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), (hidden, weight))
    if reentrant:
        checkpoint(loss, LazyLogits.of(hidden, Head(weight)), use_reentrant=True).backward()
        found = hidden.grad, weight.grad
    torch.testing.assert_close(found, torch.autograd.grad(loss(hidden @ weight.T), (hidden, weight)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.vmap(lambda a: (x * a).sum())(torch.arange(3.0)),
        lambda x: torch.vmap(lambda row: row.log_softmax(-1))(x),
        lambda x: torch.func.grad(lambda t: t[0].exp().sum())(x),
        lambda x: torch.func.jvp(lambda t: t[0].softmax(-1), (x,), (torch.ones(2, 4, V),))[1],
        lambda x: torch.func.jacrev(lambda t: t.logsumexp(-1))(x),
    ],
    ids=["vmap over a factor", "vmap", "grad", "jvp", "jacrev"],
)
@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.tanh(), lambda x: x[:]], ids=["logits", "tanh", "view"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
def test_torch_func_of_lazy_logits(transform, of):
    hidden, weight = operands()
    ours = transform(of(LazyLogits.of(hidden, Head(weight))))
    torch.testing.assert_close(ours, transform(of(hidden @ weight.T)))


def test_random_numbers_are_drawn_once():
    hidden, weight = operands()
    found = []
    for x in (LazyLogits.of(hidden, Head(weight)), hidden @ weight.T):
        torch.manual_seed(5)
        F.dropout(x[0], 0.5, inplace=True)
        found += [x + 0.0, torch.rand(3)]
    torch.testing.assert_close(found[:2], found[2:])


def test_strides_are_of_the_memory_of_the_whole():
    hidden, weight = operands()
    uses = (
        lambda t: t.as_strided((2, 2), (1, 2), 30),
        lambda t: t.as_strided_scatter(torch.zeros(()), (), (), storage_offset=0),
    )
    for use in uses:
        torch.testing.assert_close(use(LazyLogits.of(hidden, Head(weight))[1]), use((hidden @ weight.T)[1]))


def test_in_place_operations_return_their_tensor_and_change_its_shape():
    hidden, weight = operands()
    x, expected = LazyLogits.of(hidden, Head(weight)), hidden @ weight.T
    assert x.add_(1.0) is x and x.unsqueeze_(0) is x
    expected.add_(1.0).unsqueeze_(0)
    assert x.shape == (1, 2, 4, V) and x.ndim == 4 and x.stride() == expected.stride()
    torch.testing.assert_close(x + 0.0, expected)


def test_a_parameter_of_logits_is_one():
    hidden, weight = operands(requires_grad=True)
    x, expected = LazyLogits.of(hidden, Head(weight)), (hidden @ weight.T).detach()
    parameters = torch.nn.Parameter(x.detach().clone()), torch.nn.Parameter(expected.clone())
    for parameter in parameters:
        assert isinstance(parameter, torch.nn.Parameter) and parameter.is_leaf
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        parameter.pow(2).sum().backward()
        optimizer.step()
    ours, theirs = parameters
    torch.testing.assert_close(ours + 0.0, theirs + 0.0)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("how", ["requires_grad_", "retain_grad"])
def test_gradients_of_the_logits_themselves(how):
    hidden, weight = operands(requires_grad=how == "retain_grad")
    grads = []
    for logits in (LazyLogits.of(hidden, Head(weight)), hidden @ weight.T):
        getattr(logits, how)()
        assert logits.requires_grad and logits.is_leaf == (how == "requires_grad_")
        F.cross_entropy(logits.view(-1, V), labels_of(logits)).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)


def test_a_gradient_that_will_not_come_is_refused():
    hidden, weight = operands(requires_grad=True)
    x = LazyLogits.of(hidden, Head(weight))
    F.cross_entropy(x.view(-1, V), labels_of(x))
    for ask in (x.retain_grad, lambda: x.register_hook(print), lambda: torch.autograd.grad(x.sum(), x)):
        with pytest.raises(RuntimeError, match=r"without making these logits.*dense\(\)"):
            ask()


def test_gradients_by_a_view_that_was_read():
    hidden, weight = operands(requires_grad=True)
    found = []
    for x in (LazyLogits.of(hidden, Head(weight)), hidden @ weight.T):
        last = x[:, -1]
        x.argmax(-1)  # no gradient passes by
        found.append(torch.autograd.grad(last.softmax(-1).pow(2).sum(), last)[0])
    torch.testing.assert_close(*found)
    last = LazyLogits.of(hidden, Head(weight))[:, -1]
    loss = last.softmax(-1).pow(2).sum()
    for ask in (last.retain_grad, lambda: torch.autograd.grad(loss, last.parent[0], allow_unused=True)):
        with pytest.raises(RuntimeError, match="without making these logits"):
            ask()


def test_hooks_on_logits_see_their_gradient():
    hidden, weight = operands(requires_grad=True)
    seen = []
    for logits in (LazyLogits.of(hidden, Head(weight)), hidden @ weight.T):
        logits.register_hook(seen.append)
        F.cross_entropy(logits.view(-1, V), labels_of(logits)).backward()
    torch.testing.assert_close(*seen)


def test_inference_mode():
    hidden, weight = operands()
    with torch.inference_mode():
        x = LazyLogits.of(hidden * 1, Head(weight))
        expected = hidden @ weight.T
        torch.testing.assert_close(x[:, -1].softmax(-1), expected[:, -1].softmax(-1))
        assert not x.is_dense
        scaled = x * 2, expected * 2
        torch.testing.assert_close(torch.lerp(x[0], scaled[0][0], 0.5), torch.lerp(expected[0], scaled[1][0], 0.5))
        x[:, -1].mul_(2.0)
        expected[:, -1].mul_(2.0)
        torch.testing.assert_close(x.sum(-1), expected.sum(-1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"num_beams": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 96},  # transformers 5.6 cannot do without one here
    ],
    ids=["greedy", "sampling", "beams", "processors", "prompt lookup"],
)
def test_generation_from_lazy_logits_is_that_of_the_stock_model(options):
    prompt = torch.tensor([[3, 5, 6, 3, 5]])
    options = {"eos_token_id": None, "max_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    found = []
    for patched in (False, True):
        model = tiny().eval()
        torch.manual_seed(0)
        model = hf_xent.patch(model, always=True) if patched else model
        found.append(model.generate(prompt, output_scores=True, output_logits=True, **options))
    ours, stock = found[1], found[0]
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip((*ours.scores, *ours.logits), (*stock.scores, *stock.logits), strict=True):
        torch.testing.assert_close(mine + 0.0, theirs, rtol=1e-4, atol=1e-4)
