"""Core-tuning and the supervised contrastive loss: toys, limits of the mixtures, batches that lack something."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_xent.classes import CoreTuning, SupCon, supervised_contrastive
from hf_xent.classes.core_tuning import hardest

K, D = 3, 5


def batch(labels, loss):
    torch.manual_seed(0)
    head = torch.nn.Linear(D, K)
    features = torch.randn(len(labels), D, requires_grad=True)
    given = {"features": features, "head": head, "state": loss.state(D, K)}
    return head(features), torch.tensor(labels, dtype=torch.long), given


@pytest.mark.parametrize(("pi", "expected"), [(0.6, 0.204330), (0.3, 0.842781)])
def test_focal_term_of_the_toys(pi, expected):
    """Two rows of a class and one of another: each of the two has the probability pi for its only positive."""
    vectors = torch.tensor([[1.0, 0.0], [np.log(pi / (1 - pi)), 0.0], [0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    focal = supervised_contrastive(vectors, targets, temperature=1.0, focal=True)
    assert focal.item() == pytest.approx(expected, abs=1e-6)
    plain = supervised_contrastive(vectors, targets, temperature=1.0)
    assert plain.item() == pytest.approx(-np.log(pi), abs=1e-9)


def test_soft_labels_attract_by_what_they_share():
    """Anchor 0 shares .9 with row 1 and .1 with row 2; equal similarities leave log 2 for any weights."""
    vectors, targets = torch.zeros(3, 2), torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.0, 1.0]])
    assert supervised_contrastive(vectors, targets).item() == pytest.approx(np.log(2))
    vectors = torch.tensor([[1.0], [1.0], [0.0]])
    log_pi = torch.tensor([1.0, 0.0]).log_softmax(0)
    rows = [-(0.9 * log_pi[0] + 0.1 * log_pi[1]), -log_pi[0], np.log(2)]
    assert supervised_contrastive(vectors, targets, 1.0).item() == pytest.approx(sum(rows) / 3)


def test_forced_shares_leave_the_originals(monkeypatch):
    """l = 0 makes f- the rows; l = 1 makes f+ the hardest of the class, in classes of two the rows in another order."""
    loss = CoreTuning(eta=0.0)
    logits, labels, given = batch([0, 1, 2, 0, 1, 2], loss)
    zero = torch.zeros(6, 1)
    monkeypatch.setattr(CoreTuning, "draw", lambda self, rows: (torch.randperm(rows), zero, zero + 1))
    ours, plain = loss(logits, labels, **given), F.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(x, given["features"], retain_graph=True) for x in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_draws_are_those_of_the_paper_and_of_the_seed():
    loss = CoreTuning()
    order, away, near = loss.draw(4000)
    assert order.sort().values.tolist() == [*range(4000)]
    assert away.min() == pytest.approx(0.8) and (away == away.min()).float().mean() == pytest.approx(0.8, abs=0.05)
    assert near.mean() == pytest.approx(0.5, abs=0.05) and near.var() == pytest.approx(1 / 12, abs=0.01)
    logits, labels, given = batch([0, 1, 2, 0], loss)
    values = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        values.append(loss(logits, labels, **given).item())
    assert values[0] == values[1] != values[2]


def test_hardest_rows_and_those_without_any():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 1.0], [-1.0, 0.0]])
    positive, negative = hardest(features, torch.tensor([0, 0, 0, 1, 2]))
    assert positive.tolist() == [1, 0, 1, 3, 4], "rows 3 and 4 are alone in their class: not the first row"
    assert negative.tolist() == [3, 3, 3, 2, 1]
    assert [x.tolist() for x in hardest(features[:2], torch.tensor([1, 1]))] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("loss", [SupCon(), CoreTuning()], ids=str)
@pytest.mark.parametrize("labels", [[], [1], [1, 1], [0, 1, 2], [0, 0, 0, 2]], ids=str)
def test_batches_that_lack_something_are_finite(loss, labels):
    logits, labels, given = batch(labels, loss)
    value = loss(logits, labels, **given)
    value.backward()
    assert value.isfinite() and given["features"].grad.isfinite().all()
    if len(labels) < 2:
        plain = F.cross_entropy(logits, labels, reduction="sum")
        torch.testing.assert_close(SupCon()(logits, labels, **given), plain)


def test_the_encoder_is_trained_by_plain_rows_too():
    """In the authors' list the rows are detached; here the features get the gradient of every part."""
    loss = CoreTuning(eta=0.0)
    logits, labels, given = batch([0, 1, 2, 0, 1, 2], loss)
    by_logits, by_features = torch.autograd.grad(loss(logits, labels, **given), [logits, given["features"]])
    assert by_logits.abs().min() > 0 and by_features.abs().sum(1).min() > 0
    plain = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(by_logits, plain / 3)


def test_heads_of_another_dtype_are_asked_in_theirs():
    loss = CoreTuning()
    logits, labels, given = batch([0, 1, 2, 0], loss)
    given |= {"head": given["head"].bfloat16(), "state": given["state"].bfloat16()}
    given["features"] = given["features"].detach().bfloat16().requires_grad_()
    value = loss(logits.detach(), labels, **given)
    assert value.dtype == torch.float32 and value.isfinite()
