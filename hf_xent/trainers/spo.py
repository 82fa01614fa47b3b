"""Preference training that also learns to tell how much of an answer's key content is missing (SPO).

A preference loss says which answer is better; the degree loss asks the model to tell an answer from the same answer
with less of its key content. Answer y becomes y_0 = y, y_1, ..., y_(N-1), of which growing shares of the key phrases
are removed (`hf_xent.data.rake`); a linear head on the hidden state h_j of (prompt, y_j) predicts j:

    loss = alignment loss + gamma_w mean L(chosen) + gamma_l mean L(rejected)        L(y) = mean_j l(h_j, j)
    l    = -log softmax(W h_j + b)_j                                                 degree_head="classes"
         = mean over k = 1 .. N-1 of BCE(sigmoid(w h_j + b_k), 1[j >= k])            degree_head="ordinal" (CORAL)

The alignment loss is that of the trainer: `SPO` goes before any of TRL's preference trainers in a class's bases.

    class SPOKTOConfig(SPOOptions, KTOConfig): ...     (a dataclass)
    class SPOKTOTrainer(SPO, KTOTrainer): ...          gamma_w for desirable completions, gamma_l for the others

It works with `DPOTrainer` and every loss type of it (`SPOTrainer`), `SPCETrainer`, `KTOTrainer`, and TRL's experimental
ORPO and CPO, on texts and conversations, for adapters and full fine-tuning, but not on images. Key phrases are removed
from the text of an answer, which is tokenized as batches are made and truncated at `max_length`, as TRL does. They are
removed from the text parts of messages; tool calls are not changed, and an answer without text has no degree loss.

The head starts at zero (L = ln N, or ln 2 for the ordinal one), and trains with the model but is not part of it:
checkpoints have it in a separate file, `_degree_head.safetensors`, which resuming reads and which a push leaves out, as
it does all names that begin with an underscore; `push_degree_head` drops the underscore.

Source: Li et al. 2024, Self-supervised Preference Optimization, arXiv:2409.17791 (Findings of EMNLP). Re-implementation
from descriptions: N, shares, pooling, heads, both gammas and their sides are our choices, and all of them are options.
CORAL: Cao et al. 2020, arXiv:1901.07884.
Data: as the alignment trainer's, with its text columns: prompt, and chosen and rejected, or completion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from ..hub import Tokenless
from ..patching import lazily
from .base import Method, Options
from .batches import lazy
from .streamed import ANSWERS, Streamed
from .variants import Variants

KEY = "spo"  # the key of the degree task's tensors in a batch
NAME = "degree_head"
TEXTS = ("prompt", "chosen", "rejected", "completion", "tools", "chat_template_kwargs")
"""The columns from which variants are made."""


@dataclass
class SPOOptions(Options):
    """The options of SPO; goes before the configuration of the alignment trainer in a class's bases.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """

    ranges: ClassVar[dict[str, str]] = {
        "degrees": "[2, inf)",
        "max_removed": "(0, 1]",
        "gamma_w": "[0, inf)",
        "gamma_l": "[0, inf)",
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "key_content": ("rake", "random"),
        "pooling": ("last", "mean"),
        "degree_head": ("classes", "ordinal"),
    }

    degrees: int = field(default=3, metadata={"help": "N, the variants of an answer, the answer itself included."})
    max_removed: float = field(
        default=0.75,
        metadata={"help": "Share of key phrases that the last variant lacks; the other shares are evenly spaced."},
    )
    key_content: str = field(
        default="rake",
        metadata={"help": "Phrases that are removed: 'rake', the best ones first, or 'random', the control."},
    )
    pooling: str = field(
        default="last",
        metadata={"help": "Hidden state that the head reads: of the 'last' token, or the 'mean' over the answer's."},
    )
    degree_head: str = field(default="classes", metadata={"help": "'classes' (softmax) or 'ordinal' (CORAL)."})
    two_heads: bool = field(default=False, metadata={"help": "One head each for chosen and rejected answers."})
    gamma_w: float = field(default=0.1, metadata={"help": "Weight of the degree loss of chosen answers."})
    gamma_l: float = field(default=0.1, metadata={"help": "Weight of the degree loss of rejected answers."})
    push_degree_head: bool = field(default=False, metadata={"help": "Push the head with the model too."})

    @property
    def shares(self) -> list[float]:
        """The share of the key phrases that each variant lacks."""
        return [self.max_removed * j / (self.degrees - 1) for j in range(self.degrees)]


@dataclass
class SPOConfig(SPOOptions, Tokenless, DPOConfig):
    """`trl.DPOConfig` and the options of SPO."""


class SPO(Method, Streamed):
    """The degree loss on top of a TRL trainer's own; goes before that trainer in a class's bases.

        loss = alignment loss + gamma_w mean L(chosen) + gamma_l mean L(rejected)

    See the module's docstring. Logged: `degree_loss`, before its weights, and `degree_accuracy`; in evaluation, the
    same with `eval_`. With both gammas 0 it is the alignment trainer, to the last bit.

    Args:
        *args: As for the alignment trainer.
        **kwargs: As for the alignment trainer, with its columns of text. The configuration, `args`, has `SPOOptions`
            among its bases and cannot be left out.

    Raises:
        ValueError: Options that do not fit, a configuration without `SPOOptions` or of another trainer, or a model that
            cannot be patched.

    Source: Li et al. 2024, arXiv:2409.17791; the ordinal head: Cao et al. 2020, arXiv:1901.07884.
    """

    config_class: type = SPOOptions
    columns = ANSWERS
    means = ("degree_loss", "degree_accuracy")

    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any):
        config = kwargs.get("args") or next((x for x in args if isinstance(x, TrainingArguments)), None)
        if config is None:
            raise ValueError(
                f"args is None: {type(self).__name__} takes a configuration whose class derives from hf_xent.SPOOptions"
                " and TRL's configuration"
            )
        self.configured(config, kwargs)
        super().__init__(*args, **kwargs)
        get_base: Any = getattr(self.model, "get_base_model", None)  # PEFT
        model = self.model if get_base is None else get_base()
        self.degree_head = DegreeHead(model.config.get_text_config().hidden_size, self.args)
        model.add_module(NAME, self.degree_head.to(model.device))  # the optimizer, clipping and DDP find it there
        ignored = {f"{NAME}.{name}" for name in self.degree_head.state_dict()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *ignored}
        self.data_collator = Variants(self.data_collator, self.processing_class, self.args)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TEXTS]))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As in the alignment trainer; the variants are not an input of its models."""
        return super().compute_ref_log_probs(model, {k: x for k, x in inputs.items() if k != KEY})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The alignment loss and the weighted degree loss."""
        variants = inputs.get(KEY)
        alignment_inputs = {name: x for name, x in inputs.items() if name != KEY}
        result = super().compute_loss(model, alignment_inputs, return_outputs, *args, **kwargs)
        if not variants:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._degree_loss(model, **variants).to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _degree_loss(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, answer: Tensor, degree: Tensor,
        side: Tensor, weight: Tensor,
    ) -> Tensor:  # fmt: skip
        with lazily(model):  # lazy logits carry the head's hidden states [R, T, D], and are never computed
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        hidden = lazy(logits, input_ids.shape[1], "SPO").hidden
        losses, predictions = self.degree_head(hidden, answer, degree, side)
        self._note("degree_loss", losses.sum(), len(losses))
        self._note("degree_accuracy", (predictions == degree).sum(), len(losses))
        return (losses * weight).sum()

    @property
    def _head_file(self) -> str:
        return ("" if self.args.push_degree_head else "_") + f"{NAME}.safetensors"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_file(self.degree_head.state_dict(), Path(output_dir or self.args.output_dir) / self._head_file)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        self._load_head(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, folder: str) -> None:
        file = Path(folder) / self._head_file
        if not file.exists():
            raise ValueError(f"checkpoint is {folder}, which has no {file.name}: it was not saved by this trainer")
        self.degree_head.load_state_dict(load_file(file))


class SPOTrainer(SPO, DPOTrainer):
    """DPO, with any of its losses, and SPO's degree loss; see the module's docstring and `trl.DPOTrainer`.

    Args:
        model: A causal LM, or its Hub id or path.
        ref_model: The reference; without it, a copy of the model as passed (or the one without adapter).
        args: The configuration; `SPOConfig(output_dir="out")` if it is left out.
        **kwargs: As for `trl.DPOTrainer`. Rows of the data sets have TRL's columns `prompt`, `chosen` and `rejected`.

    Raises:
        ValueError: As `SPO`, and a data set without its columns.
    """

    needed = ("chosen", "rejected")
    config_class = SPOConfig
    args: SPOConfig
    _name = "SPO"

    def __init__(self, model: Any, ref_model: Any = None, args: SPOConfig | None = None, **kwargs: Any):
        super().__init__(model, ref_model, self.configured(args, kwargs), **kwargs)


class DegreeHead(nn.Module):
    """Predicts from the hidden state of an answer how much of it is missing, in float32; one head, or one per side."""

    def __init__(self, size: int, options: SPOOptions):
        super().__init__()
        self.ordinal, self.pooling = options.degree_head == "ordinal", options.pooling
        self.sides, thresholds = 1 + options.two_heads, options.degrees - 1
        self.weight = nn.Parameter(torch.zeros(self.sides, 1 if self.ordinal else options.degrees, size))
        self.bias = nn.Parameter(torch.zeros(self.sides, thresholds if self.ordinal else options.degrees))

    def forward(
        self,
        hidden: Tensor,  # [R, T, D]
        answer: Tensor,  # [R, T], true at the answer's tokens
        degree: Tensor,  # [R]
        side: Tensor,  # [R], 0 chosen, 1 rejected
    ) -> tuple[Tensor, Tensor]:
        """Losses and predicted degrees, [R] each."""
        head = side.clamp(max=self.sides - 1)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self._pool(hidden.float(), answer)
            logits = torch.einsum("rd,rnd->rn", pooled, self.weight[head].float()) + self.bias[head].float()
        if not self.ordinal:
            return F.cross_entropy(logits, degree, reduction="none"), logits.argmax(-1)
        above = (degree[:, None] > torch.arange(logits.shape[1], device=logits.device)).float()
        losses = F.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(-1)
        return losses, (logits > 0).sum(-1)

    def _pool(self, hidden: Tensor, answer: Tensor) -> Tensor:
        if self.pooling == "mean":
            mask = answer[..., None].to(hidden)
            return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        positions = torch.arange(answer.shape[1], device=answer.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), (positions * answer).argmax(1)]
