"""Quantized heads: their rows are those of the whole dequantized weight, and the loss is that of the stock layer.

bitsandbytes on the CPU, and torchao if it is installed. No float copy of the weight is made, and no logits.
"""

import peft
import pytest
import torch
from torch import nn

from hf_xent.ops import panels as reading
from hf_xent.patching import patch, patch_state
from hf_xent.patching.quantized import stored_weight
from support.models import assert_same_gradients, batch, gradients, tiny

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
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    del IntxWeightOnlyConfig
    return of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))(**sizes)


LAYERS = {
    "nf4": lambda **s: four_bits("nf4", False, **s),
    "nf4, double quantization": lambda **s: four_bits("nf4", True, **s),
    "fp4": lambda **s: four_bits("fp4", False, **s),
    "fp4, double quantization": lambda **s: four_bits("fp4", True, **s),
    "LLM.int8": eight_bits,
    "torchao int8": lambda **s: of_torchao("Int8WeightOnlyConfig")(**s),
    "torchao int4": lambda **s: (pytest.importorskip("torchao", reason="pip install torchao"), integers(**s))[1],
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
        torch.testing.assert_close(stored.rows(start, stop).to(whole.dtype), whole[start:stop])
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
    model = tiny(hidden_size=D, head_dim=16, vocab_size=V + 1).to(dtype)  # ids of the tests are below 97
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
