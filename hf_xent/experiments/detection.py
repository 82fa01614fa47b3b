"""A detection run as data: its texts, models and scores, and the file that the scores are written to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..detection.scores import SECOND_MODEL
from .fields import option

DEFAULT_CORPUS = "pydoc"


class Task(StrEnum):
    """The question that a detection run answers for each text."""

    members = "members"
    generated = "generated"


CLASSES = {Task.members: ("member", "non-member"), Task.generated: ("generated", "human")}
"""Task -> the names of its positive and its negative class."""
DEFAULTS = {
    Task.members: ("loss", "zlib", "lowercase", "min_k", "min_k_pp", "dc_pdd"),
    Task.generated: ("loss", "min_k_pp", "fast_detect"),
}
WITH_REFERENCE = {Task.members: ("reference",), Task.generated: ("fast_detect_pair", "binoculars")}


@dataclass(frozen=True)
class Detection:
    """Everything a detection run depends on; each field is an option of `hf-xent detect`.

    If `scores` is None, they are the DEFAULTS of the task and, with a `reference`, also its WITH_REFERENCE.
    """

    task: Task
    source: str  # any source of `hf_xent.data.load_text`
    model: str = "smollm2"  # the model that scores: a packaged one, or any Hub id or path of a causal LM
    reference: str | None = option(
        "A second model with the same vocabulary, for scores that compare the two models.", None
    )
    scores: str | None = option(
        "Scores with their options, ';' between them: 'min_k:k=0.1; dc_pdd' [default: by task].", None
    )
    column: str = "text"  # the column that holds the text
    split: str | None = None  # of the data set, such as 'train[:1000]'
    label: str | None = option("Column of labels; adds metrics, a ROC plot and the blind baseline.", None)
    positive: str | None = option(
        "The label of members or generated texts; all others are negative [default: 1].", None
    )
    corpus: str | None = option(
        f"Where dc_pdd counts token frequencies, as SOURCE; a Hub id is streamed [default: {DEFAULT_CORPUS}].", None
    )
    documents: int | None = option("How many documents of the corpus are counted [default: all].", None, min=1)
    batch_size: int = option("Texts per forward pass.", 16, min=1)
    max_tokens: int = option("How many tokens of a text are scored, from its start.", 512, min=1)
    dtype: str = "auto"  # of the models: float32, bfloat16, float16, or as saved
    resamples: int | None = option("Number of resamples for the bootstrap intervals [default: 1000].", None, min=1)
    output: str = option(
        "File for the rows with their scores: .csv, .parquet, .json or .jsonl.", "out/detect/scores.csv"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The scores without duplicates. Raises: ValueError if none is named."""
        if self.scores is None:
            return DEFAULTS[self.task] + (WITH_REFERENCE[self.task] if self.reference else ())
        names = tuple(dict.fromkeys(name.strip() for name in self.scores.split(";") if name.strip()))
        if not names:
            raise ValueError(f"scores is {self.scores!r}: name at least one, such as 'loss; min_k:k=0.1'")
        return names

    def check(self) -> None:
        """Check the options that can be checked without the data.

        Raises:
            ValueError: For an unknown score, and for an option that would have no effect.
        """
        from ..detection import get

        needs = {need for name in self.names for need in get(name).needs}
        labels, counts, compares = self.label is not None, "frequencies" in needs, not needs.isdisjoint(SECOND_MODEL)
        for reason, used, options in (
            ("without --label", labels, ("positive", "resamples")),
            ("but no score counts tokens", counts, ("corpus", "documents")),
            ("but no score compares with it", compares, ("reference",)),
        ):
            idle = [] if used else [name for name in options if getattr(self, name) is not None]
            if idle:
                raise ValueError(f"{idle[0]} is {getattr(self, idle[0])!r}, {reason}: leave it out")
