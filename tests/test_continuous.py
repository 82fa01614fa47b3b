"""Digits of vectors: published values, cells, densities; heads whose probabilities sum to 1 and that only look back."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chisquare, norm

from hf_xent.classes import get
from hf_xent.continuous import DigitHead, Quantiles
from hf_xent.continuous.head import smoothed
from support.oracle import assert_no_worse

GOLDEN = {2: [0.791157], 4: [0.324663, 1.260183], 8: [0.157976, 0.491349, 0.895384, 1.628965]}
KINDS = {"factorised": {}, "same network": {"kind": "factorised", "layers": 1}, "autoregressive": {"layers": 2},
         "random order": {"kind": "random_order", "layers": 1}}  # fmt: skip
ORDER = torch.tensor([2, 0, 1])


def head(name, dims=3, levels=3, seed=0, dtype=torch.float64, **options):
    """A head of 5 hidden units whose weights are all far from 0."""
    torch.manual_seed(seed)
    options = {"kind": name} | KINDS[name] | {"width": 8, "heads": 2} | options
    made = DigitHead(5, dims, levels, **options)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return made.to(dtype)


def order_of(made):
    return ORDER if made.kind == "random_order" else None


def table(dims, levels):
    """All digits [L^D, D]."""
    return torch.tensor(list(itertools.product(range(levels), repeat=dims)))


@pytest.mark.parametrize("levels", GOLDEN)
def test_values_are_the_published_ones(levels):
    half = GOLDEN[levels]
    found = Quantiles.gaussian(levels, None)
    np.testing.assert_allclose(found.values[0], [-x for x in half[::-1]] + half, atol=5e-7)
    assert found.levels == levels and found.dims is None


def test_64_values_reach_406_at_a_span_of_5():
    found = Quantiles.gaussian(64, None).values[0]
    np.testing.assert_allclose(found[[0, 31, 32, 63]], [-2.437096, -0.019586, 0.019586, 2.437096], atol=5e-7)
    assert float(Quantiles.gaussian(64).values.max()) == pytest.approx(2.437096 * 5 / 3, abs=1e-6)


def test_digits_and_values_of_the_sheet():
    assert Quantiles.gaussian(4, None).encode(np.array([-2, -0.5, 0.1, 0.4, 9])).tolist() == [0, 1, 2, 2, 3]
    published = Quantiles.gaussian(4)
    ids = published.encode(np.array([-5, -1, 0.2, 2.5]))
    assert ids.tolist() == [0, 1, 2, 3] and ids.dtype == np.int64
    np.testing.assert_allclose(published.decode(ids), [-2.100306, -0.541105, 0.541105, 2.100306], atol=5e-7)


@pytest.mark.parametrize(("levels", "error"), [(4, 0.1309), (16, 0.0207), (64, 0.0038), (256, 0.0009)])
def test_error_and_use_of_normal_numbers(levels, error):
    """By integrals: between cuts, a normal variable's square error and mass."""
    made = Quantiles.gaussian(levels, None)
    edges = np.concatenate([[-np.inf], made.cuts[0], [np.inf]])
    found = sum(
        quad(lambda x, r=r: (x - r) ** 2 * norm.pdf(x), a, b)[0]
        for r, a, b in zip(made.values[0].tolist(), edges[:-1], edges[1:], strict=True)
    )
    share = np.diff(norm.cdf(edges))
    assert found == pytest.approx(error, rel=0.005, abs=2e-4)  # the numbers to compare with are means of samples
    assert np.log2(levels) + (share * np.log2(share)).sum() < 0.015
    lloyd = {4: 0.1175, 16: 0.0095}.get(levels, 0)  # the least there can be, Max 1960
    assert found > lloyd


def test_the_nearest_value_is_taken_not_the_part():
    """Against argmin, on random values; of two that are equally near, the lower."""
    draw = np.random.default_rng(0)
    made = Quantiles(np.sort(draw.normal(size=(3, 7))))
    x = draw.normal(size=(4, 5, 3)) * 2
    expected = np.abs(x[..., None] - made.values.numpy()).argmin(-1)
    assert (made.encode(x) == expected).all()
    assert made.encode(torch.tensor(x)).equal(torch.tensor(expected))
    assert Quantiles([[0.0, 1.0, 2.0]]).encode(np.array([0.5, 1.5])).tolist() == [0, 1]


def test_fit_has_means_of_equal_parts():
    x = np.random.default_rng(0).gamma(2, size=(800, 2))
    made = Quantiles.fit(x, 8)
    for column, values in zip(x.T, made.values.numpy(), strict=True):
        edges = np.quantile(column, np.arange(1, 8) / 8)
        parts = np.digitize(column, edges)
        np.testing.assert_allclose(values, [column[parts == i].mean() for i in range(8)], rtol=1e-12)
    below = x[:, 0][x[:, 0] <= float(made.cuts[0, 0])]
    assert float(made.tails[0, 0]) == pytest.approx(float(made.cuts[0, 0]) - below.mean())


def test_fit_of_few_numbers_ties_and_a_constant():
    draw = np.random.default_rng(0)
    often = np.where(draw.random(500) < 0.6, 0.0, draw.normal(size=500) + 3)
    x = np.stack([draw.integers(3, size=500) * 1.5, np.full(500, 7.0), often], 1)
    made = Quantiles.fit(x, 6)
    assert made.used.tolist() == [3, 1, 6] and made.values[0, :3].tolist() == [0, 1.5, 3] and 0 in made.values[2]
    assert (made.round(x)[:, :2] == x[:, :2]).all() and (made.round(x)[often == 0, 2] == 0).all()
    assert made.encode(x).max(0).tolist() == [2, 0, 5], "repeated values are not used"
    assert made.encode(np.array([[99.0, 99.0, 99.0]])).tolist() == [[2, 0, 5]]
    assert np.isfinite(made.log_density(x)).all()
    assert Quantiles.fit(x[:2, :1] * 0 + 1, 2).encode(np.array([[5.0]])).tolist() == [[0]]


def test_types_and_devices_are_kept(tmp_path):
    x = torch.randn(4, 2)
    made = Quantiles.fit(x, 3)
    for dtype in (torch.float64, torch.bfloat16):
        assert made.round(x.to(dtype)).dtype == dtype
    assert made.decode(made.encode(x)).dtype == torch.float32 and made.round(x.numpy()).dtype == np.float32
    assert made.encode(x[:0]).shape == made.round(x[:0]).shape == (0, 2)
    made.save(tmp_path / "digits.json")
    back = Quantiles.load(tmp_path / "digits.json")
    assert back.values.equal(made.values) and back.tails.equal(made.tails) and back.cuts.equal(made.cuts)
    (tmp_path / "other.json").write_text('{"numbers": []}')
    with pytest.raises(ValueError, match="holds no quantiles"):
        Quantiles.load(tmp_path / "other.json")


@pytest.mark.parametrize("values", [[[-1.0, 0.2, 1.0]], [[-1.0, 2.0, 2.0]], [[3.0, 3.0, 3.0]]])
def test_densities_of_cells_integrate_to_one(values):
    """Each cell that is used has mass 1, also the outer ones; so digits' probabilities and cells make a density."""
    made = Quantiles(values, None if values[0][0] == 3 else [[0.7, 1.3]])
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64)[:, None]
    ids, density = made.encode(x)[:, 0], made.log_density(x)[:, 0].exp()
    mass = torch.zeros(3, dtype=torch.float64).index_add(0, ids, density) * 2e-4
    torch.testing.assert_close(mass[: int(made.used)], torch.ones(int(made.used)).double(), atol=2e-4, rtol=0)
    assert made.log_density(x.numpy()).dtype == np.float64
    widths = made.log_widths[0]
    assert widths[0] == torch.inf and (widths[int(made.used) :] == -torch.inf).all()
    if int(made.used) == 3:
        assert float(widths[1].exp()) == pytest.approx(float(made.cuts[0, 1] - made.cuts[0, 0]))


def test_digits_of_normal_numbers_have_nearly_their_entropy():
    """log p(x) = log P(bin) + log q is at most the true one in the mean, and near to it with many cells."""
    x = np.random.default_rng(0).normal(size=(20_000, 1))
    made = Quantiles.fit(x, 64)
    share = np.bincount(made.encode(x)[:, 0], minlength=64) / len(x)
    found = -(np.log(share[made.encode(x)]) + made.log_density(x)).mean()
    assert norm.entropy() - 0.02 < found < norm.entropy() + 0.01


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_probabilities_of_all_digits_sum_to_one(name, dims):
    made, digits = head(name, dims), table(dims, 3)
    hidden = torch.randn(1, 5).double().expand(len(digits), -1)
    order = None if made.kind != "random_order" else torch.arange(dims).flip(0)
    totals = [(-made.nll(hidden, digits, given).sum(-1)).exp().sum().item() for given in (None, order)]
    np.testing.assert_allclose(totals, 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_samples_have_the_probabilities_of_nll(name):
    made, digits, count = head(name), table(3, 3), 20_000
    hidden = torch.randn(1, 5).double()
    p = (-made.nll(hidden.expand(27, -1), digits, order_of(made)).sum(-1)).exp().detach().numpy()
    draws = made.sample(hidden.expand(count, -1), 1.0, torch.Generator().manual_seed(1), order_of(made))
    seen = np.bincount(draws @ torch.tensor([9, 3, 1]), minlength=27)
    rare = np.argsort(p)[: int((p * count < 5).sum()) + 1]  # in one cell, so that it has at least 5
    merged = [np.append(np.delete(x, rare), x[rare].sum()) for x in (seen, p * count)]
    assert chisquare(*merged).pvalue > 0.01
    cold = made.sample(hidden, 0.0, order=order_of(made))
    logits = made.logits(hidden, cold, order_of(made))
    assert logits.argmax(-1).equal(cold), "the most likely digit after those before"


@pytest.mark.parametrize("name", KINDS)
def test_digits_see_only_those_before(name):
    """Also in another order; and what is ignored is seen by none."""
    made, order = head(name, levels=4), order_of(head(name))
    hidden, digits = torch.randn(2, 5).double(), torch.tensor([[1, 2, 3], [0, 3, 1]])
    places = (order if order is not None else torch.arange(3)).tolist()
    before = made.logits(hidden, digits, order)
    for k, place in enumerate(places):
        changed = digits.clone()
        changed[:, place] = (changed[:, place] + 1) % 4
        moved = (made.logits(hidden, changed, order) - before).abs().amax((0, 2)) > 1e-9
        assert not moved[places[: k + 1]].any()
        assert moved[places[k + 1 :]].all() == (made.kind != "factorised" or k == 2)


def test_ignored_digits_cost_nothing_and_condition_nothing():
    made, hidden = head("autoregressive"), torch.randn(3, 5).double()
    digits = torch.tensor([[0, -100, 2], [-100, -100, -100], [1, 1, 1]])
    nll, logits = made.nll(hidden, digits), made.logits(hidden, digits)
    assert (nll == 0).equal(digits == -100)
    torch.testing.assert_close(made.nll(hidden[2:], digits[2:]), nll[2:])
    seen = made.logits(hidden[:1], torch.tensor([[0, 1, 1]]))[0, :2]
    torch.testing.assert_close(logits[0, :2], seen)  # its place still has logits
    assert made.nll(hidden, digits.where(digits >= 0, -7), ignore_index=-7).equal(nll)
    nll.sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_finite_differences(name):
    made, digits = head(name, levels=4, sigma=0.6), torch.tensor([[1, 2, 3], [0, -100, 1]])
    weights = {key: p.detach()[..., :2].clone() for key, p in made.named_parameters()}
    full = {key: p.detach() for key, p in made.named_parameters()}
    hidden = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def losses(hidden, *parts):
        joined = {k: torch.cat([part, full[k][..., 2:]], -1) for k, part in zip(weights, parts, strict=True)}
        return torch.func.functional_call(made.eval(), joined, (hidden,))

    made.forward = lambda hidden: torch.cat([
        made.loss(hidden, digits, order_of(made)), made.nll(hidden, digits, order_of(made))])  # fmt: skip
    assert torch.autograd.gradcheck(losses, (hidden, *(w.requires_grad_() for w in weights.values())), fast_mode=True)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_no_worse_than_torch(name):
    """Logits of the same layers in bfloat16, with nll in float32, against a softmax in bfloat16."""
    made, low = head(name), head(name, dtype=torch.bfloat16)
    made.load_state_dict(low.state_dict())
    hidden, digits = torch.randn(16, 5).bfloat16(), torch.randint(3, (16, 3))
    found = low.nll(hidden, digits)
    plain = -low.logits(hidden, digits).log_softmax(-1).gather(-1, digits[..., None]).squeeze(-1)
    assert found.dtype == torch.float32
    assert_no_worse(found, plain.float(), made.nll(hidden.double(), digits), factor=1)


@pytest.mark.parametrize(("kind", "expected"), [("factorised", 1.386294), ("autoregressive", 0.693147)])
def test_two_equal_digits(kind, expected):
    torch.manual_seed(0)
    made = DigitHead(1, 2, 2, kind, None if kind == "factorised" else 1, width=8, heads=1)
    digits, hidden = torch.tensor([[0, 0], [1, 1]]), torch.ones(2, 1)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.06)
    for _ in range(90):
        optimizer.zero_grad()
        made.loss(hidden, digits).sum().backward()
        optimizer.step()
    assert made.nll(hidden, digits).sum(-1).mean().item() == pytest.approx(expected, abs=2e-3)


def test_smoothed_targets_are_those_of_hl_gauss():
    digits, made = torch.tensor([0, 3, 6]), head("autoregressive", 1, 7, sigma=0.8)
    bins = get("hl_gauss:low=-0.5, high=6.5, bins=7, sigma_ratio=0.8, padded=False")
    torch.testing.assert_close(smoothed(digits, 7, 0.8), bins.targets(digits.float()))
    hidden = torch.randn(3, 5).double()
    expected = bins(made.logits(hidden, digits[:, None])[:, 0], digits.double())
    torch.testing.assert_close(made.loss(hidden, digits[:, None])[:, 0], expected, atol=1e-6, rtol=1e-6)
    sharp = head("autoregressive", 1, 7, sigma=1e-3)
    torch.testing.assert_close(sharp.loss(hidden, digits[:, None]), sharp.nll(hidden, digits[:, None]))


def test_orders_are_drawn_for_each_row_in_training_alone():
    made, digits = head("random order"), torch.tensor([[0, 1, 2]] * 40)
    hidden = torch.randn(1, 5).double().expand(40, -1)
    drawn = made.loss(hidden, digits, generator=torch.Generator().manual_seed(0)).sum(-1).detach()
    every = {
        tuple(o): made.nll(hidden[:1], digits[:1], torch.tensor(o)).sum().item()
        for o in itertools.permutations(range(3))
    }
    gaps = (drawn[:, None] - torch.tensor(list(every.values()), dtype=torch.float64)).abs()
    assert gaps.min(1).values.max() < 1e-12 and len(gaps.argmin(1).unique()) == 6
    assert drawn.equal(made.loss(hidden, digits, generator=torch.Generator().manual_seed(0)).sum(-1))
    assert made.eval().loss(hidden, digits).equal(made.nll(hidden, digits))
    rows = torch.tensor([[2, 1, 0], [0, 2, 1]])
    both = made.nll(hidden[:2], digits[:2], rows)
    torch.testing.assert_close(both[1:], made.nll(hidden[:1], digits[:1], rows[1]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Quantiles([[1.0]]), "at least two for each dimension"),
        (lambda: Quantiles([[2.0, 1.0]]), "sort each row"),
        (lambda: Quantiles([[1.0, np.inf]]), "not finite"),
        (lambda: Quantiles([[0.0, 1.0]], [[1.0, 0.0]]), "two numbers above 0"),
        (lambda: Quantiles.gaussian(1), "levels is 1: choose a whole number"),
        (lambda: Quantiles.gaussian(1024), "levels is 1024: beyond cut=3.0"),
        (lambda: Quantiles.gaussian(4, span=0), "span is 0: choose"),
        (lambda: Quantiles.gaussian(4, cut=-1.0), "cut is -1.0: choose"),
        (lambda: Quantiles.fit(np.ones(3), 4), r"data has shape \(3,\)"),
        (lambda: Quantiles.fit(np.ones((0, 3)), 4), r"data has shape \(0, 3\)"),
        (lambda: Quantiles.fit(np.array([[np.nan]]), 4), "nan or infinite"),
        (lambda: Quantiles.gaussian(4).encode(np.array([np.nan])), "nan: leave it out"),
        (lambda: Quantiles([[0.0, 1.0]] * 2).encode(np.ones(3)), "give vectors of 2 dimensions"),
        (lambda: Quantiles.gaussian(4).decode(np.array([4])), "beyond 0 to 3"),
        (lambda: DigitHead(4, 2, 3, "joint"), "kind is 'joint': choose one of factorised"),
        (lambda: DigitHead(4, 0, 3), "dims is 0"),
        (lambda: DigitHead(4, 2, 1), "levels is 1"),
        (lambda: DigitHead(4, 2, 3, layers=0), "layers is 0: choose a whole number of at least 1"),
        (lambda: DigitHead(4, 2, 3, width=10), "width is 10: choose a multiple of heads"),
        (lambda: DigitHead(4, 2, 3, sigma=-1.0), "sigma is -1.0"),
        (lambda: head("factorised").nll(torch.ones(1, 5).double(), torch.ones(1, 2).long()), r"give 3 for each row"),
        (lambda: head("factorised").nll(torch.ones(1, 5).double(), torch.full((1, 3), 3)), "beyond 0 to 2: mark"),
        (lambda: head("autoregressive").nll(torch.ones(1, 5), torch.ones(1, 3).long(), ORDER), "'random_order' takes"),
        (lambda: head("random order").sample(torch.ones(1, 5), order=torch.tensor([0, 0, 1])), "0 to 2, each once"),
        (lambda: head("factorised").sample(torch.ones(1, 5).double(), -1.0), "temperature is -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
