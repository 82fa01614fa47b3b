"""What every trainer here is: given its own configuration, without options that have no effect, and with its own means.

args      a `config_class`, or a class made from it; not the configuration of another trainer, parents included
options   those that a trainer cannot honor are refused by name when it is made
means     of what training and evaluation steps note, and nobody else: a forward pass in a callback leaves nothing
          behind. They are logged since the last log in training, and once an evaluation under its own prefix
          (`eval`, `test`, `eval_` and the name of one of several sets), by `evaluate` and `predict` alike
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits, next_token_labels
from ..ops.rows import token_ids
from ..options.ranges import check_flag, check_integer, check_number, check_text
from ..patching.heads import inner_of
from .rows import IDS, check_rows

Mixin: Any = object  # its methods call those of a trainer that stands after it, which type checkers cannot know
Config = TypeVar("Config")
NO_MODEL_INIT = "the model is patched once, as it is given: pass model"
OWN_LOSS = "the trainer computes its own loss: use XentTrainer, or the method's own options"


class Options(Mixin):
    """Goes before the configuration of transformers or TRL in a class's bases: our own fields hold what they declare.

    A flag is True or False, a text a text, a number finite or in the interval that `ranges` has for it, and None is
    taken where it is declared. Raises: ValueError for anything else.
    """

    ranges: ClassVar[dict[str, str]] = {}
    """Field -> interval, in a class that declares fields; its parents' are added."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in reversed(type(self).__mro__) if kind.__module__.startswith(f"{__package__}.")]
        declared: dict[str, Any] = {name: x for kind in kinds for name, x in inspect.get_annotations(kind).items()}
        ranges: dict[str, str] = {name: x for kind in kinds for name, x in vars(kind).get("ranges", {}).items()}
        for name, annotation in declared.items():
            kind, *none = annotation.split(" | ")
            if none and getattr(self, name) is None:
                continue
            if kind in ("float", "int"):
                (check_number if kind == "float" else check_integer)(self, name, ranges.get(name, "(-inf, inf)"))
            elif kind in ("bool", "str"):
                (check_flag if kind == "bool" else check_text)(self, name)
        if hasattr(super(), "__post_init__"):  # alone it has none
            super().__post_init__()


class Method(Mixin):
    """Goes before a transformers or TRL trainer in a class's bases; see the module's docstring."""

    config_class: type
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask", "labels"), IDS)
    """Columns that have a value in every row, where they are there, and what the values are."""
    means: tuple[str, ...] = ()
    """Names of what `_note` is told, in a class that notes something; its parents' are added."""
    _in_training: bool | None = None  # in which kind of step we are, if in one

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}  # name -> [total, count], by kind of step
        if kwargs.get("data_collator") is not None:  # which may know what to do with any value
            self.columns = {}
        held_out = kwargs.get("eval_dataset")
        sets = held_out if isinstance(held_out, dict) else {"eval_dataset": held_out}
        for name, dataset in {"train_dataset": kwargs.get("train_dataset"), **sets}.items():
            if dataset is not None:
                check_rows(name, dataset, self.columns)
        super().__init__(*args, **kwargs)

    @classmethod
    def configured(cls, args: Config | None) -> Config:
        """`args`, or the defaults for None. Raises: ValueError for a configuration of another class."""
        kinds: list[type] = [vars(kind)["config_class"] for kind in cls.__mro__ if "config_class" in vars(kind)]
        if args is None:
            made: Config = cls.config_class(output_dir="out")
            return made
        known = {kind for config in kinds for kind in config.__mro__}
        of_others = [k for k in type(args).__mro__ if k.__module__.startswith(f"{__package__}.") and k not in known]
        if of_others or not all(isinstance(args, kind) for kind in kinds):
            raise ValueError(
                f"args is a {type(args).__name__}: {cls.__name__} takes a hf_xent.{cls.config_class.__name__}, with"
                " the fields of its own method"
            )
        return args

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer below; what is noted counts as training."""
        with self._step(training=True):
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer below; what is noted counts as evaluation."""
        with self._step(training=False):
            return super().prediction_step(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the trainer below. Raises: ValueError for what is no data set, and a name that none has."""
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
        """As the trainer below. Raises: ValueError for what is no data set."""
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
        self._sums[False] = {}
        self._pop_trl_means()  # of passes over data that no log has come after, such as predict's
        found = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        own = {**self._pop_trl_means(), **self._means(False)}
        means = {f"{metric_key_prefix}_{name}": value for name, value in own.items()}
        found.metrics.update({name: value for name, value in means.items() if name not in found.metrics})
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of training steps since the last log."""
        if "loss" in logs:
            logs.update(self._means(True))
        super().log(logs, *args, **kwargs)

    def _pop_trl_means(self) -> dict[str, float]:
        """What TRL's trainers keep of an evaluation for the next log, which would call it eval_ in any case."""
        found: dict[str, float] = {}
        for place in ("_metrics", "_stored_metrics"):  # the second one in its experimental trainers
            values = getattr(self, place, {}).get("eval", {})
            found |= {name.removeprefix("eval_"): float(sum(x)) / len(x) for name, x in values.items() if len(x)}
            values.clear()
        return found

    @contextmanager
    def _step(self, *, training: bool) -> Iterator[None]:
        outer, self._in_training = self._in_training, training
        try:
            yield
        finally:
            self._in_training = outer

    def _note(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a total over `count` things to a mean, within a step; elsewhere nothing happens."""
        if self._in_training is None:
            return
        sums, device = self._sums[self._in_training], self.accelerator.device
        pair = torch.stack([torch.as_tensor(x, device=device).detach().to(_wide(device)) for x in (total, count)])
        sums[name] = sums[name] + pair if name in sums else pair

    def _means(self, training: bool) -> dict[str, float]:
        """Means since the last call, over all processes; none of those of nothing."""
        sums, self._sums[training] = self._sums[training], {}
        names = list(dict.fromkeys(name for kind in type(self).__mro__ for name in vars(kind).get("means", ())))
        if not names:
            return {}
        device = self.accelerator.device
        nothing = torch.zeros(2, dtype=_wide(device), device=device)
        table = torch.stack([sums.get(name, nothing) for name in names])
        totals: Any = self.accelerator.reduce(table, reduction="sum")
        return {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True) if count}


def _wide(device: torch.device) -> torch.dtype:
    """Of sums over an evaluation."""
    return torch.float32 if device.type == "mps" else torch.float64


def refuse_options(args: Any, reasons: Mapping[str, str]) -> None:
    """Raises: ValueError for the first field of a configuration that has a reason and is not at its default."""
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != getattr(type(args), name):  # a dataclass keeps defaults as attributes of the class
            raise ValueError(f"{name} is {value!r}, but {reason}")


def refuse_arguments(given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises: ValueError for the first keyword that has a reason and a value."""
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is given, but {reason}")


def refuse_compilation(model: nn.Module | None, args: Any, what: str) -> None:
    """Raises: ValueError if the model is, or is to be, compiled; `what` needs the head's hidden states."""
    if args.torch_compile or hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"torch_compile is {args.torch_compile}{'' if args.torch_compile else ' but the model is compiled'}:"
            f" compiled models compute their logits the ordinary way, and {what}: train without torch_compile"
        )


def refuse_encoder_decoder(model: Any) -> None:
    """Raises: ValueError for a model whose labels are another sequence than its inputs; and for what is none."""
    inner: Any = inner_of(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model is a {type(inner).__name__}, an encoder and a decoder, but this trainer reads inputs and labels as"
            " one sequence: use XentTrainer"
        )


def refuse_unlabeled(inputs: Mapping[str, Any]) -> None:
    """Raises: ValueError for a batch that has no labels."""
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        raise ValueError(f"a batch has {', '.join(inputs)} but no labels: use a language-modeling data collator")


def targets(inputs: Mapping[str, Any]) -> Tensor:
    """What every position of a batch has to predict, -100 for nothing. Raises: ValueError if it has no labels."""
    refuse_unlabeled(inputs)
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    return next_token_labels(labels) if shifted is None else token_ids(shifted)  # type: ignore[arg-type]


def lazy(logits: Any, length: int, what: str) -> LazyLogits:
    """Logits of sequences of a length that are not computed yet: `what` reads hidden states off them.

    Those of virtual tokens, which prompt tuning puts before a sequence, are left out. Raises: ValueError for others.
    """
    if not isinstance(logits, LazyLogits) or logits.is_dense:
        raise ValueError(
            f"the logits are a {type(logits).__name__} with values, but {what} reads hidden states off lazy ones: train"
            " without torch_compile, without an offloaded or sharded head or an adapter on it, and see hf-xent check"
        )
    cut: Any = logits[:, -length:] if logits.shape[1] > length else logits
    return cut
