"""The staircase cache: its quantiser, its schedule against a dense reference, and `generate` against DynamicCache."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
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
RECORDS = hasattr(DynamicCache, "activate_past_recording")
RECORDING = pytest.mark.skipif(not RECORDS, reason="this transformers cannot roll back a full sliding window")
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
    """Keys or values as dense numbers: a block is rounded from the numbers it had, to the bits it has come to."""

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
    return settings, [(draw.choice(kinds), draw.choice([1, 1, 1, 2, 7, 30])) for _ in range(20)], draw.randint(1, 11)


def assert_equal(got, want):
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize("seed", range(16))
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
            other.update(*torch.ones(2, batch, 3, 20, width, dtype=torch.float64), 0)  # what the copy must not see
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("recording", [False, pytest.param(True, marks=RECORDING)])
def test_a_sliding_window_holds_what_it_may_read(seed, recording):
    """With recording each update is followed by a crop, as in assisted generation."""
    settings, events, width = histories(seed)
    window = settings["residual_length"] + 2 + seed
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    cache, dense = StaircaseCache(config, **settings), DynamicCache(config=config)
    bits, size, group = settings.values()
    reference = Reference(bits, size, group, -2, keep=window - 1)
    if recording:
        cache.activate_past_recording()
        dense.activate_past_recording()
    for _, number in events:
        states = torch.randn(2, 1, 2, number, width, dtype=torch.float64)
        rejected = random.Random(number).randrange(number) if recording else 0
        expected = (number + min(window - 1, dense.get_seq_length()), max(dense.get_seq_length() - window + 1, 0))
        assert cache.get_mask_sizes(number, 0) == dense.get_mask_sizes(number, 0) == expected
        full = reference.update(states[0, :, :, : number - rejected].numpy())
        keys, values = cache.update(*states, 0)
        assert keys.shape[2] == values.shape[2] == dense.update(*states, 0)[0].shape[2] == expected[0]
        if recording:
            cache.crop(-rejected)
            dense.crop(-rejected)
        visible = expected[0] - rejected
        assert_equal(keys[:, :, :visible], full[:, :, full.shape[2] - visible :])
        assert cache.get_seq_length() == dense.get_seq_length()
        assert cache.layers[0].keys.shape[2] <= window - 1 + size - 1
        assert_equal(cache.layers[0].keys, reference.dense())
        assert cache.nbytes == sum(tensor.nbytes for tensor in cache.layers[0].tensors())


def test_a_full_window_is_cropped_where_it_was_recorded():
    cache = StaircaseCache(MistralConfig(num_hidden_layers=1, sliding_window=8), residual_length=2)
    cache.crop(-1)  # nothing came yet
    cache.update(*torch.randn(2, 1, 2, 9, 4), 0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize("splits", [[1] * 40, [13, 27], [3, 30, 7]])
def test_how_tokens_come_changes_nothing_that_is_kept(splits):
    states = torch.randn(2, 1, 2, 40, 16)
    caches = [StaircaseCache(LlamaConfig(num_hidden_layers=1), residual_length=6, group=4) for _ in range(2)]
    caches[0].update(*states, 0)
    for part in states.split(splits, dim=3):
        caches[1].update(*part, 0)
    one, many = (list(cache.layers[0].tensors()) for cache in caches)
    assert len(one) == len(many) > 8
    assert all(map(torch.equal, one, many))


@RECORDING
def test_recorded_tokens_become_a_block_when_they_can_no_longer_be_cropped():
    config, states = LlamaConfig(num_hidden_layers=1), torch.randn(2, 1, 2, 9, 16)
    plain, recording = (StaircaseCache(config, residual_length=4) for _ in range(2))
    recording.activate_past_recording()
    recording.update(*states, 0)
    assert torch.equal(recording.layers[0].keys, states[0])  # all are exact still
    recording.crop(-2)
    plain.update(*states[..., :7, :], 0)
    assert all(map(torch.equal, plain.layers[0].tensors(), recording.layers[0].tensors()))
    recording.update(*states[..., 7:, :], 0)
    recording.update(*states[..., :3, :], 0)  # no crop in between
    plain.update(*states[..., 7:, :], 0)
    assert levels(recording) == levels(plain) == [8, 4]
    blocks = [cache.layers[0].stairs[0].blocks for cache in (plain, recording)]
    assert all(torch.equal(one.data, other.data) for one, other in zip(*blocks, strict=True))


def test_what_is_kept_can_be_moved():
    cache = StaircaseCache(LlamaConfig(num_hidden_layers=1), residual_length=4)
    layer = cache.layers[0]
    layer.offload()  # nothing yet
    layer.prefetch()
    cache.early_initialization(2, 3, 8, torch.float32, torch.device("cpu"))
    assert layer.is_initialized and cache.get_seq_length() == 0
    states = torch.randn(2, 2, 3, 17, 8)
    assert torch.equal(cache.update(*states, 0)[0], states[0])
    layer.device, before = torch.device("meta"), layer.keys
    layer.prefetch()
    assert {tensor.device.type for tensor in layer.tensors()} == {"meta"}
    assert layer.keys.shape == before.shape


def levels(cache, layer=0):
    """Bits of the keys' blocks, the newest first."""
    kept = cache.layers[layer].stairs[0].blocks if cache.layers[layer].is_initialized else []
    return [blocks.bits for blocks in reversed(kept) for _ in range(len(blocks))]


def test_bits_by_age():
    """The table of the method: 8, 4, 2, 2, 2 and six blocks of 3.33 bits on average."""
    cache = StaircaseCache(LlamaConfig(num_hidden_layers=1), residual_length=5)
    seen = []
    for _ in range(30):
        cache.update(*torch.randn(2, 1, 2, 1, 8), 0)
        seen.append(levels(cache))
    assert seen[3::5] == [[], [8], [8, 4], [8, 4, 2], [8, 4, 2, 2], [8, 4, 2, 2, 2]]
    assert seen[-1] == [8, 4, 2, 2, 2, 2]
    assert sum(seen[-1]) / 6 == pytest.approx(3.33, abs=0.005)
    cache.crop(-12)  # two blocks, and two tokens of a third
    assert levels(cache) == [2, 2, 2]
    cache.update(*torch.randn(2, 1, 2, 2, 8), 0)
    assert levels(cache) == [8, 2, 2, 2]  # a block never gets bits back
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, levels(cache)) == (0, 0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [(16,), (8, 4, 2), 4, (2,), (16, 8, 4), (2, 1)])
def test_bytes(dtype, bits):
    """Codes, lo and hi of every group in the states' type, and exact tokens: no byte more."""
    batch, heads, width, size, group, tokens = 2, 3, 64, 64, 32, 1000
    cache = StaircaseCache(LlamaConfig(num_hidden_layers=2), bits, size, group)
    for layer in range(2):
        cache.update(*torch.randn(2, batch, heads, tokens, width).to(dtype), layer)
    blocks, rest = divmod(tokens, size)
    expected = 0
    for b in levels(cache):
        expected += width * size * (dtype.itemsize if b == 16 else b / 8 + 2 * dtype.itemsize / group)
    expected += width * rest * dtype.itemsize
    assert len(levels(cache)) == blocks
    assert cache.nbytes == expected * batch * heads * 2 * 2  # keys and values of two layers


def test_a_quarter_of_the_bytes():
    """What 4,096 tokens need, lo and hi included."""
    for dtype in (torch.float32, torch.bfloat16):
        cache = StaircaseCache(LlamaConfig(num_hidden_layers=1))
        cache.update(*torch.randn(2, 1, 2, 4096, 64).to(dtype), 0)
        assert cache.nbytes <= 0.25 * 2 * 2 * 4096 * 64 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """The numbers are those of float32, rounded at the end; states of another size have another width of values."""
    keys, values = torch.randn(1, 2, 40, 16).to(dtype), torch.randn(1, 2, 40, 24).to(dtype)
    half, full = (StaircaseCache(LlamaConfig(num_hidden_layers=1), residual_length=8, group=5) for _ in range(2))
    half.update(keys, values, 0)
    full.update(keys.float(), values.float(), 0)
    for got, want in (("keys", "keys"), ("values", "values")):
        assert torch.equal(getattr(half.layers[0], got), getattr(full.layers[0], want).to(dtype))
    assert half.update(keys, values, 0)[0].dtype is dtype


def test_no_gradient_goes_through_codes():
    cache = StaircaseCache(LlamaConfig(num_hidden_layers=1), residual_length=4)
    first, second = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(2))
    cache.update(first, first, 0)
    keys, _ = cache.update(second, second, 0)
    keys.sum().backward()
    assert first.grad[:, :, :4].abs().sum() == 0
    assert torch.equal(first.grad[:, :, 4:], torch.ones(1, 2, 2, 8))
    assert torch.equal(second.grad, torch.ones_like(second))


# In models

MODELS = {
    "llama": {},
    "gpt2": {},
    "gemma3 softcap": SLIDING,
    "gemma2 softcap": SLIDING,
}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


def generated(model, ids, cache, **options):
    torch.manual_seed(1)
    options = {"max_new_tokens": 24, "eos_token_id": 1, "pad_token_id": 0, **options}
    return model.generate(ids, past_key_values=cache, **options)


def prompt(mode, length=17):
    ids = torch.randint(3, V, (1 if mode in ("prompt lookup", "assisted") else 2, length))
    ids[:, 9:14] = ids[:, :5]  # something to look up
    return ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_a_dynamic_cache(name, mode):
    if mode == "prompt lookup" and MODELS[name] and not RECORDS:
        pytest.skip("this transformers cannot roll back a full sliding window")
    model, ids = tiny(name, **MODELS[name]), prompt(mode)
    cache, dense = StaircaseCache(model.config, (16,), residual_length=5), DynamicCache(config=model.config)
    expected = generated(model, ids, dense, **MODES[mode])
    assert torch.equal(generated(model, ids, cache, **MODES[mode]), expected)
    assert cache.get_seq_length() == dense.get_seq_length()
    for layer, other in zip(cache.layers, dense.layers, strict=True):
        length = other.keys.shape[2]
        assert torch.equal(layer.keys[:, :, -length:], other.keys)
        assert torch.equal(layer.values[:, :, -length:], other.values)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3 softcap", marks=RECORDING)])
def test_an_assistant_model(name):
    model, helper, ids = tiny(name, **MODELS[name]), tiny(), prompt("assisted")
    helper.generation_config.num_assistant_tokens = 3
    helper.load_state_dict({key: x + 0.02 * torch.randn_like(x) for key, x in helper.state_dict().items()})
    expected = generated(model, ids, DynamicCache(config=model.config), do_sample=False)
    for bits in [(16,), (8,)]:
        cache = StaircaseCache(model.config, bits, residual_length=5)
        got = generated(model, ids, cache, do_sample=False, assistant_model=helper)
        assert torch.equal(got, expected) or bits != (16,)
        assert got.shape == expected.shape
        assert cache.get_seq_length() == got.shape[1] - 1


@pytest.mark.parametrize("bits", [(16,), (8,)])
def test_padding_on_the_left(bits):
    """A row's tokens do not depend on how long the other row is: their own groups are."""
    model, ids = tiny(), prompt("greedy", 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = StaircaseCache(model.config, bits, residual_length=5)
    together = generated(model, ids, cache, attention_mask=mask, do_sample=False)
    alone = generated(model, ids[:1, 7:], DynamicCache(config=model.config), do_sample=False)
    agree = (together[0, 20:] == alone[0, 13:]).float().mean()
    assert agree == 1 if bits == (16,) else agree > 0.5


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_change_logits_little_and_two_more(name):
    """In a model of many tokens; and a prompt of one call is read exactly, as transformers' QuantizedCache reads it."""
    model, ids = tiny(name, **MODELS[name]), prompt("greedy", 40)
    errors = {}
    with torch.no_grad():
        expected = model(ids).logits
        for bits in (8, 4, 2):
            cache = StaircaseCache(model.config, (bits,), residual_length=4, group=4)
            first = model(ids[:, :30], past_key_values=cache).logits
            torch.testing.assert_close(first, expected[:, :30])
            second = model(ids[:, 30:], past_key_values=cache).logits
            errors[bits] = (second - expected[:, 30:]).norm() / expected[:, 30:].norm()
    assert 0 < errors[8] < errors[4] < errors[2]
    assert errors[8] < errors[2] / 10 < 0.1


def test_which_layers_are_staircases():
    config = tiny("gemma3 softcap", **SLIDING).config
    kinds = [type(layer) for layer in StaircaseCache(config, residual_length=4).layers]
    assert kinds == [StaircaseSlidingLayer, StaircaseLayer]
    kinds = [type(layer) for layer in StaircaseCache(config, residual_length=11).layers]
    assert kinds == [DynamicSlidingWindowLayer, StaircaseLayer]  # the window is no longer than the exact residual


def test_layers_without_attention_stay():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(**sizes, vocab_size=V, layer_types=["conv", "full_attention"], num_hidden_layers=2)
    cache, dense = StaircaseCache(config, (16,), residual_length=4), DynamicCache(config=config)
    assert type(cache.layers[0]) is type(dense.layers[0])
    model, ids = Lfm2ForCausalLM(config).eval(), prompt("greedy")
    assert torch.equal(generated(model, ids, cache, do_sample=False), generated(model, ids, dense, do_sample=False))
    attention = sum(tensor.nbytes for tensor in cache.layers[1].tensors())
    states = cache.layers[0].conv_states  # one tensor before transformers had several of a layer
    states = states.values() if isinstance(states, dict) else [states]
    assert cache.nbytes - attention == sum(x.nbytes for x in states) > 0


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt lookup"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_a_decoder(kind, mode):
    """BART with more decoder than encoder layers (no T5 of transformers has them); what is encoded stays exact."""
    special = {"decoder_start_token_id": 2, "pad_token_id": 0, "vocab_size": V}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, **special, dropout_rate=0)).eval()
    else:
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 16, **heads}
        model = BartForConditionalGeneration(BartConfig(**sizes, **special, forced_eos_token_id=None)).eval()
    ids, outputs = prompt(mode), []
    for own in (DynamicCache(config=model.config), StaircaseCache(model.config, (16,), residual_length=4)):
        both = EncoderDecoderCache(own, DynamicCache(config=model.config))
        outputs.append(generated(model, ids, both, **MODES[mode]))
    assert torch.equal(*outputs)
    assert own.get_seq_length() == outputs[0].shape[1] - 1
    assert own.nbytes > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (2, 4)}, r"bits=\(2, 4\) grow with age"),
        ({"bits": (8, 3)}, r"bits=\(8, 3\): give one or more of \(16, 8, 4, 2, 1\)"),
        ({"bits": ()}, r"bits=\(\): give"),
        ({"bits": (8.0,)}, r"bits=\(8.0,\): give"),
        ({"bits": 3}, r"bits=\(3,\): give"),
        ({"bits": "84"}, r"bits=\('8', '4'\): give"),
        ({"residual_length": 0}, "residual_length=0: give a whole number"),
        ({"group": 0}, "group=0: give a whole number"),
        ({"group": 2.5}, "group=2.5: give a whole number"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        StaircaseCache(LlamaConfig(num_hidden_layers=1), **options)


def refused(config, kind, message):
    with pytest.raises(kind, match=f"^{message}[^\n]*$"):
        StaircaseCache(config)


def test_configurations_are_checked():
    refused("llama", TypeError, "config is a str: give the model's configuration")
    refused(PreTrainedConfig(), ValueError, "config of PreTrainedConfig: transformers has no cache for it")
    refused(
        MambaConfig(num_hidden_layers=2), ValueError, "config of MambaConfig: none of its layers is attention alone"
    )
    refused(
        MistralConfig(num_hidden_layers=2, sliding_window=32),
        ValueError,
        "config of MistralConfig: .*residual_length=64 ",
    )
    schedule = Schedule((8, 4), 4, 4)
    with pytest.raises(AttributeError, match="give them to update"):
        StaircaseLayer(schedule).keys = torch.zeros(1)
