"""Classifiers by name: a checkpoint of transformers, or a new small model.

a folder or Hub id                              text, tokens, image; table if it is a classifier of tables
tiny-vit:hidden=64, layers=3, patch=7           image, from random weights
gru:hidden=64  or  mlp:hidden=64                table, from random weights
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..registry import parse
from .loading import explain_load_errors, tokenizer_of
from .quiet import without_load_report

NEW = {"tiny-vit": "image", "gru": "table", "mlp": "table"}
"""New models -> the task that they are for."""
AUTO = {
    "text": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "image": "AutoModelForImageClassification",
    "table": "AutoModelForSequenceClassification",
}
"""Task -> the class of transformers that loads a classifier."""


@dataclass(frozen=True)
class Wanted:
    """What a classifier is for."""

    task: str
    """A key of `AUTO`."""
    names: list[str] | None
    """The classes of the data in their order; None for numbers."""
    outputs: int
    """The width of a new head."""
    dtype: str = "float32"
    new_head: bool = False
    """Whether a checkpoint that is a classifier already gets a new head."""
    size: Any = None
    """For new models, the height and width of images, or the number of values in a row of a table."""


@dataclass(frozen=True)
class Classifier:
    """A classifier with what comes before it."""

    model: Any
    processor: Any
    """The tokenizer or image processor; None for tables."""
    names: list[str] | None
    """The classes in the order of their ids; None for numbers."""
    trained: bool
    """Whether its head was loaded."""


def load_classifier(name: str, wanted: Wanted) -> Classifier:
    """A classifier for a task, whose head is new unless the checkpoint is a classifier for this task.

    Args:
        name: A checkpoint's folder or Hub id, or a name of `NEW`, with options if any.
        wanted: What it is for. A classifier's own classes take precedence over those of the data, which have to be
            among them.

    Returns:
        The model in evaluation mode, its tokenizer or image processor, and its classes.

    Raises:
        ValueError: There is no such model, it is for another task, or a classifier for other classes.
    """
    kind, _, options = name.partition(":")
    if kind in NEW:
        if NEW[kind] != wanted.task:
            raise ValueError(f"model is {name!r}, which is for the task {NEW[kind]}: choose another for {wanted.task}")
        with _options_of(name):
            model = (
                _tiny_vit(wanted, **parse(options)) if kind == "tiny-vit" else _table(wanted, kind, **parse(options))
            )
        _name_classes(model.config, wanted.names)
        processor = _processor(model, model.config.image_size) if kind == "tiny-vit" else None
        return Classifier(model.to(_dtype(wanted)).eval(), processor, wanted.names, False)
    if wanted.task == "table" and not _is_table(name):
        raise ValueError(f"model is {name!r}, but rows of numbers need 'gru', 'mlp', or a model that was made of these")
    return _checkpoint(name, wanted)


def is_new(name: str) -> bool:
    """Whether a name stands for a new model with random weights."""
    return name.partition(":")[0] in NEW


def stored_loss(name: str) -> dict[str, Any] | None:
    """The loss that a checkpoint was trained with, as its configuration describes it; None for another model."""
    if is_new(name):
        return None
    import transformers

    from . import table  # noqa: F401  registers itself with transformers

    with explain_load_errors(name) as source:
        return getattr(transformers.AutoConfig.from_pretrained(source), "hf_xent_loss", None)


def _checkpoint(name: str, wanted: Wanted) -> Classifier:
    import transformers

    loader = getattr(transformers, AUTO[wanted.task])
    with explain_load_errors(name) as source, without_load_report():
        config = transformers.AutoConfig.from_pretrained(source)
        trained = _is_classifier(config, wanted.task) and not wanted.new_head
        if wanted.new_head or not trained:
            config.__dict__.pop("hf_xent_loss", None)
            config.num_labels = wanted.outputs
            _name_classes(config, wanted.names)
        names = _classes_of(config, wanted, name) if trained else wanted.names
        model, report = loader.from_pretrained(
            source, config=config, dtype=wanted.dtype, ignore_mismatched_sizes=wanted.new_head, output_loading_info=True
        )
    missing = sum(p.numel() for n, p in model.named_parameters() if n in set(report["missing_keys"]))
    if 2 * missing > sum(p.numel() for p in model.parameters()):
        raise ValueError(f"model is {name!r}, whose weights are not those of a {type(model).__name__}: choose another")
    if wanted.new_head:
        _renew(model)
    processor = None
    if wanted.task == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    elif wanted.task != "table":
        processor = tokenizer_of(name)
        _pad(model, processor)
    return Classifier(model, processor, names, trained)


def _is_classifier(config: Any, task: str) -> bool:
    """Whether a checkpoint has a head for this task."""
    return any(arch.endswith(AUTO[task].removeprefix("AutoModel")) for arch in config.architectures or ())


def _is_table(name: str) -> bool:
    import transformers

    from .table import TableConfig  # registers itself with transformers

    with explain_load_errors(name) as source:
        return isinstance(transformers.AutoConfig.from_pretrained(source), TableConfig)


def _classes_of(config: Any, wanted: Wanted, name: str) -> list[str] | None:
    """The classes of a trained classifier in their order. Raises: ValueError if the data have others."""
    count = (getattr(config, "hf_xent_loss", None) or {}).get("classes", config.num_labels)
    if wanted.names is None:
        return None
    stored = getattr(config, "hf_xent_names", None) or [config.id2label.get(i, "") for i in range(count)]
    if all(label == f"LABEL_{i}" for i, label in enumerate(stored)) and len(wanted.names) == count:
        return wanted.names  # it was saved without names
    if others := [label for label in wanted.names if label not in stored]:
        raise ValueError(
            f"model is {name!r}, a classifier of {count} classes ({_listed(stored)}), but there are labels"
            f" {_listed(others)}: give it a new head with --new-head, or choose other rows"
        )
    return list(stored)


def _name_classes(config: Any, names: Sequence[str] | None) -> None:
    """Writes the classes into a configuration: as those of the outputs, and for heads that have other outputs."""
    if names is None:
        config.__dict__.pop("hf_xent_names", None)
        return
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.hf_xent_names = list(names)


def _renew(model: Any) -> None:
    """Draws the head anew: the last linear layer with an output for each label."""
    from ..classes.heads import head_of

    if (head := head_of(model)) is not None:
        nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def _pad(model: Any, tokenizer: Any) -> None:
    """A model of the GPT kind pads by its end of text."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no token to pad with: set tokenizer.pad_token and save it")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id


def _tiny_vit(
    wanted: Wanted, hidden: int = 64, layers: int = 3, patch: int = 7, heads: int = 4, size: int | None = None
) -> Any:
    """A Vision Transformer of a hundred thousand parameters, for images of a few dozen pixels a side."""
    from transformers import ViTConfig, ViTForImageClassification

    seen = wanted.size if isinstance(wanted.size, tuple) else (28, 28)
    side = size or max(patch, round(min(max(seen), 32 * patch) / patch) * patch)
    config = ViTConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        num_labels=wanted.outputs,
    )
    return ViTForImageClassification(config)


def _table(wanted: Wanted, kind: str, hidden: int = 256, layers: int = 1, dropout: float = 0.15) -> Any:
    """A classifier of rows of numbers, which does not standardize them yet."""
    from .table import TableConfig, TableForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "dropout": dropout}
    config = TableConfig(features=wanted.size, encoder=kind, num_labels=wanted.outputs, **sizes)
    return TableForSequenceClassification(config)


def _processor(model: Any, side: int) -> Any:
    import transformers

    maker = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return maker(size={"height": side, "width": side})


def _dtype(wanted: Wanted) -> Any:
    import torch

    return getattr(torch, wanted.dtype)


@contextmanager
def _options_of(name: str) -> Iterator[None]:
    """A TypeError for an unknown option becomes a ValueError that names it."""
    try:
        yield
    except TypeError as error:
        reason = str(error).rpartition(") ")[2]
        raise ValueError(f"model is {name!r}, whose options cannot be used ({reason}): correct them") from error


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
