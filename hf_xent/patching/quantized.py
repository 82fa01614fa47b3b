"""Quantized heads: how the rows of a weight that is stored in few bits are read, a panel at a time.

    bitsandbytes 4 bits    rows = code[data] absmax, absmax itself of 8 bits with double quantization
    bitsandbytes 8 bits    rows = data scale / 127: LLM.int8 also quantizes hidden states in its forward on a GPU and in
                           evaluation, but neither in its backward nor when it trains on a CPU; the loss is that of the
                           dequantized weight, whose gradient it is
    torchao                rows = weight[rows].dequantize(); one that quantizes hidden states has no gradient: refused

A layer is recognized by what its weight has, so nothing is imported before there is such a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.panels import Stored


def stored_weight(layer: Any) -> Stored | None:
    """The weight of a quantized linear layer, to be read by rows; None if the layer is not one of those known here.

    Raises:
        ValueError: The layer's library is not installed, or its products are not those of a dequantized weight.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or weight is None:
        return None
    if type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{_name(layer)} whose weight was packed for inference on a CPU, which no rows are read from: load the"
                " model again, and patch it before it is evaluated"
            )
        return FourBits(weight, weight.quant_state, _bitsandbytes(layer))
    if type(weight).__name__ == "Int8Params":
        state: Any = layer.state
        codes, scales = (
            next((x for x in (getattr(weight, name, None), getattr(state, name, None)) if x is not None), None)
            for name in ("CB", "SCB")
        )
        return None if codes is None or scales is None else EightBits(codes, scales)
    if type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize"):
        return _of_torchao(layer, weight)
    return None


def is_stored(layer: Any) -> bool:
    """Whether a linear layer has a forward of its own because its weight is one of bitsandbytes."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__name__ in ("Params4bit", "Int8Params")


def packed_by(layer: Any) -> str:
    """The method by which a layer's weight is packed in a way that is not read here; empty if it is none known."""
    if not hasattr(layer, "qweight"):  # of the layers of gptqmodel, auto_gptq and autoawq
        return ""
    origin = f"{type(layer).__module__}.{type(layer).__name__}".lower()
    return next(
        (name for name in ("GPTQ", "AWQ") if name.lower() in origin), "GPTQ" if hasattr(layer, "g_idx") else "AWQ"
    )


def compute_dtype(layer: Any, hidden: Tensor) -> torch.dtype:
    """The dtype in which a quantized layer multiplies its input; of 4 bits, it chooses this at its first call."""
    if hasattr(layer, "compute_type_is_set"):
        if not layer.compute_type_is_set:
            layer.set_compute_type(hidden)
            layer.compute_type_is_set = True
        if layer.compute_dtype is not None:
            return layer.compute_dtype
    return hidden.dtype


@dataclass(frozen=True, eq=False)
class FourBits:
    """A weight of bitsandbytes in 4 bits: two numbers a byte, by rows, in blocks with a scale each."""

    data: Tensor  # bytes [V D / 2, 1]
    state: Any  # bitsandbytes.functional.QuantState
    functional: ModuleType  # bitsandbytes.functional

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        return torch.Size(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that was quantized."""
        return self.state.dtype

    @property
    def device(self) -> torch.device:
        """The device of the bytes."""
        return self.data.device

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` on: the blocks that hold them are dequantized."""
        width, size = self.shape[1], self.state.blocksize
        unit = math.lcm(size, 2)
        low, high = start * width // unit * unit, min(-(-stop * width // unit) * unit, self.shape.numel())
        state = self.functional.QuantState(
            absmax=self._scales(low // size, -(-high // size)), shape=torch.Size((1, high - low)), code=self.state.code,
            blocksize=size, quant_type=self.state.quant_type, dtype=self.state.dtype,
        )  # fmt: skip
        codes = self.data.detach().reshape(-1, 1)[low // 2 : -(-high // 2)]
        numbers = self.functional.dequantize_4bit(codes, state).reshape(-1)
        return numbers[start * width - low : stop * width - low].view(stop - start, width)

    def _scales(self, start: int, stop: int) -> Tensor:
        """The scales of some blocks, float32; with double quantization they are in blocks themselves."""
        if not self.state.nested:
            return self.state.absmax[start:stop]
        outer = self.state.state2
        low = start // outer.blocksize
        part = self.functional.QuantState(
            absmax=outer.absmax[low : -(-stop // outer.blocksize)], code=outer.code, blocksize=outer.blocksize,
            dtype=outer.dtype,
        )  # fmt: skip
        codes = self.state.absmax[low * outer.blocksize : stop]
        scales = self.functional.dequantize_blockwise(codes, part) + self.state.offset
        return scales.float()[start - low * outer.blocksize :]

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return self.data.detach(), self.state.absmax


@dataclass(frozen=True, eq=False)
class EightBits:
    """A weight of bitsandbytes in 8 bits: integers in [-127, 127], and the largest absolute value of each row."""

    data: Tensor  # [V, D], int8
    scale: Tensor  # [V], float32
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """The device of the integers."""
        return self.data.device

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` on, in float32."""
        scale = self.scale[start:stop, None] * (1.0 / 127.0)
        return self.data.detach()[start:stop].to(torch.float32).mul_(scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Integers and scales."""
        return self.data.detach(), self.scale


@dataclass(frozen=True, eq=False)
class Dequantizable:
    """A weight of a tensor class that can be sliced by rows and dequantized, as those of torchao."""

    weight: Any  # [V, D]

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that was quantized."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.weight.device

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` on."""
        with torch.no_grad():
            return self.weight[start:stop].dequantize()

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        names = getattr(self.weight, "tensor_data_names", ())
        return tuple(x for name in names if type(x := getattr(self.weight, name)) is Tensor)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that its class names as its data."""
        return self._parts


def _of_torchao(layer: Any, weight: Any) -> Dequantizable:
    """A weight of torchao. Raises: ValueError if the layer quantizes its input, or rows cannot be read."""
    name = f"{_name(layer)} of torchao's {type(weight).__name__}"
    if getattr(weight, "act_quant_kwargs", None) is not None:
        raise ValueError(
            f"{name} quantizes hidden states too, so that its logits have no gradient: quantize its weight only"
            " (Int8WeightOnlyConfig), or leave the head out of the quantization"
        )
    stored = Dequantizable(weight)
    try:
        readable = stored.rows(0, 1).shape == (1, weight.shape[1])
    except Exception as error:  # of any kind: each packing has its own
        raise ValueError(
            f"{name} cannot be read by rows ({type(error).__name__}): leave the head out of the quantization"
        ) from error
    assert readable, weight
    return stored


def _bitsandbytes(layer: Any) -> ModuleType:
    """`bitsandbytes.functional`. Raises: ValueError that says what to install."""
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ValueError(f"{_name(layer)}, which needs bitsandbytes: pip install bitsandbytes") from error


def _name(layer: Any) -> str:
    """How messages call a layer."""
    return f"the head is a {type(layer).__name__}"
