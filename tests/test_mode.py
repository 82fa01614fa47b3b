"""Models are left in the mode they had."""

import pytest
import torch
from torch import nn

from hf_xent.mode import evaluating


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
