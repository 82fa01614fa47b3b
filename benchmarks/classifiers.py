"""The time of a training step of `ClassTrainer` beside that of transformers' `Trainer`, on the same model and rows.

Both train by cross-entropy or, for the others, `ClassTrainer` by another loss. Trainers take turns, a few steps each; a
step is timed from its first batch to the end of the optimizer's update, so what losses do before that counts, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
)

from hf_xent.system.machine import cpu_name
from hf_xent.trainers import ClassConfig, ClassTrainer

LOSSES = ("cross_entropy", "focal", "comp_sum", "dice", "svm", "pairs", "bias", "core_tuning", "symmetric_ce")
CLASSES, ROWS = 10, 64
STOCK = "transformers.Trainer"


class Clock(TrainerCallback):
    """Seconds of every step but the first two of a run."""

    def __init__(self, seconds: list[float]):
        self.seconds, self.start = seconds, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first batch of the step has been read."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has updated the weights."""
        if state.global_step > 2:
            self.seconds.append(time.perf_counter() - self.start)


def page(encoder: str | None, rounds: int, steps: int) -> str:
    """The table, as Markdown; `encoder` is a model of text, beside the tiny ViT."""
    models = {"ViT, 64 hidden, 3 layers, 28 x 28": None}
    if encoder:
        shape = AutoConfig.from_pretrained(encoder)
        models[f"{shape.model_type}, {shape.hidden_size} hidden, {shape.num_hidden_layers} layers, 32 tokens"] = encoder
    times: dict[str, dict[str, list[float]]] = {name: {arm: [] for arm in (STOCK, *LOSSES)} for name in models}
    for _ in range(rounds):
        for name, source in models.items():
            for arm in times[name]:
                _run(arm, source, steps if source else 5 * steps, times[name][arm])
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for arm in (STOCK, *LOSSES):
        cells = (_cell(times[name][arm], times[name][STOCK]) for name in models)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    title = "# Steps of classifiers\n\n`python -m benchmarks classifiers --encoder FOLDER` makes this page.\n\n"
    about = (
        f"{title}{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: median\nmilliseconds of"
    )
    about += f" a step of {ROWS} rows, and the ratio to {STOCK}; {rounds} rounds of {steps - 2} steps of"
    about += f" text\nor {5 * steps - 2} of images, in turns."
    return "\n".join([about, "", *lines])


def _cell(seconds: list[float], stock: list[float]) -> str:
    ours, theirs = statistics.median(seconds), statistics.median(stock)
    return f"{1000 * ours:.1f}, {ours / theirs:.3f}"


def _run(arm: str, source: str | None, steps: int, seconds: list[float]) -> None:
    torch.manual_seed(0)
    model, data = _text(source) if source else _images()
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS, "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        clock: list[Any] = [Clock(seconds)]
        if arm == STOCK:
            trainer: Any = Trainer(model, TrainingArguments(**shared), train_dataset=data, callbacks=clock)
        else:
            trainer = ClassTrainer(model, ClassConfig(**shared), loss=arm, train_dataset=data, callbacks=clock)
        trainer.train()


def _images() -> tuple[Any, Dataset]:
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=28, patch_size=7,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    rows = {"pixel_values": torch.randn(4 * ROWS, 1, 28, 28).numpy(), "labels": _labels()}
    return AutoModelForImageClassification.from_config(config), Dataset.from_dict(rows).with_format("torch")


def _text(source: str) -> tuple[Any, Dataset]:
    config = AutoConfig.from_pretrained(source, num_labels=CLASSES)
    ids = torch.randint(1000, config.vocab_size, (4 * ROWS, 32))
    rows = {"input_ids": ids.numpy(), "labels": _labels()}
    return AutoModelForSequenceClassification.from_config(config), Dataset.from_dict(rows).with_format("torch")


def _labels() -> list[int]:
    return torch.randint(CLASSES, (4 * ROWS,)).tolist()
