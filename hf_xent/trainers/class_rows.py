"""What a loss of classes reads of a batch: one row of logits for every label, whatever the kind of classifier.

    sequence, image, audio, multiple choice    logits [B, W], labels [B]
    token                                      logits [B, T, W], labels [B, T]
    semantic segmentation                      logits [B, W, h, w], interpolated to labels [B, H, W] as SegFormer does
    question answering                         logits of start and end [B, T] each: two rows of T classes

Labels of -100, and the model's `semantic_loss_ignore_index` in images, are ignored, as are values that are nan and
positions outside of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes.base import ClassLoss
from ..classes.heads import head_of, inputs_of
from ..models.pooling import at_last_token
from ..ops.statistics import widened
from ..patching.heads import inner_of

POSITIONS = ("start_positions", "end_positions")
IGNORED = -100
_OTHER_TASKS = {
    "CTC": "scores sequences",
    "ObjectDetection": "matches boxes",
    "InstanceSegmentation": "matches masks",
    "UniversalSegmentation": "matches masks",
    "CausalLM": "predicts the next token",
    "ConditionalGeneration": "predicts the next token",
    "LMHeadModel": "predicts the next token",
    "MaskedLM": "predicts tokens",
    "PreTraining": "has several heads",
}
"""What the name of a class has after 'For', and why its logits are not one row for each label."""


@dataclass
class Rows:
    """The rows of a batch: all of them, or those with a label."""

    logits: Tensor
    """[N, W] in float32 or wider; [B, W, H, W'] for losses of masks."""
    labels: Tensor
    """[N]; [B, H, W] for losses of masks, with -100 where there is none."""
    given: dict[str, Any]
    """What else the loss needs."""


class RowReader:
    """Reads the rows of a loss from the inputs and outputs of a model.

    Args:
        model: A classifier, which may be wrapped.
        objective: The loss.

    Raises:
        ValueError: The model is not a classifier, or has not what the loss needs.
    """

    def __init__(self, model: nn.Module, objective: ClassLoss):
        inner: Any = inner_of(model)
        self.kind, self.objective = type(inner).__name__, objective
        self.refuse(inner)
        self.answers = self.answers_questions(inner)
        self.ignored = getattr(inner.config, "semantic_loss_ignore_index", IGNORED)
        self.pad = getattr(inner.config, "pad_token_id", None)
        self.head = head_of(model)
        needs_head = [need for need in ("features", "head") if need in objective.needs]
        if needs_head and (self.head is None or self.answers):
            raise ValueError(f"model is a {self.kind} without a linear head of classes, but {objective!r} needs one")
        if self.answers and (objective.labels != "classes" or objective.outputs(7) != 7 or objective.columns):
            raise ValueError(f"model is a {self.kind}, whose classes are positions, for which {objective!r} is not")

    @staticmethod
    def refuse(inner: nn.Module) -> None:
        """Raises: ValueError for what is known not to be a classifier of transformers."""
        kind = type(inner).__name__
        if not hasattr(inner, "config"):
            raise ValueError(f"model is a {kind} without configuration: pass a classifier of transformers")
        if reasons := [why for task, why in _OTHER_TASKS.items() if f"For{task}" in kind or kind.endswith(task)]:
            raise ValueError(
                f"model is a {kind}, which {reasons[0]}: pass a classifier, such as AutoModelForSequenceClassification,"
                " whose logits are one row for each label"
            )

    @staticmethod
    def answers_questions(inner: nn.Module) -> bool:
        """Whether the classes of a model are positions."""
        return type(inner).__name__.endswith("QuestionAnswering")

    def labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Labels of a batch, with -100 where one is ignored; those of start and end one after the other.

        Raises:
            ValueError: There are none, or they are not what the loss reads.
        """
        if self.answers and all(name in inputs for name in POSITIONS):
            positions = torch.cat([inputs[name].reshape(-1) for name in POSITIONS])
            return torch.where(positions < inputs["input_ids"].shape[1], positions, IGNORED)
        labels = inputs.get("labels")
        if labels is None:
            wanted = " and ".join(POSITIONS) if self.answers else "labels"
            raise ValueError(f"a batch has {', '.join(inputs)}: give {wanted}")
        if self.objective.labels == "values":
            return labels.float() if labels.itemsize < 4 or not labels.is_floating_point() else labels
        if labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype}, but {self.objective!r} is of classes: give their ids, or choose a loss of"
                " values such as squared_error or hl_gauss"
            )
        return labels if self.ignored == IGNORED else labels.masked_fill(labels == self.ignored, IGNORED)

    def kept(self, labels: Tensor) -> Tensor:
        """Which labels are not ignored."""
        return ~labels.isnan() if self.objective.labels == "values" else labels != IGNORED

    def aligned(self, outputs: Any, labels: Tensor | None) -> Tensor:
        """Logits with the shape of the labels before or, in images, around the dimension of outputs.

        Raises:
            ValueError: The shapes do not fit.
        """
        if self.answers:
            return torch.cat([outputs["start_logits"], outputs["end_logits"]])
        if "logits" not in outputs:
            raise ValueError(f"model is a {self.kind}, whose outputs are {', '.join(outputs)}: pass a classifier")
        logits: Tensor = outputs["logits"]
        if logits.ndim == 4 and labels is not None and labels.ndim == 3:
            return at_size(logits, labels)
        if labels is not None and logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"{self.kind} has logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}: pass"
                " a classifier with one row of logits for every label"
            )
        return logits

    def read(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, columns: Mapping[str, Any]
    ) -> tuple[Rows, Any]:
        """Runs the model. Returns all rows, with and without labels, and the model's outputs.

        Raises:
            ValueError: The model has other outputs than the loss needs.
        """
        needs, more = self.objective.needs, {}
        if "feature_map" in needs:
            more["output_hidden_states"] = True
        given = dict(columns)
        if self.head is not None and "features" in needs:
            with inputs_of(self.head) as seen:
                outputs = model(**inputs, **more)
            given["features"] = self._features(seen[-1], inputs, labels)
        else:
            outputs = model(**inputs, **more)
        logits = widened(self.aligned(outputs, labels))
        if "feature_map" in needs:
            given |= self._feature_map(outputs, inputs, labels)
        rows = Rows(logits, labels, given)
        return (rows if self.objective.labels == "masks" else flat(rows)), outputs

    def logits(self, outputs: Any, labels: Tensor) -> Tensor:
        """The logits of outputs as rows: [N, W], float32 or wider. Raises: ValueError as `aligned`."""
        return flat(Rows(widened(self.aligned(outputs, labels)), labels, {})).logits

    def labelled(self, rows: Rows) -> Rows:
        """The rows with a label.

        Raises:
            ValueError: A label is not an id of a class.
        """
        if self.objective.labels == "masks":
            return rows
        kept = self.kept(rows.labels)
        on_host = kept.device.type == "cpu"  # where looking at values waits for nothing
        if on_host and bool(kept.all()):
            kept = ...  # type: ignore[assignment]
        given = {name: value[kept] for name, value in rows.given.items()}
        labels, logits = rows.labels[kept], rows.logits[kept]
        if self.objective.labels == "classes" and on_host and labels.numel():
            self._check_ids(labels, logits)
        return Rows(logits, labels, given)

    def _check_ids(self, labels: Tensor, logits: Tensor) -> None:
        width, largest = logits.shape[-1], int(labels.max())
        if labels.min() < 0 or (largest >= width and self.objective.outputs(largest) == largest):
            raise ValueError(
                f"labels are {int(labels.min())} to {largest}, but the model has {width} outputs: load it with"
                f" num_labels={largest + 1}, and mark rows without a label by -100"
            )

    def _features(self, seen: Tensor, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """What the head saw for every label; of a sequence, the last token that is not padding, as transformers."""
        if seen.shape[:-1] == labels.shape:
            return widened(seen)
        ids = inputs.get("input_ids")
        if seen.ndim != 3 or ids is None or seen.shape[:2] != ids.shape:
            raise ValueError(
                f"the head of {self.kind} sees {tuple(seen.shape)} for labels of shape {tuple(labels.shape)}, but"
                f" {self.objective!r} needs one vector for every label: choose a loss without features"
            )
        return widened(at_last_token(seen, ids, self.pad))

    def _feature_map(self, outputs: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
        states = outputs.get("hidden_states")
        if not states:
            raise ValueError(
                f"model is a {self.kind} without hidden states, but {self.objective!r} needs the last ones"
            )
        last, mask = states[-1], inputs.get("attention_mask")
        if labels.ndim > 1:  # each token is a row
            last, mask = last.unsqueeze(2), None
        every = torch.ones(last.shape[: labels.ndim + 1], dtype=torch.bool, device=last.device)
        return {"feature_map": last, "mask": every if mask is None or mask.shape != every.shape else mask.bool()}


def at_size(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, W, h, w] at the size of labels [B, H, W']: [B, W, H, W']."""
    return F.interpolate(widened(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)


def flat(rows: Rows) -> Rows:
    """Rows with one leading dimension, that of all labels."""
    shape, logits = rows.labels.shape, rows.logits
    if logits.ndim == 4 and len(shape) == 3:
        logits = logits.movedim(1, -1)
    given = {name: value.flatten(0, len(shape) - 1) for name, value in rows.given.items()}
    return replace(rows, logits=logits.flatten(0, -2), labels=rows.labels.flatten(), given=given)
