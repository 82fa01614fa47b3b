"""Every loss on a head that is split over ranks: two and four gloo processes equal one, values and all gradients.

Two launches, of two processes and (slow) of four, serve all cases. The vocabulary of 97 divides by neither; the first
and the last rank have labels, and some positions have none.
"""

from functools import cache, partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor import placement_types as placement
from transformers import AutoModelForCausalLM

import hf_xent
from hf_xent import losses
from hf_xent.losses import EMO
from hf_xent.losses.other_vocabulary import OtherVocabulary
from hf_xent.losses.targets import TopK
from hf_xent.ops import Head, Shard, vocab_loss, vocab_stats
from hf_xent.ops.divergences import stream_divergence
from hf_xent.ops.request import Request
from hf_xent.ops.row_loss import RowLoss, at_ids
from hf_xent.ops.top_k import top_k_of
from hf_xent.patching import patch_state
from hf_xent.trainers.divergence import noisefit, rdrop
from support.models import V, batch, gradients, tiny
from support.oracle import Largest, Polynomial, assert_close_at_scale, assert_no_worse
from support.ranks import run_ranks

D, D2, B, T = 12, 5, 2, 6
LOSSES = {
    "cross_entropy": "cross_entropy:label_smoothing=0.1, z_loss=0.01",
    "focal": "focal",
    "comp_sum": "comp_sum:tau=0.5",
    "tailr": "tailr:gamma=0.3, label_smoothing=0.1",
    "mixce": "mixce",
    "emo": "emo:gt_detach=True",
    "emo current": "emo:variant='emo2', cost='current'",
    "eisl": "eisl:ce_factor=0.5",
    "forward_kl": "forward_kl:temperature=2.0",
    "reverse_kl": "reverse_kl:temperature=0.7",
    "jsd": "jsd:beta=0.3, temperature=1.5",
    "universal_logit": "universal_logit:temperature=1.5",
    "skew_kl": "skew_kl:reverse=True, ce_weight=0.4, temperature=2.0",
    "total_variation": "total_variation:temperature=2.0, ce_weight=0.4",
}


def powers(_, first, second, ids, power):
    """A loss with constants of every token: token ids and a number."""
    terms = ((1 + power[:, None]) * first).exp() * second
    return {"loss": terms.sum(-1) + (at_ids(first, ids) * power[:, None]).sum(-1)}


IDS = torch.arange(36).reshape(2, 6, 3) * 41 % V
PASSES = {
    "rows of constants": RowLoss(powers, ((0, 1.5), (1, 1.0)), (IDS, torch.linspace(0, 2, 12).reshape(2, 6))),
    "noisefit v1": noisefit(temperature=2.0, ce_weight=0.3, consistency_weight=0.7),
    "noisefit v2": noisefit(temperature=1.5, version="v2"),
    "rdrop": rdrop(weight=0.7),
}
TAILED = ("cross_entropy", "focal", "comp_sum:tau=1.5")
HEAD = {"scale": 0.7, "softcap": 4.0}


def operands():
    """Whole operands as leaves, the same on every rank, and labels."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "hidden": (B, T, D + 3),
        "other": (B, T, D + 3),
        "weight": (V, D),
        "bias": (V,),
        "adapter": (V, 3),
        "teacher_hidden": (B, T, D2),
        "teacher": (V, D2),
    }
    tensors = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    labels = torch.tensor([[0, V - 1, 5, -100, 96, 48], [49, 24, -100, 25, 0, 75]])
    return {n: x.requires_grad_() for n, x in tensors.items()}, labels


class Part:
    """What a rank has of the operands; without a shard, all of them."""

    def __init__(self, shard=None):
        whole, self.labels = operands()
        self.shard = shard
        cut = slice(None) if shard is None else slice(shard.start, shard.start + shard.width)
        self.leaves = {
            n: x if "hidden" in n or n == "other" else x.detach()[cut].requires_grad_() for n, x in whole.items()
        }
        self.whole = {n: x.detach().requires_grad_() for n, x in whole.items()}
        own = self.leaves
        self.head = Head(own["weight"], own["bias"], **HEAD, adapter=own["adapter"], shard=shard)
        self.teacher = own["teacher_hidden"], Head(own["teacher"], scale=0.5, shard=shard)
        self.whole_teacher = own["teacher_hidden"], Head(self.whole["teacher"], scale=0.5)

    def gradients(self, total):
        """By all operands but the teacher's, which are constants."""
        leaves = {n: x for n, x in self.leaves.items() if "teacher" not in n}
        found = torch.autograd.grad(total, [*leaves.values()], allow_unused=True, retain_graph=True)
        return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def of_a_loss(text, part, *, whole_teacher=False, **options):
    """The mean, losses of tokens, gradients of both, and those of the mean's squared gradient by hidden states."""
    loss = losses.get(text)
    if isinstance(loss, EMO) and loss.cost == "frozen":  # a matrix that every rank has
        loss = loss.bind(part.whole["weight"])
    teacher = part.whole_teacher if whole_teacher else part.teacher
    call = partial(loss, part.leaves["hidden"], part.head, part.labels, memory_budget=8000, **options)
    call = partial(call, teacher=teacher) if loss.needs_teacher and "teacher" not in options else call
    mean, tokens = call(), call(reduction="none")
    found = {"mean": mean, "tokens": tokens}
    found |= {f"mean by {n}": g for n, g in part.gradients(mean).items()}
    weights = torch.linspace(-1, 2, tokens.numel(), dtype=tokens.dtype).reshape(tokens.shape)
    found |= {f"tokens by {n}": g for n, g in part.gradients((tokens * weights).sum()).items()}
    hidden = torch.autograd.grad(call(), part.leaves["hidden"], create_graph=True)[0]
    return found | {f"twice by {n}": g for n, g in part.gradients(hidden.square().sum()).items()}


def of_tokens(text, tail, part):
    """As `of_a_loss`, against the most probable tokens of the split teacher, which are found first."""
    found = {}
    for k in (3, V - 1):
        target = top_k_of(*part.teacher, k, temperature=1.5, memory_budget=8000)
        found |= {f"{name} of {k}": x for name, x in target._asdict().items()}
        options = {"teacher": TopK(*target, tail, 1.5)}
        found |= {f"{name}, {k}": x for name, x in of_a_loss(text, part, **options).items()}
    return found


def of_another_vocabulary(part):
    """A teacher of which half of the tokens are shared, in another order."""
    ids, mask = torch.arange(1, V, 2), part.labels != 5
    found = {}
    for name, teacher in (("split", part.teacher), ("whole", part.whole_teacher)):
        target = OtherVocabulary(*teacher, ids, ids.flip(0), mask)
        for loss in ("jsd:beta=0.3", "gold"):
            value = losses.get(loss)(part.leaves["hidden"], part.head, part.labels, teacher=target, memory_budget=8000)
            found |= {f"{name} {loss}": value} | {f"{name} {loss} by {n}": g for n, g in part.gradients(value).items()}
    return found


def of_passes(name, part):
    hidden = [part.leaves["hidden"], part.leaves["other"], part.leaves["hidden"].roll(1, 0)]
    count = 3 if "noisefit" in name else 2
    request = Request(("top", "rank", "entropy"), memory_budget=20_000)
    total, stats = stream_divergence(PASSES[name], hidden[:count], part.head, part.labels, request, 0.25)
    found = {"total": total, **stats.values} | {f"by {n}": g for n, g in part.gradients(total).items()}
    request = Request(memory_budget=20_000, unreduced=True)
    tokens, _ = stream_divergence(PASSES[name], hidden[:count], part.head, part.labels, request)
    return found | {"tokens": tokens} | {f"tokens by {n}": g for n, g in part.gradients(tokens.sum()).items()}


def of_tail(text, part, tail=0.05):
    """The compressed gradient, whose kept columns and rank-one rest are those of the whole vocabulary."""
    own = (part.leaves["hidden"], part.leaves["other"])
    peaked = torch.cat([x.roll(i, -1)[..., :D] for i in range(3) for x in own], 1)  # several tokens a group
    labels = torch.cat([part.labels.roll(i, 1) for i in range(6)], 1)
    head = Head(part.leaves["weight"], scale=2.0, shard=part.shard)
    total = losses.get(text)(peaked, head, labels, tail=tail, memory_budget=8000)
    return {"total": total} | {f"by {n}": g for n, g in part.gradients(total).items()}


def of_statistics(impl, part):
    names = ("lse", "target", "mean", "entropy", "variance", "payload", "top", "rank", "log_sum_sq")
    options = {"outputs": names, "memory_budget": 8000, "impl": impl}
    stats = vocab_stats(part.leaves["hidden"], part.head, part.labels, payload=part.teacher, **options)
    total = sum((i + 1) * value.square().sum() for i, value in enumerate(stats.values.values()) if value.requires_grad)
    found = stats.values | {f"by {n}": g for n, g in part.gradients(total).items()}
    loss = Polynomial(("lse", "target", "entropy"))
    value, observed = vocab_loss(loss, part.leaves["hidden"], part.head, part.labels, observe=("rank",), impl=impl)
    return (
        found
        | {"eager rank": observed.rank, "eager": value}
        | {f"eager by {n}": g for n, g in part.gradients(value).items()}
    )


def of_trained_payload(part):
    """A second head that is whole and trains, its gradient whole on every rank; and a whole head, the second split."""
    hidden, whole = part.whole_teacher
    options = {"outputs": ("payload", "entropy"), "memory_budget": 8000}
    first = vocab_stats(part.leaves["hidden"], part.head, part.labels, payload=(hidden, whole), **options)
    second = vocab_stats(hidden, whole, part.labels, payload=(part.leaves["hidden"], part.head), **options)
    total = first.payload.square().sum() + (second.payload * second.entropy).sum()
    leaves = [hidden, whole.weight, part.leaves["hidden"]]
    names = ("teacher hidden", "whole teacher", "hidden")
    return {"payload": first.payload, "other payload": second.payload} | dict(
        zip(names, torch.autograd.grad(total, leaves), strict=True)
    )


def of_nothing(part):
    """Without labels, and without gradients."""
    found = {}
    for name, text in LOSSES.items():
        loss = losses.get(text).bind(part.whole["weight"])
        options = {"teacher": part.teacher} if loss.needs_teacher else {}
        total = loss(part.leaves["hidden"], part.head, torch.full_like(part.labels, -100), **options)
        found |= {f"{name} by {n}": g for n, g in part.gradients(total).items()}
        with torch.no_grad():
            found[name] = loss(part.leaves["hidden"], part.head, part.labels, **options)
    return found


LOW = ("cross_entropy", "emo", "eisl", "forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation")


def low_precision(part):
    """Values and gradients of a plain head in bfloat16, one run after the other."""
    found = {}
    for name in LOW:
        own = {n: x.detach().bfloat16().requires_grad_() for n, x in part.leaves.items()}
        loss = losses.get(name).bind(part.whole["weight"].detach().bfloat16())
        teacher = own["teacher_hidden"][:1], Head(own["teacher"], shard=part.shard)
        options = {"teacher": teacher} if loss.needs_teacher else {}
        labels = part.labels.clamp(min=0)[:1]  # one sequence
        total = loss(own["hidden"][:1, :, :D], Head(own["weight"], shard=part.shard), labels, **options)
        grads = torch.autograd.grad(total, [own["hidden"], own["weight"]])
        found |= {name: total, f"{name} by hidden": grads[0], f"{name} by weight": grads[1]}
    return found


def dense(name, dtype):
    """The same by the loss's own reference on dense logits of `dtype`."""
    whole = {n: x.detach().bfloat16().to(dtype).requires_grad_() for n, x in operands()[0].items()}
    loss = losses.get(name).bind(whole["weight"].detach())
    logits = (whole["hidden"][0, :, :D] @ whole["weight"].T).to(torch.promote_types(dtype, torch.float32))
    teacher = (whole["teacher_hidden"][0] @ whole["teacher"].T).to(logits.dtype)
    total = loss.reference(logits, operands()[1].clamp(min=0)[0], weight=whole["weight"], teacher=teacher).mean()
    grads = torch.autograd.grad(total, [whole["hidden"], whole["weight"]])
    return {name: total.detach(), f"{name} by hidden": grads[0], f"{name} by weight": grads[1]}


CASES = {
    **{name: partial(of_a_loss, text) for name, text in LOSSES.items()},
    **{f"{name}, whole teacher": partial(of_a_loss, LOSSES[name], whole_teacher=True)
       for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation")},
    **{name: partial(of_passes, name) for name in PASSES},
    **{f"{text}, {tail}": partial(of_tokens, text, tail)
       for text, tail in (("jsd:beta=0.3, temperature=1.5", "class"), ("reverse_kl:ce_weight=0.3", "uniform"),
                          ("forward_kl:temperature=2.0, ce_weight=0.3", "student"))},
    **{f"tail {text}": partial(of_tail, text) for text in TAILED},
    "statistics": partial(of_statistics, None),
    "statistics, reference": partial(of_statistics, "reference"),
    "another vocabulary": of_another_vocabulary,
    "trained payload": of_trained_payload,
    "nothing": of_nothing,
}  # fmt: skip


@cache
def alone(name):
    """What one process finds."""
    return {n: x.detach() for n, x in CASES[name](Part()).items()}


OF_MODELS = {  # options of `patch`
    "emo": {"loss": "emo"},
    "emo, current head": {"loss": "emo:variant='emo', cost='current'"},
    "eisl": {"loss": "eisl"},
    "tailr": {"loss": "tailr:gamma=0.5"},
    "mixce": {"loss": "mixce"},
    "comp_sum": {"loss": "comp_sum"},
    "tail": {"tail": 0.3},
    "reference": {"impl": "reference"},
}


def of_a_model(model, options):
    """Loss and all gradients, gathered, of a patched model."""
    ids, labels = batch()
    loss = hf_xent.patch(model, **options)(input_ids=ids, labels=labels).loss
    loss.backward()
    state = patch_state(model)
    assert (state.streamed, state.materialized) == (1, 0)
    found = gradients(model)
    hf_xent.unpatch(model)
    return {"loss": loss.detach()} | {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def largest_of(shard):
    """The numbers in the largest tensor that a loss makes of 64 tokens, with room for 8 rows."""
    head = Head(torch.randn(min(shard.width, V - shard.start), D, requires_grad=True), shard=shard)
    hidden, labels, found = torch.randn(64, D, requires_grad=True), torch.randint(V, (64,)), {}
    for name in ("emo:cost='current'", "forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation"):
        for reduction in ("mean", "none"):
            with Largest() as largest:
                options = {"memory_budget": 8 * V * 4 // 4, "reduction": reduction, "teacher": (hidden, head)}
                losses.get(name)(hidden, head, labels, **options).sum().backward()
            found[f"{name} {reduction}"] = largest.numel
    return found


def split_by_hidden_size(model):
    """What a call says whose head is split, but not by the vocabulary."""
    hf_xent.patch(model)
    weight, mesh = model.lm_head.weight, init_device_mesh("cpu", (dist.get_world_size(),))
    model.lm_head.weight = nn.Parameter(distribute_tensor(torch.zeros(weight.shape), mesh, [placement.Shard(1)]))
    ids, labels = batch()
    with pytest.raises(ValueError) as error:
        model(input_ids=ids, labels=labels)
    return str(error.value)


def on_a_rank(rank, folder):
    shard = Shard(dist.group.WORLD, rank * -(-V // dist.get_world_size()), V)
    found = {name: {n: x.detach() for n, x in case(Part(shard)).items()} for name, case in CASES.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    found["models"] = {name: of_a_model(model, options) for name, options in OF_MODELS.items()}
    emo = hf_xent.losses.get("emo").bind(model.lm_head.weight)
    found["largest"] = largest_of(shard)
    found["low precision"] = {n: x.detach() for n, x in low_precision(Part(shard)).items()}
    return found | {"cost": emo.cost.to_local().shape, "refused": split_by_hidden_size(model)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that four ranks can split."""
    folder = tmp_path_factory.mktemp("model")
    tiny(num_key_value_heads=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, folder, tmp_path_factory):
    """What two and four processes find: one launch each."""
    return run_ranks(request.param, on_a_rank, tmp_path_factory.mktemp("ranks"), folder)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name, ranks):
    expected = alone(name)
    for key, want in expected.items():
        parts = [rank[name][key] for rank in ranks]
        if want.shape == parts[0].shape:
            assert all(torch.equal(parts[0], part) for part in parts), f"{key}: ranks differ"
            parts = parts[:1]
        found = torch.cat(parts) if parts[1:] else parts[0]
        torch.testing.assert_close(found, want, msg=f"{key}: {found} is not {want}")


@pytest.mark.parametrize("text", TAILED)
def test_these_tails_are_compressed(text):
    found, exact = alone(f"tail {text}")["by weight"], of_tail(text, Part(), 0.0)["by weight"]
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("name", LOW)
def test_low_precision_is_no_worse_than_torch(name, ranks):
    truth, same = dense(name, torch.float64), dense(name, torch.bfloat16)
    for key, exact in truth.items():
        parts = [rank["low precision"][key] for rank in ranks]
        found = torch.cat(parts) if "weight" in key else parts[0]
        assert_no_worse(found, same[key], exact, what=key)


def test_no_rank_gathers_rows(ranks):
    """The largest tensor has a few rows of a rank's part, or hidden states of 64 tokens, or their statistics."""
    for rank in ranks:
        for name, largest in rank["largest"].items():
            assert largest <= 64 * max(D, 4 * len(ranks)) < 64 * V // len(ranks), name


@pytest.mark.parametrize("name", OF_MODELS)
def test_tensor_parallel_models_equal_one_process(name, ranks, folder):
    """`tp_plan="auto"` and `patch(model, ...)`: the loss and all gradients of the whole model."""
    expected = of_a_model(AutoModelForCausalLM.from_pretrained(folder).eval(), OF_MODELS[name])
    for rank in ranks:
        found = rank["models"][name]
        assert found.keys() == expected.keys()
        for key, want in expected.items():
            assert_close_at_scale(found[key], want, 1e-4, key)


def test_a_rank_keeps_its_part_of_the_cost(ranks):
    width = -(-V // len(ranks))
    assert [rank["cost"][0] for rank in ranks] == [min(width, V - i * width) for i in range(len(ranks))]


def test_a_head_split_by_hidden_size_is_refused(ranks):
    message = ranks[0]["refused"]
    for part in ("weight", "Shard(dim=1)", f"({len(ranks)},) ranks", "Shard(0)", "unpatch"):
        assert part in message
    assert "\n" not in message
