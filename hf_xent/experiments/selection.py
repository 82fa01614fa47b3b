"""A selection of texts as data: the pool, the target, how texts are ranked, and the file that they are written to."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.selectors import SELECTORS
from .fields import option

LOSS = "loss"
"""The selector that takes two models."""


@dataclass(frozen=True)
class Selecting:
    """Everything a selection depends on; each field is an option of `hf-xent data select`."""

    source: str  # the pool, any source of `hf_xent.data.load_text`
    k: int = option("How many texts to choose.", 1000, min=1)
    target: str | None = option("Texts of the target, as SOURCE; 'random', 'length' and 'loss' read none.", None)
    by: str = option(
        f"How texts are ranked, with options if any ('compression:level=1'): {SELECTORS.names()}.", "compression"
    )
    column: str = "text"  # the column that holds the text
    split: str | None = None  # of the pool, such as 'train[:1000]'
    target_column: str | None = option("Column that holds the target's text [default: as --column].", None)
    target_split: str | None = option("Split of the target's data, or a slice of it.", None)
    jobs: int = option("In how many processes texts are scored; the result is the same for any number.", 1, min=1)
    tuned: str | None = option("For 'loss': the model that was fine-tuned on the target.", None)
    base: str | None = option("For 'loss': the model before the fine-tuning, with the same tokenizer.", None)
    batch_size: int | None = option("For 'loss': texts per forward pass [default: 16].", None, min=1)
    max_tokens: int | None = option("For 'loss': how many tokens of a text are scored [default: 512].", None, min=1)
    output: str = option("File for the chosen rows: .jsonl, .json, .csv or .parquet.", "out/selected.jsonl")

    @property
    def name(self) -> str:
        """The selector without its options."""
        return self.by.partition(":")[0].strip()

    def check(self) -> None:
        """Check the options that can be checked without the data.

        Raises:
            ValueError: For an unknown selector or option, and for an option that is missing or has no effect.
        """
        from ..data.selectors import get

        selector = SELECTORS.find(self.name)
        if self.name != LOSS:
            get(self.by)
            models: tuple[str, ...] = ("tuned", "base", "batch_size", "max_tokens")
        elif self.by != LOSS:
            raise ValueError(f"by is {self.by!r}: the losses are those of --tuned and --base, write 'loss' alone")
        else:
            models = ()
            if missing := [name for name in ("tuned", "base") if getattr(self, name) is None]:
                raise ValueError(f"{missing[0]} is None, but by is 'loss', which compares two models: name the model")
            if self.jobs != 1:
                raise ValueError(f"jobs is {self.jobs}, but models score in one process: leave it out")
        reads = selector.reads_target
        if reads and self.target is None:
            raise ValueError(f"target is None, but by is {self.by!r}, which compares with texts: name a target")
        idle = (*models, *(() if reads else ("target", "target_column", "target_split")))
        if given := [name for name in idle if getattr(self, name) is not None]:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r}, but {self.by!r} does not read it: leave it out"
            )
