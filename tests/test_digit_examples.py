"""The examples of digits run on tiny models, end to end, and run nothing twice."""

import csv
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t, norm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Where the scripts find one another, with a tiny decoder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("digit_training", "digit_head", "sensor_digits", "digit_baselines", "sensor_baselines"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import digit_training

    digit_training.SIZE.update(n_embd=8, n_layer=1, n_head=2)


def archive(path, rows):
    """A stand-in of the package's archive."""
    table = io.StringIO()
    csv.writer(table).writerows(
        [["", "julday", "LNOx", "LNOxEm", "sqrtWS"], *([i, 1, *row] for i, row in enumerate(rows))]
    )
    content = table.getvalue().encode()
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo("resources/rdata/csv/robustbase/NOxEmissions.csv")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.slow
def test_digit_head(examples, tmp_path):
    import digit_head as example

    example.PARTS[:] = [300, 40, 1457]
    example.TRAINING["num_train_epochs"] = 1
    found = example.main(1, 40, tmp_path)
    rows = {arm: found[arm][0] for arm in found}
    assert set(rows) == {*example.HEADS, *example.FITTED, "real images"}
    assert all(0 < row["nats"] < 3 for arm, row in rows.items() if arm != "real images")
    assert rows["real images"]["trained on samples"] > 0.9 and "nats, other orders" in rows["random order"]
    assert len(list(tmp_path.glob("*.png"))) == len(rows)
    card = (tmp_path / "README.md").read_text()
    errors = [[float(x) for x in line.split("|")[2:-1]] for line in card.splitlines() if line[:5].strip("| ").isdigit()]
    assert len(errors) == 5 and (np.diff(errors, axis=0) < 0).all(), "more bits, less error"
    assert all(lloyd < min(normal, fit) for normal, fit, lloyd, _ in errors)
    example.neural = None
    assert example.main(1, 40, tmp_path) == found


def test_the_controls_of_pixels_are_distributions(examples):
    """Where only the last pixel varies, the probabilities of its values sum to one."""
    import digit_baselines as example

    x, y = torch.zeros(60, 16, 4), torch.arange(60) % 10
    x[:, 15, 3] = torch.randint(17, (60,), generator=torch.Generator().manual_seed(0))
    image = example.patches(x + torch.arange(64.0).view(16, 4), back=True)
    assert image[0, :2, :4].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]], "the second patch is beside the first"
    others = {"pixels of a class": 6.1 / 7.7, "linear Gaussian": 0.999 + 0.001 / 17}  # of 6 zeros in 6, and sd 0.1
    for name, fitted in example.FITTED.items():
        total = 0.0
        for value in range(17):
            test = x[:2].clone()
            test[:, 15, 3] = value
            found, drawn = fitted("", 0, [(x, y), (x, y), (test, y[:1].expand(2))], y[:4])
            total += np.exp(-64 * found["nats"]) / others[name] ** 63
        assert total == pytest.approx(1, abs=1e-4), name
        assert drawn.shape == (4, 16, 4) and drawn.equal(drawn.round().clamp(0, 16))


@pytest.mark.slow
def test_sensor_digits(examples, tmp_path, monkeypatch):
    import sensor_digits as example

    steps = np.random.default_rng(0).normal(size=(600, 3)).cumsum(0)
    monkeypatch.setattr(example, "file_of", lambda *_: archive(tmp_path / "resources.tar.gz", steps))
    np.testing.assert_allclose(example.read(), steps)
    changes = {"LENGTH": 12, "BEFORE": 4, "LEVELS": 4, "STRIDES": (40, 8, 8)}
    for name, value in changes.items():
        monkeypatch.setattr(example, name, value)
    example.TRAINING["num_train_epochs"] = 1
    found = example.main(1, tmp_path / "out")
    rows = {arm: found[arm][0] for arm in found}
    assert set(rows) == {*example.ARMS, *example.CONTROLS}
    assert all(np.isfinite(row["density"]) for row in rows.values())
    assert rows["walk, normal"]["density"] < rows["constant, normal"]["density"], "it is a random walk"
    assert all(0 < rows[arm]["digits"] < 4 for arm in example.ARMS)
    monkeypatch.setattr(example, "trained", None)
    assert example.main(1, tmp_path / "out") == found


def test_densities_of_the_controls(examples):
    """Of one dimension against scipy's own, and degrees of freedom that are found again."""
    import sensor_baselines as example

    draw = np.random.default_rng(0)
    train, test = draw.normal(2, 3, size=(400, 1)), draw.normal(2, 3, size=(50, 1))
    found = example.density("constant", "normal", train, test, 5)
    sd = np.sqrt(((train[5:] - train[5:].mean()) ** 2).mean())
    assert found == pytest.approx(-norm(train[5:].mean(), sd).logpdf(test[5:]).mean())
    drawn = multivariate_t(np.zeros(2), [[2, 0.5], [0.5, 1]], 4).rvs(4000, random_state=0)
    scale, degrees = example.fitted_t(drawn)
    assert degrees in (3, 4, 5)
    np.testing.assert_allclose(scale, [[2, 0.5], [0.5, 1]], atol=0.2)
    walk = draw.normal(size=(400, 2)).cumsum(0)
    np.testing.assert_allclose(example.errors_of("walk", walk, walk, 3), np.diff(walk, axis=0)[2:])
    lags = example.errors_of("24 lags", walk, walk, 3)
    assert lags.shape == (397, 2) and (lags**2).mean() < 1.05 * (np.diff(walk, axis=0)[2:] ** 2).mean()
