"""Quantized heads: their rows are those of the whole dequantized weight, and the loss is that of the stock layer.

bitsandbytes on the CPU, and torchao if it is installed. No float copy of the weight is made, and no logits.
"""

import sys

import peft
import pytest
import torch
from torch import nn

from hf_xent.ops import panels as reading
from hf_xent.patching import compare, patch, patch_state
from hf_xent.patching.quantized import stored_weight
from support.models import assert_same_gradients, batch, gradients, tiny
from support.oracle import Allocations, peak_bytes

V, D = 96, 64
bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


def plain(vocabulary=V, features=D, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Linear(features, vocabulary, bias=False, dtype=dtype).requires_grad_(False)


def four_bits(kind="nf4", double=True, compute=torch.float32, **sizes):
    weight = plain(**sizes).weight
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=compute, quant_type=kind, compress_statistics=double
    )
    options = {"requires_grad": False, "quant_type": kind, "compress_statistics": double}
    layer.weight = bnb.nn.Params4bit(weight.detach(), **options).to("cpu")
    return layer.to("cpu")


def eight_bits(**sizes):
    weight = plain(**sizes).weight
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.detach(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.weight.requires_grad_(False)
    return layer


def of_torchao(config, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")

    def build(**sizes):
        layer = plain(**sizes)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        return layer

    return build


def integers(**sizes):
    granularity = pytest.importorskip("torchao.quantization.granularity", reason="pip install torchao").PerGroup(32)
    return of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity)(**sizes)


LAYERS = {
    "nf4": lambda **s: four_bits("nf4", False, **s),
    "nf4, double quantization": lambda **s: four_bits("nf4", True, **s),
    "fp4": lambda **s: four_bits("fp4", False, **s),
    "fp4, double quantization": lambda **s: four_bits("fp4", True, **s),
    "LLM.int8": eight_bits,
    "torchao int8": lambda **s: of_torchao("Int8WeightOnlyConfig")(**s),
    "torchao int4": integers,
    "torchao float8": lambda **s: of_torchao("Float8WeightOnlyConfig")(**s),
}


def dequantized(layer):
    """The whole weight by the library's own function."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        return bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
    return weight.dequantize()


@pytest.mark.parametrize("name", LAYERS)
def test_rows(name):
    """Every slice of rows is that of the whole."""
    layer = LAYERS[name]()
    stored, whole = stored_weight(layer), dequantized(layer)
    assert stored.shape == whole.shape == (V, D) and stored.device.type == "cpu"
    for start, stop in ((0, V), (0, 1), (5, 5), (7, 24), (V - 1, V), (33, 80)):
        rows = reading.Panels.of(stored).rows(slice(start, stop))
        torch.testing.assert_close(rows.to(whole.dtype), whole[start:stop])
    torch.testing.assert_close(reading.Panels.of(stored)[torch.tensor([5, 90, 5])], whole[[5, 90, 5]])
    assert all(type(x) is torch.Tensor for x in stored.tensors()) and stored.tensors()


@pytest.mark.parametrize("shape", [(33, 40), (1000, 24), (7, 3), (600, 72)])
@pytest.mark.parametrize("double", [False, True])
def test_rows_that_cut_blocks(shape, double):
    """Rows of 4 bits whose width is no multiple of a block, with blocks of blocks."""
    layer = four_bits("nf4", double, vocabulary=shape[0], features=shape[1])
    stored, whole = stored_weight(layer), dequantized(layer)
    for start in range(0, shape[0], max(1, shape[0] // 11)):
        stop = min(start + 5, shape[0])
        assert torch.equal(stored.rows(start, stop), whole[start:stop])


def model_with(layer, dtype=torch.float32):
    """A tiny model with such a head, whose other parameters train."""
    size = getattr(layer, "out_features", V + 1)  # ids of the tests are below 97
    model = tiny(hidden_size=D, head_dim=16, vocab_size=size).to(dtype)
    model.lm_head = layer
    return model.train()


def run(model):
    ids, labels = batch()
    torch.manual_seed(0)
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    return out.loss.detach(), gradients(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on merging
@pytest.mark.parametrize("adapter", [None, "LoRA", "DoRA"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_streams_what_the_stock_layer_computes(name, adapter):
    if adapter and name.startswith("torchao"):
        pytest.skip("PEFT's layers for torchao need its own quantization configuration")

    def build():
        model = model_with(LAYERS[name](vocabulary=V + 1))
        if adapter is None:
            return model
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, use_dora=adapter == "DoRA")
        torch.manual_seed(5)
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        return model.train()

    loss, expected = run(build())
    model = patch(build(), memory_budget=2 * 4 * V)
    found_loss, found = run(model)
    torch.testing.assert_close(found_loss, loss)
    assert_same_gradients(found, expected)
    state = patch_state(model)
    assert (state.streamed, state.materialized, state.bypassed) == (1, 0, 0)


@pytest.mark.parametrize("name", ["nf4, double quantization", "LLM.int8"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_16_bits_are_no_worse_than_stock(name, how):
    """The products of the stock layer in bfloat16, or in the float32 that its 4 bits are computed in under autocast."""
    compute = {"compute": torch.bfloat16} if how == "bfloat16" and name != "LLM.int8" else {}
    layer = lambda: LAYERS[name](vocabulary=V + 1, **compute)  # noqa: E731

    def losses(change, dtype=torch.float32, autocast=False):
        model = change(model_with(layer(), torch.bfloat16).to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = run(model)
        assert getattr(patch_state(model) if change is patch else None, "materialized", 0) == 0
        return found

    keep = lambda model: model  # noqa: E731
    options = {"dtype": torch.bfloat16} if how == "bfloat16" else {"autocast": True}
    truth, true_grads = losses(keep)
    (stock, stock_grads), (ours, our_grads) = losses(keep, **options), losses(patch, **options)
    assert abs(ours - truth) <= 2 * abs(stock - truth) + 2e-3
    for key, true in true_grads.items():
        errors = [(g[key].double() - true.double()).norm() for g in (our_grads, stock_grads)]
        assert errors[0] <= 2 * errors[1] + 1e-2 * true.double().norm(), key


def test_int8_evaluation_quantizes_hidden_states_as_well():
    """What LLM.int8 computes then is near, but another function; streamed is the loss of the dequantized weight."""
    model = model_with(eight_bits(vocabulary=V + 1)).eval()
    weight = dequantized(model.lm_head)
    ids, labels = batch()
    stock = model(input_ids=ids, labels=labels).loss
    ours = patch(model)(input_ids=ids, labels=labels).loss
    whole = model_with(nn.Linear(D, V + 1, bias=False)).eval()
    whole.lm_head.weight.data = weight
    exact = whole(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(ours, exact)
    assert 0 < abs(stock - exact) < 1e-2 * exact


@pytest.mark.parametrize("loss", ["focal", "emo"])
def test_other_losses(loss):
    """EMO's unit embeddings are read by panels, too."""
    found = []
    for layer in (four_bits(vocabulary=V + 1), None):
        model = model_with(plain(V + 1) if layer is None else layer)
        if layer is None:
            model.lm_head.weight.data = dequantized(four_bits(vocabulary=V + 1))
        found.append(run(patch(model, loss=loss)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def test_compare_of_a_quantized_model():
    model = model_with(four_bits(vocabulary=V + 1)).eval()
    found = compare(model)
    assert found.equal and found.lean and (found.vocabulary, found.hidden, found.dtype) == (V + 1, D, "float32")


def test_no_float_copy_and_no_logits(monkeypatch):
    """Of a larger head there are panels, a few rows of logits, and nothing else; the peak is a part of the stock's."""
    monkeypatch.setattr(reading, "PANEL_BYTES", 4 * D * 64)
    size = 8192

    def build():
        model = model_with(four_bits(vocabulary=size))
        model.model.embed_tokens.requires_grad_(False)
        return model

    stock_model, model = build(), patch(build(), memory_budget=8 * 4 * size)
    with Allocations() as made:
        run(model)
    larger = {shape for shape in made.shapes if torch.Size(shape).numel() > 8 * size}
    assert not larger, "eight rows of logits, or less; a float copy would have 64"
    stock, ours = peak_bytes(lambda: run(stock_model)), peak_bytes(lambda: run(model))
    assert ours < stock / 3, (ours, stock)


def test_refusals_name_the_head_and_the_remedy(monkeypatch):
    """One line each: an unknown packing, a missing library, what has no gradient."""

    class GPTQLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.qweight, self.g_idx = torch.zeros(1), torch.zeros(1)

    class WQLinear_AWQ(nn.Module):
        qweight = torch.zeros(1)

    for kind, name in ((GPTQLinear, "GPTQ"), (WQLinear_AWQ, "AWQ")):
        with pytest.raises(ValueError, match=f"whose head is a {kind.__name__} of {name}: leave the head out of the"):
            patch(model_with(kind()))
    model = model_with(four_bits(vocabulary=V + 1))
    model.lm_head.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"head is a Linear4bit whose weight was packed for inference.*load the model"):
        patch(model)
    model = model_with(four_bits(vocabulary=V + 1))
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"model is a LlamaForCausalLM: the head is a Linear4bit.*pip install bits"):
        patch(model)


def test_a_head_of_torchao_that_quantizes_hidden_states_is_refused():
    """The stock layer's output has no gradient at all."""
    layer = of_torchao("Int8DynamicActivationInt8WeightConfig")(vocabulary=V + 1)
    assert not layer(torch.randn(3, D, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match=r"Int8Tensor quantizes hidden states too.*quantize its weight only"):
        patch(model_with(layer))
