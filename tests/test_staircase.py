"""The staircase cache: its quantiser, its schedule against a dense reference, and `generate` against DynamicCache."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    DynamicCache,
    EncoderDecoderCache,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_xent.caches import StaircaseCache
from hf_xent.caches.blocks import Schedule
from hf_xent.caches.layers import StaircaseLayer, StaircaseSlidingLayer
from hf_xent.caches.quantiser import BITS, Groups, dequantise, pack, quantise, requantise, unpack
from support.models import V, tiny

# transformers 5.24 calls the argument `cache`, which releases before did not know
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}


def there_and_back(x, bits, groups):
    low, high = groups.bounds(x)
    out = torch.empty_like(x)
    dequantise(pack(quantise(x, low, high, bits, groups), bits), low, high, bits, groups, out)
    return out


# The quantiser


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (8, [0, 0.996863, 2.005882, 3.1]),
        (4, [0, 1.033333, 2.066667, 3.1]),
        (2, [0, 1.033333, 2.066667, 3.1]),
        (1, [0, 0, 3.1, 3.1]),
    ],
)
def test_the_golden_group(bits, expected):
    x = torch.tensor([[0, 1, 2, 3.1]])
    torch.testing.assert_close(there_and_back(x, bits, Groups(-1, 4)), torch.tensor([expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.0058), (4, 0.0984), (2, 0.4946)])
def test_relative_errors_of_normal_rows(bits, error):
    x = torch.randn(4000, 128)
    relative = (there_and_back(x, bits, Groups(-1, 128)) - x).norm() / x.norm()
    assert relative == pytest.approx(error, rel=0.015)


def fake_quantised(x, bits, axis, group):
    """The formula on a dense array, group by group."""
    if bits == 16:
        return x
    parts = []
    for start in range(0, x.shape[axis], group):
        part = x.take(range(start, min(start + group, x.shape[axis])), axis)
        low, high = part.min(axis, keepdims=True), part.max(axis, keepdims=True)
        step = (high - low) / (2**bits - 1)
        parts.append(np.where(step > 0, low + np.round((part - low) / np.where(step > 0, step, 1)) * step, low))
    return np.concatenate(parts, axis)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("group", [1, 3, 4, 5, 12, 100])
def test_groups_of_any_size(bits, axis, group):
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    x[0, :, 3] = 1.5  # equal numbers
    got = there_and_back(x, bits, Groups(axis, group))
    np.testing.assert_allclose(got, fake_quantised(x.numpy(), bits, axis, group), atol=1e-12)


def test_fewer_bits_from_codes_are_those_of_the_numbers():
    groups = Groups(-1, 64)
    x = torch.randn(500, 64, dtype=torch.float64)
    low, high = groups.bounds(x)
    codes = {bits: quantise(x, low, high, bits, groups) for bits in BITS}
    for bits in BITS:
        for fewer in BITS[BITS.index(bits) :]:
            assert torch.equal(requantise(codes[bits], bits, fewer), codes[fewer]), (bits, fewer)


def test_every_code_of_fewer_bits():
    for bits in BITS:
        for fewer in BITS[BITS.index(bits) :]:
            code = torch.arange(2**bits, dtype=torch.uint8)
            nearest = [round(c * (2**fewer - 1) / (2**bits - 1)) for c in range(2**bits)]
            assert requantise(code, bits, fewer).tolist() == nearest
            assert (nearest[0], nearest[-1]) == (0, 2**fewer - 1)  # lo and hi stay what they are


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 2, 5, 7, 8, 9, 64])
def test_packing(bits, width):
    codes = torch.randint(0, 2**bits, (3, 2, width)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-width * bits // 8)
    assert torch.equal(unpack(packed, bits, torch.empty_like(codes)), codes)
    assert torch.equal(unpack(packed, bits, torch.empty(codes.shape)), codes.float())


# The schedule


class Reference:
    """Keys or values as dense numbers: each block is rounded from the numbers it had, to the bits that it has come to."""

    def __init__(self, bits, size, group, axis, keep=None):
        self.bits, self.size, self.group, self.axis, self.keep = bits, size, group, axis, keep
        self.blocks, self.residual = [], None

    def rounded(self, block):
        x, bits = block
        return fake_quantised(x, bits, self.axis, self.group)

    def dense(self):
        return np.concatenate([*map(self.rounded, self.blocks), self.residual], 2)

    def update(self, new):
        self.residual = new if self.residual is None else np.concatenate([self.residual, new], 2)
        full = self.dense()
        self.settle()
        return full

    def settle(self):
        while self.residual.shape[2] >= self.size:
            self.blocks.append((self.residual[:, :, : self.size], 16))
            self.residual = self.residual[:, :, self.size :]
            self.blocks = [
                (x, min(bits, self.bits[min(age, len(self.bits) - 1)]))
                for age, (x, bits) in zip(reversed(range(len(self.blocks))), self.blocks, strict=True)
            ]
        while self.keep and self.blocks and self.dense().shape[2] - self.size >= self.keep:
            self.blocks.pop(0)

    def crop(self, removed):
        while removed > self.residual.shape[2]:
            removed -= self.residual.shape[2]
            self.residual = self.rounded(self.blocks.pop())
        self.residual = self.residual[:, :, : self.residual.shape[2] - removed]

    def rows(self, index):
        self.blocks = [(x[index], bits) for x, bits in self.blocks]
        self.residual = self.residual[index]


def histories(seed, crops=True):
    """Random settings, and a random list of what happens to a cache."""
    draw = random.Random(seed)
    levels = sorted(draw.choices([16, *BITS], k=draw.randint(1, 4)), reverse=True)
    settings = {"bits": tuple(levels), "residual_length": draw.randint(1, 9), "group": draw.randint(1, 9)}
    kinds = ["update"] * 8 + ["crop"] * 3 * crops + ["reorder", "repeat", "select", "copy"]
    return settings, [(draw.choice(kinds), draw.choice([1, 1, 1, 2, 7, 30])) for _ in range(30)], draw.randint(1, 11)


def assert_equal(got, want):
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_any_history_equals_the_reference(seed):
    settings, events, width = histories(seed)
    cache = StaircaseCache(LlamaConfig(num_hidden_layers=1), **settings)
    bits, size, group = settings.values()
    references = [Reference(bits, size, group, -2), Reference(bits, size, group, -1)]
    batch, length = 2, 0
    for kind, number in [("update", 1), *events]:
        if kind == "update":
            states = torch.randn(2, batch, 3, number, width, dtype=torch.float64)
            for got, reference, new in zip(cache.update(*states, 0), references, states, strict=True):
                assert_equal(got, reference.update(new.numpy()))
            length += number
        elif kind == "crop":
            number = min(number, length - 1)
            cache.crop(-number)
            length -= number
            for reference in references:
                reference.crop(number)
        elif kind == "copy":
            other, cache = cache, copy.deepcopy(cache)
            other.update(states[0][:1].new_ones(batch, 3, 20, width), states[0].new_ones(batch, 3, 20, width), 0)
        else:
            index = torch.randint(0, batch, (max(1, batch - 1) if kind == "select" else batch,))
            index = torch.arange(batch).repeat_interleave(2) if kind == "repeat" else index
            argument = 2 if kind == "repeat" else index
            name = {"reorder": "reorder_cache", "repeat": "batch_repeat_interleave", "select": "batch_select_indices"}
            if kind == "repeat" and batch > 4:
                continue
            getattr(cache, name[kind])(argument)
            batch = len(index)
            for reference in references:
                reference.rows(index.numpy())
        layer = cache.layers[0]
        assert cache.get_seq_length() == length == layer.keys.shape[2]
        assert_equal(layer.keys, references[0].dense())
        assert_equal(layer.values, references[1].dense())
        assert cache.nbytes == sum(tensor.nbytes for tensor in layer.tensors())  # no view keeps more memory alive
