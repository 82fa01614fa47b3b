"""torch.compile: patched models and functional losses stream in one graph, without breaks, and equal what they are
without the compiler, in losses and all gradients.

The backend `aot_eager` traces forward and backward as Inductor does, and runs torch's own kernels: nothing is built.
"""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import hf_xent
from hf_xent import Head, linear_cross_entropy, vocab_loss, vocab_stats
from hf_xent.lazy import LazyLogits, TracedLogits
from hf_xent.losses import EMO, CrossEntropy, Focal, ForwardKL, ReverseKL
from hf_xent.patching import patch_state
from support.models import V, batch, gradients, tiny
from support.oracle import assert_no_worse

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"  # torch's tracer reads it
)
D = 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operands(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(2, length, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (2, length), generator=generator)
    labels[0, :2], labels[1, -1] = -100, -100
    return hidden.to(dtype).requires_grad_(), labels


def weight_and_bias(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(V, D, generator=generator, dtype=torch.float64), torch.randn(V, generator=generator).double()
    return [x.to(dtype).requires_grad_() for x in made]


def entropy_and_variance(h, w, b, y):
    stats = vocab_stats(h, Head(w, b, 0.7, 5.0), y, outputs=("entropy", "variance", "mean", "top", "log_sum_sq"))
    return (stats.entropy * stats.nll + stats.variance * stats.mean + stats.is_top1 + stats.log_sum_sq).sum()


TEACHER = torch.randn(V, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
FUNCTIONAL = {
    "mean": lambda h, w, b, y: linear_cross_entropy(h, w, y, bias=b),
    "smoothed sum, softcap": lambda h, w, b, y: linear_cross_entropy(
        h, w, y, bias=b, scale=0.5, softcap=5.0, label_smoothing=0.1, reduction="sum"
    ),
    "z-loss, each token": lambda h, w, b, y: (
        linear_cross_entropy(h, w, y, bias=b, z_loss=1e-2, reduction="none").square().sum()
    ),
    "class weights": lambda h, w, b, y: linear_cross_entropy(h, w, y, bias=b, class_weight=b.detach().exp()),
    "class weights, smoothing, z-loss": lambda h, w, b, y: linear_cross_entropy(
        h, w, y, bias=b, class_weight=b.detach().exp(), label_smoothing=0.1, z_loss=1e-2
    ),
    "class weights, smoothing": lambda h, w, b, y: linear_cross_entropy(
        h, w, y, bias=b, class_weight=b.detach().exp(), label_smoothing=0.1
    ),
    "gain and adapter": lambda h, w, b, y: CrossEntropy()(h, Head(w[:, :5], b, adapter=w[:, 5:], gain=b.exp()), y),
    "tail": lambda h, w, b, y: linear_cross_entropy(h, w, y, bias=b, tail=1e-9),
    "statistics": entropy_and_variance,
    "focal": lambda h, w, b, y: Focal(gamma=2.0)(h, Head(w, b), y, num_items=7),
    "emo": lambda h, w, b, y: EMO(cost=TEACHER, variant="emo")(h, Head(w, b), y),
    "forward kl": lambda h, w, b, y: ForwardKL(temperature=2.0)(
        h, Head(w, b), y, teacher=(h.detach()[..., :5], Head(TEACHER))
    ),
    "forward kl and cross-entropy": lambda h, w, b, y: ForwardKL(temperature=2.0, ce_weight=0.3)(
        h, Head(w, b), y, teacher=(h.detach()[..., :5], Head(TEACHER))
    ),
    "reverse kl": lambda h, w, b, y: ReverseKL()(h, Head(w, b), y, teacher=(h.detach()[..., :5], Head(TEACHER))),
    "vocab_loss": lambda h, w, b, y: vocab_loss(CrossEntropy(), h, Head(w, b), y, token_weight=0.5)[0],
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functions_in_one_graph_for_any_length(name):
    if "z-loss" in name and "class" in name and torch.__version__ < "2.10":
        pytest.skip("torch 2.9 does not trace the copy of the loss that this call makes")
    function, head = FUNCTIONAL[name], weight_and_bias()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for length in (5, 6, 9, 11):
        hidden, labels = operands(length)
        leaves = [hidden, *head]
        expected, found = function(hidden, *head, labels), compiled(hidden, *head, labels)
        torch.testing.assert_close(found, expected)
        grads = torch.autograd.grad(expected, leaves, allow_unused=True)
        torch.testing.assert_close(torch.autograd.grad(found, leaves, allow_unused=True), grads)
    assert counter.frame_count == 2, "once for a length, once for any length"


def test_positions_without_a_label_have_no_gradient_of_a_loss_that_is_infinite_there():
    """An ignored position's zeros are the statistics of p = 1, where this loss has an infinite slope."""

    class Root(CrossEntropy):
        linear = False

        def of(self, stats):
            return (1 - stats.logp.exp()).sqrt()

    (weight, bias), (hidden, labels) = weight_and_bias(), operands(6)
    compiled = torch.compile(lambda h: Root()(h, Head(weight, bias), labels), backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(Root()(hidden, Head(weight, bias), labels), [hidden, weight])
    found = torch.autograd.grad(compiled(hidden), [hidden, weight])
    torch.testing.assert_close(found, expected)
    assert not found[0][0, :2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(gamma=2.0)], ids=["linear", "other"])
def test_low_precision_is_no_worse_than_without_the_compiler(dtype, loss):
    hidden, labels = operands(9, dtype)
    weight, bias = weight_and_bias(dtype)

    def value(h, w, b):
        return loss(h, Head(w, b), labels)

    def dense(h, w, b):
        rows = F.linear(h, w, b)[labels != -100].float()
        return loss.reference(rows, labels[labels != -100]).mean()

    def solve(function, *leaves):
        return torch.autograd.grad(function(*leaves) * 64, leaves)

    exact = solve(
        dense_in_float64(loss, labels), *(x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    )
    ours = solve(torch.compile(value, backend="aot_eager", fullgraph=True), hidden, weight, bias)
    plain = solve(dense, hidden, weight, bias)
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert_no_worse(one, other, truth)


def dense_in_float64(loss, labels):
    return lambda h, w, b: loss.reference(F.linear(h, w, b)[labels != -100], labels[labels != -100]).mean()


def test_errors_of_operands_are_those_without_the_compiler():
    (weight, _), (hidden, labels) = weight_and_bias(), operands(5)
    compiled = torch.compile(lambda y: linear_cross_entropy(hidden, weight, y), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=f"but the head has {V} tokens"):
        compiled(labels + V)
    focal = torch.compile(lambda: Focal()(hidden, Head(weight), labels, tail=1e-3), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="pass tail=0, or compute the loss outside of"):
        focal()
    dense = torch.compile(
        lambda y: linear_cross_entropy(hidden, weight, y, impl="reference"), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="choose 'chunked' or 'triton'"):
        dense(labels)


CASES = {
    "llama": ("llama", None, {}),
    "softcap, emo": ("gemma2 softcap", "emo", {}),
    "tied, z-loss": ("llama tied", "cross_entropy:z_loss=0.01", {}),
    "always": ("llama", "focal", {"always": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_models_in_one_graph(case):
    name, loss, options = CASES[case]
    model = tiny(name, dtype=torch.float64, num_hidden_layers=1).train()
    hf_xent.patch(model, loss, observe=("entropy", "top"), **options)
    ids, labels = batch()
    expected, stock = model(input_ids=ids, labels=labels).loss, {}
    expected.backward()
    stock = gradients(model)
    sums = patch_state(model).take()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for part in (slice(None), slice(1, None)):
        with torch.no_grad():
            plain = model(input_ids=ids[:, part], labels=labels[:, part]).loss
        found = compiled(input_ids=ids[:, part], labels=labels[:, part]).loss
        torch.testing.assert_close(found, plain, rtol=2e-6, atol=0)
    assert counter.frame_count <= 3
    state = patch_state(model)
    state.take()
    out = compiled(input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected, rtol=2e-6, atol=0)
    out.loss.backward()
    found = gradients(model)
    assert found.keys() == stock.keys()
    for parameter, grad in stock.items():
        torch.testing.assert_close(found[parameter], grad, rtol=1e-5, atol=1e-8)
    again = state.take()
    assert again.keys() == sums.keys() == {"tokens", "nll", "entropy", "correct"}
    for key, value in sums.items():
        torch.testing.assert_close(again[key], value, rtol=2e-6, atol=0)
    assert (state.materialized, state.bypassed, state.reason) == (0, 0, "") and state.streamed == 6


def test_what_a_compiled_model_returns():
    """In training the logits stay lazy, and their uses are those of LazyLogits; in evaluation they are a tensor."""
    model, (ids, labels) = tiny(num_hidden_layers=1).train(), batch()
    dense = model(input_ids=ids).logits
    compiled = torch.compile(hf_xent.patch(model), backend="aot_eager", fullgraph=True)
    out = compiled(input_ids=ids, labels=labels)
    assert isinstance(out.logits, TracedLogits) and isinstance(out.logits.lazy(), LazyLogits)
    assert out.logits.shape == dense.shape and out.logits.dtype == dense.dtype
    torch.testing.assert_close(out.logits.argmax(-1), dense.argmax(-1))
    torch.testing.assert_close(out.logits.softmax(-1), dense.softmax(-1))
    torch.testing.assert_close(torch.logsumexp(out.logits, -1), dense.logsumexp(-1))
    torch.testing.assert_close(out.logits[:, :2].float(), dense[:, :2])
    torch.testing.assert_close(1 - out.logits, 1 - dense)
    assert len(out.logits) == len(dense) and bool(((out.logits > 0) == (dense > 0)).all())
    rows, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(dense[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(F.cross_entropy(rows, targets), expected)
    stats = out.logits.stats(labels, shift=True)
    torch.testing.assert_close(stats.nll.sum() / stats.mask.sum(), expected)
    model.eval()
    with torch.no_grad():
        evaluated = compiled(input_ids=ids, labels=labels)
        torch.testing.assert_close(compiled(input_ids=ids).logits, dense)
    assert type(evaluated.logits) is torch.Tensor
    torch.testing.assert_close(evaluated.logits, dense)
    torch.testing.assert_close(evaluated.loss, out.loss)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the head's weight was modified in place since"):
        out.logits.argmax(-1)


def test_logits_that_a_program_needs_are_in_it():
    """Operations that no recipe has: the numbers are right, and the reason tells that the logits were made."""
    model, (ids, labels) = tiny(num_hidden_layers=1).train(), batch()
    stock = model.loss_function

    def centered(logits, labels, **options):
        logits = logits - logits.mean(-1, keepdim=True)
        logits[..., 0] = -logits[..., 0]
        return stock(torch.cat([logits, logits]).chunk(2)[0] ** 2, labels, **options)

    model.loss_function = centered
    expected = model(input_ids=ids, labels=labels).loss
    found = torch.compile(hf_xent.patch(model), backend="aot_eager", fullgraph=True)(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, expected)
    leaves = [*model.parameters()]
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    assert "needs the logits' values" in patch_state(model).reason


@pytest.mark.parametrize("loss", [None, "eisl"])
def test_a_graph_that_breaks(loss):
    """What follows a break streams all the same, also a loss that cannot be traced itself."""
    model, (ids, labels) = tiny(num_hidden_layers=1).train(), batch()
    expected = hf_xent.patch(model, loss)(input_ids=ids, labels=labels).loss
    model.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    found = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, expected)
    leaves = [*model.parameters()]
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (2, 0)


def test_copies_of_a_compiled_model_count_for_themselves():
    model, (ids, labels) = tiny(num_hidden_layers=1).train(), batch()
    hf_xent.patch(model)
    copied = copy.deepcopy(model)
    torch.compile(copied, backend="eager", fullgraph=True)(input_ids=ids, labels=labels)
    assert (patch_state(copied).streamed, patch_state(model).streamed) == (1, 0)


def lora_on_the_head():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=3, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny(num_hidden_layers=1), config)


@pytest.mark.parametrize("build", [lora_on_the_head], ids=["LoRA on the head"])
def test_adapters_in_one_graph(build):
    model, (ids, labels) = build().double().train(), batch()
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    stock = gradients(model)
    hf_xent.patch(model)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, stock[name])
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


def test_autocast():
    model, (ids, labels) = tiny(num_hidden_layers=1).train(), batch()
    hf_xent.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (m(input_ids=ids, labels=labels).loss for m in (model, compiled))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, [*model.parameters()]) for loss in (expected, found)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="the backends of torch 2.9 take functions in another form")
def test_no_node_of_the_program_is_as_large_as_the_logits():
    """Forward and backward, in training; what the operators do inside is what they do without the compiler."""
    vocabulary, tokens, sizes = 4001, 500, []

    def record(graph, _):
        values = (value for node in graph.graph.nodes for value in tree_leaves(node.meta.get("val")))
        sizes.append(max(int(value.numel()) for value in values if isinstance(value, torch.Tensor)))
        return make_boxed_func(graph)

    model = tiny(num_hidden_layers=1, vocab_size=vocabulary).train()
    ids = torch.randint(vocabulary, (1, tokens))
    hf_xent.patch(model)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    compiled(input_ids=ids, labels=ids).loss.backward()
    assert sizes == [model.lm_head.weight.numel()] * 2, "the weight and its gradient, in each of the two"


@pytest.mark.slow
def test_inductor(tmp_path, monkeypatch):
    """The compiler's own backend, with kernels built by the C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a run that was killed leaves halves of files
    model, (ids, labels) = tiny("gemma2 softcap", num_hidden_layers=1).train(), batch()
    hf_xent.patch(model, "focal")
    expected, found = (m(input_ids=ids, labels=labels).loss for m in (model, torch.compile(model, fullgraph=True)))
    torch.testing.assert_close(found, expected)
    leaves = [*model.parameters()]
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
