"""`token_logprobs` against dense log-softmax, in the losses of reinforcement learning, and in float32 from 16 bits."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

import hf_xent
from hf_xent import Head, token_logprobs
from hf_xent.ops import Shard
from hf_xent.patching import patch, patch_state
from support.models import batch, tiny
from support.oracle import Allocations, Largest, assert_close_at_scale, assert_no_worse
from support.ranks import run_ranks

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "logprobs.md"
N, D, V = 19, 7, 41
BUDGET = {"memory_budget": 4 * V * 8}


def run_lines(of, **names):
    """The names after running the block of the page that contains `of`."""
    [block] = [
        block for block in re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if of in block
    ]
    names |= {"hf_xent": hf_xent, "importlib": importlib}
    exec(compile(block, PAGE.name, "exec"), names)
    return names


def operands(dtype=torch.float64, shape=(N,), size=V, width=D, gain=1.0, bias=True):
    """Leaves (hidden, weight, bias) and labels, the first and fourth ignored."""
    leaves = [gain * torch.randn(*shape, width), torch.randn(size, width), torch.randn(size)][: 3 if bias else 2]
    labels = torch.randint(size, shape)
    labels.view(-1)[::4] = -100
    return [x.to(dtype).requires_grad_() for x in leaves], labels


def dense(leaves, labels, temperature=1.0, softcap=None):
    """Log-probability of the label and entropy, of logits that are written down in the dtype of the operands."""
    z = F.linear(*leaves) / (temperature[..., None] if torch.is_tensor(temperature) else temperature)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(-1)
    found = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    return tuple(torch.where(labels == -100, 0.0, x) for x in found)


def grpo(logp, entropy, labels):
    """Clipped importance ratios, a KL penalty to a reference and an entropy bonus: three uses of two results."""
    generator = torch.Generator().manual_seed(5)
    old, reference = (
        logp.detach() + 0.3 * torch.randn(logp.shape, generator=generator, dtype=logp.dtype) for _ in range(2)
    )
    advantage = torch.randn(logp.shape, generator=generator, dtype=logp.dtype)
    ratio, mask = (logp - old).exp(), labels != -100
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (reference - logp).exp() - (reference - logp) - 1
    return ((kl * 0.1 - surrogate - 0.01 * entropy) * mask).sum() / mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(N,), (3, 5)])
def test_values_and_gradients_are_those_of_dense_logits(impl, shape, temperature, device):
    leaves, labels = operands(shape=shape)
    leaves, labels = [x.detach().to(device).requires_grad_() for x in leaves], labels.to(device)
    expected = dense(leaves, labels, temperature)
    head = Head(*leaves[1:])
    found = token_logprobs(leaves[0], head, labels, temperature=temperature, impl=impl)
    torch.testing.assert_close(found, expected)
    assert all((x[labels == -100] == 0).all() for x in found)
    upstream = [torch.randn_like(x) for x in expected]
    for outputs in ([0], [1], [0, 1]):
        ours, torchs = (
            torch.autograd.grad([x[i] for i in outputs], leaves, [upstream[i] for i in outputs], retain_graph=True)
            for x in (found, expected)
        )
        torch.testing.assert_close(ours, torchs)


def test_a_loss_that_uses_both_results_several_times():
    leaves, labels = operands()
    totals = [
        grpo(*results, labels)
        for results in (token_logprobs(leaves[0], Head(*leaves[1:]), labels, **BUDGET), dense(leaves, labels))
    ]
    torch.testing.assert_close(*totals)
    first = [torch.autograd.grad(total, leaves, create_graph=True) for total in totals]
    torch.testing.assert_close(*first)
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in first]
    torch.testing.assert_close(*second)


def test_options_of_the_results():
    leaves, labels = operands(bias=False)
    logp, nothing = token_logprobs(*leaves, labels, entropy=False)
    assert nothing is None
    torch.testing.assert_close(logp, dense(leaves, labels)[0])
    other = torch.where(labels == -100, 3, labels)
    logp, entropy = token_logprobs(*leaves, other, ignore_index=3)
    assert all(torch.equal(x != 0, other != 3) for x in (logp, entropy))
    torch.testing.assert_close(logp[other == labels], dense(leaves, other)[0].where(other != 3, 0.0)[other == labels])
    with torch.no_grad():
        assert not token_logprobs(*leaves, labels)[0].requires_grad
    empty = token_logprobs(*leaves, torch.full_like(labels, -100))
    assert all((x == 0).all() for x in empty)
    assert all((g == 0).all() for g in torch.autograd.grad(sum(x.sum() for x in empty), leaves))
    capped = token_logprobs(leaves[0], Head(leaves[1], softcap=2.0), labels)
    torch.testing.assert_close(capped, dense(leaves, labels, softcap=2.0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(N,), (3, 5), ()])
def test_a_temperature_for_every_token(bias, shape):
    """The temperature gets its gradient, too; an ignored token may have any, such as 0."""
    leaves, labels = operands(shape=shape or (N,), bias=bias)
    temperature = torch.rand(shape, dtype=torch.float64) + 0.5
    expected = dense(leaves, labels, wanted := temperature.clone().expand(labels.shape).clone().requires_grad_())
    if shape:
        temperature[labels == -100] = 0
    temperature.requires_grad_()
    head = Head(*leaves[1:])
    found = token_logprobs(leaves[0], head, labels, temperature=temperature, **BUDGET)
    torch.testing.assert_close(found, expected)
    totals = (grpo(*found, labels), grpo(*expected, labels))
    ours, torchs = (torch.autograd.grad(x, [*leaves, t]) for x, t in zip(totals, (temperature, wanted), strict=True))
    torch.testing.assert_close(ours[:-1], torchs[:-1])
    torch.testing.assert_close(ours[-1], torchs[-1] if shape else torchs[-1].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.8, "each"])
def test_low_precision_is_no_worse_than_torch(dtype, temperature):
    leaves, labels = operands(dtype, shape=(3, 40), width=64, gain=0.3)
    if temperature == "each":
        temperature = torch.rand(3, 40).to(dtype) + 0.5
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_temperature = temperature.double() if torch.is_tensor(temperature) else temperature
    results = (
        token_logprobs(leaves[0], Head(*leaves[1:]), labels, temperature=temperature, memory_budget=1000),
        dense(leaves, labels, temperature),
        dense(exact, labels, exact_temperature),
    )
    assert all(x.dtype == torch.float32 for x in results[0])
    for name, ours, torchs, truth in zip(("logp", "entropy"), *results, strict=True):
        assert_no_worse(ours.detach(), torchs.detach(), truth.detach(), what=name)
    weights = [torch.randn(3, 40, dtype=torch.float64) for _ in range(2)]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(result, weights, strict=True)), x)
        for result, x in zip(results, (leaves, leaves, exact), strict=True)
    ]
    for name, *three in zip(("hidden", "weight", "bias"), *grads, strict=True):
        assert_no_worse(*three, what=name)


def error(found, truth):
    return float((found.detach().double() - truth.detach()).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_products_of_16_bit_operands(dtype, bias):
    """The error is that of float32 operands with these values; 16-bit products err hundreds of times as much."""
    leaves, labels = operands(dtype, shape=(50,), width=96, size=300, bias=bias)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    truth, float32 = dense(exact, labels), dense(wide, labels)
    narrow = token_logprobs(leaves[0], Head(*leaves[1:]), labels)
    found = token_logprobs(leaves[0], Head(*leaves[1:]), labels, fp32=True, memory_budget=9 * 300 * 4)
    for name, ours, torchs, true, rounded in zip(("logp", "entropy"), found, float32, truth, narrow, strict=True):
        assert ours.dtype == torch.float32
        assert_no_worse(ours.detach(), torchs.detach(), true.detach(), what=name)
        assert error(rounded, true) > 100 * error(ours, true), name
    ours, torchs, true = (
        torch.autograd.grad(grpo(*result, labels), x)
        for result, x in ((found, leaves), (float32, wide), (truth, exact))
    )
    for name, x, grad, y, z in zip(("hidden", "weight", "bias"), leaves, ours, torchs, true, strict=False):
        assert grad.dtype == x.dtype, "each gradient is given, rounded once, in its tensor's dtype"
        assert_no_worse(grad, y.to(dtype), z, factor=1.5, what=name)


def test_float32_under_autocast_and_with_a_float32_head():
    """As mixed precision has it: hidden states of 16 bits, a head of 32; autocast does not apply."""
    leaves, labels = operands(torch.float32, width=64, bias=False)
    hidden = leaves[0].detach().bfloat16().requires_grad_()
    truth = dense([hidden.double(), leaves[1].double()], labels)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = token_logprobs(hidden, leaves[1], labels, fp32=True)
        assert max(error(x, true) for x, true in zip(found, truth, strict=True)) < 2e-5
        grads = torch.autograd.grad(sum(x.sum() for x in found), [hidden, leaves[1]])
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match=r"hidden is torch.bfloat16 but weight torch.float32"):
        token_logprobs(hidden, leaves[1], labels)


@pytest.mark.parametrize("fp32", [False, True])
def test_nothing_is_as_large_as_the_logits_or_a_float32_head(fp32, monkeypatch):
    leaves, labels = operands(torch.bfloat16, shape=(128,), size=640, width=8, bias=False)
    monkeypatch.setattr("hf_xent.ops.panels.PANEL_BYTES", 64 * 8 * 4)
    with Largest() as largest:
        logp, entropy = token_logprobs(*leaves, labels, fp32=fp32, memory_budget=16 * 640 * 4)
        (logp + 0.1 * entropy).sum().backward()
    assert largest.numel <= 128 * 640 // 4
    leaves, labels = operands(torch.bfloat16, shape=(16,), size=640, width=8, bias=False)
    with Allocations() as allocations:
        logp, entropy = token_logprobs(*leaves, labels, fp32=fp32, memory_budget=16 * 64 * 4)
        (logp + 0.1 * entropy).sum().backward()
    assert allocations.shapes[640, 8] == 1, "the weight's gradient, and no copy of the weight"


WRONG = {
    "temperature 0": ({"temperature": 0}, "temperature is 0: pass a finite number > 0, or a tensor shaped like labels"),
    "temperature nan": ({"temperature": float("nan")}, "temperature is nan: pass a finite number > 0"),
    "temperature text": ({"temperature": "hot"}, "temperature is 'hot': pass a finite number"),
    "temperatures": ({"temperature": torch.full((N,), -1.0)}, "temperature is down to -1.0: pass finite numbers > 0"),
    "their shape": (
        {"temperature": torch.ones(3)},
        r"temperature has shape \(3,\) on cpu: pass one number, or one per",
    ),
    "their device": (
        {"temperature": torch.ones(N, device="meta")},
        r"temperature has shape \(19,\) on meta: .* on cpu",
    ),
    "a module": ({"head": torch.nn.Linear(D, V)}, r"head is a Linear: pass its weight \[V, D\], or a hf_xent.Head"),
    "softcap": (
        {"head": Head(torch.ones(V, D, dtype=torch.float64), softcap=3.0), "temperature": torch.ones(N)},
        "temperature has one number per token, but the head has softcap 3.0: pass one number for all",
    ),
    "two groups": (
        {"head": Head(torch.ones(V, D), shard=Shard(None, 0, V)), "group": SimpleNamespace()},
        "group is given, but the head has a shard, which has its own group: pass one of them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals_are_one_line(name):
    options, message = WRONG[name]
    leaves, labels = operands()
    arguments = {"hidden": leaves[0], "head": leaves[1], "labels": labels} | options
    with pytest.raises(ValueError, match=message) as raised:
        token_logprobs(**arguments)
    assert "\n" not in str(raised.value)


CASES = {  # options, whether the operands have 16 bits
    "plain": ({}, False),
    "temperature": ({"temperature": 0.7}, False),
    "fp32": ({"fp32": True}, True),
}


def split(options, narrow, group=None):
    """Results and gradients of a GRPO loss; with a group, of this rank's rows of the head."""
    torch.manual_seed(4)
    leaves, labels = operands(torch.bfloat16 if narrow else torch.float64, bias=False)
    hidden, weight = leaves
    if group is not None:
        width = -(-V // group.size())
        weight = weight.detach()[group.rank() * width :][:width].clone().requires_grad_()
    results = token_logprobs(hidden, weight, labels, group=group, **options, **BUDGET)
    grads = torch.autograd.grad(grpo(*results, labels), [hidden, weight])
    return [*(x.detach() for x in results), *grads]


class Gathered(torch.autograd.Function):
    """What Megatron's `gather_from_sequence_parallel_region` does with tensor_parallel_output_grad=False."""

    @staticmethod
    def forward(ctx, part, group):
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part, group=group)
        ctx.rank, ctx.length = group.rank(), len(part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.rank * ctx.length :][: ctx.length], None


def gather_from_sequence_parallel_region(part, tensor_parallel_output_grad, group):
    assert not tensor_parallel_output_grad
    return Gathered.apply(part, group)


def nemo_rl(group=None):
    """Log-probabilities and gradients of NeMo-RL's function: the page's, or of dense logits; two rows of six tokens."""
    torch.manual_seed(6)
    (hidden, weight), target = operands(shape=(6, 2), bias=False)[0], torch.randint(V, (2, 6))
    if group is None:
        logp = dense([hidden.transpose(0, 1), weight], target.roll(-1, -1))[0][:, :-1]
    else:
        rows, width = 6 // group.size(), -(-V // group.size())
        hidden = hidden.detach()[group.rank() * rows :][:rows].requires_grad_()
        weight = weight.detach()[group.rank() * width :][:width].requires_grad_()
        names = run_lines(
            "from_parallel_hidden_states", gather_from_sequence_parallel_region=gather_from_sequence_parallel_region
        )
        logp = names["from_parallel_hidden_states_to_logprobs"](hidden, weight, None, target, 0, 0, group, chunk_size=4)
    return [logp.detach(), *torch.autograd.grad(logp.square().sum(), [hidden, weight])]


def on_a_rank(rank):
    group = dist.group.WORLD
    found = {name: split(options, narrow, group) for name, (options, narrow) in CASES.items()}
    leaves, labels = operands(bias=False)
    with pytest.raises(ValueError) as raised:  # the first rank has fewer rows than the last
        token_logprobs(leaves[0], leaves[1].detach()[: 20 + rank], labels, group=group)
    return found, str(raised.value), nemo_rl(group)


def test_a_split_vocabulary_equals_a_whole_one(tmp_path):
    """Two gloo processes with 21 and 20 of 41 rows."""
    (first, message, nemo), (second, other, others_nemo) = run_ranks(2, on_a_rank, tmp_path)
    assert message == other == "weight has [20, 21] rows on the ranks of group: split it as [21, 20], in order"
    for name, (options, narrow) in CASES.items():
        logp, entropy, hidden, weight = split(options, narrow)
        for rank in (first, second):
            torch.testing.assert_close(rank[name][:2], [logp, entropy])
            assert_close_at_scale(rank[name][2], hidden, 1e-2 if narrow else 1e-10, f"{name}: hidden")
        whole = torch.cat([first[name][3], second[name][3]])
        assert_close_at_scale(whole, weight, 1e-2 if narrow else 1e-10, f"{name}: weight")
    logp, *grads = nemo_rl()
    torch.testing.assert_close([nemo[0], others_nemo[0]], [logp, logp])
    torch.testing.assert_close([torch.cat(parts) for parts in zip(nemo[1:], others_nemo[1:], strict=True)], grads)


def test_the_lines_for_verl(monkeypatch):
    name = "verl.utils.kernel.linear_cross_entropy"
    for end in (1, 2, 3, 4):
        package = ".".join(name.split(".")[:end])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    run_lines("verl.utils.kernel")
    leaves, labels = operands(shape=(1, N), bias=False)
    labels = labels.clamp(min=0)
    found = sys.modules[name].linear_cross_entropy(*leaves, labels, 0.7, "none", None)
    expected = [x.flatten() for x in dense(leaves, labels, 0.7)]
    torch.testing.assert_close(list(found), expected)
    ours, torchs = (torch.autograd.grad(grpo(*x, labels.flatten()), leaves) for x in (found, expected))
    torch.testing.assert_close(ours, torchs)


def test_the_lines_for_prime_rl():
    leaves, labels = operands(shape=(2, 5), bias=False)
    labels, temperature = labels.clamp(min=0), torch.rand(2, 5, dtype=torch.float64) + 0.5
    layer = type("FusedOutputLinear", (torch.nn.Linear,), {})
    run_lines("FusedOutputLinear", FusedOutputLinear=layer, PrimeLmOutput=dict)
    head = layer(D, V, bias=False)
    head.weight = torch.nn.Parameter(leaves[1].detach())
    found = head(leaves[0], labels, temperature)
    torch.testing.assert_close([found["logprobs"], found["entropy"]], [*dense(leaves, labels, temperature)])


def test_the_lines_for_skyrl_and_open_instruct():
    """Over lazy logits of a patched model, whose own softcap they include."""
    model, (ids, _) = tiny("gemma2 softcap"), batch()
    logits = model(input_ids=ids).logits.detach() / 0.7
    dense_logp = logits.log_softmax(-1)
    dense_entropy = -(dense_logp.exp() * dense_logp).sum(-1)
    patch(model, always=True)
    rolled = ids.roll(-1, 1)
    names = {"sequences_rolled": rolled, "temperature": 0.7, "compute_entropy": True}
    names = run_lines("sequences_rolled", output=model(input_ids=ids), **names)
    torch.testing.assert_close(names["log_probs"], dense_logp.gather(-1, rolled[..., None]).squeeze(-1))
    torch.testing.assert_close(names["entropy_BS"], dense_entropy)
    pad = int(ids[0, 3])
    forward_for_logprobs = run_lines("def forward_for_logprobs")["forward_for_logprobs"]
    logp, entropy = forward_for_logprobs(model, ids, torch.ones_like(ids), None, pad, 0.7, True)
    expected = dense_logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logp, torch.where(ids[:, 1:] == pad, 0.0, expected))
    torch.testing.assert_close(entropy, torch.where(ids[:, 1:] == pad, 0.0, dense_entropy[:, :-1]))
    assert patch_state(model).materialized == 0 and logp.requires_grad
