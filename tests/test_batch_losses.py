"""Losses of batches, and the symmetric cross-entropy: worked examples, and what their formulas promise."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from hf_xent import classes

BINARY = torch.tensor([[0.9], [0.2], [0.6]], dtype=torch.float64).logit(), torch.tensor([1, 0, 1])
A, B, FAR = [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]
MAPS = torch.tensor([[0, 1, 2, 3], [0, 0.5, 1, 1.5], [1, 1, 1, 1.2]], dtype=torch.float64)[..., None]
CE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
TEXTS = ["dice", "tversky", "bias", "marginal_entropy", "pairs", "pairwise_gain", "symmetric_ce"]


def log(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def near(found, expected, tolerance=1e-6):
    assert float(torch.as_tensor(found).detach()) == pytest.approx(float(expected), abs=tolerance)


def given(loss, rows, width, feature_map=None):
    """What a loss needs, for a number of rows."""
    maps = torch.randn(rows, 3, 2) if feature_map is None else feature_map
    known = {"feature_map": maps, "state": loss.state(2, width), "second": torch.randn(rows, width)}
    known["list_id"] = torch.arange(rows) % 2
    return {need: known[need] for need in (n.removeprefix("column:") for n in loss.needs)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dice:smooth=1e-4, alpha=0.0, squared=False", 0.189184),
        ("dice", 0.052497),
        ("dice:alpha=0.0", 0.049881),
        ("tversky", 0.122807),
    ],
)
def test_worked_examples_of_overlap(text, expected):
    near(classes.get(text)(*BINARY), expected)


@pytest.mark.parametrize("text", ["dice:alpha=0.0", "dice:alpha=0.0, squared=False, hard_negatives=1.0", "tversky"])
def test_a_perfect_prediction_costs_nothing(text):
    labels = torch.tensor([0, 2, 2, 1])
    near(classes.get(text)(60 * F.one_hot(labels).double(), labels), 0, 1e-12)


def test_certain_rows_count_less_by_the_logit_and_not_by_its_rounded_probability():
    """(1 - p)^alpha is e^(-alpha z) for a large logit z; in float32 1 - p is 0 from 17 on."""
    for z in (10.0, 30.0, 1000.0):
        logits = torch.tensor([[z]], requires_grad=True)
        loss = classes.get("dice")(logits, torch.tensor([1]))
        w = math.exp(-0.01 * z)
        near(loss, 1 - (2 * w + 1) / (w * w + 2), 1e-5)
        [gradient] = torch.autograd.grad(loss, logits)
        slope = (2 * (w * w + 2) - 2 * w * (2 * w + 1)) / (w * w + 2) ** 2
        near(gradient, 0.01 * w * slope, 1e-5)


def test_one_logit_is_the_second_class_of_two():
    """And two classes of a softmax with the logits 0 and z have the dice of both."""
    torch.manual_seed(0)
    z, labels = torch.randn(9, 1).double(), torch.randint(2, (9,))
    for text in ("dice", "tversky:alpha=0.2, beta=0.9", "dice:hard_negatives=0.5"):
        loss = classes.get(text)
        both = loss(torch.cat([torch.zeros_like(z), z], 1), labels)
        torch.testing.assert_close(both, loss(z, labels) + loss(-z, 1 - labels))
        assert torch.equal(loss.predict(z), (z[:, 0] > 0).long())
        torch.testing.assert_close(loss.scores(z)[:, 1], z[:, 0].sigmoid())


def test_tversky_of_equal_weights_is_dice():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4).double(), torch.randint(4, (9,))
    dice = classes.get("dice:alpha=0.0, squared=False, smooth=0.6")
    torch.testing.assert_close(classes.get("tversky:smooth=0.3")(logits, labels), dice(logits, labels))
    recall = classes.get("tversky:alpha=0.0, beta=1.0")
    near(recall(torch.tensor([[9.0], [9.0]]).double(), torch.tensor([1, 0])), 0, 1e-4)  # a false positive is free


def test_hard_negatives_are_those_of_the_largest_probability():
    """Two rows of the class keep one of the other four; a class without rows keeps none and has no loss."""
    loss = classes.get("dice:hard_negatives=0.5, alpha=0.0")
    z = torch.tensor([[1.0], [0.5], [2.0], [-1.0], [0.3], [-3.0]]).double()
    labels = torch.tensor([1, 1, 0, 0, 0, 0])
    torch.testing.assert_close(loss(z, labels), classes.get("dice:alpha=0.0")(z[:3], labels[:3]))
    near(loss(z, 0 * labels), 0)
    every = classes.get("dice:hard_negatives=2.0, alpha=0.0")
    torch.testing.assert_close(every(z, labels), classes.get("dice:alpha=0.0")(z, labels))


def test_overlap_of_accumulated_batches_is_not_that_of_all_rows():
    """As their documentation says: the mean of two halves differs from the whole, by far more than rounding."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    for text in ("dice", "tversky", "marginal_entropy", "pairs"):
        loss = classes.get(text)
        halves = (loss(logits[:4], labels[:4]) + loss(logits[4:], labels[4:])) / 2
        assert not loss.per_row and abs(halves - loss(logits, labels)) > 1e-2


def bias(text, maps=MAPS, state=None, mask=None, ce=CE):
    """The loss of rows whose cross-entropies are given."""
    p = torch.exp(-ce)
    logits = torch.stack([p, 1 - p], 1).log()
    return classes.get(text)(logits, torch.zeros(len(ce), dtype=torch.long), feature_map=maps, state=state, mask=mask)


def test_bias_by_example():
    near(bias("bias:mode=local"), 0.900450)
    near(bias("bias"), 0.900450)  # nothing was seen before
    images = MAPS.reshape(3, 1, 2, 2)
    near(bias("bias:mode=local", images), 0.900450)
    padded = torch.cat([torch.full_like(MAPS, torch.nan), MAPS], 1)
    near(bias("bias:mode=local", padded, mask=torch.arange(8).expand(3, 8) >= 4), 0.900450)


def test_the_smallest_variance_is_remembered_while_training():
    state = classes.get("bias").state(1, 2)
    low = MAPS / 10
    bias("bias", low, state.eval())
    assert state.minimum == math.inf, "evaluation leaves the state"
    bias("bias", low, state.train())
    near(state.minimum, 0.0001, 1e-9)
    found = bias("bias", MAPS, state)
    near(state.minimum, 0.0001, 1e-9)  # it does not rise
    v = torch.tensor([1.6666667, 0.4166667, 0.01]).double()
    relative = (v - 0.0001) / (v.max() - v.min())  # the batch's spread, as in the authors' code: 1.006 at most
    near(found, (((0.3 * relative).exp() - 0.3) * CE).mean())
    again = classes.get("bias").state(1, 2)
    again.load_state_dict(copy.deepcopy(state.state_dict()))
    assert again.minimum == state.minimum
    assert classes.get("bias:mode=local").state(1, 2) is None


def test_equal_and_nearly_equal_variances_are_finite():
    state = classes.get("bias").state(1, 2)
    bias("bias", MAPS / 10, state)
    equal = MAPS[:1].expand(3, 4, 1)
    near(bias("bias", equal, state), 0.7 * CE.mean())
    near(bias("bias", MAPS[:1], state, ce=CE[:1]), 0.7 * 0.5)  # one row
    apart = equal * torch.tensor([1, 1.0005, 1.0005]).double()[:, None, None]
    weights = torch.full((3,), math.exp(0.3 * 10) - 0.3)
    near(bias("bias", apart, state), (weights * CE).mean())


def test_weights_of_bias_have_no_gradient():
    maps = MAPS.clone().requires_grad_()
    ce = CE.clone().requires_grad_()
    found = bias("bias:mode=local", maps, ce=ce)
    by_maps, by_ce = torch.autograd.grad(found, [maps, ce], allow_unused=True)
    assert by_maps is None
    torch.testing.assert_close(by_ce, torch.tensor([1.049859, 0.776421, 0.7]).double() / 3, rtol=0, atol=1e-6)


def test_symmetric_ce_by_example():
    q, t, label = log(A), log(B), torch.tensor([0])
    pure = classes.get("symmetric_ce:ce_weight=0.0")
    near(pure(q, label, second=t), 0.877863)
    near(pure(t, label, second=q), 0.877863)  # the same from both sides
    near(classes.get("symmetric_ce")(q, label, second=t), 0.877863 - math.log(0.7))
    near(pure(q, label, second=q), -sum(p * math.log(p) for p in A))  # the entropy
    distilled = classes.get("symmetric_ce:alpha=0.0, ce_weight=0.0")(q, label, second=t)
    torch.testing.assert_close(distilled, F.cross_entropy(q, t.exp(), reduction="none"))


def test_symmetric_ce_learns_through_both_sides_and_not_into_the_teacher():
    z, t = log(A, B).requires_grad_(), log(B, FAR).requires_grad_()
    found = classes.get("symmetric_ce:alpha=1.0, ce_weight=0.0")(z, torch.tensor([0, 0]), second=t)
    by_z, by_t = torch.autograd.grad(found.sum(), [z, t], allow_unused=True)
    q, cost = z.softmax(1), -t.log_softmax(1)
    torch.testing.assert_close(by_z, q * (cost - (q * cost).sum(1, keepdim=True)))  # d sum q c / dz
    assert by_t is None


def test_marginal_entropy_by_example():
    logits, labels = log([0.9, 0.1], [0.3, 0.7]), torch.tensor([0, 1])
    ce = -(math.log(0.9) + math.log(0.7)) / 2
    near(classes.get("marginal_entropy")(logits, labels) - ce, -0.201903)
    near(classes.get("marginal_entropy:weight=0.0")(logits, labels), ce)
    even = log([0.9, 0.1], [0.1, 0.9])
    near(classes.get("marginal_entropy:weight=1.0")(even, labels) + math.log(0.9), -math.log(2), 1e-5)
    flat = even.clone().requires_grad_()
    loss = classes.get("marginal_entropy:weight=1.0")(flat, labels) - F.cross_entropy(flat, labels)
    near(torch.autograd.grad(loss, flat)[0].abs().max(), 0)  # the least of all


def test_pairs_by_example():
    same, other = torch.tensor([1, 1]), torch.tensor([1, 0])
    term = lambda rows, labels, text="pairs": (  # noqa: E731
        classes.get(text)(log(*rows), labels) - F.cross_entropy(log(*rows), labels)
    )
    near(term((A, B), same), 0.055962)
    near(term((A, FAR), other), 1.307530)
    near(term((A, FAR), other), (2 - 1.292822) + (2 - 1.399648), 2e-6)
    near(term((A, FAR), same), 1.292822 + 1.399648, 2e-6)
    near(term((A, FAR), other, "pairs:margin=1.0"), 0)  # both directions are farther apart
    three = torch.tensor([1, 1, 0])
    apart = (term((A, FAR), other) + term((B, FAR), other)) / 2
    near(term((A, B, FAR), three), 0.055962 + apart)
    near(term((A,), same[:1]), 0)
    with torch.autocast("cpu", torch.bfloat16):
        near(term((A, B), same), 0.055962)


def test_gains_by_example():
    """Also without the winner, which cannot be told from the order of rows, and with a list that has no pair."""
    loss = classes.get("pairwise_gain")
    gains, scores = torch.tensor([100.0, 9, -1]).double(), torch.tensor([[0.5], [0.8], [-0.2]]).double()
    one = torch.zeros(3, dtype=torch.long)
    near(loss(scores, gains, list_id=one), 0.937947)
    near(loss(scores + 7, gains, list_id=one), 0.937947)
    torch.testing.assert_close(loss.predict(scores), scores[:, 0])
    near(classes.get("pairwise_gain:top=2")(scores, gains, list_id=one), 1.963788 * 0.854355 / 2)
    tied = torch.cat([gains, torch.tensor([4.0, 4.0]).double()])
    more = torch.cat([scores, torch.tensor([[3.0], [-3.0]]).double()])
    near(loss(more, tied, list_id=torch.tensor([5, 5, 5, 8, 8])), 0.937947)  # two rows of equal gain
    near(loss(more, 0 * tied, list_id=torch.tensor([5, 5, 5, 8, 8])), 0)
    two = loss(torch.cat([scores, -scores]), torch.cat([gains, gains]), list_id=torch.tensor([4, 4, 4, 7, 7, 7]))
    torch.testing.assert_close(two, (loss(scores, gains, list_id=one) + loss(-scores, gains, list_id=one)) / 2)


def test_ties_with_the_last_row_count():
    """Of gains 3, 1, 1, 0 the top two are three rows, in any order of the two that tie."""
    loss, every = classes.get("pairwise_gain:top=2"), classes.get("pairwise_gain:top=0")
    gains, scores = torch.tensor([1.0, 3, 0, 1]).double(), torch.tensor([[0.5], [0.8], [-0.2], [2.0]]).double()
    one = torch.zeros(4, dtype=torch.long)
    kept = torch.tensor([0, 1, 3])
    expected = every(scores[kept], gains[kept], list_id=one[:3])
    torch.testing.assert_close(loss(scores, gains, list_id=one), expected)
    torch.testing.assert_close(loss(scores.flip(0), gains.flip(0), list_id=one), expected)


def test_tanh_bounds_the_difference_of_scores():
    loss = classes.get("pairwise_gain:tanh=True")
    gains, one = torch.tensor([9.0, 0.0]), torch.zeros(2, dtype=torch.long)
    near(loss(torch.tensor([[50.0], [-50.0]]), gains, list_id=one), math.log1p(math.exp(-2)) / 2)


@pytest.mark.parametrize("text", TEXTS)
def test_one_row_no_row_and_an_absent_class_are_finite(text):
    torch.manual_seed(0)
    loss = classes.get(text)
    for rows in (0, 1, 2):
        logits = (1e4 * torch.randn(rows, loss.outputs(3))).requires_grad_()
        labels = torch.zeros(rows, dtype=torch.long) if loss.labels == "classes" else torch.arange(rows).float()
        found = loss(logits, labels, **given(loss, rows, loss.outputs(3)))
        [gradient] = torch.autograd.grad(found.sum(), logits)
        assert bool(found.isfinite().all()) and bool(gradient.isfinite().all())
        assert rows or bool((found == 0).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dice:smooth=0.0", "smooth is 0.0: choose a number in"),
        ("bias:mode=running", "mode is 'running': choose 'global' or 'local'"),
        ("bias:mode=local, largest=3.0", "largest is 3.0 in the mode 'local'"),
        ("symmetric_ce:alpha=1.5", "alpha is 1.5"),
        ("pairwise_gain:top=-1", "top is -1: choose a whole number of at least 0"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        classes.get(text)


def test_what_a_loss_needs_is_asked_for():
    logits, labels = torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)
    for text, message in (
        ("symmetric_ce", "second is None"),
        ("pairwise_gain", "list_id is None"),
        ("bias", "is None"),
    ):
        with pytest.raises(ValueError, match=message):
            classes.get(text)(logits, labels)
    with pytest.raises(ValueError, match=r"feature_map is \(1, 4, 1\) for 3 labels"):
        classes.get("bias")(logits, labels, feature_map=MAPS[:1])
