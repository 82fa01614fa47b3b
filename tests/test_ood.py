"""Scores of inputs that belong to no class: shares of the classes beside negative labels, in groups or all at once."""

import pytest
import torch
from torch.nn import functional as F

from hf_xent.adapt import ood_score
from hf_xent.adapt.ood import grouped_share, random_groups

Z_ID, Z_NEG = torch.tensor([[10.0, 8.0]]).double(), torch.tensor([[9.0, 7.0, 6.0, 5.0]]).double()


def problem(seed=0, rows=7, classes=3, words=11, width=6):
    draw = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, generator=draw), dim=-1) for n in (rows, classes, words)]


def share(id_logits, negative_logits):
    """The formula: probabilities of the classes, added up."""
    return torch.cat([id_logits, negative_logits], -1).softmax(-1)[:, : id_logits.shape[1]].sum(-1)


def test_worked_values():
    pairs = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    assert float(grouped_share(Z_ID, Z_NEG, pairs)) == pytest.approx(0.854734, abs=1e-6)
    assert float(grouped_share(Z_ID, Z_NEG, [torch.arange(4)])) == pytest.approx(0.719452, abs=1e-6)


def test_one_group_is_the_share_of_the_classes_among_all_names():
    x, classes, words = problem()
    found = ood_score(x, classes, words, groups=1, temperature=0.1)
    logits = [x.double() @ t.double().T / 0.1 for t in (classes, words)]
    torch.testing.assert_close(found.score, share(*logits))
    assert torch.equal(found.predicted, logits[0].argmax(-1))
    groups = random_groups(11, 4, 5)
    expected = torch.stack([share(logits[0], logits[1][:, g]) for g in groups]).mean(0)
    torch.testing.assert_close(ood_score(x, classes, words, groups=4, temperature=0.1, seed=5).score, expected)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_groups_never_lower_a_score(temperature):
    for seed in range(20):
        problem_of = problem(seed, words=4 + seed)
        one = ood_score(*problem_of, groups=1, temperature=temperature).score
        for groups in (2, 3, 4 + seed):
            more = ood_score(*problem_of, groups=groups, temperature=temperature, seed=seed).score
            assert bool((more >= one - 1e-12).all()) and bool((more <= 1).all())


def test_the_order_of_names_does_not_matter_for_given_groups():
    x, classes, words = problem(3)
    a, b = x.double() @ classes.double().T / 0.1, x.double() @ words.double().T / 0.1
    groups = random_groups(11, 3)
    order, inverse = torch.randperm(11), torch.empty(11, dtype=torch.long)
    inverse[order] = torch.arange(11)
    moved = [inverse[g].flip(0) for g in reversed(groups)]
    torch.testing.assert_close(grouped_share(a.flip(1), b[:, order], moved), grouped_share(a, b, groups))


def test_groups_are_those_of_a_seed_and_of_about_one_size():
    for count, groups in ((10, 3), (11, 11), (1000, 100), (7, 1)):
        found = random_groups(count, groups, 1)
        assert sorted(torch.cat(found).tolist()) == list(range(count)) and len(found) == groups
        assert max(map(len, found)) - min(map(len, found)) <= 1
    scores = [ood_score(*problem(), groups=4, temperature=0.1, seed=seed).score for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.allclose(scores[0], scores[2])


def test_without_negatives_it_is_the_largest_probability():
    x, classes, _ = problem()
    for temperature in (0.01, 1.0):
        found = ood_score(x, classes, temperature=temperature)
        probabilities = (x.double() @ classes.double().T / temperature).softmax(-1)
        torch.testing.assert_close(found.score, probabilities.max(-1).values)
    assert torch.equal(found.predicted, probabilities.argmax(-1))
    torch.testing.assert_close(ood_score(3 * x, 0.5 * classes).score, ood_score(x, classes).score)


def test_far_apart_logits_stay_exact():
    """A group far below the best word has its own share, not 1."""
    mass, far = torch.tensor([[0.0]]).double(), torch.tensor([[900.0, -5.0]]).double()
    found = grouped_share(mass, far, [torch.tensor([0]), torch.tensor([1])])
    assert float(found) == pytest.approx(float(torch.sigmoid(torch.tensor(5.0).double())) / 2, rel=1e-9)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="nan or infinite"):
        ood_score(torch.full((2, 3), torch.nan), torch.randn(2, 3))
    x, classes, words = problem()
    for options, message in (
        ({"groups": 12}, "groups is 12, but there are 11 negative labels: choose at most as many"),
        ({"groups": 0}, "groups is 0"),
        ({"temperature": 0}, "temperature is 0: choose a number in"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_score(x, classes, words, **options)
    for tables in ((classes[:, :5], words), (classes, words[:0]), (classes[0], words)):
        with pytest.raises(ValueError, match="give rows of one width"):
            ood_score(x, *tables)
