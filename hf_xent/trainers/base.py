"""What every trainer here is: given its own configuration, without options that have no effect, and with its own means.

args      a `config_class`, or a class made from it; not the configuration of another trainer, parents included
options   those that a trainer cannot honor are declared with the reason, and refused by name when it is made
means     of what training and evaluation steps note, and nobody else: a forward pass in a callback leaves nothing
          behind. They are logged since the last log in training, and once an evaluation under its own prefix
          (`eval`, `test`, `eval_` and the name of one of several sets), by `evaluate` and `predict` alike
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..options.ranges import check_flag, check_integer, check_number, check_text
from .means import Sums
from .refusals import refuse_arguments, refuse_options
from .rows import IDS, check_rows

Mixin: Any = object  # its methods call those of a trainer that stands after it, which type checkers cannot know
Config = TypeVar("Config")


class Options(Mixin):
    """Goes before the configuration of transformers or TRL in a class's bases: our own fields hold what they declare.

    A flag is True or False, a text a text, a number finite or in its interval, and None is taken where it is declared.
    The three tables below are about the fields that a class declares; those of its parents are added.

    Raises:
        ValueError: A field has another value, or is set where its method does not read it.
    """

    ranges: ClassVar[dict[str, str]] = {}
    """Field -> interval, such as "[0, 1)"."""
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Field -> the values it may have."""
    read_by: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Field -> the values of the field `method` under which it has an effect."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in reversed(type(self).__mro__) if kind.__module__.startswith(f"{__package__}.")]
        ranges, choices, read_by = (_merged(kinds, table) for table in ("ranges", "choices", "read_by"))
        for name, annotation in {
            name: x for kind in kinds for name, x in inspect.get_annotations(kind).items()
        }.items():
            kind, *optional = annotation.split(" | ")
            if optional and getattr(self, name) is None:
                continue
            if kind in ("float", "int"):
                (check_number if kind == "float" else check_integer)(self, name, ranges.get(name, "(-inf, inf)"))
            elif kind in ("bool", "str"):
                (check_flag if kind == "bool" else check_text)(self, name)
        if hasattr(super(), "__post_init__"):  # alone it has none
            super().__post_init__()
        for name, values in choices.items():
            if getattr(self, name) not in values:
                *others, last = map(repr, values)
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {', '.join(others)} or {last}")
        unread = [name for name, methods in read_by.items() if self.method not in methods]
        if unread:
            refuse_options(self, dict.fromkeys(unread, f"method is {self.method!r}, which does not read it"))


class Method(Mixin):
    """Goes before a transformers or TRL trainer in a class's bases; see the module's docstring.

    What a class declares here is added to what its parents do.
    """

    config_class: type
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask", "labels"), IDS)
    """Columns that have a value in every row, where they are there, and what the values are."""
    means: tuple[str, ...] = ()
    """Names of what `_note` is told that are logged as means."""
    counts: tuple[str, ...] = ()
    """Names of what `_note` is told that are logged as totals."""
    refused_options: Mapping[str, str] = {}
    """Field of the configuration -> why it has to stay at its default."""
    refused_arguments: Mapping[str, str] = {}
    """Keyword of the trainer -> why it cannot be given."""
    averages_items = False
    """Whether the loss is a mean over a batch's items, not a sum over the tokens of all batches of a step."""
    _in_training: bool | None = None  # in which kind of step we are, if in one

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums = {True: Sums(), False: Sums()}  # by kind of step
        if kwargs.get("data_collator") is not None:  # which may know what to do with any value
            self.columns = {}
        held_out = kwargs.get("eval_dataset")
        sets = held_out if isinstance(held_out, dict) else {"eval_dataset": held_out}
        for name, dataset in {"train_dataset": kwargs.get("train_dataset"), **sets}.items():
            if dataset is not None:
                check_rows(name, dataset, self.columns)
        super().__init__(*args, **kwargs)
        if self.averages_items:  # training_step is then to divide by the number of accumulated batches
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False

    @classmethod
    def configured(cls, args: Config | None, arguments: Mapping[str, Any] | None = None) -> Config:
        """`args`, or the defaults for None; what the trainer cannot honor of these and of its keywords is refused.

        Args:
            args: A `config_class`, or a class made from it.
            arguments: Keywords that the trainer is made with.

        Raises:
            ValueError: A configuration of another class, or an option or keyword that is declared as refused.
        """
        if args is None:
            args = cls.config_class(output_dir="out")
        elif not cls._accepts(args):
            raise ValueError(
                f"args is a {type(args).__name__}: {cls.__name__} takes a hf_xent.{cls.config_class.__name__}, with"
                " the fields of its own method"
            )
        refuse_arguments(arguments or {}, _merged(cls.__mro__[::-1], "refused_arguments"))
        refuse_options(args, _merged(cls.__mro__[::-1], "refused_options"))
        return args

    @classmethod
    def _accepts(cls, args: Any) -> bool:
        """Whether a configuration is of the trainer's classes, or made from them alone."""
        kinds: list[type] = [vars(kind)["config_class"] for kind in cls.__mro__ if "config_class" in vars(kind)]
        known = {kind for config in kinds for kind in config.__mro__}
        of_others = [k for k in type(args).__mro__ if k.__module__.startswith(f"{__package__}.") and k not in known]
        return not of_others and all(isinstance(args, kind) for kind in kinds)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer below; what is noted counts as training."""
        with self._step(training=True):
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer below; what is noted counts as evaluation."""
        with self._step(training=False):
            return super().prediction_step(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the trainer below.

        Raises:
            ValueError: What is no data set, or a name that none has.
        """
        known = [*self.eval_dataset] if isinstance(self.eval_dataset, dict) else []
        if isinstance(eval_dataset, str) and eval_dataset not in known:
            raise ValueError(
                f"eval_dataset is {eval_dataset!r}: pass a data set, or the name of one that the trainer has"
                f" ({', '.join(map(str, known)) or 'none'})"
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_rows("eval_dataset", eval_dataset, self.columns)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the trainer below.

        Raises:
            ValueError: What is no data set.
        """
        check_rows("test_dataset", test_dataset, self.columns)
        return super().get_test_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the trainer below, with the means of this evaluation under its prefix."""
        self._sums[False] = Sums()
        self._pop_trl_means()  # of passes over data that no log has come after, such as predict's
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {**self._pop_trl_means(), **self._means(False)}
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        output.metrics.update({name: value for name, value in named.items() if name not in output.metrics})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of training steps since the last log."""
        if "loss" in logs:
            logs.update(self._means(True))
        super().log(logs, *args, **kwargs)

    def _pop_trl_means(self) -> dict[str, float]:
        """What TRL's trainers keep of an evaluation for the next log, which would call it eval_ in any case."""
        means: dict[str, float] = {}
        for attribute in ("_metrics", "_stored_metrics"):  # the second one in its experimental trainers
            values = getattr(self, attribute, {}).get("eval", {})
            means |= {name.removeprefix("eval_"): float(sum(x)) / len(x) for name, x in values.items() if len(x)}
            values.clear()
        return means

    @contextmanager
    def _step(self, *, training: bool) -> Iterator[None]:
        outer, self._in_training = self._in_training, training
        try:
            yield
        finally:
            self._in_training = outer

    def _note(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a total over `count` things to a mean or a count, within a step; elsewhere nothing happens."""
        if self._in_training is not None:
            self._sums[self._in_training].add(name, total, count, self.accelerator.device)

    def _means(self, training: bool) -> dict[str, float]:
        """Means and counts since the last call, over all processes; none of those of nothing."""
        means, counts = (
            list(dict.fromkeys(name for kind in type(self).__mro__ for name in vars(kind).get(table, ())))
            for table in ("means", "counts")
        )
        sums = self._sums[training].take(means + counts, self.accelerator)
        averages = {name: sums[name][0] / sums[name][1] for name in means if sums[name][1]}
        return averages | {name: int(sums[name][0]) for name in counts if sums[name][1]}


def _merged(kinds: Iterable[type], table: str) -> dict[str, Any]:
    """What classes declare in a table of a name, later ones over earlier ones."""
    return {key: value for kind in kinds for key, value in vars(kind).get(table, {}).items()}
