"""CTC meets optimal transport: a speech encoder learns to write, and to have states that a text encoder would have.

    loss = sum over the rows of a step of  CTC(speech, labels) + ot_weight S(speech states, text states)  / rows
    speech states   the last of the acoustic encoder, at the frames that are not padding, with one more coordinate,
                    position_weight i / (frames - 1)
    text states     the last of a text encoder, for the same transcript, with that coordinate too; through a linear
                    layer if they are of another width

S is the debiased Sinkhorn divergence with cost |x - y|^2 / 2 and eps = blur^2 (`hf_xent.ops.sinkhorn_divergence`).
Gradients reach both encoders unless `detach_text` is set. After it, the speech encoder starts a translation model.

CTC is the model's own loss, whose configuration says whether a row's is the sum over its labels
(`ctc_loss_reduction="sum"`, the paper's, for which `ot_weight` is .1) or divided by their number ("mean"). The divisor
is the number of rows in all accumulated batches of all processes, so that 1 x 8 rows are 8 x 1. In the authors' code
padding takes part in the transport by default, and its position has no weight in one of two branches; here neither is
so. Its phoneme transcripts, and a text encoder that comes from a translation model, are the user's to give.

Source: Le et al. 2023, Pre-training for Speech Translation: CTC Meets Optimal Transport, arXiv:2301.11716.
Data: `input_values` or `input_features`, as the model reads them; `labels`, the transcript's ids for CTC; and
`text_input_ids`, its ids for the text encoder. `SiameseCollator` makes batches of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from ..hub import Carded, Tokenless
from ..ops.transport import sinkhorn_divergence, with_positions
from ..patching.heads import inner_of
from . import class_state
from .base import Method, Options
from .batches import refuse_unlabeled
from .refusals import OWN_LOSS, refuse_options
from .rows import IDS
from .siamese_collator import TEXT, TEXT_MASK, SiameseCollator
from .siamese_text import TextStates, check_model, check_text_encoder, frame_mask, last_states, text_of, width_of


@dataclass
class SiameseCTCConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments`, and the transport between speech and text.

    Raises:
        ValueError: A field has a value out of its range or of another type, or would have no effect.
    """

    ot_weight: float = field(
        default=0.1, metadata={"help": "The weight of the divergence; with 0, CTC alone, there is no text encoder."}
    )
    position_weight: float = field(
        default=1.0, metadata={"help": "The coordinate of the last position; 0 compares sets without an order."}
    )
    blur: float = field(default=0.05, metadata={"help": "The square root of eps, a distance of states."})
    iterations: int = field(default=50, metadata={"help": "The updates of the transport's potentials in a step."})
    detach_text: bool = field(
        default=False, metadata={"help": "Whether the text encoder is frozen; a linear layer after it is trained."}
    )

    ranges = {  # noqa: RUF012
        "ot_weight": "[0, inf)", "position_weight": "[0, inf)", "blur": "(0, inf)", "iterations": "[1, inf)",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ot_weight:
            why = "ot_weight is 0, so nothing is transported: set ot_weight, or leave it out"
            refuse_options(self, dict.fromkeys(("position_weight", "blur", "iterations", "detach_text"), why))


class SiameseCTCTrainer(Method, Carded, Trainer):
    """Trains a speech model by CTC and by transport to a text encoder; see the module's docstring.

    Logged and evaluated, means over rows: `ctc` and `divergence`. Predictions are the logits of all frames.
    `save_model` writes the speech model and, in `text_encoder` beside it, the text encoder, a checkpoint of its own,
    with the linear layer if there is one. Checkpoints have both, and a resumed run goes on with both.

    Args:
        model: A model of AutoModelForCTC: wav2vec 2.0, HuBERT, Wav2Vec2-BERT, Parakeet and others.
        text_encoder: A model of texts with `last_hidden_state`: AutoModel, or the encoder of a translation model. It
            becomes a part of the model while it is trained.
        args: The configuration; `SiameseCTCConfig(output_dir="out")` if it is left out.
        **kwargs: As for `transformers.Trainer`. The default data collator is `SiameseCollator`.

    Raises:
        ValueError: A model without a CTC loss, no text encoder or one without effect, an encoder-decoder as text
            encoder, the configuration of another trainer, FSDP or DeepSpeed; in training, a batch without labels or
            text, or speech that is shorter than a frame.

    Source: Le et al. 2023, arXiv:2301.11716.
    """

    config_class = SiameseCTCConfig
    args: SiameseCTCConfig
    columns: Mapping[str, str] = dict.fromkeys(("labels", TEXT), IDS)
    means = ("ctc", "divergence")
    refused_arguments: Mapping[str, str] = {
        "model_init": "the text encoder becomes a part of one model: pass model instead",
        "compute_loss_func": OWN_LOSS,
    }
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "CTC sums over alignments, not over positions with a label each: leave it 0",
    }
    _signature_columns: Any

    def __init__(self, model: Any, text_encoder: Any = None, args: SiameseCTCConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        check_model(model)
        check_text_encoder(args, text_encoder, model)
        set_seed(args.seed)  # as the stock trainer does, but before the linear layer is drawn
        self.text: Any = text_encoder and TextStates(text_encoder, width_of(model), frozen=args.detach_text)
        class_state.attach(model, self.text, next(model.parameters()))
        super().__init__(model=model, args=args, **kwargs)
        if kwargs.get("data_collator") is None:
            pad = getattr(text_encoder.config, "pad_token_id", None) if text_encoder is not None else 0
            self.data_collator = SiameseCollator(pad or 0)
        self.model_accepts_loss_kwargs = True  # the rows of a step are counted for us
        if self.text is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("the text encoder runs beside the model's forward: train without FSDP and DeepSpeed")
        if self.text is not None and self.args.world_size > 1:
            class_state.average_over_ranks(self.model, self.text)

    @property
    def card_facts(self) -> Mapping[str, str]:
        """The text encoder, and what becomes of it."""
        if self.text is None:
            return {}
        kept = "frozen" if self.args.detach_text else "trained, saved in text_encoder"
        layer = "" if self.text.projection is None else ", a linear layer after it"
        return {"Text encoder": f"{type(inner_of(self.text.encoder)).__name__}, {kept}{layer}"}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, TEXT, TEXT_MASK]))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of rows in the batches of a step."""
        if not batch_samples:
            return None
        rows = sum(len(batch["labels"]) for batch in batch_samples if batch.get("labels") is not None)
        return self._counted_over_processes(rows, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch.

        Raises:
            ValueError: As the class says.
        """
        refuse_unlabeled(inputs)
        speech = {name: value for name, value in inputs.items() if name not in (TEXT, TEXT_MASK)}
        with last_states(model) as seen:
            outputs = model(**speech)
        rows = len(inputs["labels"])
        config: Any = inner_of(model).config
        ctc = outputs.loss if config.ctc_loss_reduction == "sum" else outputs.loss * rows
        self._note("ctc", ctc.detach(), rows)
        total = ctc
        if self.text is not None:
            divergence = self.divergences(seen[-1], inputs).sum()
            self._note("divergence", divergence.detach(), rows)
            total = ctc + self.args.ot_weight * divergence
        loss = total / rows if num_items_in_batch is None else total / num_items_in_batch * self._averaged_by
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def divergences(self, states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The divergence of each row's speech and text.

        Args:
            states: The last states of the acoustic encoder, [B, S, D].
            inputs: The batch.

        Returns:
            [B]; float32, or float64 if the states are.

        Raises:
            ValueError: The batch has no text, or a row is shorter than a frame of the encoder.
        """
        kept = frame_mask(self.model, inputs.get("attention_mask"), states.shape[1], states)
        ids, mask = text_of(inputs)
        sides = [(states, kept), (self.text(ids, mask), mask)]
        x, y = (with_positions(found, valid, self.args.position_weight) for found, valid in sides)
        try:
            return sinkhorn_divergence(x, y, kept, mask, blur=self.args.blur, iterations=self.args.iterations)
        except ValueError as error:
            raise ValueError(f"of speech (x) and text (y) in a batch, {error}") from None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.text is not None and self.args.should_save:
            self.text.save(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            class_state.save(self.text, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            class_state.load(self.text, checkpoint)
