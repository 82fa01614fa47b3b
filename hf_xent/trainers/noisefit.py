"""Noise-augmented fine-tuning (NoiseFiT): cross-entropy, and divergences between clean and noisy passes.

    loss = alpha CE(p) + (1 - alpha) 1/2 sum_i KL(p_T || p_i) + lambda KL(p_2 || p_1)

p is the softmax of a clean pass (p_T at temperature T), p_1 and p_2 those of passes with Gaussian noise on the outputs
of a few layers, scaled to them (`hf_xent.trainers.noise`). The layers are chosen once, on the first batch, by the
signal-to-noise ratio that noise with s = sigma std(h) would have there.

Clean and noisy passes are the thirds of one batch: one forward and one backward, as DDP and activation checkpointing
require. Only the selected layers' outputs in the last two thirds get noise, and only within a training step. The loss
is a function of whole rows of all passes (`hf_xent.trainers.divergence`); a few rows of logits are in memory at a time,
and the three passes have one gradient of the head (`hf_xent.ops.divergences`).

Where the authors' code and paper differ or leave a choice: `sigma_power` is 2, since the code applies sigma twice in
training (and once when it measures layers); the masks of the divergences are shifted to the predicted tokens, whereas
the code does not shift them; `version="v2"` is their later script (teacher and second pass detached, temperature on
both sides with a factor T^2; its lambda is 0.05). `method="rdrop"` trains R-Drop in the same trainer (two passes, no
noise):
CE_1 / 2 + CE_2 / 2 + rdrop_weight (KL(1 || 2) + KL(2 || 1)) / 2. NEFTune is transformers' own
`neftune_noise_alpha=5` on any trainer. With sigma 0 and no dropout the loss is alpha CE.

Defaults are the authors' recipe: learning rate 5e-5 with a cosine schedule, 4 rows x 4 accumulated, 5 epochs (their
script also stops at 1000 steps), and the adapter `lora_config()` on a frozen model, which they load in 4 bits. They
train on prompt and response; here the labels decide.

Source: Khadangi et al. 2025, arXiv:2504.03302, with the authors' code, github.com/akhadangi/NoiseFiT; R-Drop: Liang et
al. 2021, arXiv:2106.14448.
Data: as for `XentTrainer`; in a packed batch (one row with position ids and without a mask, as
`DataCollatorWithFlattening` makes it) the passes follow each other in the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..models.anatomy import layers_of
from ..models.contexts import eval_mode
from ..ops import Head
from ..ops.divergences import stream_divergence
from ..ops.request import Request
from ..patching import lazily, patch_state
from .batches import lazy, targets
from .divergence import noisefit, rdrop
from .noise import Noise, strengths
from .passes import packed, repeated
from .refusals import OWN_LOSS, refuse_encoder_decoder
from .xent import XentConfig, XentTrainer


@dataclass
class NoiseFiTConfig(XentConfig):
    """`XentConfig` and the options of NoiseFiT; the defaults are those of the authors' first script.

    Raises:
        ValueError: A field has a value out of its range or of another type, or is set where `method` does not read it.
    """

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("noise_std", "consistency_weight", "rdrop_weight"), "[0, inf)"),
        "num_noise_layers": "[1, inf)",
        "ce_weight": "[0, 1]",
        "temperature": "(0, inf)",
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "method": ("noisefit", "rdrop"),
        "version": ("v1", "v2"),
        "sigma_power": (1, 2),
    }
    read_by: ClassVar[dict[str, tuple[str, ...]]] = {
        "rdrop_weight": ("rdrop",),
        **dict.fromkeys(  # without the options that choose layers: R-Drop accepts them, though they have no effect
            ("noise_std", "sigma_power", "ce_weight", "consistency_weight", "temperature", "version"), ("noisefit",)
        ),
    }

    method: str = field(default="noisefit", metadata={"help": "'noisefit', or its baseline 'rdrop'."})
    noise_std: float = field(default=0.1, metadata={"help": "sigma; 0 is a control with clean passes only."})
    sigma_power: int = field(default=2, metadata={"help": "2 as in the authors' code, or 1."})
    noise_layers: str = field(
        default="largest",
        metadata={"help": "'largest' or 'lowest' signal-to-noise ratio, or layers by number: '0,3,5'."},
    )
    num_noise_layers: int = field(default=3, metadata={"help": "How many layers get noise, unless they are listed."})
    ce_weight: float = field(default=0.5, metadata={"help": "alpha, the weight of the cross-entropy."})
    consistency_weight: float = field(
        default=0.1, metadata={"help": "lambda, the weight of the consistency of noisy passes; 0.05 in version v2."}
    )
    temperature: float = field(default=1.0, metadata={"help": "T, the temperature of the divergences."})
    version: str = field(default="v1", metadata={"help": "'v1' as in the paper, 'v2' as in the authors' later script."})
    rdrop_weight: float = field(default=1.0, metadata={"help": "Weight of the divergences, under method 'rdrop'."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per step and device."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Steps per update."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs, unless max_steps is given."})


def lora_config() -> Any:
    """The authors' adapter: `peft.get_peft_model(model, lora_config())` before the trainer."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])


class NoiseFiTTrainer(XentTrainer):
    """Fine-tunes a causal LM under NoiseFiT's hybrid loss; see the module's docstring.

        loss = alpha CE(p) + (1 - alpha) 1/2 sum_i KL(p_T || p_i) + lambda KL(p_2 || p_1)

    Evaluation is plain cross-entropy, without noise. The chosen layers are in `noise_layers`, and in the log, with the
    standard deviation of the noise as a share of theirs. Logged beside what `XentTrainer` logs: `divergence`,
    KL(clean || noisy) in nats per token; dropout alone causes some (compare with sigma 0).

    Args:
        model: A causal LM with a list of layers. It is patched.
        args: The configuration; `NoiseFiTConfig(output_dir="out")` if it is left out.
        **kwargs: As for `XentTrainer`, but neither `loss` nor `compute_loss_func`.

    Raises:
        ValueError: Options that do not fit, another loss than plain cross-entropy, an encoder and decoder, or
            compilation; in training, a model whose layers cannot be found or are fewer than `num_noise_layers`.

    Source: Khadangi et al. 2025, arXiv:2504.03302; R-Drop: Liang et al. 2021, arXiv:2106.14448.
    """

    config_class = NoiseFiTConfig
    weighs_labels = False  # the loss of several passes has no weights
    args: NoiseFiTConfig
    means = ("divergence",)
    splits_sequences = False
    refused_arguments: Mapping[str, str] = {"compute_loss_func": OWN_LOSS}
    refused_options: Mapping[str, str] = {
        "tail": "the divergences have exact gradients only: leave it 0",
        "label_smoothing_factor": "NoiseFiT is built on plain cross-entropy: leave it 0",
    }

    def __init__(self, model: Any, args: NoiseFiTConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        refuse_encoder_decoder(model)
        self._noise = Noise(args.noise_std**args.sigma_power)
        self._is_compiled = args.torch_compile or getattr(model, "_compiled_call_impl", None) is not None
        self._is_compiled |= hasattr(model, "_orig_mod")
        super().__init__(model, args, **kwargs)
        self.noise_layers: list[int] | None = None if self.args.method == "noisefit" else []

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        objective = super()._objective(args, loss)
        if objective != CrossEntropy():
            raise ValueError(f"loss is {objective!r}: NoiseFiT is built on plain cross-entropy, pass no loss")
        return objective

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step with noise on the chosen layers until backward ends, since that may recompute the forward pass."""
        if self.noise_layers is None:
            earlier = [entry for entry in self.state.log_history if "noise_layer_0" in entry]  # the run is resumed
            logged = earlier[-1] if earlier else self._choose_layers(model, self._prepare_inputs(dict(inputs)))
            self.noise_layers = [int(value) for name, value in logged.items() if name.startswith("noise_layer_")]
        layers = layers_of(self.model) if self.noise_layers else []
        self._noise.install([layers[index] for index in self.noise_layers])
        try:
            with self._noise.on(inputs.get("attention_mask"), int(packed(inputs))):
                return super().training_step(model, inputs, *args, **kwargs)
        finally:
            if not self._is_compiled:  # a compiled model has the hooks in its program, where they stay until the end
                self._noise.remove()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `XentTrainer`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._noise.remove()

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
        model_inputs, labels = _inputs_and_labels(inputs)
        with lazily(model):
            output = model(**repeated(model_inputs, copies))
        in_row = packed(inputs)
        logits = lazy(output.logits, labels.shape[1] * (copies if in_row else 1), "NoiseFiT")
        loss = logits.with_head(
            lambda hidden, head: self._hybrid(hidden.chunk(copies, int(in_row)), head, labels, num_items_in_batch)
        )
        if num_items_in_batch is not None:
            loss = loss * self._averaged_by
        return (loss, output) if return_outputs else loss

    def _hybrid(self, passes: Sequence[Tensor], head: Head, labels: Tensor, num_items: Tensor | None) -> Tensor:
        args, state = self.args, patch_state(self.model)
        tokens = (labels != -100).sum()
        count = tokens if num_items is None else torch.as_tensor(num_items, device=labels.device)
        if args.method == "rdrop":
            function = rdrop(weight=args.rdrop_weight)
        else:
            options = ("ce_weight", "consistency_weight", "temperature", "version")
            function = noisefit(**{name: getattr(args, name) for name in options})
        request = Request(state.observe, **state.options)
        loss, stats = stream_divergence(function, passes, head, labels, request)
        if state.observe:
            state.record(stats)
        if "divergence" in stats.values:
            self._note("divergence", stats.values["divergence"].sum(), tokens)
        return loss / count.clamp(min=1)  # a step without labels has loss 0

    def _choose_layers(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        """Chooses the layers that get noise: those listed, or by the signal-to-noise ratio in evaluation mode.

        Returns the layers, ascending, and the strength of their noise, as logged: a resumed run reads them in the log.
        """
        args, layers = self.args, layers_of(self.model)
        listed = self._listed_layers(len(layers))
        model_inputs, _ = _inputs_and_labels(inputs)
        mask = inputs.get("attention_mask")
        # a compiled program would keep the hooks that measure
        with torch.compiler.set_stance("force_eager"), eval_mode(model), lazily(model):
            noise = strengths(layers, lambda: model(**model_inputs), args.noise_std or 1.0, mask)
        ordered = sorted(range(len(layers)), key=lambda i: noise[i].ratio, reverse=args.noise_layers == "largest")
        chosen = sorted(ordered[: args.num_noise_layers]) if listed is None else listed
        factor = args.noise_std ** (args.sigma_power - 1) if args.noise_std else 0.0
        logged = {f"noise_layer_{i}": float(layer) for i, layer in enumerate(chosen)}
        logged |= {f"noise_share_{i}": noise[layer].share * factor for i, layer in enumerate(chosen)}
        self.log(dict(logged))
        return logged

    def _listed_layers(self, count: int) -> list[int] | None:
        """The layers that `noise_layers` lists, or None if it names a criterion. Raises: ValueError if none fit."""
        args = self.args
        if args.noise_layers in ("largest", "lowest"):
            if not 1 <= args.num_noise_layers <= count:
                raise ValueError(
                    f"num_noise_layers is {args.num_noise_layers}: the model has {count} layers, choose 1 to {count}"
                )
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


def _inputs_and_labels(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs in a batch, and the label of every position. Raises: ValueError if it has no labels."""
    return {name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")}, targets(inputs)
