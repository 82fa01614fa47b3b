"""The rows, the model and the trainer of a classifier's run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rows import Columns, Labeled, load_labeled
from ..models.classifiers import Classifier, Wanted, is_new, load_classifier, stored_loss
from .class_rows import (
    Collator,
    Part,
    as_ids,
    as_numbers,
    check_names,
    check_table,
    class_names,
    divided,
    encoder,
    known,
    part,
    standardize,
)
from .class_settings import EPOCHS, RATE, RATE_OF_NEW, SHARE, Classifying, Report
from .finetuning import arguments_of
from .predictions import measures, write_predictions


@dataclass(frozen=True)
class Task:
    """A run that is ready to start."""

    run: Classifying
    loss: Any
    data: Labeled
    classifier: Classifier
    trainer: Any
    held_out: Part
    steps: int
    counts: dict[str, int]

    def save(self, folder: str) -> None:
        """Writes the model, with adapters merged, its tokenizer or image processor, and its card."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.run.lora:
            model = model.merge_and_unload()
            model.save_pretrained(folder)
            if self.classifier.processor is not None:
                self.classifier.processor.save_pretrained(folder)
        else:
            self.trainer.save_model(folder)
        self.trainer.create_model_card(dataset=self.run.dataset)

    def predict(self, path: Path) -> tuple[Path, dict[str, float]]:
        """Writes the predictions; returns the file, and the number of rows with their measures."""
        data, rows = self.data, self.held_out
        if self.run.predict:
            data = _to_predict(self)
            labels = None if data.labels is None else _numbered(self, data, self.run.predict)
            encode = encoder(self.classifier, data.columns, self.run.max_length)
            rows = part(data, labels, np.arange(len(data.rows)), encode)
        logits, labels, _ = self.trainer.predict(rows.rows)
        logits = logits[0] if isinstance(logits, tuple) else logits
        names, task = self.classifier.names, data.columns.task
        shown = {"names": names, "labels": data.labels, "texts": _texts(data) if task == "text" else None}
        shown |= {"tokens": data.rows["tokens"]} if task == "tokens" else {}
        shown = {name: value for name, value in shown.items() if value}
        found = {} if labels is None else measures(self.loss, logits, labels)
        return write_predictions(path, self.loss, logits, rows, shown), {"rows": len(rows.indices), **found}


def prepared(run: Classifying, report: Report) -> Task:
    """Reads the rows, loads the model, and makes the trainer.

    Raises:
        ValueError: One of them cannot be used, or they do not fit.
    """
    from transformers import set_seed

    loss = _loss(run)
    rate = RATE_OF_NEW if is_new(run.model) else RATE
    run = replace(run, loss=written(loss), learning_rate=rate if run.learning_rate is None else run.learning_rate)
    run.check(loss)
    report.phase("reading the rows")
    inputs = tuple(run.column.split(",")) if run.column else ()
    data = load_labeled(run.dataset, run.split, Columns(run.task, inputs, run.label, loss.columns))
    if data.labels is None:
        raise ValueError(f"{run.dataset} has no column of labels: name one with --label, of {', '.join(data.found)}")
    if loss.labels == "values" and data.columns.task == "tokens":
        raise ValueError(f"task is tokens, but {run.loss} is a loss of values: choose a loss of classes")
    names = None if loss.labels == "values" else class_names(data, run.dataset, str(run.loss))
    report.phase("loading the model")
    set_seed(run.seed)
    wanted = Wanted(
        data.columns.task,
        names,
        len(names) if names else loss.least_classes,
        run.dtype,
        run.new_head,
        _size(data),
    )
    classifier = load_classifier(run.model, wanted)
    if run.steps == 0 and not classifier.trained:
        raise ValueError(f"steps is 0, but the head of model {run.model!r} is new: train it, or give a classifier")
    return _task(run, loss, data, classifier)


def _loss(run: Classifying) -> Any:
    """The loss that is named, or the one that the model was trained with, whose options are kept with its name."""
    from .. import classes

    if run.loss and run.steps != 0:
        return classes.get(run.loss)
    stored = stored_loss(run.model)
    if stored is None or (run.loss and run.loss != stored["loss"]):
        return classes.get(run.loss or "cross_entropy")
    options = {name: value for name, value in stored.items() if name not in ("loss", "classes")}
    return classes.get(stored["loss"], **options)


def written(loss: Any) -> str:
    """A loss as text: its name, and the options that are not its defaults."""
    from .. import classes

    options = loss.describe()
    name = options.pop("loss")
    default: dict[str, Any] = next((row["options"] for row in classes.table() if row["name"] == name), {})
    given = [f"{key}={value}" for key, value in options.items() if value != default.get(key)]
    return f"{name}:{', '.join(given)}" if given else name


def _in_range(loss: Any, labels: Sequence[float]) -> Any:
    """A loss of bins from the least to the largest label, if its range was not set."""
    unset = {name: end(labels) for name, end in (("low", min), ("high", max)) if getattr(loss, name, 0) is None}
    return replace(loss, **unset) if unset else loss


def _task(run: Classifying, loss: Any, data: Labeled, classifier: Classifier) -> Task:
    labels = as_ids(data, classifier.names) if classifier.names else as_numbers(data, run.dataset, str(run.loss))
    indices = known(labels)
    counts = {"unlabeled": len(labels) - len(indices)}
    train = held = indices
    if run.steps != 0:
        groups = data.rows[loss.together] if loss.together else None
        train, held = divided(indices, run.eval_share or SHARE, run.seed, groups)
    if loss.labels == "values":
        loss = _in_range(loss, [labels[i] for i in train])
        run = replace(run, loss=written(loss))
    if data.columns.task == "table":
        if not classifier.trained:
            standardize(classifier.model, data, train)
        check_table(classifier.model.config, data, run.dataset)
    encode = encoder(classifier, data.columns, run.max_length)
    parts = [part(data, labels, rows, encode) for rows in (train, held)]
    batches = math.ceil(len(train) / run.batch_size)
    each = math.ceil(batches / run.accumulation)
    steps = run.steps if run.steps is not None else math.ceil(each * (run.epochs or EPOCHS))
    trainer = _trainer(run, loss, classifier, parts, data.columns.task, steps)
    counts = {"train": len(train) if steps else 0, "held_out": len(held), **counts}
    return Task(run, loss, data, classifier, trainer, parts[1], steps, counts)


def _trainer(run: Classifying, loss: Any, classifier: Classifier, parts: list[Part], task: str, steps: int) -> Any:
    from transformers import PrinterCallback

    from .. import classes
    from ..trainers.classes import ClassConfig, ClassTrainer

    model = classifier.model
    classes.resize(model, loss)
    if run.lora:
        model = adapted(model, run.lora)
    options = {"class_weights": _weights(run.class_weights), "momentum": run.momentum}
    second = {}
    if run.second in ("average", "model"):
        options["second"] = run.second
    elif run.second:
        second = {"second": _teacher(run, classifier, task)}
    config = ClassConfig(
        **{**arguments_of(run, steps or 1), "remove_unused_columns": False, **run.more},
        loss=str(run.loss),
        **{name: value for name, value in options.items() if value is not None},
    )
    trainer = ClassTrainer(
        model,
        config,
        loss=loss,
        train_dataset=parts[0].rows,
        eval_dataset=parts[1].rows,
        processing_class=classifier.processor,
        data_collator=Collator(classifier, task, loss.columns),
        compute_metrics=lambda found: measures(loss, _first(found.predictions), found.label_ids),
        preprocess_logits_for_metrics=lambda logits, labels: _first(logits),
        **second,
    )
    trainer.remove_callback(PrinterCallback)  # the caller shows progress and numbers
    return trainer


def adapted(model: Any, rank: int) -> Any:
    """A classifier with LoRA adapters in its body; what is new in it is trained whole."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    body = model.base_model_prefix
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = [name for name in linear if name.startswith(f"{body}.")]
    rest = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    if not inner:
        raise ValueError(f"lora is {rank}, but the body of a {type(model).__name__} has no linear layer: choose 0")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=inner, modules_to_save=rest)
    return get_peft_model(model, config)


def _teacher(run: Classifying, classifier: Classifier, task: str) -> Any:
    """The model of the second pass. Raises: ValueError unless it is a classifier for the same classes."""
    assert run.second is not None, "the caller checks"
    teacher = load_classifier(run.second, Wanted(task, classifier.names, 2, run.dtype))
    if not teacher.trained or teacher.names != classifier.names:
        raise ValueError(
            f"second is {run.second!r}, which is no classifier for the classes {', '.join(classifier.names or ())} in"
            " this order: train one on these rows"
        )
    return teacher.model


def _weights(text: str | None) -> Any:
    if text in (None, "balanced"):
        return text
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"class_weights is {text!r}: choose 'balanced', or numbers with commas between them") from None


def _to_predict(task: Task) -> Labeled:
    """The rows to predict, in the columns of the data, of which labels and those of the loss may be missing."""
    assert task.run.predict is not None, "the caller checks"
    data = load_labeled(task.run.predict, task.run.predict_split, replace(task.data.columns, optional=True))
    if data.columns.task == "table":
        check_table(task.classifier.model.config, data, task.run.predict)
    return data


def _numbered(task: Task, data: Labeled, source: str) -> list[Any]:
    """The labels of rows to predict."""
    names = task.classifier.names
    if names is None:
        return as_numbers(data, source, str(task.run.loss))
    check_names(data, names, source)
    return as_ids(data, names)


def _texts(data: Labeled) -> list[str]:
    pairs = data.rows["text_pair"] if "text_pair" in data.rows.column_names else None
    firsts = data.rows["text"]
    return list(firsts) if pairs is None else [" | ".join(pair) for pair in zip(firsts, pairs, strict=True)]


def _size(data: Labeled) -> Any:
    first = data.rows[0]
    if data.columns.task == "image":
        return first["image"].size[::-1]
    return len(first["values"]) if data.columns.task == "table" else None


def _first(logits: Any) -> Any:
    return logits[0] if isinstance(logits, tuple) else logits
