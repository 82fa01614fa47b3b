"""Calibrators: the method sheet's numbers, limits, scipy's optimum, finite differences; judges, scores, choices."""

import math

import datasets
import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from hf_xent import calibration, detection
from hf_xent.calibration import Calibrator, Training, draw, fit, report
from hf_xent.calibration.fitting import Rows
from hf_xent.calibration.objectives import OBJECTIVES, correct, correctness, mean_loss, row_weights
from hf_xent.data import Format, PromptFormats
from hf_xent.generation.calibrated_judge import CalibratedJudge
from hf_xent.generation.choices import as_views, choice_scores
from hf_xent.generation.judging import ModelJudge, both_orders, quality
from hf_xent.metrics.calibration import binned, calibration_error, cumulative_error
from support.models import tiny, tiny_tokenizer

QUICK = Training(steps=40, held_out=0)
M, K = 240, 6


def drawn(rows=M, classes=K, views=3, seed=0):
    """Logits of rows that are sure, or overconfident by nine times; views are noisier for the latter."""
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, classes, generator=g)
    sure = torch.rand(rows, 1, generator=g) < 0.5
    labels = torch.multinomial((z / torch.where(sure, 0.5, 4.5)).softmax(-1), 1, generator=g)[:, 0]
    return z, labels, z + torch.where(sure, 1, 4) * torch.randn(views, rows, classes, generator=g)


def golden():
    """Logits of two classes with confidences .9, .8, .6, of which the second is wrong."""
    confidence = torch.tensor([0.9, 0.8, 0.6], dtype=torch.float64)
    z = torch.stack([confidence.log(), (1 - confidence).log()], -1)
    return z, torch.tensor([0, 1, 0])


def random_calibrator(views=3, outputs=K, seed=0):
    torch.manual_seed(seed)
    calibrator = Calibrator(outputs, views)
    torch.nn.init.normal_(calibrator.last.weight, std=3)
    return calibrator


def test_the_worked_numbers():
    z, y = golden()
    rows, right = correctness(z, y), correct(z, y)
    assert rows.sum().item() / 1 == pytest.approx(0.01 + 0.64 + 0.16)
    assert mean_loss(rows, row_weights(right, False)).item() == pytest.approx(0.27)
    assert row_weights(right, True).tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert mean_loss(rows, row_weights(right, True)).item() == pytest.approx(0.3625)
    found = report(z.softmax(-1), y)
    assert found["ks"] == pytest.approx(0.133333, abs=1e-6)
    assert found["brier"] == pytest.approx(0.27) and found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-math.log(0.9 * 0.2 * 0.6) / 3)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.4) / 3) and found["auroc"] == 0.5


@pytest.mark.parametrize("balanced", [False, True])
def test_limits_of_the_temperature(balanced):
    z, y, _ = drawn()
    z, right = z.double(), correct(z, y)
    accuracy, weights = right.double().mean().item(), row_weights(right, balanced)
    share = 0.5 if balanced else accuracy
    flat, sharp = (mean_loss(correctness(z / t, y), weights).item() for t in (1e9, 1e-9))
    assert flat == pytest.approx(share * (1 - 1 / K) ** 2 + (1 - share) / K**2, abs=1e-6)
    assert sharp == pytest.approx(1 - share, abs=1e-6)


def test_balance_pulls_a_constant_confidence_to_one_half():
    """1/2 [(1 - c)^2 + c^2] whatever the accuracy: here it is 3/4, to which plain CA and CE go."""
    margin = torch.tensor([[0.7, 0.0]]).expand(8, 2)
    y = torch.tensor([0, 0, 0, 1] * 2)
    for c in (0.55, 0.7, 0.9):
        z = torch.tensor([[math.log(c), math.log(1 - c)]], dtype=torch.float64).expand(8, 2)
        loss = mean_loss(correctness(z, y), row_weights(correct(z, y), True))
        assert loss.item() == pytest.approx(((1 - c) ** 2 + c**2) / 2)
    with pytest.warns(UserWarning, match="balanced without views pulls confidence towards 1/2"):
        pulled = fit(margin, y)
    assert pulled.temperatures(margin)[0].item() == pytest.approx(10)  # as near to 1/2 as it may go
    for options in ({"balanced": False}, {"objective": "ce"}, {"objective": "brier"}):
        p = fit(margin, y, **options)(margin)
        assert p[0, 0].item() == pytest.approx(0.75, abs=1e-6) and report(p, y)["ece"] < 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_the_prediction_never_changes(seed, classes):
    z, _, v = drawn(classes=classes, seed=seed)
    calibrator = random_calibrator(outputs=classes, seed=seed)
    p, t = calibrator(z, v), calibrator.temperatures(z, v)
    assert 0.1 - 1e-12 < t.min() < t.max() < 10 + 1e-12 and t.unique().numel() > M / 4
    expected = z.argmax(-1) if classes > 1 else (z[:, 0] > 0).long()
    assert torch.equal(p.argmax(-1), expected)
    torch.testing.assert_close(p.sum(-1), torch.ones(M, dtype=torch.float64))


def test_the_network_is_what_the_docstring_says():
    """Row by row, with numpy: the original's four largest classes, view after view, 71 weights for three views."""
    z, _, v = drawn(rows=7)
    calibrator = random_calibrator()
    assert sum(p.numel() for p in calibrator.parameters()) == 71
    A, a, w, b = (
        x.detach().numpy() for x in (*calibrator.first.parameters(), calibrator.last.weight[0], calibrator.bias)
    )
    for i in range(7):
        top = np.argsort(-z[i].numpy())[:4]
        seen = np.concatenate([np.exp(log_softmax(view[i].double().numpy()))[top] for view in v])
        g = b + w @ np.maximum(A @ seen + a, 0)
        expected = math.exp(min(max(g, math.log(0.1)), math.log(10)))
        assert calibrator.temperatures(z, v)[i].item() == pytest.approx(expected, rel=1e-10)
    few = Calibrator(3, 2)
    assert few.first.in_features == 6 and Calibrator(1, 2).first.in_features == 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_finite_differences(objective):
    z, y, v = drawn(rows=9, views=2)
    torch.manual_seed(1)
    calibrator = Calibrator(K, 2, hidden=3, temperature=1.5)
    torch.nn.init.normal_(calibrator.last.weight, std=0.3)
    weights = row_weights(correct(z, y), True)

    def loss():
        return mean_loss(OBJECTIVES[objective](calibrator.logits(z, v), y), weights)

    loss().backward()
    for parameter in calibrator.parameters():
        flat, expected = parameter.data.view(-1), []
        for i in range(flat.numel()):
            values = []
            for step in (1e-5, -2e-5):
                flat[i] += step
                values.append(loss().item())
            flat[i] += 1e-5
            expected.append((values[0] - values[1]) / 2e-5)
        torch.testing.assert_close(
            parameter.grad.view(-1), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8
        )


def test_one_temperature_is_scipy_s_optimum():
    z, y, _ = drawn()
    found = fit(z, y, objective="ce").temperatures(z)[0].item()
    table, labels = z.double().numpy(), y.numpy()
    nll = lambda t: -log_softmax(table / t, -1)[np.arange(M), labels].mean()  # noqa: E731  one line
    expected = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-10}).x
    assert found == pytest.approx(expected, rel=1e-6)
    brier = lambda t: ((np.exp(log_softmax(table / t, -1)) - np.eye(K)[labels]) ** 2).sum(-1).mean()  # noqa: E731  one line
    expected = minimize_scalar(brier, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-10}).x
    assert fit(z, y, objective="brier").temperatures(z)[0].item() == pytest.approx(expected, rel=1e-6)
    own = fit(z, y, objective=lambda logits, labels: OBJECTIVES["ce"](logits, labels))
    assert own.temperatures(z)[0].item() == found


def test_views_tell_correct_rows_from_wrong_ones():
    """On other rows: better than one temperature where views say something, and no worse where they say nothing."""
    z, y, v = drawn(1200)
    half, rest = slice(0, 600), slice(600, 1200)
    one = report(fit(z[half], y[half], objective="ce")(z[rest]), y[rest])
    for objective in OBJECTIVES:
        with_views = fit(z[half], y[half], v[:, half], objective, training=Training(steps=200))
        found = report(with_views(z[rest], v[:, rest]), y[rest])
        assert found["accuracy"] == one["accuracy"] and found["auroc"] > one["auroc"] + 0.03, objective
    mixed = v[:, torch.randperm(1200, generator=torch.Generator().manual_seed(0))]
    found = [
        report(fit(z[half], y[half], mixed[:, half], "ce", training=training)(z[rest], mixed[:, rest]), y[rest])
        for training in (Training(steps=200), Training(steps=200, held_out=0))
    ]
    assert found[0]["auroc"] < one["auroc"] + 0.01 and found[0]["nll"] - one["nll"] < (found[1]["nll"] - one["nll"]) / 2


def test_training_never_ends_above_its_start():
    z, y, v = drawn()
    weights = row_weights(correct(z, y), False)
    for objective, loss in OBJECTIVES.items():
        start = mean_loss(loss(fit(z, y, objective=objective, balanced=False).logits(z), y), weights)
        for options in ({"steps": 40}, {"steps": 20, "learning_rate": 30.0}, {"steps": 30, "batch_size": 50}):
            training = Training(held_out=0, **options)
            found = fit(z, y, v, objective, balanced=False, training=training)
            assert mean_loss(loss(found.logits(z, v), y), weights) <= start
            assert not any(p.requires_grad for p in found.parameters())


def test_the_order_of_views_is_kept():
    z, y, v = drawn()
    calibrator = fit(z, y, v, training=QUICK)
    assert (calibrator(z, v) - calibrator(z, v.flip(0))).abs().max() > 1e-3
    rows = torch.randperm(M)
    torch.testing.assert_close(calibrator(z[rows], v[:, rows]), calibrator(z, v)[rows])


def test_weights_of_batches():
    """`per_batch` is another objective where batches differ in accuracy; the same numbers without balance."""
    z, y, v = drawn()
    found = [
        fit(
            z, y, v, balanced=balanced, training=Training(steps=30, held_out=0, batch_size=7, per_batch=per_batch)
        ).temperatures(z, v)
        for balanced in (True, False)
        for per_batch in (True, False)
    ]
    assert not torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert all(t.isfinite().all() for t in found), "also where a batch is all correct"
    again = fit(z, y, v, training=Training(steps=30, held_out=0, batch_size=7, per_batch=True)).temperatures(z, v)
    assert torch.equal(again, found[0])


def test_the_loss_of_a_batch_is_that_of_the_authors_code():
    """Row by row: weights 1 - acc and acc, acc the batch's share of correct rows; all rows' weights without parity."""
    z, y, v = drawn()
    calibrator, batch = random_calibrator(), torch.arange(5, 24)
    weights = row_weights(correct(z, y), True)
    rows = Rows(z.double(), y, calibrator.features(z.double(), v.double()), weights, correctness)
    p = calibrator(z, v).detach().numpy()
    for own, chosen in ((True, batch), (False, slice(None))):
        right = (z.argmax(-1) == y).numpy()[chosen]
        accuracy = right.mean()
        w = np.where(right, 1 - accuracy, accuracy)
        errors = (p[chosen].max(-1) - right) ** 2
        assert rows.loss(calibrator, chosen, own).item() == pytest.approx((w * errors).sum() / w.sum())
    right, accuracy = correct(z, y).numpy(), correct(z, y).double().mean().item()
    w = np.where(right, 1 - accuracy, accuracy)[batch]
    expected = (w * (p[batch].max(-1) - right[batch]) ** 2).sum() / w.sum()
    assert rows.loss(calibrator, batch).item() == pytest.approx(expected)


def test_the_random_state_of_the_user_is_left_alone():
    z, y, v = drawn()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit(z, y, v, training=QUICK)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("right", [True, False])
def test_rows_that_cannot_be_balanced_count_equally(right):
    z, _, v = drawn()
    y = z.argmax(-1) if right else (z.argmax(-1) + 1) % K
    with pytest.warns(UserWarning, match="cannot be balanced over correctness"):
        found = fit(z, y, v, training=QUICK)
    plain = fit(z, y, v, balanced=False, training=QUICK)
    assert torch.equal(found(z, v), plain(z, v))
    assert math.isnan(report(found(z, v), y)["auroc"])


def test_one_score_a_row_is_the_log_odds_of_class_1():
    z, y, v = drawn(classes=1)
    y = (z[:, 0] + torch.randn(M, generator=torch.Generator().manual_seed(1)) * 4 > 0).long()
    two, two_views = (torch.cat([torch.zeros_like(x), x], -1) for x in (z, v))
    expected = fit(two, y, two_views, training=QUICK)(two, two_views)
    for scores, views in ((z, v), (z[:, 0], v[..., 0]), (z[:, 0].numpy(), v.tolist())):
        torch.testing.assert_close(fit(scores, y, views, training=QUICK)(scores, views), expected)
    one = fit(z[:, 0], y, objective="ce")
    torch.testing.assert_close(one(z[:, 0])[:, 1], (z[:, 0].double() / one.temperatures(z[:, 0])).sigmoid())


def test_ignored_labels_are_left_out():
    z, y, v = drawn()
    kept = torch.arange(M) % 3 > 0
    some = torch.where(kept, y, -100)
    found, expected = fit(z, some, v, training=QUICK), fit(z[kept], y[kept], v[:, kept], training=QUICK)
    torch.testing.assert_close(found(z, v), expected(z, v))
    assert report(found(z, v), some) == pytest.approx(report(expected(z, v)[kept], y[kept]))


def test_saved_and_read_again(tmp_path):
    z, y, v = drawn()
    for views in (v, None):
        calibrator = fit(z, y, views, balanced=False)
        file = calibrator.save(tmp_path / "new" / "calibrator.safetensors", note="of digits")
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        again = Calibrator.load(file)
        assert torch.equal(again(z, views), calibrator(z, views)) and again.sizes == calibrator.sizes
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        Calibrator.load(other)
    from safetensors.torch import save_file

    save_file({"x": z}, other)
    with pytest.raises(ValueError, match="has no hf_xent_calibrator"):
        Calibrator.load(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y, v: fit(z * math.nan, y), "scores has 1440 values that are not finite"),
        (lambda z, y, v: fit(z, y, v.where(v < 9, math.inf)), "views has .* not finite"),
        (lambda z, y, v: fit(z, y, v[:, :-1]), r"views has shape \[3, 239, 6\]"),
        (lambda z, y, v: fit(z, y, v[:0]), "at least one changed copy"),
        (lambda z, y, v: fit(z[:0], y[:0]), "at least one row"),
        (lambda z, y, v: fit(z, y[:-1]), r"labels has shape \[239\]"),
        (lambda z, y, v: fit(z, y + 0.5), "one class, a whole number"),
        (lambda z, y, v: fit(z, y + 1), "labels has 6: choose 0 to 5"),
        (lambda z, y, v: fit(z, y * 0 - 100), "label at least one row"),
        (lambda z, y, v: fit(z, y, v, "mse"), "objective is 'mse': choose one of ca, ce, brier"),
        (lambda z, y, v: fit(z, y, v, balanced="yes"), "balanced is 'yes'"),
        (lambda z, y, v: fit(z, y, training=QUICK), "without views one temperature is fitted exactly"),
        (lambda z, y, v: fit(z, y, v, training=QUICK)(z), "views has views = 0, but the calibrator was fitted with 3"),
        (lambda z, y, v: fit(z, y, objective="ce")(z, v), "fitted with 0"),
        (lambda z, y, v: fit(z, y, objective="ce")(z[:, :3]), "scores has outputs = 3"),
        (lambda z, y, v: Training(per_batch=True), "per_batch is True, but batch_size is None"),
        (lambda z, y, v: Training(steps=0), "steps is 0"),
        (lambda z, y, v: Training(held_out=1), "held_out is 1"),
        (lambda z, y, v: fit(z, y, objective=lambda a, b: a.sum()), r"objective returns \[\] for 240 rows"),
        (lambda z, y, v: Training(learning_rate=0), "learning_rate is 0"),
        (lambda z, y, v: Calibrator(3, temperature=11), "temperature is 11"),
        (lambda z, y, v: report(z, y), "no distributions"),
        (lambda z, y, v: report(z[:, 0], y), r"probs has shape \[240\]"),
        (lambda z, y, v: binned(z[:, 0], y, closed="both"), "closed is 'both'"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        change(*drawn())


def test_metrics_are_those_of_their_definitions():
    """ECE over (low, high] and KS by loops, edges and ties included; AUROC of scikit-learn."""
    g = np.random.default_rng(0)
    confidence = np.concatenate([g.integers(13, 26, 300) / 25, g.random(100) / 2 + 0.5])  # many on the edges
    right = g.random(400) < confidence**2
    p = np.stack([confidence, 1 - confidence], -1)
    found = report(p, np.where(right, 0, 1))
    expected = 0
    for b in range(25):
        inside = (confidence > b / 25) & (confidence <= (b + 1) / 25)
        expected += abs((confidence[inside] - right[inside]).sum()) / 400
    assert found["ece"] == pytest.approx(expected)
    levels = np.unique(confidence)
    sums = [abs((confidence - right)[confidence <= level].sum()) / 400 for level in levels]
    assert found["ks"] == pytest.approx(max(sums)) and found["auroc"] == pytest.approx(roc_auc_score(right, confidence))
    order = g.permutation(400)
    assert cumulative_error(torch.tensor(confidence)[order], torch.tensor(right)[order]) == pytest.approx(found["ks"])
    assert calibration_error(binned(torch.ones(3), torch.tensor([1, 1, 0]), 4)) == pytest.approx(1 / 3)
    assert binned(torch.tensor([0.5]), torch.tensor([1]), 2)[0].tolist() == [0, 1]
    assert binned(torch.tensor([0.5]), torch.tensor([1]), 2, closed="right")[0].tolist() == [1, 0]


def test_the_diagram_is_a_picture_of_all_arms(tmp_path):
    z, y, _ = drawn()
    path = draw(
        {"none": z.softmax(-1), "temperature": fit(z, y, objective="ce")(z)}, y, tmp_path / "a" / "reliability.png"
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


ANIMALS = ["fox", "dog", "brown fox", "lazy dog", "quick dog", "lazy fox", "quick fox", "brown dog"]
ROWS = [{"prompt": f"the {animal}"} for animal in ANIMALS]
FORMAT = Format("{prompt} over {first} or {second} is", ("a", "b"))


def test_a_judge_is_calibrated_in_both_orders():
    """A tiny model, and a program that is right seven times of eight; two views: itself, and another question."""
    tokenizer = tiny_tokenizer("the quick brown fox jumps over the lazy dog or is a b " * 8)
    model = tiny(vocab_size=97)
    judge = ModelJudge(model, tokenizer, FORMAT)
    other = ModelJudge(model, tokenizer, Format("{first} or {second}, {prompt} is", ("a", "b")))
    better, worse = [f"the {animal}" for animal in ANIMALS], [f"{animal} jumps" for animal in reversed(ANIMALS)]
    plain = both_orders(judge, ROWS, better, worse).p
    for views in ((), (judge,), (judge, other)):
        calibrated = CalibratedJudge.fit(judge, ROWS, better, worse, views=views, objective="ce")
        forth, back = calibrated(ROWS, better, worse), calibrated(ROWS, worse, better)
        torch.testing.assert_close(forth + back, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-9)
        assert torch.equal(forth > 0.5, plain > 0.5) and (forth - plain).abs().max() > 1e-3
        torch.testing.assert_close(both_orders(calibrated, ROWS, better, worse).p, forth, rtol=0, atol=1e-9)
        assert len(calibrated([], [], [])) == 0
    with pytest.raises(ValueError, match="views has 1 judges, but the calibrator has 4 views"):
        CalibratedJudge(judge, calibrated.calibrator, (judge,))
    with pytest.raises(ValueError, match=r"eps is 0\.5"):
        CalibratedJudge.fit(judge, ROWS, better, worse, eps=0.5)


def test_a_judge_that_is_too_sure_is_held_back():
    asked = []

    def program(rows, first, second):
        asked.append(len(rows))
        return [0.9 if (len(a) > len(b)) != ("lazy" in a + b) else 0.1 for a, b in zip(first, second, strict=True)]

    better, worse = [f"{animal} xx" for animal in ANIMALS], ["x"] * 8
    calibrated = CalibratedJudge.fit(program, ROWS, better, worse, views=(program,), objective="ce", training=QUICK)
    assert asked == [8, 8], "once in each order"
    one = CalibratedJudge.fit(program, ROWS, better, worse, objective="ce")
    assert one(ROWS, better, worse)[0].item() == pytest.approx(6 / 8, abs=1e-6)
    before, after = quality(program, ROWS, better, worse), quality(one, ROWS, better, worse)
    assert after.accuracy == before.accuracy == 6 / 8 and after.brier < before.brier
    assert calibrated(ROWS, better, worse).shape == (8,)


def test_a_score_becomes_a_probability(tmp_path):
    """'loss' is lower for members; slope and offset are scipy's, NaN stays, and a file gives the same."""
    g = np.random.default_rng(0)
    labels = np.repeat([1.0, 0.0], [60, 90])
    loss = np.where(labels == 1, 2.8, 3.2) + 0.4 * g.standard_normal(150)
    found = detection.calibrate("loss", np.append(loss, math.nan), np.append(labels, 1))
    targets = np.where(labels == 1, 61 / 62, 1 / 92)

    def objective(line):
        z = line[0] * -loss + line[1]
        return (np.logaddexp(0, z) - targets * z).mean()

    expected = minimize(
        objective, [1, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000}
    ).x
    assert [found.slope, found.offset] == pytest.approx(list(expected), rel=1e-4) and found.slope > 0
    p = found([2.0, math.nan, 4.0])
    assert p[0] > 0.8 > 0.2 > p[2] and math.isnan(p[1])
    views = loss + 0.1 * g.standard_normal((2, 150))
    seen = detection.calibrate("loss", loss, labels, views, "ca", training=QUICK)
    again = detection.CalibratedScore.load(seen.save(tmp_path / "loss.safetensors"))
    assert np.array_equal(again(loss, views), seen(loss, views)) and again.score == "loss"
    assert np.array_equal(seen(loss, views) > 0.5, found(loss) > 0.5)
    views[1, 3] = math.nan
    assert np.isnan(seen(loss, views)).nonzero()[0].tolist() == [3]
    apart = detection.calibrate("loss", [1.0, 1.5, 3.0, 3.5], [1, 1, 0, 0])
    assert 0.5 < apart([1.0])[0] < 1 and math.isfinite(apart.slope)
    for options, message in (
        ({"labels": labels[:-1]}, r"values has shape \(150,\), labels \(149,\)"),
        ({"labels": labels * 0}, r"labels has the values \[0.0\]"),
        ({"views": views}, "objective is None, so that T = 1"),
        ({"score": "nonesuch"}, "score is 'nonesuch'"),
    ):
        with pytest.raises(ValueError, match=message):
            detection.calibrate(**{"score": "loss", "values": loss, "labels": labels, **options})


def test_a_tiny_model_s_scores_are_calibrated():
    tokenizer = tiny_tokenizer()
    texts = [f"the {animal} jumps over the lazy dog" for animal in ANIMALS] + [
        f"{animal} dog the" for animal in ANIMALS
    ]
    scorer = detection.TextScorer(tiny(), tokenizer, ("loss",), progress=False)
    values, cut = scorer(texts)["loss"], scorer([text[:-4] for text in texts])["loss"]
    labels = [1] * 8 + [0] * 8
    p = detection.calibrate("loss", values, labels, [cut], "ce", training=QUICK)(values, [cut])
    assert p.shape == (16,) and ((p > 0) & (p < 1)).all()


def test_answer_choices_are_scored_as_dense_logits_do():
    """Every format and answer alone, from the softmax over the vocabulary; formats are the views of a calibrator."""
    tokenizer = tiny_tokenizer()
    formats = PromptFormats(
        Format("the {animal} is quick or not", ("quick", "not")),
        Format("is the {animal} quick", ("the fox", "lazy")),
        Format("{animal} jumps over", ("the dog", "the lazy dog")),
    )
    items = datasets.Dataset.from_dict({"animal": ANIMALS, "label": [0, 1, 0, 1, 0, 1, 0, 1]})
    rows, model = formats.build(items, tokenizer), tiny()
    found = choice_scores(model, rows, batch_size=3)
    assert found.shape == (8, 3, 2) and "_hf_xent" not in model.__dict__
    for i, k, c in ((0, 0, 0), (3, 1, 0), (5, 2, 1), (7, 1, 1)):
        prompt, answer = rows[i]["prompts"][k], rows[i]["answers"][k][c]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        expected = logp[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).mean()
        assert found[i, k, c].item() == pytest.approx(expected.item(), rel=1e-4)
    scores, views = as_views(found)
    assert torch.equal(views[1, 4], found[4, 2])
    calibrator = fit(scores, rows["gold"], views, "ce", training=QUICK)
    assert torch.equal(calibrator(scores, views).argmax(-1), found[:, 0].argmax(-1))
    with pytest.raises(ValueError, match="rows is empty"):
        choice_scores(model, [])
    with pytest.raises(ValueError, match="but the model has 8 positions"):
        choice_scores(tiny("gpt2", n_positions=8), rows)


def test_names_are_loaded_on_first_use():
    assert calibration.OBJECTIVES is OBJECTIVES
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = calibration.nonesuch
