"""Models are left in the mode they had."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hf_xent.models.contexts import evaluating, measuring


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_its_mode_whatever_happens(training):
    """Without dropout in between, with gradients; an error passes through."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(training)
    x = torch.randn(3, 4)
    with evaluating(model):
        out = model(x)
    torch.testing.assert_close(out, model[0](x))
    assert out.requires_grad and all(module.training is training for module in model.modules())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(module.training is training for module in model.modules())


def test_parts_in_another_mode_keep_it():
    """A frozen encoder in evaluation mode within a model in training, or the other way round."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))).train()
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before and True in before and False in before


def test_measuring_takes_a_trainers_autocast_off_and_puts_it_back():
    """As accelerate puts it on; float32 in between."""
    AcceleratorState._reset_state()  # trainers in this process leave theirs, with another precision
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    expected = model(x)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    rounded = prepared(x)
    assert not torch.equal(rounded, expected)
    with measuring(prepared):
        assert torch.equal(prepared(x), expected) and not prepared.training
    assert torch.equal(prepared(x), rounded) and prepared.training
