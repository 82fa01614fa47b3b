"""The k most probable tokens of a teacher: what is written down of it, and the losses that compare with it."""

import pytest
import torch

from hf_xent import losses
from hf_xent.losses.targets import TopK
from hf_xent.ops import Head
from hf_xent.ops.top_k import top_k_of
from support.oracle import Largest, gradients

V, D = 37, 5


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_the_most_probable_tokens_are_those_of_dense_logits(k):
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 7, D), (V, D), (V,)))
    bias[4] = -torch.inf  # a banned token is the last of all
    head = Head(weight, bias, scale=1.5, softcap=None)
    ids, logp, rest = top_k_of(hidden, head, k, temperature=0.7, memory_budget=4 * V * 8 * 4)
    dense = (head.logits(hidden) / 0.7).log_softmax(-1)
    expected, order = dense.sort(-1, descending=True)
    assert torch.equal(ids, order[..., :k]) and ids.dtype == torch.int64
    torch.testing.assert_close(logp, expected[..., :k])
    torch.testing.assert_close(rest, expected[..., k:].logsumexp(-1))


def test_a_small_rest_is_not_rounded_to_nothing():
    """Far below what float32 resolves beside 1."""
    bias = torch.full((V,), -30.0)
    bias[3] = 0.0
    found = top_k_of(torch.zeros(2, D), Head(torch.zeros(V, D), bias), 1)
    torch.testing.assert_close(found.rest, torch.full((2,), -30.0) + torch.tensor(V - 1.0).log(), rtol=1e-6, atol=0)


def test_the_most_probable_tokens_are_found_in_few_rows_at_a_time():
    hidden, weight = torch.randn(200, D), torch.randn(V, D)
    with Largest() as largest:
        top_k_of(hidden.bfloat16(), Head(weight.bfloat16()), 3, memory_budget=10 * V * 16)
    assert largest.numel <= 200 * D
    assert [tuple(x.shape) for x in top_k_of(hidden[:0], Head(weight), 3)] == [(0, 3), (0, 3), (0,)]


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [(0, {}, "k is 0: pass"), (V + 1, {}, "k is 38"), (3, {"temperature": 0.0}, "temperature is 0.0: pass")],
)
def test_what_cannot_be_found_is_refused(k, options, message):
    with pytest.raises(ValueError, match=message):
        top_k_of(torch.zeros(2, D), Head(torch.zeros(V, D)), k, **options)


# --- losses ----------------------------------------------------------------------------------------------------------

OBJECTIVES = ("forward_kl", "reverse_kl", "jsd:beta=0.3", "total_variation")
LABELS = torch.tensor([[3, -100, 0], [V - 1, 3, 7]])
OPINIONS = torch.tensor([[True, False, True], [True, True, False]])


def teacher(k, temperature=1.0, tail="class", mask=None):
    """The k most probable tokens of a random teacher, in any order, and the mass of all others."""
    dense = (2 * torch.randn(2, 3, V, dtype=torch.float64) / temperature).log_softmax(-1)
    order = dense.argsort(-1, descending=True)
    ids = order[..., :k].flip(-1)
    rest = dense.gather(-1, order[..., k:]).logsumexp(-1)
    return TopK(ids, dense.gather(-1, ids), rest, tail, temperature, mask)


def operands():
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, D), (V, D), (V,)))
    return [x.requires_grad_() for x in (hidden, weight, bias)]


def dense_loss(objective, logits, target):
    """The losses [2, 3] by the definitions, from a row of the teacher's probabilities."""
    own, temperature, k = target.temperature, objective.temperature, target.ids.shape[-1]
    z = logits.flatten(0, 1)
    ids, logp, rest = target.ids.reshape(-1, k), target.logp.reshape(-1, k), target.rest.flatten()
    if target.tail == "class" and k < V:
        s = (z / temperature).softmax(-1)
        given = s.gather(-1, ids)
        student = torch.cat([given, 1 - given.sum(-1, keepdim=True)], 1).log()
        full = torch.cat([logp, rest[:, None]], 1)
    else:
        student = z / temperature
        others = (z.detach() / own).scatter(1, ids, -torch.inf) if target.tail == "student" else torch.zeros_like(z)
        others = others.scatter(1, ids, -torch.inf).softmax(-1).log() + rest[:, None] if k < V else others
        full = others.scatter(1, ids, logp) * (own / temperature)
    found = objective.reference(temperature * student, None, teacher=temperature * full.detach())
    found = found.reshape(2, 3)
    return found if target.mask is None else torch.where(target.mask, found, 0.0)


@pytest.mark.parametrize("tail", ["class", "uniform", "student"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_against_a_few_tokens_equal_dense_formulas(name, tail):
    """Values and all gradients, reduced and not, for 1, 3, V - 1 and all tokens, at equal and other temperatures."""
    for k in (1, 3, V - 1, V):
        for temperature, own in ((1.0, 1.0), (2.0, 2.0)) if tail == "class" else ((1.5, 1.5), (0.8, 1.3)):
            objective = losses.get(name, temperature=temperature)
            target, leaves = teacher(k, own, tail, OPINIONS if k == 3 else None), operands()
            hidden, weight, bias = leaves
            head, tokens = Head(weight, bias, scale=0.7, softcap=4.0), torch.rand(2, 3, dtype=torch.float64)
            expected = torch.where(LABELS != -100, dense_loss(objective, head.logits(hidden), target), 0.0)
            options = {"teacher": target, "memory_budget": 2 * V * 8}
            for reduction in ("mean", "none"):
                found, stats = objective.compute(hidden, head, LABELS, reduction=reduction, **options)
                torch.testing.assert_close(stats.loss, expected.detach())
                want = expected.sum() / 5 if reduction == "mean" else expected
                torch.testing.assert_close(found, want)
                upstream = 1.0 if reduction == "mean" else tokens
                got = gradients((found * upstream).sum(), leaves)
                for x, y in zip(got, gradients((want * upstream).sum(), leaves, retain_graph=True), strict=True):
                    torch.testing.assert_close(x, y)
