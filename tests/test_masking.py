"""Signs of gradient masking: none of a plain model, and those of models that hide their gradients in a known way."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_xent.robust import masking

COUNT, SIDE, EPSILON = 60, 4, 0.06


class Processor:
    """Pixels are from -1 to 1."""

    image_mean = image_std = (0.5,)


class Plain(nn.Module):
    """A small net of three classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.net(pixel_values))


class Sure(Plain):
    """Its probabilities are 0 or 1 in float32, so that the cross-entropy is flat."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=1e4 * self.net(pixel_values))


class Quantised(Plain):
    """Sees pixels in steps, which have no slope."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.net((pixel_values * 12).round() / 12))


class Reversed(Plain):
    """Its gradient is that of the opposite."""

    def forward(self, pixel_values):
        pixel_values = 2 * pixel_values.detach() - pixel_values
        return SimpleNamespace(logits=self.net(pixel_values))


@pytest.fixture(scope="module")
def rows():
    """Noise around a picture of each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 3
    centers = torch.rand(3, 1, SIDE, SIDE, generator=generator) - 0.5
    x = centers[labels] + 0.5 * (torch.rand(COUNT, 1, SIDE, SIDE, generator=generator) - 0.5)
    return {"pixel_values": x}, labels


@pytest.fixture(scope="module")
def trained(rows):
    batch, labels = rows
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
    return model


def report(kind, rows, trained, **options):
    model = kind()
    model.load_state_dict(trained.state_dict())
    return masking(model, *rows, **{"epsilon": EPSILON, "steps": 10, "processor": Processor()} | options)


def said(found):
    """Of each sign, its first words."""
    return {" ".join(sign.split()[:2]) for sign in found.signs}


def test_a_plain_model_has_no_sign(rows, trained):
    found = report(Plain, rows, trained, surrogate=Plain(), batch_size=17)
    assert found.signs == () and found.rows == COUNT and found.epsilon == EPSILON
    assert found.clean == 1 and 0.1 < found.pgd < 0.9 and found.large == 0
    assert found.pgd <= found.one_step <= found.random <= found.clean and found.pma == pytest.approx(found.pgd, abs=0.1)
    assert found.zero_gradients == found.tiny_gradients == 0 and found.pgd <= found.transfer <= 1


def test_a_sure_model_has_no_gradient_but_margins(rows, trained):
    plain, found = report(Plain, rows, trained), report(Sure, rows, trained)
    assert found.clean == plain.clean and found.random == plain.random, "its classes are the same"
    assert found.zero_gradients == found.tiny_gradients > 0.9
    assert found.pgd > plain.pgd and found.pma == pytest.approx(plain.pma, abs=0.1)
    assert {"An attack", "The gradient"} <= said(found)
    [sign] = [sign for sign in found.signs if sign.startswith("An attack")]
    assert f"leaves {found.pma:.1%} right, PGD on cross-entropy {found.pgd:.1%}: at least" in sign


def test_a_quantised_model_is_found_by_chance_and_by_transfer(rows, trained):
    found = report(Quantised, rows, trained, surrogate=trained, epsilon=0.15)
    assert found.zero_gradients == 1 and found.random <= found.pgd and found.transfer < found.pgd
    assert {"Random points", "In a", "Inputs changed", "The gradient"} <= said(found)


def test_a_reversed_gradient_makes_many_steps_worse_than_one(rows, trained):
    found = report(Reversed, rows, trained, surrogate=trained, epsilon=0.15)
    assert found.pgd > found.one_step or found.pgd >= found.random
    assert {"In a", "Inputs changed"} <= said(found) and found.zero_gradients == 0


def test_what_cannot_be_looked_at_is_refused(rows, trained):
    with pytest.raises(ValueError, match="steps is 0"):
        report(Plain, rows, trained, steps=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        report(Plain, rows, trained, batch_size=0)
    texts = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="surrogate is given, but embeddings of tokens are each model's own"):
        masking(trained, texts, torch.zeros(2, dtype=torch.long), 1.0, surrogate=trained)
