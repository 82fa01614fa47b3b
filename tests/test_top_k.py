"""The k most probable tokens of a teacher: what is written down of it, and the losses that compare with it."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import top_k as benchmark
from hf_xent import losses
from hf_xent.losses.targets import TopK
from hf_xent.ops import Head, vocab_stats
from hf_xent.ops.top_k import top_k_of
from support.oracle import Largest, assert_no_worse, gradients

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

OBJECTIVES = ("forward_kl", "reverse_kl", "jsd:beta=0.3", "skew_kl:alpha=0.2", "total_variation")
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
    found = replace(objective, ce_weight=0.0).reference(
        temperature * student, None, teacher=temperature * full.detach()
    )
    found = found.reshape(2, 3)
    found = found if target.mask is None else torch.where(target.mask, found, 0.0)
    nll = cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none").reshape(2, 3)
    return (1 - objective.ce_weight) * found + objective.ce_weight * nll


@pytest.mark.parametrize("tail", ["class", "uniform", "student"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_against_a_few_tokens_equal_dense_formulas(name, tail):
    """Values and all gradients, reduced and not, for 1, 3, V - 1 and all tokens, at equal and other temperatures."""
    for k in (1, 3, V - 1, V):
        for temperature, own in ((1.0, 1.0), (2.0, 2.0)) if tail == "class" else ((1.5, 1.5), (0.8, 1.3)):
            objective = losses.get(name, temperature=temperature, ce_weight=0.3 if k in (3, V) else 0.0)
            target, leaves = teacher(k, own, tail, OPINIONS if k == 3 else None), operands()
            hidden, weight, bias = leaves
            head = (
                Head(weight, bias, scale=0.7, softcap=4.0) if k == 1 else Head(weight, bias, scale=1 if k == 3 else 2)
            )
            tokens = torch.rand(2, 3, dtype=torch.float64)
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


@pytest.mark.parametrize("tail", ["class", "uniform", "student"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_tokens_of_a_teacher_are_all_of_its_distribution(name, tail):
    """k = V equals hidden states and head of the same teacher."""
    hidden, weight, _ = operands()
    other, head = torch.randn(2, 3, 4, dtype=torch.float64), Head(torch.randn(V, 4, dtype=torch.float64))
    objective = losses.get(name, temperature=1.7)
    target = TopK(*top_k_of(other, head, V, temperature=0.6), tail, 0.6)
    found, expected = (objective(hidden, Head(weight), LABELS, teacher=t) for t in (target, (other, head)))
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(gradients(total, [hidden, weight]) for total in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_students_own_tail_is_one_class(name):
    """At one temperature the value and all gradients of 'student' are those of 'class', for every divergence."""
    leaves, objective = operands()[:2], losses.get(name)
    found = [
        objective(leaves[0], Head(leaves[1]), LABELS, teacher=replace(target, tail=tail))
        for target in [teacher(3)]
        for tail in ("class", "student")
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*(gradients(total, leaves) for total in found))


@pytest.mark.parametrize("tail", ["class", "uniform"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_that_leaves_the_others_nothing(name, tail):
    """Masses far below what float32 resolves beside 1 are compared in float32 as in float64; nothing is infinite."""
    bias = torch.full((V,), -25.0, dtype=torch.float64)
    bias[:3] = torch.tensor([1.0, 0.5, 0.0])
    target = TopK(torch.arange(3).expand(1, 3), torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([-30.0]), tail)
    answers = []
    for dtype in (torch.float32, torch.float64):
        z = bias.to(dtype).requires_grad_()
        total = losses.get(name)(
            torch.zeros(1, D, dtype=dtype), Head(z.new_zeros(V, D), z), LABELS[1, 1:2], teacher=target
        )
        answers.append((total.double(), torch.autograd.grad(total, z)[0].double()))
    for x, y in zip(*answers, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    nothing = replace(
        target, rest=torch.full((1,), -torch.inf), logp=target.logp.clone().index_fill_(1, torch.tensor(2), -torch.inf)
    )
    z = bias.float().requires_grad_()
    total = losses.get(name)(torch.zeros(1, D), Head(torch.zeros(V, D), z), LABELS[1, 1:2], teacher=nothing)
    assert total.isfinite() and torch.autograd.grad(total, z)[0].isfinite().all()


def test_what_stands_where_a_teacher_has_no_opinion_is_not_read():
    """Neither ids nor numbers there, and none at ignored labels."""
    leaves, clean = operands()[:2], teacher(3, mask=OPINIONS)
    unread = ~OPINIONS | (LABELS == -100)
    broken = TopK(
        torch.where(unread[..., None], -1, clean.ids),
        torch.where(unread[..., None], torch.nan, clean.logp),
        torch.where(unread, torch.nan, clean.rest),
        mask=OPINIONS,
    )
    for tail in ("class", "uniform"):
        totals = [
            losses.get("jsd")(leaves[0], Head(leaves[1]), LABELS, teacher=replace(t, tail=tail))
            for t in (clean, broken)
        ]
        assert torch.equal(*totals)
        torch.testing.assert_close(*(gradients(total, leaves) for total in totals), rtol=0, atol=0)


def test_two_halves_are_the_whole_batch():
    """Sums over accumulated batches with one divisor; no label at all is a loss of 0."""
    hidden, weight, _ = operands()
    target = teacher(3, tail="student")
    objective, rows = losses.get("reverse_kl"), (slice(0, 1), slice(1, 2))
    parts = [
        objective(
            hidden[part],
            Head(weight),
            LABELS[part],
            num_items=5,
            teacher=TopK(target.ids[part], target.logp[part], target.rest[part], "student"),
        )
        for part in rows
    ]
    whole = objective(hidden, Head(weight), LABELS, teacher=target)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(gradients(total, [hidden, weight]) for total in (sum(parts), whole)))
    for tail in ("class", "uniform"):
        empty = objective(hidden, Head(weight), torch.full_like(LABELS, -100), teacher=replace(target, tail=tail))
        assert empty == 0 and all(not g.any() for g in gradients(empty, [hidden, weight]))


@pytest.mark.parametrize("tail", ["class", "uniform"])
def test_statistics_beside_the_loss_are_the_students_at_temperature_1(tail):
    hidden, weight, bias = operands()
    objective, names = losses.get("jsd", temperature=2.0), ("lse", "target", "entropy", "rank")
    expected = vocab_stats(hidden, Head(weight, bias), LABELS, outputs=names)
    for observe in ((), names[2:]):
        options = {"teacher": teacher(3, 2.0, tail), "token_weight": OPINIONS.double() / 3, "observe": observe}
        found, stats = objective.compute(hidden, Head(weight, bias), LABELS, reduction="sum", **options)
        for name in ("lse", "target", *observe):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name).detach())
        torch.testing.assert_close(found.detach(), (stats.loss * OPINIONS).sum() / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", ["class", "uniform"])
def test_low_precision_is_no_worse_than_torch(dtype, tail):
    target = teacher(3, tail=tail)
    for name in OBJECTIVES:
        objective, answers = losses.get(name), {}
        low = [x.detach().to(dtype) for x in operands()[:2]]
        for kind, to in (("truth", torch.float64), ("torch", dtype), ("found", dtype)):
            hidden, weight = leaves = [x.to(to).requires_grad_() for x in low]
            if kind == "found":
                total = objective(hidden, Head(weight), LABELS, teacher=target)
            else:
                logits = hidden @ weight.T
                logits = logits.to(torch.promote_types(to, torch.float32))
                total = dense_loss(objective, logits, target)[LABELS != -100].mean()
            answers[kind] = [total.detach(), *gradients(total, leaves)]
        for i, what in enumerate(("loss", "by hidden", "by weight")):
            out, same, truth = (answers[kind][i] for kind in ("found", "torch", "truth"))
            assert_no_worse(out, same, truth, what=f"{name} {what}")


@pytest.mark.parametrize("tail", ["class", "uniform", "student"])
def test_no_row_of_the_vocabulary_is_kept(tail):
    """Of 40 tokens no tensor has more than a few rows of the vocabulary, or k + 1 numbers a token."""
    hidden, weight = torch.randn(40, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target, labels = top_k_of(torch.randn(40, D), Head(torch.randn(V, D)), 3), torch.randint(V, (40,))
    for reduction, budget in (("mean", 2 * V * 4), ("none", 4 * V * 4)):
        with Largest() as largest:
            options = {"teacher": TopK(*target, tail), "memory_budget": budget, "reduction": reduction}
            losses.get("jsd")(hidden, Head(weight), labels, **options).sum().backward()
        assert largest.numel <= 40 * D < 40 * V / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 2.0}, "temperature is 1.0 but the teacher's .* at 2.0.*: choose tail"),
        ({"tail": "none"}, "tail is 'none': choose 'class', 'uniform', 'student'"),
        ({"ids": torch.full((2, 3, 3), V)}, "ids range over .* head has 37 tokens: pass"),
        ({"ids": torch.zeros(2, 3, 3, dtype=torch.long)}, "a token twice at a position: pass"),
        ({"ids": torch.zeros(2, 3, 3)}, "ids are torch.float32: pass token ids"),
        ({"logp": torch.zeros(2, 3, 4)}, r"logp \(2, 3, 4\): pass two of one shape"),
        ({"rest": torch.zeros(2)}, r"rest has shape \(2,\) on cpu but labels \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, "mask is torch.float32: pass one of bool"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(changes, message):
    hidden, weight, _ = operands()
    with pytest.raises(ValueError, match=message) as error:
        losses.get("forward_kl")(hidden, Head(weight), LABELS, teacher=replace(teacher(3), **changes))
    assert "\n" not in str(error.value)


def test_what_is_measured_is_one_loss():
    """Tails that are one computation, and dense torch beside the uniform tail, give equal losses; memory is counted."""
    hidden, weight, _ = (x.detach().float().requires_grad_() for x in operands())
    runs = benchmark.runs_of(hidden[0].detach().requires_grad_(), weight, LABELS[1], 3)
    torch.testing.assert_close(runs["forward_kl, class"](), runs["forward_kl, student"]())
    torch.testing.assert_close(runs["forward_kl, uniform"](), runs[benchmark.DENSE]())
    run, leaves = lambda: (hidden @ weight.T).square().sum(), [hidden, weight]
    assert benchmark.seconds_of(run, leaves) > 0 and benchmark.memory_of(run, leaves) >= 2 * 6 * V * 4
