"""Noise-augmented fine-tuning (NoiseFiT): cross-entropy, and agreement between clean and noisy passes.

    loss = alpha CE(p) + (1 - alpha) 1/2 sum_i KL(p_T || p_i) + lambda KL(p_2 || p_1)

p is the softmax of a clean pass (p_T at temperature T), p_1 and p_2 those of passes with noise on the outputs of a few
layers. Per element of a layer's output h, the noise is Gaussian with standard deviation

    s . mad . exp(-beta |h - med| / mad) . exp(min(var / mean var, log 5))      s = sigma^power std(h)

(median, median deviation and variance over the features of a token; std and mean over all tokens that are no padding;
no gradient). The layers are chosen once, on the first batch, by their signal-to-noise ratio under s = sigma std(h).

Clean and noisy passes are the thirds of one batch: one forward and one backward, as DDP and activation checkpointing
want them. Only the selected layers' outputs in the last two thirds get noise, and only within a training step. All
divergences are statistics of hidden states under one head (`vocab_stats` with a payload); no logits are kept.

Where the authors' code and paper leave a choice: `sigma_power` is 2, since the code applies sigma twice when training
(and once when measuring layers); the masks of the divergences are shifted to the predicted tokens, where the code uses
the unshifted ones; `version="v2"` is their later script (teacher and second pass detached, temperature on both sides
with a factor T^2; its lambda is 0.05). `method="rdrop"` trains R-Drop in the same trainer (two passes, no noise):
CE_1 / 2 + CE_2 / 2 + rdrop_weight (KL(1 || 2) + KL(2 || 1)) / 2. NEFTune is transformers' own
`neftune_noise_alpha=5` on any trainer. With sigma 0 and no dropout the loss is alpha CE.

Source: Khadangi et al. 2025, arXiv:2504.03302, with the authors' code, github.com/akhadangi/NoiseFiT; R-Drop: Liang et
al. 2021, arXiv:2106.14448.
Data: as for `XentTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import next_token_labels
from ..losses import CrossEntropy
from ..ops import Payload, vocab_stats
from ..patching import lazily, seam_of
from .xent import XentConfig, XentTrainer

BETA = 0.1  # how fast the noise of a feature falls with its distance from the token's median
LARGEST_FACTOR = 5.0
PASSES = 10  # noise drawings a layer's signal-to-noise ratio is a mean over


@dataclass
class NoiseFiTConfig(XentConfig):
    """`XentConfig` and the options of NoiseFiT; the defaults are those of the authors' first script."""

    method: str = field(default="noisefit", metadata={"help": "'noisefit', or its baseline 'rdrop'."})
    noise_std: float = field(default=0.1, metadata={"help": "sigma; 0 is a control with clean passes only."})
    sigma_power: int = field(default=2, metadata={"help": "2 as in the authors' code, or 1."})
    noise_layers: str = field(
        default="largest",
        metadata={"help": "'largest' or 'lowest' signal-to-noise ratio, or layers by number: '0,3,5'."},
    )
    num_noise_layers: int = field(default=3, metadata={"help": "How many layers get noise, where they are not given."})
    ce_weight: float = field(default=0.5, metadata={"help": "alpha."})
    consistency_weight: float = field(default=0.1, metadata={"help": "lambda; 0.05 in version v2."})
    temperature: float = field(default=1.0, metadata={"help": "T."})
    version: str = field(default="v1", metadata={"help": "'v1' as the paper, 'v2' as the authors' later script."})
    rdrop_weight: float = field(default=1.0, metadata={"help": "Of the symmetric divergence, under method 'rdrop'."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in {"method": ("noisefit", "rdrop"), "version": ("v1", "v2"), "sigma_power": (1, 2)}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {choices[0]!r} or {choices[1]!r}")
        if self.noise_std < 0 or not 0 <= self.ce_weight <= 1 or self.temperature <= 0:
            raise ValueError(
                f"noise_std is {self.noise_std}, ce_weight {self.ce_weight}, temperature {self.temperature}: choose"
                " noise_std >= 0, ce_weight in [0, 1] and temperature > 0"
            )


class NoiseFiTTrainer(XentTrainer):
    """Fine-tunes a causal LM under NoiseFiT's hybrid loss; see the module's docstring.

    Takes what `XentTrainer` takes, under plain cross-entropy. Evaluation is plain cross-entropy, without noise. The
    chosen layers are in `noise_layers` and in the log.

    Raises: ValueError for options that do not fit, or a model whose layers cannot be found.
    """

    config_class = NoiseFiTConfig
    args: NoiseFiTConfig

    def __init__(self, model: Any, args: NoiseFiTConfig | None = None, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        if self.objective != CrossEntropy():
            raise ValueError(f"loss is {self.objective!r}: NoiseFiT is built on plain cross-entropy, pass no loss")
        self.noise_layers: list[int] | None = None if self.args.method == "noisefit" else []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step with noise on the chosen layers, from forward to the end of backward (which may compute it again)."""
        if self.noise_layers is None:
            self.noise_layers = self._choose_layers(model, self._prepare_inputs(dict(inputs)))
            self.log({f"noise_layer_{i}": float(layer) for i, layer in enumerate(self.noise_layers)})
        with _noisy(self.model, self.noise_layers, self.args, inputs.get("attention_mask")):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The hybrid loss in training, plain cross-entropy in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        copies = 2 if self.args.method == "rdrop" else 3
        tensors = {name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")}
        with lazily(model):
            output = model(**{name: torch.cat([x] * copies) for name, x in tensors.items()})
        labels = inputs.get("shift_labels")
        labels = next_token_labels(inputs["labels"]) if labels is None else labels
        logits = output.logits
        passes = [(hidden, logits.head) for hidden in logits.hidden.chunk(copies)]
        loss = self._hybrid(passes, labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as Trainer does: DDP averages what counts all ranks' tokens
        return (loss, output) if return_outputs else loss

    def _hybrid(self, passes: list[Payload], labels: Tensor, num_items: Tensor | None) -> Tensor:
        args, seam = self.args, seam_of(self.model)
        tokens = (labels != -100).sum().clamp(min=1) if num_items is None else num_items.to(labels.device)

        def entropy(part: Payload, observe: tuple[str, ...] = ()) -> Tensor:
            found, stats = CrossEntropy().compute(*part, labels, num_items=tokens, observe=observe, **seam.options)
            if observe:
                seam.record(stats)
            return found

        def between(p: Payload, q: Payload) -> Tensor:
            return divergence(p, q, labels, **seam.options).sum() / tokens

        if args.method == "rdrop":
            first, second = passes
            both = (entropy(first, seam.observe) + entropy(second)) / 2
            return both + args.rdrop_weight * (between(first, second) + between(second, first)) / 2
        clean, first, second = passes
        teacher, students, other, factor = tempered(clean, args.temperature), [first, second], second, 1.0
        if args.version == "v2":
            teacher, other, factor = detached(teacher), detached(second), args.temperature**2
            students = [tempered(student, args.temperature) for student in students]
        loss = args.ce_weight * entropy(clean, seam.observe)
        if args.ce_weight < 1:
            loss = loss + (1 - args.ce_weight) * factor * sum(between(teacher, student) for student in students) / 2
        if args.consistency_weight:
            loss = loss + args.consistency_weight * between(other, first)
        return loss

    @torch.no_grad()
    def _choose_layers(self, model: nn.Module, inputs: dict[str, Any]) -> list[int]:
        """The layers to disturb, ascending: given, or by the signal-to-noise ratio of one batch in evaluation mode."""
        args, layers = self.args, layers_of(self.model)
        if args.noise_layers not in ("largest", "lowest"):
            try:
                chosen = sorted({int(number) for number in args.noise_layers.split(",")})
            except ValueError:
                chosen = [-1]
            if not all(0 <= layer < len(layers) for layer in chosen):
                raise ValueError(
                    f"noise_layers is {args.noise_layers!r}: choose 'largest', 'lowest' or numbers below"
                    f" {len(layers)}, separated by commas"
                )
            return chosen
        if not 1 <= args.num_noise_layers <= len(layers):
            raise ValueError(f"num_noise_layers is {args.num_noise_layers}: the model has {len(layers)} layers")
        ratios: dict[int, float] = {}

        def measure(index: int, output: Any) -> None:
            h, mask = _first(output), inputs.get("attention_mask")
            keep = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask.bool()
            scale = noise_scale(h, args.noise_std or 1.0, mask)
            noise = torch.stack([(torch.randn_like(scale) * scale).abs()[keep].mean() for _ in range(PASSES)]).mean()
            ratios[index] = float(h.float().abs()[keep].mean() / (noise + 1e-6))

        handles = [
            layer.register_forward_hook(lambda _, __, output, index=index: measure(index, output))
            for index, layer in enumerate(layers)
        ]
        training = model.training
        try:
            model.eval()
            model(**{name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")})
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        ordered = sorted(ratios, key=ratios.__getitem__, reverse=args.noise_layers == "largest")
        return sorted(ordered[: args.num_noise_layers])


def divergence(p: Payload, q: Payload, labels: Tensor, **options: Any) -> Tensor:
    """KL(softmax of p's logits || softmax of q's) in the shape of labels, nats, 0 at ignored positions; no logits.

        KL = lse_q - H_p - sum_j p_j z_qj

    `p` and `q` are (hidden [..., D], head) over one vocabulary, differentiated both; options as `vocab_stats`.
    """
    mine = vocab_stats(*p, labels, outputs=("entropy", "payload"), payload=q, **options)
    return vocab_stats(*q, labels, outputs=("lse",), **options).lse - mine.entropy - mine.payload


def tempered(part: Payload, temperature: float) -> Payload:
    """The same pass with its logits divided by a temperature."""
    hidden, head = part
    if temperature == 1:
        return part
    softcap = None if head.softcap is None else head.softcap / temperature
    return hidden, replace(head, scale=head.scale / temperature, softcap=softcap)


def detached(part: Payload) -> Payload:
    """The same pass without its graph."""
    hidden, head = part
    bias, adapter = (None if x is None else x.detach() for x in (head.bias, head.adapter))
    return hidden.detach(), replace(head, weight=head.weight.detach(), bias=bias, adapter=adapter)


@torch.no_grad()
def noise_scale(h: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    """The standard deviation of the noise on every element of h [B, T, H]; `mask` [B, T] is 0 at padding.

    Medians are torch's: of an even number of elements the lower one of the two in the middle.
    """
    h = h.float()
    keep = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask.bool()
    variance = h.var(-1, keepdim=True)
    uneven = variance / (variance[keep].mean() + 1e-6)
    median = h.median(-1, keepdim=True).values
    away = (h - median).abs()
    deviation = torch.maximum(away.median(-1, keepdim=True).values, 1e-6 * h.norm(dim=-1, keepdim=True))
    factor = uneven.clamp(max=math.log(LARGEST_FACTOR)).exp()  # the exponent: exp of a large ratio would overflow
    return sigma * h[keep].std() * deviation * torch.exp(-BETA * away / (deviation + 1e-6)) * factor


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model: the first list of modules as long as its configuration says.

    Raises: ValueError if there is none.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers: NoiseFiT does not know where to go")
    return list(lists[0])


@contextmanager
def _noisy(model: nn.Module, chosen: list[int], args: Any, mask: Tensor | None) -> Iterator[None]:
    """Noise on the last two thirds of the chosen layers' outputs, in training mode."""
    layers, sigma = layers_of(model) if chosen else [], args.noise_std**args.sigma_power

    def disturb(layer: nn.Module, _: Any, output: Any) -> Any:
        if not layer.training or not sigma:
            return None
        clean, *parts = _first(output).chunk(3)
        scales = [noise_scale(part, sigma, None if mask is None else mask.to(part.device)) for part in parts]
        noisy = [h + (torch.randn_like(s) * s).to(h.dtype) for h, s in zip(parts, scales, strict=True)]
        h = torch.cat([clean, *noisy])
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handles = [layers[index].register_forward_hook(disturb) for index in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    """The hidden states of a layer's output: it is them, or a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output
