"""The options of a trainer that takes any registered loss: which one, how it is streamed, what evaluations measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Options


@dataclass
class LossOptions(Options):
    """Goes before the configuration of transformers or TRL in a class's bases.

    Raises:
        ValueError: A field has a value out of its range or of another type, or would have no effect.
    """

    ranges: ClassVar[dict[str, str]] = {"memory_budget": "[1, inf)", "tail": "[0, 1)", "eval_top_k": "[1, inf)"}

    loss: str = field(
        default="cross_entropy",
        metadata={
            "help": "Registry name of the loss, with options if any: 'focal:gamma=3'. `hf-xent losses` lists them."
        },
    )
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes of logits held at a time; default: half a byte for each number in the head, or more."},
    )
    tail: float = field(
        default=0.0,
        metadata={
            "help": "Relative error allowed in the gradient of the logits by compressing unlikely tokens, such as 1e-3;"
            " 0 is exact. For losses that depend on log p alone."
        },
    )
    eval_top_k: int | None = field(
        default=None, metadata={"help": "k of the top-k accuracy that evaluations report, such as 5."}
    )
    eval_calibration: bool = field(
        default=False, metadata={"help": "Whether evaluations report the calibration error of the tokens' confidence."}
    )
    eval_bits_per_byte: bool = field(
        default=False, metadata={"help": "Whether evaluations report bits per byte; needs processing_class."}
    )
    streamed_metrics: bool = field(
        default=False,
        metadata={
            "help": "Whether compute_metrics and predict get the arg max and the log-probability of every label, [N, T]"
            " each, in place of logits [N, T, V]."
        },
    )
    streamed_entropy: bool = field(
        default=False, metadata={"help": "Whether these also have the entropy of every token's softmax."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streamed_entropy and not self.streamed_metrics:
            raise ValueError("streamed_entropy is True, but streamed_metrics is False: set that one to True, too")
        if self.streamed_metrics and self.prediction_loss_only:
            raise ValueError(
                "streamed_metrics is True, but so is prediction_loss_only, which leaves none: set it to False"
            )
