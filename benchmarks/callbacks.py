"""What callbacks that measure add to a training: `CurveCallback` at every step, `GeometryCallback` at each evaluation.

The same small GPT-2 trains without callback, with the one and with the other, in turns, each from the same weights and
on the same batches. A turn's time is that from its third step to its last one, everything between steps included. What
CurveCallback adds is less than turns differ by, so the time within its own calls is measured, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_xent.callbacks.curve import CurveCallback, running_trainer
from hf_xent.system.machine import cpu_name

FILE = Path("benchmarks/results/callbacks.md")
SHAPE = {"vocab_size": 2048, "n_positions": 64, "n_embd": 160, "n_layer": 3, "n_head": 4}
ROWS, LENGTH, DOCUMENTS, BEFORE = 8, 64, 256, 2
TARGET = 0.02
"""The share of a step that a callback may take, decided before anything was measured."""


Arm = Callable[[Path, int], list[Any]]
"""From a folder and the steps of a turn to its callbacks."""


class Clock(TrainerCallback):
    """The time from the third step of a training to its end; the last callback, so that what others do then counts."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first steps allocate what the later ones use."""
        if state.global_step == BEFORE:
            self.start = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step and what callbacks did in it."""
        self.seconds = time.perf_counter() - self.start


class TimedCurve(CurveCallback):
    """The callback, and the seconds that its calls have taken since the third step."""

    seconds = 0.0

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = call(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Around the callback's own part of a training step, which the trainer's own step lies within."""
        inner = (trainer := running_trainer()).training_step
        trainer.training_step = lambda *more, **options: self._less(inner, *more, **options)  # type: ignore[method-assign]
        super().on_train_begin(args, state, control, **kwargs)
        followed = trainer.training_step
        trainer.training_step = lambda *more, **options: self._timed(followed, *more, **options)  # type: ignore[method-assign]

    def _less(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = inner(*args, **kwargs)
        self.seconds -= time.perf_counter() - start
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first steps are not timed."""
        if state.global_step == BEFORE:
            self.seconds = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._timed(super().on_pre_optimizer_step, *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._timed(super().on_step_end, *args, **kwargs)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._timed(super().on_epoch_end, *args, **kwargs)


def page(rounds: int, steps: int, every: int) -> str:
    """The table, as Markdown.

    Args:
        rounds: Turns of each arm.
        steps: Steps of a turn, of which the first two are not timed.
        every: Steps between two evaluations of the geometry, over which one is spread.
    """
    curves: list[TimedCurve] = []

    def curve_arm(folder: Path, steps: int) -> list[Any]:
        curves.append(TimedCurve(folder / "curve.csv", every=10))
        return [curves[-1]]

    arms: dict[str, Arm] = {
        "none": lambda folder, steps: [],
        "CurveCallback": lambda folder, steps: [
            curves.append(TimedCurve(folder / "curve.csv", every=10)) or curves[-1]
        ],
        "GeometryCallback": _geometry,
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    _turn(arms["none"], BEFORE + 1)  # the process's first training is slower
    for turn in range(rounds):
        for arm in list(arms)[turn % 3 :] + list(arms)[: turn % 3]:  # each is the first in turn
            times[arm].append(_turn(arms[arm], steps))
    timed = steps - BEFORE
    plain = statistics.median(times["none"]) / timed
    curve = [(ours - none) / none for ours, none in zip(times["CurveCallback"], times["none"], strict=True)]
    own = [callback.seconds / none for callback, none in zip(curves, times["none"], strict=True)]
    one = [(ours - none) / 2 for ours, none in zip(times["GeometryCallback"], times["none"], strict=True)]
    geometry = [seconds / (every * plain) for seconds in one]
    lines = ["| callback | what it does | median | smallest and largest of the rounds |", "|---|---|---|---|"]
    lines += [
        f"| CurveCallback | a row a step, written every 10 steps | {_share(curve)} |",
        f"| | the same, the time within its own calls | {_share(own)} |",
        f"| GeometryCallback | an evaluation of {DOCUMENTS} documents every {every} steps | {_share(geometry)} |",
    ]
    about = (
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}. A GPT-2 of"
        f" {_model().num_parameters()} parameters, {ROWS} x {LENGTH} tokens\na step; without a callback a step takes"
        f" {1000 * plain:.1f} ms. {rounds} rounds of {timed} timed steps, in turns; shares are of a step's time,\n"
        f"round by round. One evaluation of the geometry takes {1000 * statistics.median(one):.0f} ms. The target,"
        f" decided before, is at most {TARGET:.0%}:\n"
    )
    kept = [name for name, shares in (("CurveCallback", own), ("GeometryCallback", geometry)) if _met(shares)]
    verdict = f"{' and '.join(kept)} met it." if kept else "neither met it."
    return "\n".join(
        ["# Callbacks\n\n`python -m benchmarks callbacks` makes this page.\n", about + verdict, "", *lines]
    )


def _met(shares: list[float]) -> bool:
    return statistics.median(shares) <= TARGET


def _share(shares: list[float]) -> str:
    return f"{statistics.median(shares):+.2%} | {min(shares):+.2%} to {max(shares):+.2%}"


def _geometry(folder: Path, steps: int) -> list[Any]:
    """Two evaluations are timed, in the middle of a turn and after its last step; that before the first one is not."""
    from hf_xent.callbacks.geometry import GeometryCallback

    texts = torch.randint(3, SHAPE["vocab_size"], (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(1))
    return [GeometryCallback(texts.tolist(), every=steps // 2, file=folder / "geometry.csv")]


def _model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**SHAPE, **off, activation_function="gelu_pytorch_tanh"))


def _turn(callbacks: Arm, steps: int) -> float:
    ids = torch.randint(SHAPE["vocab_size"], (ROWS * steps, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()}).with_format("torch")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, report_to="none", save_strategy="no",
            logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(_model(), arguments, train_dataset=rows, callbacks=[*callbacks(Path(folder), steps), clock]).train()
    return clock.seconds
