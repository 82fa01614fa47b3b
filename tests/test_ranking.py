"""Ranking losses: published numbers, plain formulas, libauc where it is right; what must never happen; the sampler."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys

import pytest
import torch

from hf_xent import ranking as auc
from hf_xent.ranking.base import SURROGATES
from hf_xent.ranking.objective import Objective

H, Y = [0.9, 0.6, 0.2, 0.7], [1, 1, 0, 0]
STATEFUL = [name for name in auc.LOSSES if auc.get(name).state(1)]


def steps(objective, scores=H, labels=Y, index=(0, 1, 2, 3), times=1, dtype=torch.float32):
    """(value, gradient) of every repetition of a batch."""
    found = []
    for _ in range(times):
        h = torch.tensor(scores, dtype=dtype, requires_grad=True)
        loss = objective(h, torch.tensor(labels), torch.tensor(index))
        loss.backward()
        found.append((loss.item(), h.grad.tolist()))
    return found


def raw(name, **options):
    """The loss of scores as they are."""
    return auc.get(name, **({"sigmoid": False} if hasattr(auc.LOSSES[name], "sigmoid") else {}), **options)


GOLDEN = [  # libauc 2.0.1 on H, Y with rows 0..3: (loss, values, gradients, state after)
    (
        raw("tpauc_kl"),
        [0.934313, 0.778594],
        [[-0.585876, -1.444130, 0.377237, 1.652769], [-0.488230, -1.203442, 0.314364, 1.377308]],
        {"log_u": [math.log(1.480374), math.log(2.369473)], "log_w": math.log(1.889925)},
    ),
    (
        raw("tpauc_kl", tau=0.5, lam=2.0, gamma=0.5, gamma_w=0.5),
        [2.947747, 1.788521],
        [[-1.358562, -5.120175, 1.647093, 4.831644], [-0.824296, -3.106622, 0.999359, 2.931559]],
        {"log_u": [math.log(0.908683), math.log(1.135676)], "log_w": math.log(0.644226)},
    ),
    (
        raw("pauc_dro"),
        [0.774587, 0.704170],
        [[-0.685631, -1.055871, 0.321577, 1.419925], [-0.623301, -0.959882, 0.292342, 1.290841]],
        {"log_u": [math.log(1.480374), math.log(2.369473)]},
    ),
    (
        raw("pauc_cvar"),
        [2.875, 2.3125, 2.3125, 1.5125],
        [[-2.75, -4.25, 2.25, 4.75], [-2.0, -2.75, 0, 4.75], [-2.0, -2.75, 0, 4.75], [0, -2.75, 0, 2.75]],
        {"s": [0.6, 0.85]},
    ),
    (
        raw("ap"),
        [0.0, 0.0],
        [[-0.379271, -0.270231, 0.199596, 0.449906], [-0.344792, -0.245664, 0.181451, 0.409005]],
        {"u": [0.54945, 1.05435], "v": [0.368775, 0.665775]},
    ),
]


@pytest.mark.parametrize(("loss", "values", "gradients", "state"), GOLDEN, ids=lambda x: type(x).__name__)
def test_published_numbers(loss, values, gradients, state):
    objective = Objective(loss, rows=4)
    found = steps(objective, times=len(values))
    assert [value for value, _ in found] == pytest.approx(values, abs=1e-5)
    torch.testing.assert_close(torch.tensor([g for _, g in found]), torch.tensor(gradients), rtol=1e-5, atol=1e-5)
    for name, expected in state.items():
        buffer = objective.state_dict()[name]
        mine = buffer if buffer.ndim == 0 else buffer[:2]
        torch.testing.assert_close(mine, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_first_touch_starts_where_the_averages_settle():
    assert steps(Objective(raw("tpauc_kl", first_touch=True), 4))[0][0] == pytest.approx(0.756794, abs=1e-6)
    assert steps(Objective(raw("pauc_dro", first_touch=True), 4))[0][0] == pytest.approx(0.697128, abs=1e-6)


def test_aucm_is_its_documented_formula_and_steps_as_pesg():
    """libauc's version 2 gives 0.485 here: a parenthesis. Then three steps: descent in a and b, ascent in alpha."""
    objective = Objective(raw("aucm"), rows=0)
    objective.alpha.fill_(1.0)
    assert steps(objective, scores=[0.9, 0.6, 0.2, 0.4])[0][0] == pytest.approx(0.785)
    objective, rate = Objective(raw("aucm", gamma=0.2), rows=0), 0.1
    a, b, alpha = (torch.zeros((), requires_grad=True) for _ in range(3))
    h = torch.tensor(H)
    for [(value, _)] in [steps(objective) for _ in range(3)]:
        pos, neg = h[:2], h[2:]
        loss = ((pos - a) ** 2).mean() + ((neg - b) ** 2).mean() + 2 * alpha * (1 + neg.mean() - pos.mean()) - alpha**2
        assert value == pytest.approx(loss.item(), abs=1e-6)
        grads = torch.autograd.grad(loss, [a, b])
        with torch.no_grad():
            for x, g in zip((a, b), grads, strict=True):
                x -= rate * g
            alpha.copy_((alpha + rate * (2 * (1 + b - a) - 2 * alpha)).clamp(min=0))
    for name, expected in (("a", a), ("b", b), ("alpha", alpha)):
        torch.testing.assert_close(getattr(objective, name), expected.detach())


def plain(name, options, batches, rows):
    """Values and gradients by the formulas, exponentials and all, in float64; batches of (scores, labels, index)."""
    o = {"margin": 1.0, "gamma": 0.9, "lam": 1.0, "tau": 1.0, "gamma_w": 0.9, "beta": 0.2, "eta": 0.1, **options}
    state, w, found = torch.zeros(2, rows, dtype=torch.float64), 0.0, []
    for scores, labels, index in batches:
        h = scores.double().requires_grad_()
        pos, neg, rows_of = h[labels == 1], h[labels == 0], index[labels == 1]
        other = torch.cat([pos, neg]) if name == "ap" else neg
        ell = (o["margin"] - (pos[:, None] - other[None])).clamp(min=0) ** 2
        fixed, now = ell.detach(), state[:, rows_of]
        if name == "pauc_cvar":
            p = (fixed > now[0][:, None]) / o["beta"]
            state[0, rows_of] = now[0] - o["eta"] * (1 - p.mean(1))
        elif name == "ap":
            mine = (torch.arange(len(other)) < len(pos)).double()
            u, v = (0.1 * old + 0.9 * new.mean(1) for old, new in zip(now, (fixed, fixed * mine), strict=True))
            state[:, rows_of] = torch.stack([u, v])
            p = (v[:, None] - u[:, None] * mine) / u[:, None] ** 2
        else:
            e = (fixed / o["lam"]).exp()
            u = state[0, rows_of] = (1 - o["gamma"]) * now[0] + o["gamma"] * e.mean(1)
            p = e / u[:, None]
            if name == "tpauc_kl":
                power = o["lam"] / o["tau"]
                w = (1 - o["gamma_w"]) * w + o["gamma_w"] * (u**power).mean()
                p = u[:, None] ** (power - 1) * e / w
        loss = (p * ell).mean()
        loss.backward()
        found.append((loss.item(), h.grad))
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("pauc_cvar", {"beta": 0.3, "eta": 0.05}), ("pauc_dro", {"lam": 0.5}), ("pauc_dro", {"gamma": 1.0}),
     ("tpauc_kl", {}), ("tpauc_kl", {"tau": 0.5, "lam": 1.5, "gamma_w": 0.3}), ("ap", {"margin": 0.7})],
)  # fmt: skip
def test_logarithms_equal_the_plain_formulas(name, options):
    """Over epochs of unequal batches, rows drawn anew; through the sigmoid on one side."""
    generator = torch.Generator().manual_seed(0)
    labels, batches = (torch.rand(40, generator=generator) < 0.3).long(), []
    for size in (7, 12, 9, 12, 5, 16, 40):
        index = torch.randperm(40, generator=generator)[:size]
        index = torch.cat([index, labels.nonzero()[:1, 0], (1 - labels).nonzero()[:1, 0]]).unique()
        batches.append((torch.randn(len(index), generator=generator), labels[index], index))
    expected = plain(name, options, [(x.sigmoid(), y, i) for x, y, i in batches], 40)
    objective = Objective(auc.get(name, **options), 40)
    for (logits, y, index), (value, grad) in zip(batches, expected, strict=True):
        logits = logits.clone().requires_grad_()
        loss = objective(logits, y, index)
        assert loss.item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        h = logits.detach().double().sigmoid()
        [found] = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(found.double(), grad * h * (1 - h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name):
    t = torch.tensor([-0.5, 0.2, 0.7, 3.0])
    expected = {
        "squared_hinge": [1.44, 0.25, 0, 0], "hinge": [1.2, 0.5, 0, 0], "squared": [1.44, 0.25, 0, 5.29],
        "logistic": [math.log1p(math.exp(-0.7 * x)) for x in t.tolist()],
    }[name]  # fmt: skip
    torch.testing.assert_close(SURROGATES[name](0.7, t), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    for loss in ("tpauc_kl", "ap"):
        assert math.isfinite(steps(Objective(raw(loss, surrogate=name), 4))[0][0])


def test_bce_is_torchs():
    logits, labels = torch.randn(9), (torch.rand(9) < 0.5).float()
    for weight in (1.0, 3.5):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weight))
        torch.testing.assert_close(Objective(auc.BCE(pos_weight=weight), 0)(logits, labels), expected)
    assert Objective(auc.BCE(), 0)(torch.zeros(3), torch.tensor([1, 1, 1])).item() == pytest.approx(math.log(2))


def test_special_cases():
    """A large lambda looks at all pairs alike; with lambda = tau the power of u drops out; AP rests at 0, unlike its
    gradient; a perfect ranking costs nothing."""
    pairs = (1 - (torch.tensor(H[:2])[:, None] - torch.tensor(H[2:])[None])).clamp(min=0).square().mean()
    loss = steps(Objective(raw("pauc_dro", lam=1e4, first_touch=True), 4))[0][0]
    assert loss == pytest.approx(pairs.item(), rel=1e-3)
    both = steps(Objective(raw("tpauc_kl", lam=0.7, tau=0.7), 4))
    exponent = (1 - (torch.tensor(H[:2])[:, None] - torch.tensor(H[2:])[None])).square()
    p = (exponent / 0.7).exp() / (0.9 * 0.9 * (exponent / 0.7).exp().mean(1)).mean()
    assert both[0][0] == pytest.approx((p * exponent).mean().item(), rel=1e-5)
    value, gradient = steps(Objective(raw("ap"), 4), times=3)[-1]
    assert abs(value) < 1e-6 and max(map(abs, gradient)) > 0.1
    for name in ("pauc_cvar", "pauc_dro", "tpauc_kl"):
        assert steps(Objective(raw(name), 4), scores=[3.0, 2.0, 0.5, 1.0])[0][0] == 0


@pytest.mark.parametrize("name", ["tpauc_kl", "pauc_dro", "pauc_cvar", "ap", "aucm"])
def test_equals_libauc(name):
    """On sigmoid scores, over batches that revisit rows; AUCM's version 1 is ours over 4 in a balanced batch."""
    libauc = pytest.importorskip("libauc.losses", reason="optional: pip install --no-deps libauc")
    theirs = {
        "tpauc_kl": lambda: libauc.tpAUC_KL_Loss(data_len=12, Lambda=0.5, tau=0.8, gammas=(0.7, 0.4)),
        "pauc_dro": lambda: libauc.pAUC_DRO_Loss(data_len=12, Lambda=0.5, gamma=0.7),
        "pauc_cvar": lambda: libauc.pAUC_CVaR_Loss(data_len=12, pos_len=6, beta=0.4, eta=0.2),
        "ap": lambda: libauc.APLoss(data_len=12),
        "aucm": lambda: libauc.AUCMLoss(),
    }[name]()
    options = {
        "tpauc_kl": {"lam": 0.5, "tau": 0.8, "gamma": 0.7, "gamma_w": 0.4}, "pauc_dro": {"lam": 0.5, "gamma": 0.7},
        "pauc_cvar": {"beta": 0.4, "eta": 0.2},
    }.get(name, {})  # fmt: skip
    ours, generator = Objective(auc.get(name, **options), 12), torch.Generator().manual_seed(1)
    for _ in range(6):
        index = torch.cat([torch.randperm(6, generator=generator)[:3], 6 + torch.randperm(6, generator=generator)[:3]])
        labels, logits = (index < 6).long(), torch.randn(6, generator=generator, requires_grad=True)
        mine, their = ours(logits, labels, index), theirs(logits.sigmoid(), labels, index=index)
        factor = 4 if name == "aucm" else 1
        torch.testing.assert_close(mine, factor * their.squeeze(), rtol=1e-5, atol=1e-6)
        [mine], [their] = torch.autograd.grad(mine, logits), torch.autograd.grad(factor * their, logits)
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)
        if name == "aucm":  # its a, b, alpha move in its optimizer
            with torch.no_grad():
                for parameter in ("a", "b", "alpha"):
                    getattr(theirs, parameter).fill_(getattr(ours, parameter))


@pytest.mark.parametrize("size", [20.0, 1e4])
@pytest.mark.parametrize("name", auc.LOSSES)
def test_raw_logits_stay_finite(name, size):
    """libauc's tpAUC-KL is nan at 20; the state stays usable when the logits come back."""
    objective = Objective(raw(name), 4)
    for scores in ([-size, size, size, -size], [size, size, -size, -size], [-size, -size, size, size], H):
        [(value, gradient)] = steps(objective, scores=scores)
        assert math.isfinite(value) and all(map(math.isfinite, gradient))
    assert all(x[:2].isfinite().all() if x.ndim else x.isfinite() for x in objective.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", auc.LOSSES)
def test_low_precision_logits_are_widened(name, dtype):
    logits = torch.tensor([2.0, -1.0, 0.5, -3.0], dtype=dtype)
    found = Objective(auc.get(name), 4)(logits, torch.tensor(Y), torch.arange(4))
    expected = Objective(auc.get(name), 4)(logits.double(), torch.tensor(Y), torch.arange(4))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("labels", [[1, 1, 1, 1], [0, 0, 0, 0], [1], [0]], ids=str)
@pytest.mark.parametrize("name", STATEFUL)
def test_a_batch_of_one_class_is_a_zero_with_a_warning(name, labels):
    objective = Objective(auc.get(name), 4)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    logits = torch.randn(len(labels), requires_grad=True)
    with pytest.warns(UserWarning, match="use a DualSampler"):
        loss = objective(logits, torch.tensor(labels), torch.arange(len(labels)))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_saved_and_never_moves_outside_training(name):
    objective = Objective(auc.get(name), 4)
    steps(objective, times=2)
    saved = {k: v.clone() for k, v in objective.state_dict().items()}
    assert saved and any(v.isfinite().any() and v.ne(0).any() for v in saved.values())
    objective.eval()
    steps(objective)
    objective.train()
    with torch.no_grad():
        objective(torch.tensor(H), torch.tensor(Y), torch.arange(4))
    assert all(torch.equal(v, saved[k]) for k, v in objective.state_dict().items())
    restored = Objective(auc.get(name), 4)
    restored.load_state_dict(saved)
    assert steps(restored, times=2) == steps(objective, times=2)
    assert steps(Objective(auc.get(name), 4), times=2) != steps(restored, times=2), "the state matters"


def test_rows_are_remembered_by_their_number():
    """A shuffled batch moves the same rows; a row that comes twice gets the mean of its new states."""
    one, two = (Objective(raw("pauc_cvar"), 6) for _ in range(2))
    steps(one, index=(4, 1, 0, 5))
    steps(two, scores=[0.7, 0.6, 0.2, 0.9], labels=[0, 1, 0, 1], index=(5, 1, 0, 4))
    assert torch.equal(one.s, two.s) and one.s.nonzero().flatten().tolist() == [1, 4]
    twice = Objective(raw("pauc_cvar"), 6)
    steps(twice, scores=[0.9, -5.0, 0.2, 0.7], index=(3, 3, 0, 5))
    assert twice.s[3] == pytest.approx((0.4 + 0.4) / 2)
    with pytest.raises(ValueError, match="index is None"):
        twice(torch.tensor(H), torch.tensor(Y))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nonesuch", f"choose one of {auc.LOSSES.names()}"),
     ("tpauc_kl:tau=0", r"tau is 0: choose a number in \(0, inf\)"),
     ("pauc_dro:gamma=0", r"gamma is 0: .*\(0, 1\]"),
     ("pauc_cvar:beta=2", "beta is 2"), ("aucm:margin=0", "margin is 0"), ("ap:surrogate=cubic", "squared_hinge"),
     ("bce:gamma=1", "does not take gamma"), ("bce:pos_weight=-1", "pos_weight is -1"), ("aucm:gamma=2", "gamma is 2"),
     ("aucm:margin=nan", "margin is nan"), ("pauc_cvar:eta=inf", "eta is inf"), ("pauc_dro:lam=x", "lam is 'x'"),
     ("tpauc_kl:gamma_w=0", "gamma_w is 0"), ("ap:sigmoid=maybe", "sigmoid is 'maybe': choose True or False"),
     ("pauc_dro:first_touch=no", "first_touch is 'no'"), ("ap:gamma=True", "gamma is True"),
     ("aucm:gamma=.1, gamma=.2", "set gamma once")],
)  # fmt: skip
def test_errors_name_the_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        auc.get(name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_row_numbers_of_any_integer_dtype(dtype):
    """A uint8 index is the rows' numbers, not a mask."""
    index, found = torch.tensor([3, 1, 2, 0]), []
    for rows in (index, index.to(dtype)):
        objective = Objective(auc.get("pauc_cvar"), 4)
        found.append((objective(torch.tensor(H), torch.tensor(Y), rows), objective.s.clone()))
    torch.testing.assert_close(*found)


def test_errors_of_a_batch():
    objective = Objective(auc.get("pauc_cvar"), 4)
    for labels, index, message in (
        (torch.tensor(Y), torch.zeros(4), "index is torch.float32: pass the rows' numbers as integers"),
        (torch.tensor(Y), torch.zeros(3).long(), r"have the shapes \(4,\), \(4,\), \(3,\): pass one number per row"),
        (torch.tensor(Y)[:, None], None, r"have the shapes \(4,\), \(4, 1\): pass one number per row"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(torch.tensor(H), labels, index)


def test_the_table_of_losses_needs_no_torch():
    """Every file has its summary, formula and source, and every option its line."""
    code = "import json, sys; from hf_xent import ranking; print(json.dumps([ranking.LOSSES.table(), [*sys.modules]]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    table, modules = json.loads(run.stdout)
    assert [row["name"] for row in table] == list(auc.LOSSES) and "torch" not in modules
    assert all(row[key] for row in table for key in ("summary", "formula", "source", "relations"))
    for row in table:
        fields = dataclasses.fields(auc.LOSSES[row["name"]])
        assert row["options"] == {field.name: field.default for field in fields} and all(row["help"].values())


def test_registry():
    assert auc.get("tpauc_kl:tau=0.5, gamma=0.7") == auc.TPAUCKL(tau=0.5, gamma=0.7)
    loss = auc.PAUCCVaR(beta=0.1)
    assert auc.get(loss) is loss
    for entry in auc.LOSSES.values():
        assert dataclasses.is_dataclass(entry) and entry.__dataclass_params__.frozen
        assert "Source:" in inspect.getmodule(entry).__doc__


def test_sampler_batches_have_both_classes():
    labels = [1] * 13 + [0] * 50
    sampler = auc.DualSampler(labels, batch_size=8, rate=0.3, seed=3)
    order = list(sampler)
    batches = torch.tensor(order).view(-1, 8)
    assert len(batches) == max(13 // 2, 50 // 6) and len(order) == len(sampler)
    assert (torch.tensor(labels)[batches].sum(1) == 2).all()
    negatives = [row for row in order if row >= 13]
    assert len(set(negatives)) == len(negatives) == 48
    assert all(order[8 * i + k] < 13 for i in range(6) for k in (0, 1)) and len({*order} - {*negatives}) == 13


def test_sampler_length_of_the_published_run():
    labels = torch.zeros(373_845 + 92_160)
    labels[:92_160] = 1
    assert auc.DualSampler(labels, 16).batches == 46_730


def test_sampler_epochs_seeds_and_small_classes():
    labels = [1, 1, 0, 1, 0]
    state = torch.random.get_rng_state()
    first = auc.DualSampler(labels, 4, seed=1)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        orders.append(list(first))
        assert list(first) == orders[-1]
    long = [1] * 30 + [0] * 30
    assert list(auc.DualSampler(long, 4, seed=1)) != list(auc.DualSampler(long, 4, seed=2))
    other = auc.DualSampler(long, 4, seed=1)
    other.set_epoch(1)
    assert list(other) != list(auc.DualSampler(long, 4, seed=1))
    assert list(other) != list(auc.DualSampler(long, 4, seed=2)), "seeds and epochs do not run into each other"
    tight = list(auc.DualSampler([1, 0, 0, 0], 8, rate=0.5))
    assert len(tight) == 8 and tight[:4] == [0] * 4 and {*tight[4:]} == {1, 2, 3}
    assert torch.equal(state, torch.random.get_rng_state())
    for bad in ({"labels": [0, 0]}, {"labels": [0, 1], "batch_size": 1}, {"labels": [0, 1], "rate": 1.0},
                {"labels": [0, 1], "batch_size": 2.5}, {"labels": [0, 1], "rate": float("nan")}):  # fmt: skip
        with pytest.raises(ValueError, match=r"pass both|batch_size is"):
            auc.DualSampler(**{"batch_size": 4, **bad})
