"""One fine-tuning run as data, and its execution in this process: `fit(Run(...), PATCHED)` gives an `Outcome`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..losses import LOSSES
from ..models.quiet import quiet_loading
from .fields import option

STOCK, PATCHED = "stock", "hf_xent"
"""The arms: the model's own loss under transformers' `Trainer`, and the run's loss under `XentTrainer`."""


@dataclass(frozen=True)
class Tuning:
    """The settings that all trainings share."""

    model: str = "smollm2"  # a packaged model, or any Hub id or path
    dataset: str = "pydoc"  # any source of `hf_xent.data.load_text`
    split: str | None = None  # of the dataset, such as 'train[:10%]'
    batch_size: int = option("Blocks per forward pass.", 4, min=1)
    accumulation: int = option("Forward passes per optimizer step.", 1, min=1)
    learning_rate: float = option("Peak learning rate of AdamW, decayed linearly.", 2e-5)
    lora: int = option(
        "Rank of LoRA adapters on all linear layers but the head, the rest frozen; 0 trains all weights.", 0, min=0
    )
    gradient_checkpointing: bool = option(
        "Compute each layer's activations again in the backward pass instead of keeping them.", False
    )
    seed: int = option("Seed of batches, dropout and everything else.", 0, min=0, max=2**32 - 1)
    dtype: str = "float32"  # of the model: float32, bfloat16 or float16
    output: str = option("Folder for the model, its checkpoints, results.json and curves.png.", "out/train")
    save_steps: int = option("Write a checkpoint after every so many steps; 0 writes none.", 0, min=0)
    resume: bool = option("Resume from the newest checkpoint in the output folder.", False)
    save: bool = option("Save the fine-tuned model.", True)


@dataclass(frozen=True)
class Training(Tuning):
    """The settings that all trainings of a causal LM on text share."""

    column: str = "text"  # the column that holds the text
    steps: int = option("Optimizer steps.", 30, min=1)
    block_size: int = option("Tokens per block.", 192, min=2)
    eval_blocks: int = option("Blocks held out for evaluation.", 4, min=1)
    memory_budget: int | None = option(
        "Bytes of logits in memory at a time [default: half a byte for each number in the head, or more].", None
    )


@dataclass(frozen=True)
class Run(Training):
    """All settings of a fine-tuning run; each field is an option of `hf-xent train`."""

    loss: str = option(f"The loss, with options if any, such as 'focal:gamma=3': {LOSSES.names()}.", "cross_entropy")
    tail: float = option(
        "Relative error allowed to the gradient of the logits by compressing unlikely tokens; 0 is exact.", 0.0
    )
    save: bool = option("Save the fine-tuned model (never with --compare).", True)


@dataclass
class Outcome:
    """The measurements of a run; lists have one number for each step."""

    arm: str
    losses: list[float]
    seconds: list[float]
    memory: list[int]  # peak of resident memory during the step, bytes (one entry if it cannot be reset)
    eval_before: float
    eval_after: float
    tokens_per_step: int
    logs: list[dict[str, float]]
    evaluations: list[dict[str, float]]  # before and after, without their prefix

    @property
    def peak(self) -> int:
        """Peak memory of the process over all training steps, bytes."""
        return max(self.memory)


def fit(
    run: Run,
    arm: str,
    before_step: Callable[[int], None] = lambda step: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Train one arm of a run in this process.

    Args:
        run: The run; with `run.save` the model and its card are written to `run.output`.
        arm: STOCK for the model's own loss, PATCHED for `run.loss` without logits.
        before_step: Called with the step's number before each optimizer step; it may wait.
        on_phase: Called with a phase's name when it begins: 'loading the model', 'training', ...

    Returns:
        Losses, seconds and peak memory of every step, and the evaluation loss before and after.

    Raises:
        ValueError: If the model or the text cannot be used, or there is no checkpoint to resume from.
    """
    return fitted(run, arm, lambda: make_trainer(run, arm, on_phase), before_step, on_phase)


def fitted(
    run: Training,
    arm: str,
    make_trainer: Callable[[], Any],
    before_step: Callable[[int], None],
    on_phase: Callable[[str], None],
) -> Outcome:
    """`fit` with a trainer that the caller makes."""
    with quiet_loading():
        on_phase("loading the libraries")
        trainer, watch = make_trainer(), watching(before_step)
        trainer.add_callback(watch)
        checkpoint = checkpoint_of(run, run.steps)
        on_phase("evaluating")
        before = trainer.evaluate()
        on_phase("training")
        trainer.train(resume_from_checkpoint=checkpoint)
        on_phase("evaluating")
        after = trainer.evaluate()
        if run.save:
            on_phase("saving")
            trainer.save_model(run.output)
            trainer.state.log_history.insert(0, {**before, "step": 0})  # training began a log of its own
            trainer.create_model_card(dataset=run.dataset)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(
        arm=arm,
        losses=[entry["loss"] for entry in logs],
        seconds=watch.seconds,
        memory=watch.memory,
        eval_before=before["eval_loss"],
        eval_after=after["eval_loss"],
        tokens_per_step=run.batch_size * run.accumulation * run.block_size,
        logs=logs,
        evaluations=[{name.removeprefix("eval_"): x for name, x in found.items()} for found in (before, after)],
    )


def make_trainer(run: Run, arm: str, on_phase: Callable[[str], None] = lambda phase: None) -> Any:
    """The trainer of an arm, with its model and text."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from ..models import loading
    from ..models.anatomy import check_room
    from ..trainers import XentConfig, XentTrainer

    on_phase("loading the model")
    set_seed(run.seed)
    model, tokenizer = loading.load(run.model, dtype=run.dtype)
    check_room(model, run.block_size, "block_size")
    if run.lora:
        model = adapted(model, run.lora)
    on_phase("reading the text")
    train, held_out = _blocks(run, tokenizer)
    options: dict[str, Any] = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    if arm == PATCHED:
        config = XentConfig(
            **arguments_of(run, run.steps), loss=run.loss, memory_budget=run.memory_budget, tail=run.tail
        )
        trainer: Trainer = XentTrainer(model, config, **options)
    else:
        trainer = Trainer(model, TrainingArguments(**arguments_of(run, run.steps)), **options)
    trainer.remove_callback(PrinterCallback)  # the caller shows progress and numbers
    return trainer


def adapted(model: Any, rank: int) -> Any:
    """The model with LoRA adapters of this rank; all other weights are frozen."""
    from peft import LoraConfig, get_peft_model

    # all linear layers but the output embedding; the strength alpha / rank = 2 of PEFT's own examples
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def checkpoint_of(run: Tuning, steps: int) -> str | None:
    """The newest checkpoint of a run that resumes; a finished one is refused: Trainer would take one step too many."""
    if not run.resume:
        return None
    checkpoint = newest_checkpoint(run.output)
    step = int(checkpoint.rsplit("-", 1)[1])
    if step >= steps:
        raise ValueError(
            f"nothing to resume: {Path(checkpoint).name} in {run.output} is at step {step} of {steps}, choose"
            " more steps"
        )
    return checkpoint


def newest_checkpoint(folder: str) -> str:
    """The newest checkpoint of a folder. Raises: ValueError if there is none."""
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if checkpoint is None:
        raise ValueError(f"no checkpoint in {folder}: train with save_steps first, or without resume")
    return str(checkpoint)


def _blocks(run: Run, tokenizer: Any) -> tuple[Any, Any]:
    """The blocks of text to train on, and the held-out blocks."""
    from ..data import load_text, pack

    blocks = pack(load_text(run.dataset, run.split, run.column), tokenizer, run.block_size, run.column)
    if len(blocks) < 2:
        raise ValueError(
            f"dataset {run.dataset!r} fills {len(blocks)} blocks of {run.block_size} tokens, but 2 are needed: choose a"
            " smaller block_size"
        )
    held_out = min(run.eval_blocks, len(blocks) // 2)
    split = blocks.train_test_split(test_size=held_out, seed=run.seed)
    return split["train"], split["test"]


def arguments_of(run: Tuning, steps: int) -> dict[str, Any]:
    """The training arguments that all trainings share."""
    import torch
    from transformers import TrainingArguments

    # transformers 5.23 renamed the option; older versions know only the old name
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        checkpointing: run.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if run.gradient_checkpointing else None,
        "output_dir": run.output,
        "max_steps": steps,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "learning_rate": run.learning_rate,
        "logging_steps": 1,
        "save_strategy": "steps" if run.save_steps else "no",
        "save_steps": run.save_steps or 500,
        "seed": run.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,  # the run uses the dtype of the model
        "report_to": [],
        "disable_tqdm": True,
    }


def watching(before_step: Callable[[int], None], memory: bool = True) -> Any:
    """A callback that calls `before_step`, and measures time and memory of every optimizer step.

    Without `memory`, time alone: garbage is collected before memory is measured, which takes long beside a small step.
    """
    from transformers import TrainerCallback

    from ..bench.memory import PeakMemory

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.memory: list[int] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            before_step(state.global_step)
            if memory:
                self.meter = PeakMemory(args.device).__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            if not memory:
                return
            self.meter.__exit__()
            self.memory.append(self.meter.peak)

    return Watch()
