"""Noise-augmented fine-tuning (NoiseFiT): cross-entropy, and agreement between clean and noisy passes.

    loss = alpha CE(p) + (1 - alpha) 1/2 sum_i KL(p_T || p_i) + lambda KL(p_2 || p_1)

p is the softmax of a clean pass (p_T at temperature T), p_1 and p_2 those of passes with Gaussian noise on the outputs
of a few layers, adapted to them (`hf_xent.trainers.noise`). The layers are chosen once, on the first batch, by the
signal-to-noise ratio that noise under s = sigma std(h) would have there.

Clean and noisy passes are the thirds of one batch: one forward and one backward, as DDP and activation checkpointing
want them. Only the selected layers' outputs in the last two thirds get noise, and only within a training step. All
divergences are statistics of hidden states under one head (`vocab_stats` with a payload); no logits are kept.

Where the authors' code and paper leave a choice: `sigma_power` is 2, since the code applies sigma twice when training
(and once when measuring layers); the masks of the divergences are shifted to the predicted tokens, where the code uses
the unshifted ones; `version="v2"` is their later script (teacher and second pass detached, temperature on both sides
with a factor T^2; its lambda is 0.05). `method="rdrop"` trains R-Drop in the same trainer (two passes, no noise):
CE_1 / 2 + CE_2 / 2 + rdrop_weight (KL(1 || 2) + KL(2 || 1)) / 2. NEFTune is transformers' own
`neftune_noise_alpha=5` on any trainer. With sigma 0 and no dropout the loss is alpha CE.

Defaults are the authors' recipe: learning rate 5e-5 with a cosine schedule, 4 rows x 4 accumulated, 5 epochs (their
script also stops at 1000 steps), and the adapter `lora_config()` on a frozen model, which they load in 4 bits. They
train on prompt and response; here labels say what is trained on.

Source: Khadangi et al. 2025, arXiv:2504.03302, with the authors' code, github.com/akhadangi/NoiseFiT; R-Drop: Liang et
al. 2021, arXiv:2106.14448.
Data: as for `XentTrainer`; a packed batch (one row with position ids and without a mask, as of
`DataCollatorWithFlattening`) has its passes one after the other in the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..models.contexts import eval_mode
from ..ops import Payload, vocab_stats
from ..patching import lazily, patch_state
from .base import OWN_LOSS, lazy, refuse_arguments, refuse_compilation, refuse_encoder_decoder, refuse_options, targets
from .noise import layers_of, noisy, strengths
from .xent import XentConfig, XentTrainer

NOISEFIT_OPTIONS = ("noise_std", "sigma_power", "ce_weight", "consistency_weight", "temperature", "version")
"""What R-Drop does not read; where noise would go does no harm, and stays."""


@dataclass
class NoiseFiTConfig(XentConfig):
    """`XentConfig` and the options of NoiseFiT; the defaults are those of the authors' first script."""

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("noise_std", "consistency_weight", "rdrop_weight"), "[0, inf)"),
        "num_noise_layers": "[1, inf)",
        "ce_weight": "[0, 1]",
        "temperature": "(0, inf)",
    }

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
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows a step and device."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Steps an update."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs, unless max_steps is given."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in {"method": ("noisefit", "rdrop"), "version": ("v1", "v2"), "sigma_power": (1, 2)}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {choices[0]!r} or {choices[1]!r}")
        unread = NOISEFIT_OPTIONS if self.method == "rdrop" else ("rdrop_weight",)
        refuse_options(self, dict.fromkeys(unread, f"method is {self.method!r}, which does not read it"))


def lora_config() -> Any:
    """The authors' adapter: `peft.get_peft_model(model, lora_config())` before the trainer."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])


class NoiseFiTTrainer(XentTrainer):
    """Fine-tunes a causal LM under NoiseFiT's hybrid loss; see the module's docstring.

    Takes what `XentTrainer` takes, under plain cross-entropy. Evaluation is plain cross-entropy, without noise. The
    chosen layers are in `noise_layers`, and with the share of their standard deviation that the noise has, in the log.
    Logged too: `divergence`, KL(clean || noisy) in nats a token; dropout alone makes some (compare with sigma 0).

    Raises: ValueError for options that do not fit, or a model whose layers cannot be found.
    """

    config_class = NoiseFiTConfig
    args: NoiseFiTConfig
    means = ("divergence",)

    def __init__(self, model: Any, args: NoiseFiTConfig | None = None, **kwargs: Any):
        args = self.configured(args)
        refuse_arguments(kwargs, {"compute_loss_func": OWN_LOSS})
        refuse_options(args, {"tail": "the divergences have exact gradients only: leave it 0"})
        refuse_encoder_decoder(model)
        refuse_compilation(model, args, "NoiseFiT compares passes by the hidden states before them")
        super().__init__(model, args, **kwargs)
        self.noise_layers: list[int] | None = None if self.args.method == "noisefit" else []

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        refuse_options(args, {"label_smoothing_factor": "NoiseFiT is built on plain cross-entropy: leave it 0"})
        objective = super()._objective(args, loss)
        if objective != CrossEntropy():
            raise ValueError(f"loss is {objective!r}: NoiseFiT is built on plain cross-entropy, pass no loss")
        return objective

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step with noise on the chosen layers, from forward to the end of backward (which may compute it again)."""
        if self.noise_layers is None:
            known = [entry for entry in self.state.log_history if "noise_layer_0" in entry]  # of a run that is resumed
            logged = known[-1] if known else self._choose_layers(model, self._prepare_inputs(dict(inputs)))
            self.noise_layers = [int(value) for name, value in logged.items() if name.startswith("noise_layer_")]
        layers = layers_of(self.model) if self.noise_layers else []
        sigma = self.args.noise_std**self.args.sigma_power
        chosen, mask = [layers[index] for index in self.noise_layers], inputs.get("attention_mask")
        with noisy(chosen, sigma, mask, dim=int(packed(inputs))):
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
        rest, labels = _without_labels(inputs)
        with lazily(model):
            output = model(**repeated(rest, copies))
        in_row = packed(inputs)
        logits = lazy(output.logits, labels.shape[1] * (copies if in_row else 1), "NoiseFiT")
        passes = [(hidden, logits.head) for hidden in logits.hidden.chunk(copies, int(in_row))]
        loss = self._hybrid(passes, labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as Trainer does: DDP averages what counts all ranks' tokens
        return (loss, output) if return_outputs else loss

    def _hybrid(self, passes: list[Payload], labels: Tensor, num_items: Tensor | None) -> Tensor:
        args, seam = self.args, patch_state(self.model)
        tokens = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
        tokens = tokens.clamp(min=1)  # a step without labels is a zero

        def entropy(part: Payload, observe: tuple[str, ...] = ()) -> Tensor:
            found, stats = CrossEntropy().compute(*part, labels, num_items=tokens, observe=observe, **seam.options)
            if observe:
                seam.record(stats)
            return found

        if args.method == "rdrop":
            first, second = passes
            apart = sum(divergence(p, q, labels, **seam.options) for p, q in ((first, second), (second, first)))
            both = (entropy(first, seam.observe) + entropy(second)) / 2
            return both + args.rdrop_weight * apart.sum() / (2 * tokens)  # type: ignore[union-attr]  # of tensors
        soft, consistency = disagreement(
            passes, labels, temperature=args.temperature, version=args.version, **seam.options
        )
        self._note("divergence", soft.sum(), (labels != -100).sum())
        rest = (1 - args.ce_weight) * soft + args.consistency_weight * consistency
        return args.ce_weight * entropy(passes[0], seam.observe) + rest.sum() / tokens

    def _choose_layers(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        """The layers to disturb, ascending: given, or by the signal-to-noise ratio of one batch in evaluation mode.

        Also how large the noise is there; all as it is logged, which is where a resumed run finds its layers.
        """
        args, layers = self.args, layers_of(self.model)
        given = self._given_layers(len(layers))
        rest, _ = _without_labels(inputs)
        with eval_mode(model), lazily(model):
            found = strengths(layers, lambda: model(**rest), args.noise_std or 1.0, inputs.get("attention_mask"))
        ordered = sorted(range(len(layers)), key=lambda i: found[i].ratio, reverse=args.noise_layers == "largest")
        chosen = sorted(ordered[: args.num_noise_layers]) if given is None else given
        factor = args.noise_std ** (args.sigma_power - 1) if args.noise_std else 0.0
        logged = {f"noise_layer_{place}": float(layer) for place, layer in enumerate(chosen)}
        logged |= {f"noise_share_{place}": found[layer].share * factor for place, layer in enumerate(chosen)}
        self.log(dict(logged))
        return logged

    def _given_layers(self, count: int) -> list[int] | None:
        """What `noise_layers` lists, or None where it tells how to choose. Raises: ValueError for what does not fit."""
        args = self.args
        if args.noise_layers in ("largest", "lowest"):
            if not 1 <= args.num_noise_layers <= count:
                raise ValueError(f"num_noise_layers is {args.num_noise_layers}: the model has {count} layers")
            return None
        try:
            chosen = sorted({int(number) for number in args.noise_layers.split(",")})
        except ValueError:
            chosen = [-1]
        if not all(0 <= layer < count for layer in chosen):
            raise ValueError(
                f"noise_layers is {args.noise_layers!r}: choose 'largest', 'lowest' or numbers below {count}, separated"
                " by commas"
            )
        return chosen


def packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch is one row of sequences that their position ids tell apart."""
    ids = inputs.get("input_ids")
    return (
        isinstance(ids, Tensor)
        and len(ids) == 1
        and inputs.get("position_ids") is not None
        and inputs.get("attention_mask") is None
    )


def repeated(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """A model's inputs with the batch several times over; what is no tensor with rows stays as it is.

    Rows are repeated, or, in a packed batch, the sequences of its row: attention kernels look for packing in single
    rows only. The copies' ends (`cu_seq_lens_q`, `cu_seq_lens_k`) and numbers (`seq_idx`) go on counting.
    """
    in_row = packed(inputs)
    width = inputs["input_ids"].shape[1] if in_row else 0
    found = {}
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.ndim == 0:
            found[name] = x
        elif in_row and name.startswith("cu_seq_lens"):
            found[name] = torch.cat([x[:1], *(x[1:] + i * x[-1] for i in range(copies))])
        elif in_row and name == "seq_idx":
            found[name] = torch.cat([x + i * (x.max() + 1) for i in range(copies)], 1)
        elif name == "position_ids" and x.ndim == 3:  # [3, B, T] of models that place tokens in images
            found[name] = torch.cat([x] * copies, 1 + in_row)
        else:
            found[name] = torch.cat([x] * copies, int(in_row and x.ndim > 1 and x.shape[1] == width))
    return found


def _without_labels(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The rest of a batch, and what every position has to predict. Raises: ValueError if it has no labels."""
    return {name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")}, targets(inputs)


def disagreement(
    passes: list[Payload], labels: Tensor, *, temperature: float = 1.0, version: str = "v1", **options: Any
) -> tuple[Tensor, Tensor]:
    """NoiseFiT's soft cross-entropy and consistency of a clean and two noisy passes, in the shape of labels.

        soft = 1/2 sum_i KL(p_T || p_i)        consistency = KL(p_2 || p_1)

    Of version 'v2', both at the temperature on both sides, times T^2, with p_T and p_2 constant. Options as
    `vocab_stats`.
    """
    clean, *students = passes
    (hidden, head), other, factor = clean, students[1], 1.0
    teacher = hidden, head.tempered(temperature)
    if version == "v2":
        students = [(hidden, head.tempered(temperature)) for hidden, head in students]
        teacher, other = ((hidden.detach(), head.detach()) for hidden, head in (teacher, students[1]))
        factor = temperature**2
    first, second = (vocab_stats(*student, labels, outputs=("lse",), **options).lse for student in students)
    soft = (first + second) / 2 - _toward(teacher, students, labels, **options)
    return factor * soft, factor * (first - _toward(other, students[:1], labels, **options))


def divergence(p: Payload, q: Payload, labels: Tensor, **options: Any) -> Tensor:
    """KL(softmax of p's logits || softmax of q's) in the shape of labels, nats, 0 at ignored positions; no logits.

        KL = lse_q - (H_p + sum_j p_j z_qj)

    `p` and `q` are (hidden [..., D], head) over one vocabulary, differentiated both; options as `vocab_stats`.
    """
    return vocab_stats(*q, labels, outputs=("lse",), **options).lse - _toward(p, [q], labels, **options)


def _toward(p: Payload, others: list[Payload], labels: Tensor, **options: Any) -> Tensor:
    """H_p + the mean over others, which share a head, of sum_j p_j z_qj."""
    head = others[0][1]
    if head.softcap is None:  # logits are linear in the hidden states: one reduction for all
        others = [(torch.stack([hidden for hidden, _ in others]).mean(0), head)]
    outputs = ("entropy", "payload")
    found = [vocab_stats(*p, labels, outputs=outputs, payload=other, **options) for other in others]
    return torch.stack([stats.entropy + stats.payload for stats in found]).mean(0)
