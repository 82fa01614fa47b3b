"""Corruptions of images: none at severity 0, more with severity, the same under a seed, and within 0 to 1."""

import pytest
import torch

from hf_xent.data.corruptions import CORRUPTIONS, corrupt


@pytest.fixture(scope="module")
def images():
    """Bright strokes on black, in two shapes of images."""
    x = torch.zeros(6, 3, 20, 24)
    for i in range(6):
        x[i, :, 3 + i : 15, 8 : 12 + i] = torch.tensor([0.9, 1.0, 0.7]).view(3, 1, 1)
    return x


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_is_none_then_some_then_more(images, name):
    kept = images.clone()
    assert torch.equal(corrupt(images, name, 0), images)
    changes = [(corrupt(images, name, s) - images).abs().mean().item() for s in (0.5, 2, 5)]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_seed_repeats_it_and_the_range_holds(images, name):
    before = torch.get_rng_state()
    made = corrupt(images, name, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made, corrupt(images, name, 5, seed=3))
    assert made.shape == images.shape and made.dtype == images.dtype and made.min() >= 0 and made.max() <= 1
    drawn = not torch.equal(made, corrupt(images, name, 5, seed=4))
    assert drawn == (name not in ("blur", "pixelate", "contrast", "brightness", "thickening"))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_image_has_its_own_severity(images, name):
    """And its draws do not depend on the severities."""
    levels = torch.tensor([0, 1, 2, 3, 4, 5.0])
    mixed = corrupt(images, name, levels)
    for i in range(6):
        assert torch.allclose(mixed[i], corrupt(images, name, float(i))[i], atol=1e-6)


def test_what_some_do_by_their_formulas(images):
    x = images.double()
    assert torch.allclose(corrupt(x, "brightness", 2.5), (x + 0.2).clamp(max=1))
    mean = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(corrupt(x, "contrast", 5), mean + 0.1 * (x - mean))
    noisy = corrupt(torch.full((40, 1, 30, 30), 0.5), "gaussian_noise", 1)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    turned = corrupt(x, "rotation", 5)
    assert turned.sum().item() == pytest.approx(x.sum().item(), rel=0.05)  # strokes stay inside
    hidden = corrupt(torch.zeros(9, 1, 20, 20), "occlusion", 5).ne(0).flatten(1).sum(1)
    assert hidden.tolist() == [100] * 9  # half of each side


def test_what_is_refused(images):
    with pytest.raises(ValueError, match="name is 'snow': choose one of gaussian_noise, "):
        corrupt(images, "snow")
    for severity in (-1, 6, float("nan"), torch.tensor([0.0] * 5 + [7.0])):
        with pytest.raises(ValueError, match="choose numbers from 0 to 5"):
            corrupt(images, "blur", severity)
    with pytest.raises(ValueError, match=r"images are from 0 to 2: scale them"):
        corrupt(images * 2, "blur")
    with pytest.raises(ValueError, match=r"images are from nan to nan"):
        corrupt(images * float("nan"), "blur")
    for wrong in (images[0], images.half(), images.mul(255).byte()):
        with pytest.raises(ValueError, match="give float32"):
            corrupt(wrong, "blur")
    with pytest.raises(ValueError, match="seed is -1"):
        corrupt(images, "blur", seed=-1)
