"""Rows of unequal lengths as one batch, against torch's own padding."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_xent.models.padding import padded

ROWS = [[5, 6, 7], [8], [], [9, 10]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fill", [0, -100])
def test_rows_are_filled_up_as_torch_does(side, fill):
    ids, mask = padded(ROWS, fill, left=side == "left")
    tensors = [torch.tensor(row, dtype=torch.long) for row in ROWS]
    expected = pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
    ones = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side=side)
    assert torch.equal(ids, expected) and torch.equal(mask, ones)
    assert ids.dtype == mask.dtype == torch.int64


def test_no_rows_and_empty_rows_have_a_shape():
    assert padded([])[0].shape == (0, 0) and padded([[], []])[1].shape == (2, 0)
