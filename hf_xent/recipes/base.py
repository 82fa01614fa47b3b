"""What every recipe has: the arguments of its data, its trainer by name, and how the trainer is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar


@dataclass
class DataArguments:
    """Where the rows come from, in TRL's names."""

    dataset_name: str = field(
        default="pydoc",
        metadata={
            "help": "The data: 'pydoc' (packaged, offline), a text, JSON, CSV or Parquet file, a folder, or a Hub id."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of a data set of the Hub."})
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "The split to train on, or a slice of one, 'train[:10%%]'; default: train."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "The split to evaluate on; default: eval_rows of the split to train on."}
    )
    eval_rows: int = field(
        default=64,
        metadata={"help": "How many rows are held out, where no test split is given (at most half); 0 for none."},
    )

    def __post_init__(self) -> None:
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows is {self.eval_rows}: choose 0 or more")

    @property
    def source(self) -> str:
        """The data set with its configuration, as `hf_xent.data` reads it."""
        return f"{self.dataset_name}:{self.dataset_config}" if self.dataset_config else self.dataset_name


@dataclass(frozen=True)
class Setup:
    """The parsed arguments of a run."""

    data: Any
    """An instance of the recipe's `arguments`."""
    config: Any
    """The configuration of the trainer."""
    model: Any
    """`trl.ModelConfig`."""
    given: Mapping[str, Any]
    """What the user gave, on the command line or in the file: name -> value."""
    phase: Callable[[str], None] = print
    """Called with what begins: 'loading the model', 'reading the data', ..."""


class Recipe:
    """How a trainer is run from the command line; a subclass names its trainer and reads its data.

    The first line of a recipe's file is the help of its command; `Example:` there is a command that works.
    """

    trainer: ClassVar[str]
    """The trainer's name in `hf_xent.trainers`; it is made by `make`."""
    config: ClassVar[str]
    """The configuration, as 'file:class' in `hf_xent.trainers`."""
    arguments: ClassVar[type] = DataArguments
    """The dataclass of what the command reads beside the configuration and `trl.ModelConfig`."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Argument -> its default here, where that is another one than the dataclass has."""

    shown: ClassVar[Mapping[str, str]] = {}
    """Argument of TRL's configuration -> what the short help says of it, beside the fields of our own."""

    def check(self, setup: Setup) -> None:
        """Checks what can be checked before anything is loaded. Raises: ValueError."""

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """The model, with adapters if they are asked for, and its tokenizer or processor."""
        from .models import adapted, load_causal_lm

        model, tokenizer = load_causal_lm(setup.model)
        return adapted(model, setup.model), tokenizer

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The keywords `train_dataset`, `eval_dataset` (None for no evaluation), and others that the trainer takes."""
        raise NotImplementedError

    def make(self, setup: Setup) -> Any:
        """The trainer, ready to train."""
        setup.phase("loading the model")
        model, tokenizer = self.model(setup)
        setup.phase("reading the data")
        options = self.datasets(setup, model, tokenizer)
        trainer = getattr(import_module("..trainers", __package__), self.trainer)
        return trainer(model, args=setup.config, processing_class=tokenizer, **options)


def split_rows(data: DataArguments, read: Callable[[str, str | None], Any], seed: int) -> tuple[Any, Any]:
    """The rows to train on and those to evaluate on, which are None if `eval_rows` is 0.

    Args:
        data: The arguments.
        read: A function of a source and a split that returns a `datasets.Dataset`.
        seed: The seed by which rows are held out, where there is no test split.

    Raises:
        ValueError: A split cannot be read, or one row is all there is.
    """
    train = read(data.source, data.dataset_train_split)
    if data.dataset_test_split is not None:
        return train, read(data.source, data.dataset_test_split)
    if not data.eval_rows:
        return train, None
    if len(train) < 2:
        raise ValueError(
            f"dataset_name is {data.dataset_name!r}, which has one row, but one has to be held out: set eval_rows to 0"
        )
    parts = train.train_test_split(test_size=min(data.eval_rows, len(train) // 2), seed=seed)
    return parts["train"], parts["test"]
