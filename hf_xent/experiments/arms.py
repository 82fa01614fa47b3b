"""One fine-tuning run as data (`Run`), and two of them side by side: the stock loss and ours, each in its own process.

The processes take their steps in turn, so that whatever else the machine does slows both alike; each reads its own peak
of memory. Same seed, same batches, same optimizer: only the loss differs.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..models.quiet import quiet_loading

STOCK, PATCHED = "stock", "hf_xent"


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field that is also an option of the command line: its metadata are what `app.takes` reads."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Run:
    """Everything one fine-tuning run depends on; each field is an option of `hf-xent train`."""

    loss: str = _option(
        "cross_entropy", "The loss, with options if any: 'focal:gamma=3'; see `hf-xent losses`.", positional=True
    )
    model: str = _option("smollm2", "'smollm2' (embedded, offline), or any Hub id or path of a causal LM.")
    dataset: str = _option("pydoc", "'pydoc' (embedded, offline), a text/JSON/CSV/Parquet file or folder, or a Hub id.")
    split: str | None = _option(None, "Split of the dataset, such as 'train[:10%]'.")
    column: str = _option("text", "Column that holds the text.")
    steps: int = _option(30, "Optimizer steps.", min=1)
    batch_size: int = _option(4, "Blocks per forward pass.", min=1)
    accumulation: int = _option(1, "Forward passes per optimizer step.", min=1)
    block_size: int = _option(192, "Tokens per block.", min=2)
    learning_rate: float = _option(2e-5, "Peak learning rate of AdamW, decayed linearly.")
    lora: int = _option(
        0,
        "Rank of LoRA adapters on all linear layers but the head, the rest frozen; 0 trains all weights.",
        min=0,
    )
    gradient_checkpointing: bool = _option(
        False,
        "Compute each layer's activations again in the backward pass instead of keeping them.",
        flags=("--gradient-checkpointing",),
    )
    eval_blocks: int = _option(4, "Blocks held out for evaluation.", min=1)
    seed: int = _option(0, "Seed of batches, dropout and everything else.", min=0, max=2**32 - 1)
    dtype: str = _option("float32", "float32, bfloat16 or float16.")
    memory_budget: int | None = _option(
        None, "Bytes of logits alive at a time [default: half a byte a number in the head]."
    )
    tail: float = _option(
        0.0, "Relative error allowed to the gradient of the logits by compressing unlikely tokens; 0 is exact."
    )
    output: str = _option("out/train", "Folder for model, checkpoints, results.json and plot.")
    save_steps: int = _option(0, "Write a checkpoint every so many steps; 0 for none.", min=0)
    resume: bool = _option(False, "Go on from the newest checkpoint in the output folder.", flags=("--resume",))
    save: bool = _option(True, "Save the fine-tuned model (never with --compare).")


@dataclass
class Outcome:
    """What a run measured; one number a step where it is a list."""

    arm: str
    losses: list[float]
    seconds: list[float]
    memory: list[int]  # peak of resident memory during the step, bytes (one entry if it cannot be reset)
    eval_before: float
    eval_after: float
    tokens_per_step: int
    logs: list[dict[str, float]]

    @property
    def peak(self) -> int:
        """Peak memory of the process over all training steps, bytes."""
        return max(self.memory)


def fit(
    run: Run,
    arm: str,
    turn: Callable[[int], None] = lambda step: None,
    say: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Train in this process. `turn(step)` is called before each step and may wait; `say(phase)` when a phase begins."""
    with quiet_loading():
        say("loading the libraries")
        trainer, watch = _trainer(run, arm, say), _watch(turn)
        trainer.add_callback(watch)
        checkpoint = _checkpoint(run)
        say("evaluating")
        before = trainer.evaluate()["eval_loss"]
        say("training")
        trainer.train(resume_from_checkpoint=checkpoint)
        say("evaluating")
        after = trainer.evaluate()["eval_loss"]
        if run.save:
            say("saving")
            trainer.save_model(run.output)
            trainer.create_model_card(dataset=run.dataset)
    return Outcome(
        arm=arm,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        seconds=watch.seconds,
        memory=watch.memory,
        eval_before=before,
        eval_after=after,
        tokens_per_step=run.batch_size * run.accumulation * run.block_size,
        logs=[entry for entry in trainer.state.log_history if "loss" in entry],
    )


def _trainer(run: Run, arm: str, say: Callable[[str], None]) -> Any:
    """The trainer of an arm, with model and text."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from ..models import loading
    from ..models.anatomy import check_room
    from ..trainers import XentConfig, XentTrainer

    say("loading the model")
    set_seed(run.seed)
    model, tokenizer = loading.load(run.model, dtype=run.dtype)
    check_room(model, run.block_size, "block_size")
    if run.lora:
        model = _adapted(model, run.lora)
    say("reading the text")
    train, held_out = _data(run, tokenizer)
    options: dict[str, Any] = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    if arm == PATCHED:
        config = XentConfig(**_arguments(run), loss=run.loss, memory_budget=run.memory_budget, tail=run.tail)
        trainer: Trainer = XentTrainer(model, config, **options)
    else:
        trainer = Trainer(model, TrainingArguments(**_arguments(run)), **options)
    trainer.remove_callback(PrinterCallback)  # progress and numbers are the caller's to show
    return trainer


def _adapted(model: Any, rank: int) -> Any:
    """The model with everything frozen but LoRA adapters of this rank."""
    from peft import LoraConfig, get_peft_model

    # all linear layers but the output embedding; the strength alpha / rank = 2 of PEFT's own examples
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


Report = Callable[[str, int | str], None]
"""`report(arm, step)` before a step, `report(arm, phase)` when a phase begins."""


def side_by_side(run: Run, report: Report = lambda arm, news: None) -> list[Outcome]:
    """The run under the stock loss and under ours, step by step in turn; `report` follows them.

    Raises: RuntimeError with the message of an arm that failed.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for arm in (STOCK, PATCHED):
        pipes[arm], theirs = context.Pipe()
        process = context.Process(target=_arm, args=(run, arm, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    try:
        outcomes = _conduct(pipes, report)
        for process in processes:  # let them clean up after themselves
            process.join(timeout=30)
        return outcomes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _conduct(pipes: dict[str, Any], report: Report) -> list[Outcome]:
    """Nobody steps while another does: an arm's next message comes before the next arm may go."""
    messages: dict[str, tuple[str, Any]] = {}
    while len(messages) < len(pipes):  # they load at the same time, and whoever has news is heard
        for arm, pipe in pipes.items():
            if arm not in messages and pipe in wait([p for a, p in pipes.items() if a not in messages]):
                _hear(arm, pipe, messages, report)
    while any(kind == "step" for kind, _ in messages.values()):
        for arm, pipe in pipes.items():
            kind, step = messages[arm]
            if kind == "step":
                report(arm, step)
                pipe.send("go")
                del messages[arm]
                while arm not in messages:
                    _hear(arm, pipe, messages, report)
    return [Outcome(**messages[arm][1]) for arm in pipes]


def _hear(arm: str, pipe: Any, messages: dict[str, tuple[str, Any]], report: Report) -> None:
    """One message of an arm: a phase is passed on, a step or an outcome is kept."""
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"the {arm} run ended without a word (killed for memory?): try a smaller batch_size"
        ) from None
    if kind == "error":
        raise RuntimeError(f"the {arm} run failed: {value}")
    if kind == "phase":
        report(arm, value)
    else:
        messages[arm] = (kind, value)


def _arm(run: Run, arm: str, pipe: Any) -> None:
    """The life of one process."""
    from ..bench.memory import return_large_blocks

    return_large_blocks()

    def turn(step: int) -> None:
        pipe.send(("step", step))
        pipe.recv()

    try:
        pipe.send(("outcome", asdict(fit(run, arm, turn, lambda phase: pipe.send(("phase", phase))))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # whoever listened is gone or going
    except Exception as error:  # whatever it is, the command has to tell
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _checkpoint(run: Run) -> str | None:
    """The newest checkpoint to go on from; a finished one is refused, since Trainer would take one step too many."""
    from transformers.trainer_utils import get_last_checkpoint

    if not run.resume:
        return None
    found = get_last_checkpoint(run.output) if Path(run.output).is_dir() else None
    if found is None:
        raise ValueError(f"no checkpoint in {run.output}: train with save_steps first, or without resume")
    step = int(found.rsplit("-", 1)[1])
    if step >= run.steps:
        raise ValueError(
            f"nothing to resume: {Path(found).name} in {run.output} is at step {step} of {run.steps}, ask for more"
            " steps"
        )
    return found


def _data(run: Run, tokenizer: Any) -> tuple[Any, Any]:
    from ..data import load_text, pack

    blocks = pack(load_text(run.dataset, run.split, run.column), tokenizer, run.block_size, run.column)
    if len(blocks) < 2:
        raise ValueError(
            f"dataset {run.dataset!r} makes {len(blocks)} block of {run.block_size} tokens: 2 are needed, choose a"
            " smaller block_size"
        )
    held_out = min(run.eval_blocks, len(blocks) // 2)
    split = blocks.train_test_split(test_size=held_out, seed=run.seed)
    return split["train"], split["test"]


def _arguments(run: Run) -> dict[str, Any]:
    import torch
    from transformers import TrainingArguments

    # transformers 5.23 names it anew; older ones know the old name alone
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        checkpointing: run.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if run.gradient_checkpointing else None,
        "output_dir": run.output,
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "learning_rate": run.learning_rate,
        "logging_steps": 1,
        "save_strategy": "steps" if run.save_steps else "no",
        "save_steps": run.save_steps or 500,
        "seed": run.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,  # the dtype of the run is the model's
        "report_to": [],
        "disable_tqdm": True,
    }


def _watch(turn: Callable[[int], None]) -> Any:
    """A callback that waits for its turn, and reads time and memory of every optimizer step."""
    from transformers import TrainerCallback

    from ..bench.memory import PeakMemory

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.memory: list[int] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn(state.global_step)
            self.meter = PeakMemory(args.device).__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.meter.__exit__()
            self.memory.append(self.meter.peak)

    return Watch()


def write(folder: Path, run: Run, outcomes: list[Outcome]) -> Path:
    """Everything measured, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps({"run": asdict(run), "outcomes": [asdict(o) for o in outcomes]}, indent=1))
    return path
