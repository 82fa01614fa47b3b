"""The base of all trainers here: checks of their configurations, refusals of options without effect, means in the log.

args      must be an instance of the trainer's `config_class` or of a subclass; the configuration of another trainer is
          refused, even that of a parent class
options   that a trainer cannot honor are declared with the reason, and are refused by name when the trainer is made
means     are taken over what training and evaluation steps record. A forward pass outside of a step, as in a callback,
          is not recorded. In training each log has the means since the last one; `evaluate` and `predict` report those
          of an evaluation under its prefix (`eval`, `test`, or `eval_` and the name of one of several data sets)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..options.ranges import check_flag, check_integer, check_number, check_text
from .means import Sums
from .refusals import refuse_arguments, refuse_options
from .renamed_weights import load_renamed
from .rows import IDS, check_rows
from .weights import check_columns, refuse_columns

Mixin: Any = object  # a mixin's methods call those of the trainer after it in the bases, unknown to type checkers
Config = TypeVar("Config")


class Options(Mixin):
    """Goes before the configuration of transformers or TRL in a class's bases: checks the fields that we declare.

    A flag has to be True or False, text a string, and a number finite or in its interval; None is allowed where the
    annotation allows it. The three tables describe the fields of the class; those of its parents are added.

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
        classes = [cls for cls in reversed(type(self).__mro__) if cls.__module__.startswith(f"{__package__}.")]
        ranges, choices, read_by = (_merged(classes, table) for table in ("ranges", "choices", "read_by"))
        annotations = {name: text for cls in classes for name, text in inspect.get_annotations(cls).items()}
        for name, annotation in annotations.items():
            type_name, *optional = annotation.split(" | ")
            if optional and getattr(self, name) is None:
                continue
            if type_name in ("float", "int"):
                (check_number if type_name == "float" else check_integer)(self, name, ranges.get(name, "(-inf, inf)"))
            elif type_name in ("bool", "str"):
                (check_flag if type_name == "bool" else check_text)(self, name)
        if hasattr(super(), "__post_init__"):  # not where no other configuration follows in the bases
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

    What a class declares in these attributes is added to what its parents declare.
    """

    config_class: type
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask", "labels"), IDS)
    """Column -> what its values are. Where a data set has the column, every row has to have a value."""
    means: tuple[str, ...] = ()
    """Names of the quantities recorded by `_note` that are logged as means."""
    counts: tuple[str, ...] = ()
    """Names of the quantities recorded by `_note` that are logged as totals."""
    refused_options: Mapping[str, str] = {}
    """Field of the configuration -> why it has to stay at its default."""
    refused_arguments: Mapping[str, str] = {}
    """Keyword of the trainer -> why it cannot be passed."""
    averages_items = False
    """Whether the loss is a mean over a batch's items, not a sum over the tokens of all batches of a step."""
    weighs_labels = False
    """Whether columns that weigh labels have an effect; otherwise they are refused."""
    _in_training: bool | None = None  # True in a training step, False in an evaluation step, None outside of steps

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums = {True: Sums(), False: Sums()}  # whether of training steps -> sums
        if kwargs.get("data_collator") is not None:  # a collator of the user's may accept any value
            self.columns = {}
        eval_dataset = kwargs.get("eval_dataset")
        eval_sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": kwargs.get("train_dataset"), **eval_sets}.items():
            if dataset is not None:
                self._check_rows(name, dataset)
        super().__init__(*args, **kwargs)
        if self.averages_items:  # training_step then divides by the number of accumulated batches
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False

    def _check_rows(self, name: str, dataset: Any) -> None:
        """Raises: ValueError for a data set without rows, or whose columns the trainer cannot use."""
        check_rows(name, dataset, self.columns)
        if self.weighs_labels:
            check_columns(name, dataset)
        else:
            refuse_columns(name, dataset, type(self).__name__)

    @classmethod
    def configured(cls, args: Config | None, arguments: Mapping[str, Any] | None = None) -> Config:
        """Checks a configuration, and refuses the options and keywords that the trainer cannot honor.

        Args:
            args: An instance of `config_class` or of a subclass; None stands for the defaults.
            arguments: The keywords that the trainer is made with.

        Returns:
            The configuration.

        Raises:
            ValueError: A configuration of another class, or an option or keyword that is declared as refused.
        """
        if args is None:
            args = cls.config_class(output_dir="out")
        elif not cls._accepts(args):
            raise ValueError(
                f"args is a {type(args).__name__}: {cls.__name__} takes a hf_xent.{cls.config_class.__name__}, which"
                " has the options of its method"
            )
        refuse_arguments(arguments or {}, _merged(cls.__mro__[::-1], "refused_arguments"))
        refuse_options(args, _merged(cls.__mro__[::-1], "refused_options"))
        return args

    @classmethod
    def _accepts(cls, args: Any) -> bool:
        """Whether a configuration is an instance of all configuration classes of the trainer, and of no other's."""
        configs: list[type] = [vars(base)["config_class"] for base in cls.__mro__ if "config_class" in vars(base)]
        known = {base for config in configs for base in config.__mro__}
        of_others = [x for x in type(args).__mro__ if x.__module__.startswith(f"{__package__}.") and x not in known]
        return not of_others and all(isinstance(args, config) for config in configs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the stock trainer; what the step records counts as training."""
        with self._step(training=True):
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock trainer; what the step records counts as evaluation."""
        with self._step(training=False):
            return super().prediction_step(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the stock trainer.

        Raises:
            ValueError: `eval_dataset` is not a data set, or is a name that none of the trainer's data sets has.
        """
        names = [*self.eval_dataset] if isinstance(self.eval_dataset, dict) else []
        if isinstance(eval_dataset, str) and eval_dataset not in names:
            raise ValueError(
                f"eval_dataset is {eval_dataset!r}: pass a data set, or the name of one that the trainer has"
                f" ({', '.join(map(str, names)) or 'none'})"
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._check_rows("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the stock trainer.

        Raises:
            ValueError: `test_dataset` is not a data set.
        """
        self._check_rows("test_dataset", test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """As the stock trainer, also where the checkpoint's files name the weights otherwise than the model does."""
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            given = args[0] if args else kwargs.get("model")
            load_renamed(self.model if given is None else given, checkpoint)

    def _load_best_model(self) -> None:
        """As the stock trainer, also where the files name the weights otherwise."""
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed(self.model, self.state.best_model_checkpoint)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the stock trainer, with the means of this evaluation under its prefix."""
        self._sums[False] = Sums()
        self._pop_trl_means()  # left by passes over data that no log followed, such as those of `predict`
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {**self._pop_trl_means(), **self._means(False)}
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        output.metrics.update({name: value for name, value in prefixed.items() if name not in output.metrics})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of training steps since the last log."""
        if "loss" in logs:
            logs.update(self._means(True))
        super().log(logs, *args, **kwargs)

    def _pop_trl_means(self) -> dict[str, float]:
        """Takes the means that TRL's trainers keep for the next log, where their prefix would always be eval_."""
        means: dict[str, float] = {}
        for attribute in ("_metrics", "_stored_metrics"):  # the second one in TRL's experimental trainers
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
        """Adds a total over `count` items to a mean or a count; it has an effect only within a step."""
        if self._in_training is not None:
            self._sums[self._in_training].add(name, total, count, self.accelerator.device)

    def _counted_over_processes(self, count: Tensor | float, device: torch.device) -> Tensor:
        """The items of a step by which its losses are divided: those of all processes, unless the arguments say not."""
        total = torch.as_tensor(count, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total.reshape(1)).sum()
        return total

    @property
    def _averaged_by(self) -> int:
        """What a loss that was divided by a count of all processes is multiplied by: DDP averages their gradients."""
        processes: int = self.accelerator.num_processes
        return processes if self.args.average_tokens_across_devices else 1

    def _means(self, training: bool) -> dict[str, float]:
        """Means and counts since the last call, over all processes; those without any items are left out."""
        means, counts = (
            list(dict.fromkeys(name for cls in type(self).__mro__ for name in vars(cls).get(table, ())))
            for table in ("means", "counts")
        )
        sums = self._sums[training].take(means + counts, self.accelerator)
        averages = {name: sums[name][0] / sums[name][1] for name in means if sums[name][1]}
        return averages | {name: int(sums[name][0]) for name in counts if sums[name][1]}


def _merged(classes: Iterable[type], table: str) -> dict[str, Any]:
    """Merges the table of this name that classes declare; later classes take precedence."""
    return {key: value for cls in classes for key, value in vars(cls).get(table, {}).items()}
