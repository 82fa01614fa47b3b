"""Attacks on a trained classifier, batch by batch: `attacked(Attacking(...))`. An interrupted run goes on.

Until all is written, a draft in the output folder keeps what each attack has found, a line for every batch. It is used
again if the weights, the inputs and the settings are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ..data.rows import Columns, load_labeled
from ..models.classifiers import Classifier, Wanted, load_classifier
from ..models.contexts import eval_mode
from ..models.fingerprints import fingerprint_model
from ..models.quiet import quiet_loading
from ..robust import attack
from ..robust.gradient_masking import masking
from ..robust.inputs import ball_of, target_of
from ..system.drafts import Draft
from ..system.files import replace_atomically
from .attack_results import Attacked, Found, summary, write_rows
from .attack_settings import Attacking
from .class_rows import Collator, as_ids, class_names, encoder, known, part

MASKED = 256
"""The most rows that signs of masking are looked for in."""

Report = Callable[[str, int, int, float], None]
"""`report(method, done, total, robust accuracy so far)`, in rows."""


@dataclass
class Task:
    """A run that is ready to start."""

    run: Attacking
    classifier: Classifier
    rows: Any
    """The inputs of the model, with 'labels'."""
    indices: np.ndarray
    """The index of each row in the data, [N]."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    unlabeled: int

    @property
    def labels(self) -> np.ndarray:
        """Ids of classes [N]."""
        return np.asarray(self.rows["labels"])

    def batches(self, first: int = 0) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """The batches from the number `first` on, and their labels, on the model's device."""
        device, size = self.classifier.model.device, self.run.batch_size
        for start in range(first * size, len(self.rows), size):
            yield self.batch(range(start, min(start + size, len(self.rows))), device)

    def batch(self, which: range, device: Any) -> tuple[dict[str, Any], torch.Tensor]:
        """Some rows, and their labels."""
        batch = {name: value.to(device) for name, value in self.collate([self.rows[i] for i in which]).items()}
        return batch, batch.pop("labels")


def attacked(run: Attacking, report: Report | None = None) -> tuple[Attacked, dict[str, Any]]:
    """Attacks a classifier, and writes what was found to `rows.csv` and `results.json` in the output folder.

    Args:
        run: The settings.
        report: Who is told of the progress.

    Returns:
        What was found row by row, and a summary of it.

    Raises:
        ValueError: An option, the data or the model cannot be used.
    """
    run.check()
    with quiet_loading():
        task = prepared(run)
        identity = [fingerprint_model(task.classifier.model), _digest(task)]
        outcome = Attacked(task.classifier.names or [], task.labels, task.indices, unlabeled=task.unlabeled)
        drafts = []
        for method in run.methods:
            settings = json.dumps([*identity, run.of_one(method)])
            name = hashlib.sha256(method.encode()).hexdigest()[:8]
            draft = Draft(Path(run.output, f".attack-{name}.partial"), settings)
            outcome.found[method] = _under(task, method, draft, report)
            drafts.append(draft)
        if run.masking:
            batch, labels = task.batch(range(min(MASKED, len(task.rows))), task.classifier.model.device)
            options: Any = {"norm": run.norm, "processor": task.classifier.processor, "seed": run.seed}
            options |= {"batch_size": run.batch_size}
            outcome.masking = asdict(masking(task.classifier.model, batch, labels, run.radius, run.steps, **options))
    found = summary(run, outcome)
    folder = Path(run.output)
    replace_atomically(folder / "rows.csv", lambda draft: write_rows(draft, outcome))
    stored = json.dumps({"run": asdict(run), **found}, indent=1)
    replace_atomically(folder / "results.json", lambda draft: draft.write_text(stored, encoding="utf-8"))
    for draft in drafts:
        draft.file.unlink()
    return outcome, found


def prepared(run: Attacking) -> Task:
    """Reads the rows and loads the classifier.

    Raises:
        ValueError: One of them cannot be used, or they do not fit.
    """
    inputs = tuple(run.column.split(",")) if run.column else ()
    data = load_labeled(run.dataset, run.split, Columns(run.task, inputs, run.label))
    task = data.columns.task
    if task not in ("image", "text"):
        raise ValueError(f"{run.dataset} has rows of {task}: attacks are on images and texts, of one label a row")
    if data.labels is None:
        raise ValueError(f"{run.dataset} has no column of labels: name one with --label, of {', '.join(data.found)}")
    names = class_names(data, run.dataset, "an attack")
    classifier = load_classifier(run.model, Wanted(task, names, len(names), run.dtype))
    if not classifier.trained:
        raise ValueError(f"model is {run.model!r}, which is no trained classifier: train it with `hf-xent classify`")
    if torch.accelerator.is_available():
        classifier.model.to(torch.accelerator.current_accelerator())
    labels = as_ids(data, classifier.names or [])
    indices = known(labels)
    unlabeled = len(labels) - len(indices)
    if run.limit is not None and run.limit < len(indices):
        indices = np.sort(np.random.default_rng(run.seed).permutation(indices)[: run.limit])
    rows = part(data, labels, indices, encoder(classifier, data.columns, run.max_length)).rows
    return Task(run, classifier, rows, indices, Collator(classifier, task), unlabeled)


def _digest(task: Task) -> str:
    """A hash of all inputs and labels."""
    found = hashlib.sha256(json.dumps(task.classifier.names).encode())
    for batch, labels in task.batches():
        for tensor in (*batch.values(), labels):
            found.update(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def _under(task: Task, method: str, draft: Draft, report: Report | None) -> Found:
    """What an attack finds, in batches that are on disk before the next one begins."""
    right = lambda: [not wrong for chunk in draft.chunks for wrong in chunk["flipped"]]  # noqa: E731
    name = hashlib.sha256(draft.settings.encode()).hexdigest()[:12]
    folder = Path(task.run.output, "inputs", name) if task.run.keep_inputs else None
    tell = report or (lambda method, done, total, robust: None)
    if draft.chunks:
        tell(method, len(right()), len(task.rows), float(np.mean(right())))
    with draft.appending() as append:
        for batch, labels in task.batches(len(draft.chunks)):
            number = len(draft.chunks)
            file = None if folder is None else folder / f"{number:05}.safetensors"
            append(_of_batch(task, method, (batch, labels), number, file))
            tell(method, len(right()), len(task.rows), float(np.mean(right())))
    chunks = draft.chunks
    lists: dict[str, Any] = {
        key: [x for chunk in chunks for x in chunk[key]] for key in ("predicted", "under", "flipped", "distance")
    }
    sums: dict[str, Any] = {key: sum(chunk[key] for chunk in chunks) for key in ("passes", "seconds")}
    return Found(**lists, **sums, folder="" if folder is None else str(folder))


def _of_batch(task: Task, method: str, given: tuple[Any, torch.Tensor], number: int, file: Path | None) -> Any:
    """What an attack finds in a batch, as lists and numbers."""
    (batch, labels), run, model = given, task.run, task.classifier.model
    processor, every = task.classifier.processor, torch.arange(len(labels), device=labels.device)
    start = perf_counter()
    found = attack(
        model, batch, labels, run.radius, run.steps, method, norm=run.norm, processor=processor, seed=run.seed
    )
    flipped = found.flipped.tolist()  # waits for the device
    seconds = perf_counter() - start
    target = target_of(model, batch, labels)
    with eval_mode(model), torch.no_grad():
        ball, center = ball_of(target, run.radius, run.norm, processor), target.center()
        predicted, under = (target.logits(x, every).argmax(-1).tolist() for x in (target.given, found.inputs))
        distance = (ball.distance(found.inputs.to(center), center) * run.radius).tolist()
    if file is not None:
        _keep(file, found.inputs, labels, task.indices[number * run.batch_size :][: len(labels)])
    lists = {"predicted": predicted, "under": under, "flipped": flipped, "distance": distance}
    return {**lists, "passes": int(found.passes), "seconds": seconds}


def _keep(file: Path, inputs: torch.Tensor, labels: torch.Tensor, rows: np.ndarray) -> None:
    """Writes the changed inputs of a batch."""
    from safetensors.torch import save_file

    tensors = {"inputs": inputs, "labels": labels, "rows": torch.tensor(rows)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_atomically(file, lambda draft: save_file(tensors, draft))
