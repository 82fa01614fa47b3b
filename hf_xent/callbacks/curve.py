"""The curve of a training as a CSV file: of every optimizer step its learning rate, its loss and the tokens so far.

    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[CurveCallback("runs/cosine.csv")])

What trainers log cannot replace it: with `logging_steps=50`, a logged loss is the mean of 50 steps, and the learning
rate beside it is that of the last one. Laws of training (`hf_xent.laws`) need both of every step.

The first line is a comment with what the run is, as JSON; then come a line with the names of the columns and the rows:

    # {"model": "GPT2LMHeadModel", "schedule": "cosine", "learning_rate": 0.001, "max_steps": 1000, ...}
    step,lr,loss,tokens,params
    1,0.0001,8.317,512,1204224
"""

from __future__ import annotations

import inspect
import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..system.files import replace_atomically

COLUMNS = ("step", "lr", "loss", "tokens", "params")


class CurveCallback(TrainerCallback):
    """Writes the curve of a training, in any trainer that derives from `transformers.Trainer` (TRL's included).

    `loss` is that of the step alone, as `logging_steps=1` would log it: summed over accumulated batches, and the mean
    over ranks. `lr` is what the optimizer has used (of its first group), before the scheduler moves on. `tokens` counts
    the input's tokens without padding, of all ranks since the training began; of an input that is no text, its rows.

    A training that resumes from a checkpoint drops the rows after it and goes on. Rows are gathered on the device and
    written together, so that no step waits for them; what is not yet written when a process dies, a resumed training
    computes again.

    Args:
        path: The CSV file. The main process alone writes it.
        every: Rows are written after so many steps, before every checkpoint and in the end.

    Raises:
        ValueError: `every` is not positive. When the training begins: the file is that of another run, of a finished
            one, or lacks steps before the checkpoint.
    """

    def __init__(self, path: str | Path, every: int = 50):
        if every < 1:
            raise ValueError(f"every is {every}: give a positive number of steps")
        self.path, self.every = Path(path), every
        self._trainer: Trainer | None = None
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[int, float, Tensor, Tensor]] = []
        self._loss: Any = 0.0
        self._tokens: Any = 0
        self._lr = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read what there is of the file, and follow the trainer's steps."""
        self._leave()  # a training that failed did not call on_train_end
        self._clear()
        self._trainer = trainer = running_trainer()
        self._params = _parameters(trainer)
        self._run = _description(trainer, state)
        self._seen, self._begun = 0, False
        if state.is_world_process_zero:
            self._seen = self._resume(state.global_step)
            self._begun = state.global_step > 0
        step = trainer.training_step  # with what the trainer's class makes of it

        @wraps(step)
        def followed(model: Any, inputs: Any, *more: Any, **options: Any) -> Tensor:
            self._tokens = self._tokens + _tokens(inputs, trainer)  # before the step, which may take inputs away
            loss = step(model, inputs, *more, **options)
            self._loss = self._loss + loss.detach()
            return loss

        trainer.training_step = followed  # of this object alone, until the training ends

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer is about to use its learning rate."""
        self._lr = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The scheduler has moved on, and what the trainer logs comes after."""
        device = args.device
        loss, tokens = torch.as_tensor(self._loss, device=device), torch.as_tensor(self._tokens, device=device)
        self._rows.append((state.global_step, self._lr, loss.float(), tokens))
        self._loss, self._tokens = 0.0, 0
        if len(self._rows) >= self.every or control.should_save or control.should_training_stop:
            self._write()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint may follow."""
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another callback may have asked for the checkpoint after `on_step_end`."""
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last rows, and leave the trainer as it was."""
        self._write()
        self._leave()

    def _leave(self) -> None:
        if self._trainer is not None:
            self._trainer.__dict__.pop("training_step", None)
        self._trainer = None

    def _write(self) -> None:
        """Every rank has the same rows to write at the same time, since all go through the same steps."""
        if not self._rows or self._trainer is None:
            return
        steps, rates, losses, tokens = zip(*self._rows, strict=True)
        self._rows = []
        accelerator = self._trainer.accelerator
        mean = accelerator.reduce(torch.stack(losses), "mean").tolist()
        total = accelerator.reduce(torch.stack(tokens), "sum").tolist()
        if not accelerator.is_main_process:
            return
        lines = []
        for step, rate, loss, count in zip(steps, rates, mean, total, strict=True):
            self._seen += int(count)
            lines.append(f"{step},{rate!r},{loss!r},{self._seen},{self._params}\n")
        if not self._begun:
            self._replace([])
            self._begun = True
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _replace(self, lines: list[str]) -> None:
        head = f"# {json.dumps(self._run)}\n{','.join(COLUMNS)}\n"
        replace_atomically(self.path, lambda draft: draft.write_text(head + "".join(lines), encoding="utf-8"))

    def _resume(self, step: int) -> int:
        """Keep the rows up to a step, and return the tokens until then."""
        first, lines = _read(self.path)
        if first is None and step == 0:
            return 0
        if first is not None and first != self._run:
            name = min(name for name in {*first, *self._run} if first.get(name) != self._run.get(name))
            raise ValueError(
                f"path is {str(self.path)!r}, the curve of another run, with {name}={first.get(name)!r}, not"
                f" {self._run.get(name)!r}: choose another file"
            )
        if step == 0:
            if len(lines) >= self._run["max_steps"]:
                raise ValueError(f"path is {str(self.path)!r}, the curve of a finished run: choose another file")
            return 0
        if [line.partition(",")[0] for line in lines[:step]] != [str(i + 1) for i in range(step)]:
            raise ValueError(
                f"path is {str(self.path)!r}, which does not have all steps before the checkpoint of step {step}: a law"
                " needs them all; begin the training anew, or leave the callback out"
            )
        self._replace(lines[:step])
        return int(lines[step - 1].split(",")[3])


def _read(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """What the run of a file is, and its complete rows; None without a file."""
    if not path.exists():
        return None, []
    first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    try:
        run = json.loads(first.removeprefix("# "))
    except ValueError:
        run = None
    if not isinstance(run, dict) or not lines or lines[0].strip() != ",".join(COLUMNS):
        raise ValueError(f"path is {str(path)!r}, which is no curve of this callback: choose another file")
    return run, [line for line in lines[1:] if line.endswith("\n")]  # a process may have died while it wrote


def running_trainer() -> Trainer:
    """The trainer that is calling its callbacks: they are given its parts, but not the trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("CurveCallback was not called by a transformers.Trainer: pass it in a trainer's `callbacks`")


def _parameters(trainer: Trainer) -> int:
    """The number of the model's parameters, embeddings included."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    parameters = model.num_parameters() if hasattr(model, "num_parameters") else 0
    return int(parameters or sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))  # ZeRO-3 empties p


def _description(trainer: Trainer, state: Any) -> dict[str, Any]:
    """What makes a run, as it is read back from JSON."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    group = trainer.optimizer.param_groups[0]
    described = {
        "model": type(model).__name__,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "schedule": getattr(args.lr_scheduler_type, "value", str(args.lr_scheduler_type)),
        "schedule_options": args.lr_scheduler_kwargs or {},
        "learning_rate": group.get("initial_lr", group["lr"]),  # the scheduler's base, which it keeps in the optimizer
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "max_steps": state.max_steps,
        "seed": args.seed,
        "params": _parameters(trainer),
    }
    return dict(json.loads(json.dumps(described, default=str)))


def _tokens(inputs: Any, trainer: Trainer) -> Any:
    """The tokens of a batch that are not padding; its rows, if the input is no text."""
    main = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"), inputs.get("input_ids"))
    if not torch.is_tensor(main):
        return 0
    if main.ndim != 2 or main.is_floating_point():
        return len(main)
    mask = inputs.get("attention_mask")
    return mask.sum() if torch.is_tensor(mask) and mask.shape == main.shape else main.numel()
