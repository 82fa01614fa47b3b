"""`plan`: the peak memory of a training step by component, and the largest batch that fits a GPU."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..models.anatomy import check_room
from . import shapes
from .contestants import CONTESTANTS, HeadShape, Held
from .settings import Settings, gpu_bytes
from .trace import ACTIVATIONS, AFTER, BEFORE, GRADIENTS, LOGITS, Trace, trace

STOCK = "stock"
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits")
SOURCE = (
    "Estimated from the configuration: every tensor of the model's own forward and backward is counted on fake tensors."
    " Left out: fragmentation, the CUDA context, workspaces of kernels."
)
MOST = 1 << 24  # sequences


@dataclass(frozen=True)
class Peak:
    """The memory of one contestant where the step takes the most, bytes by component."""

    name: str
    moment: str  # in which part of the step
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float  # and the loss
    largest_tokens: int | None = None  # tokens of the largest batch that fits the GPU; None without a GPU

    @property
    def total(self) -> float:
        """The sum of the components, bytes."""
        return sum(getattr(self, name) for name in COMPONENTS)


@dataclass(frozen=True)
class Plan:
    """The memory of a training step of a model, for each contestant."""

    model: str
    settings: Settings
    parameters: int
    trained: int  # parameters that have gradients
    sequence_length: int
    sequences: float  # of a forward pass on one device
    gpu_bytes: int | None  # of memory that can be used
    peaks: tuple[Peak, ...]
    source: str = SOURCE

    def __getitem__(self, name: str) -> Peak:
        return {peak.name: peak for peak in self.peaks}[name]

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, bytes."""
        options = {k: v for k, v in asdict(self.settings).items() if k != "model"}
        peaks = [{**asdict(peak), "total": peak.total} for peak in self.peaks]
        numbers = {name: getattr(self, name) for name in ("parameters", "trained", "sequence_length", "sequences")}
        return {
            "model": self.model,
            "settings": options,
            **numbers,
            "gpu_bytes": self.gpu_bytes,
            "peaks": peaks,
            "source": self.source,
        }


@dataclass(frozen=True)
class _Account:
    """What a step of a model holds, as a function of the batch size."""

    settings: Settings
    trace: Trace
    head: HeadShape
    length: int
    weights: float
    gradients: float  # all of them
    state: float
    step: float  # what the optimizer's step takes beside it
    unit: float  # the largest part that is gathered at a time
    dequantized: float  # the largest 4-bit weight in the dtype of products

    def peak(self, name: str, batch: float) -> Peak:
        """The moment at which a contestant holds the most."""
        moments = self._of_stock(batch) if name == STOCK else self._of(CONTESTANTS[name], batch)
        moments["optimizer step"] = (self.gradients, self.step, 0.0)
        peaks = [self._divided(name, moment, *numbers) for moment, numbers in moments.items()]
        return max(peaks, key=lambda peak: peak.total)

    def _of_stock(self, batch: float) -> dict[str, tuple[float, float, float]]:
        alive, part = self.trace.alive(batch), self.trace.part
        regions = {"forward": part == BEFORE, "backward": part == AFTER}
        regions["head"] = ~(regions["forward"] | regions["backward"])
        return {name: _highest(alive[region]) for name, region in regions.items()}

    def _of(self, contestant: Any, batch: float) -> dict[str, tuple[float, float, float]]:
        """The trace without the logits, and in their place what the contestant holds."""
        held: Held = contestant(self.head, batch * self.length, self.settings)
        alive, part = self.trace.alive(batch), self.trace.part
        alive[:, LOGITS] = 0
        gradients, activations, _ = map(float, alive[part == BEFORE][-1])
        hidden = self.head.hidden(batch * self.length)
        weight = self.head.weight if self.head.trained else 0
        early = held.early * (hidden + weight)
        return {
            "forward": _highest(alive[part == BEFORE]),
            "head": (gradients, activations, held.forward + early),
            "head backward": (gradients, activations, held.backward + hidden + weight),
            "backward": _highest(alive[part == AFTER]),
        }

    def _divided(self, name: str, moment: str, gradients: float, activations: float, logits: float) -> Peak:
        """The peak on one device, which may hold a part of weights, gradients and state."""
        stage, devices, weights, state = self.settings.zero_stage, self.settings.devices, self.weights, self.state
        if stage >= 1:
            state /= devices
        if stage >= 2:
            gradients = gradients / devices + self.unit * (gradients > 0)
        elif devices > 1:
            gradients += self.gradients  # the buckets of DDP
        if stage == 3:  # one part is used while the next is gathered
            weights = weights / devices + 2 * self.unit
        return Peak(name, moment, weights, gradients, state, activations + self.dequantized, logits)

    def largest(self, name: str, room: int) -> int:
        """The most sequences that fit, 0 if one does not."""
        low, high = 0, MOST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(name, middle).total <= room else (low, middle)
        return low


def plan(model: Any, tokens: int = 8192, **options: Any) -> Plan:
    """The peak memory of a training step, from a model's configuration alone.

    Every architecture works, since its own code runs, on tensors without numbers. A step is a forward and a backward of
    `tokens` tokens and the optimizer's step, with the optimizer's state in memory from the step before.

    Args:
        model: A packaged model's name, a path or Hub id, a configuration of transformers, or a config.json as a dict.
        tokens: Tokens of a forward pass on one device.
        **options: Further fields of `Settings`: dtype, optimizer, peft, gpu, ...

    Returns:
        The peaks of the stock step, of its peers and of this package.

    Raises:
        ValueError: An option is out of its range, or the model has no configuration or no head of tokens.
    """
    settings = Settings(model, tokens, **options).checked()
    config = shapes.config_of(model)
    account, numbers = _account(config, settings)
    batch, room = tokens / account.length, gpu_bytes(settings.gpu)
    peaks = []
    for name in (STOCK, *CONTESTANTS):
        peak = account.peak(name, batch)
        most = None if room is None else account.largest(name, room) * account.length
        peaks.append(Peak(**{**asdict(peak), "largest_tokens": most}))
    shown = model if isinstance(model, str) else config.model_type
    return Plan(shown, settings, *numbers, account.length, batch, room, tuple(peaks))


def _account(config: Any, settings: Settings) -> tuple[_Account, tuple[int, int]]:
    """The account of a step, and the numbers of all parameters and of those trained."""
    length = settings.sequence_length or _length(config, settings.tokens)
    model = shapes.build(config, settings)
    check_room(model, length, "sequence_length")
    weight, dtype = model.get_output_embeddings().weight, getattr(torch, settings.dtype)
    state, step = shapes.optimizer_bytes(model, settings.optimizer)
    numbers = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in shapes.trained(model))
    stored = [p.numel() for p in shapes.frozen_linear(model)] if settings.four_bit else []
    of_model = {
        "head": HeadShape(len(weight), weight.shape[1], dtype.itemsize, weight.requires_grad),
        "weights": shapes.weight_bytes(model, four_bit=settings.four_bit),
        "gradients": shapes.gradient_bytes(model),
        "state": state,
        "step": step,
        "unit": shapes.largest_unit(model) if settings.zero_stage > 1 else 0,
        "dequantized": max(stored, default=0) * dtype.itemsize,
    }
    steps = trace(
        model,
        length,
        on_cpu=settings.device == "cpu",
        autocast=dtype if settings.mixed_precision else None,
        accumulate=settings.accumulation > 1,
    )
    return _Account(settings, steps, length=length, **of_model), numbers


def _length(config: Any, tokens: int) -> int:
    """2048 tokens, or fewer where the model or the batch has fewer."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(2048, tokens, limit if isinstance(limit, int) else math.inf)  # type: ignore[return-value]


def _highest(alive: Any) -> tuple[float, float, float]:
    """Gradients, activations and logits where their sum is largest."""
    if not len(alive):
        return 0.0, 0.0, 0.0
    row = np.maximum(alive[alive.sum(1).argmax()], 0)  # a batch below those that were run may come out negative
    return float(row[GRADIENTS]), float(row[ACTIVATIONS]), float(row[LOGITS])
