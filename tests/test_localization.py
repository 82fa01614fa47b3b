"""Where a class is in an image: background activation suppression, `Localizer`, and maps of any classifier."""

import math

import pytest
import torch
from torch import nn

from hf_xent.localization.suppression import background_activation, frozen_call, mask_area, suppression_loss


def two_classes(score, ce):
    """Logits [1, 2] with that score of class 0, and that cross-entropy of it."""
    return torch.tensor([[score, score + math.log(math.expm1(ce))]])


def test_the_loss_of_the_toy_is_that_of_the_formula():
    labels = torch.zeros(1, dtype=torch.long)
    whole, masked, erased = two_classes(2.0, 0.5), two_classes(3.0, 0.7), two_classes(1.0, 0.1)
    background = background_activation(whole, erased, labels)
    assert background.item() == 0.5
    area = mask_area(torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))
    assert area.item() == 0.25
    loss = suppression_loss(whole, labels, masked=masked, background=background, area=area, alpha=0.5, beta=1.5)
    assert loss.item() == pytest.approx(1.725, abs=1e-6)
    alone = suppression_loss(whole, labels, masked=masked, area=area, alpha=0, beta=0)
    assert alone.item() == nn.functional.cross_entropy(whole, labels).item()


@pytest.mark.parametrize(
    ("whole", "outside", "value", "slope"),
    [
        (2.0, 1.0, 0.5, 0.5),  # 1 / s
        (2.0, 2.0, 1.0, 0.5),  # nothing is erased
        (2.0, 4.0, 1.0, 0.25),  # 1 / b, where the authors have none
        (1e-3, 4.0, 1.0, 0.25),  # bounded where the class has hardly any activation
        (-1.0, 4.0, 1.0, 0.25),
        (2.0, -1.0, 0.0, 0.0),
        (-2.0, -1.0, 1.0, 0.0),
        (-1.0, -2.0, 0.0, 0.0),
    ],
)
def test_suppression_is_the_share_of_activation_that_remains(whole, outside, value, slope):
    labels = torch.zeros(1, dtype=torch.long)
    for saturate, expected in ((False, slope), (True, slope if outside <= whole else 0.0)):
        logits = torch.tensor([[whole, 7.0]], requires_grad=True)
        erased = torch.tensor([[outside, 9.0]], requires_grad=True)
        bas = background_activation(logits, erased, labels, saturate=saturate)
        assert bas.item() == value
        (bas.sum() + 0 * logits.sum()).backward()
        torch.testing.assert_close(erased.grad, torch.tensor([[expected, 0.0]]))
        assert not logits.grad.any()


def test_areas_count_valid_positions_alone():
    masks, valid = torch.tensor([[1.0, 0.5, 9.0], [3.0, 3.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mask_area(masks, valid).tolist() == [0.75, 0.0]
    assert mask_area(torch.ones(2, 3, 5)).tolist() == [1.0, 1.0]


def test_a_frozen_call_moves_inputs_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    x = torch.randn(5, 3, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    out = frozen_call(net, x)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    out.square().sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)
