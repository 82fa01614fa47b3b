"""The k most probable tokens of a teacher: what is written down of it, and the losses that compare with it."""

import pytest
import torch

from hf_xent.ops import Head
from hf_xent.ops.top_k import top_k_of
from support.oracle import Largest

V, D = 37, 5


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_the_most_probable_tokens_are_those_of_dense_logits(k):
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 7, D), (V, D), (V,)))
    bias[4] = -torch.inf  # a banned token is the last of all
    head = Head(weight, bias, scale=1.5, softcap=None)
    ids, logp, rest = top_k_of(hidden, head, k, temperature=0.7, memory_budget=4 * V * 8 * 4)
    dense = (head.logits(hidden) / 0.7).log_softmax(-1)
    expected, order = dense.sort(-1, descending=True)
    assert torch.equal(ids, order[..., :k]) and ids.dtype == torch.int64
    torch.testing.assert_close(logp, expected[..., :k])
    torch.testing.assert_close(rest, expected[..., k:].logsumexp(-1))


def test_a_small_rest_is_not_rounded_to_nothing():
    """Far below what float32 resolves beside 1."""
    bias = torch.full((V,), -30.0)
    bias[3] = 0.0
    found = top_k_of(torch.zeros(2, D), Head(torch.zeros(V, D), bias), 1)
    torch.testing.assert_close(found.rest, torch.full((2,), -30.0) + torch.tensor(V - 1.0).log(), rtol=1e-6, atol=0)


def test_the_most_probable_tokens_are_found_in_few_rows_at_a_time():
    hidden, weight = torch.randn(200, D), torch.randn(V, D)
    with Largest() as largest:
        top_k_of(hidden.bfloat16(), Head(weight.bfloat16()), 3, memory_budget=10 * V * 16)
    assert largest.numel <= 200 * D
    assert [tuple(x.shape) for x in top_k_of(hidden[:0], Head(weight), 3)] == [(0, 3), (0, 3), (0,)]


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [(0, {}, "k is 0: pass"), (V + 1, {}, "k is 38"), (3, {"temperature": 0.0}, "temperature is 0.0: pass")],
)
def test_what_cannot_be_found_is_refused(k, options, message):
    with pytest.raises(ValueError, match=message):
        top_k_of(torch.zeros(2, D), Head(torch.zeros(V, D)), k, **options)
