"""One distillation run as data, and its execution in this process: `distilled(Distilling(...))` gives an `Outcome`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .documents import load_documents
from .fields import option
from .finetuning import Outcome, Training, adapted, arguments_of, fitted

ARM = "hf_xent"


@dataclass(frozen=True)
class Distilling(Training):
    """All settings of a distillation run; each field is an option of `hf-xent distill train`."""

    teacher: list[str] | None = option(  # noqa: RUF009  a field
        "The teacher: 'smollm2' (packaged), a path or Hub id, the folder of a cache, a server's http(s) URL, or 'base'"
        " for the student without its LoRA adapters; several if it is given again.",
        None,
    )
    teacher_weights: list[float] | None = option(  # noqa: RUF009  a field
        "The weight of each of several teachers [default: all alike].", None
    )
    objective: str = option(
        "The divergence, with options if any: forward_kl, reverse_kl, 'jsd:beta=0.5',"
        " 'skew_kl:alpha=0.1', total_variation.",
        "forward_kl",
    )
    temperature: float = option("T of both softmaxes in the divergence, which is multiplied by T^2.", 1.0)
    ce_weight: float = option("Weight of the labels' cross-entropy; the divergence has the rest.", 0.0)
    on_policy: float = option("Share of the batches whose completions the student samples.", 0.0)
    max_new_tokens: int | None = option(
        "The maximum length of a sampled completion, tokens [default: 128].", None, min=1
    )
    sampling_temperature: float | None = option("Temperature of the samples [default: 1].", None)
    tail: str | None = option(
        "What is assumed about the tokens that a cache or a server does not name: 'class', 'uniform' or 'student'"
        " [default: class].",
        None,
    )
    k: int | None = option("How many tokens a server is asked for at each position [default: 64].", None, min=1)
    assistant_only_loss: bool = option(
        "Learn the assistant's turns of chats alone; the chat template has to mark them.", False
    )
    batch_size: int = option("Documents per forward pass.", 4, min=1)
    block_size: int = option("Tokens that are kept of a document, from its start.", 192, min=2)
    eval_blocks: int = option("Documents held out for evaluation.", 16, min=1)
    output: str = option("Folder for the model, its checkpoints, results.json and curves.png.", "out/distill")
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the trainer's configuration: name -> value."""

    @property
    def teachers(self) -> list[str]:
        """The teachers' names. Raises: ValueError if there is none, or nothing to learn from it."""
        if not self.teacher:
            raise ValueError("teacher is not given: name a model, a cache or a server, --teacher smollm2")
        if self.teacher == ["base"] and not self.ce_weight:
            raise ValueError(
                "ce_weight is 0, but with new adapters the student is its teacher 'base': set ce_weight above 0, so"
                " that it learns the labels and stays near to what it was"
            )
        return self.teacher


def distilled(
    run: Distilling,
    before_step: Callable[[int], None] = lambda step: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Train the student of a run in this process.

    Args:
        run: The run; with `run.save` the student and its card are written to `run.output`.
        before_step: Called with the step's number before each optimizer step.
        on_phase: Called with a phase's name when it begins: 'loading the models', 'training', ...

    Returns:
        Losses, seconds and peak memory of every step, and the evaluations before and after.

    Raises:
        ValueError: A model, the text or an option cannot be used, or there is no checkpoint to resume from.
        RuntimeError: A server does not answer.
    """
    run.teachers  # noqa: B018  before anything is loaded
    return fitted(run, ARM, lambda: _trainer(run, on_phase), before_step, on_phase)


def _trainer(run: Distilling, on_phase: Callable[[str], None]) -> Any:
    """The trainer, with the models and the text."""
    from transformers import PrinterCallback, set_seed

    from ..models import loading
    from ..models.anatomy import check_room
    from ..trainers import DistillationTrainer
    from ..trainers.distillation import BASE

    config = _config(run)
    on_phase("loading the models")
    set_seed(run.seed)
    model, tokenizer = loading.load(run.model, dtype=run.dtype)
    check_room(model, run.block_size, "block_size")
    if run.lora:
        model = adapted(model, run.lora)
    teacher = BASE if run.teachers == [BASE] else _teacher(run, tokenizer)
    on_phase("reading the text")
    train, held_out = _documents(run)
    trainer = DistillationTrainer(
        model, teacher, config, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)  # the caller shows progress and numbers
    return trainer


def _config(run: Distilling) -> Any:
    from ..trainers import DistillationConfig

    sampling = {"max_new_tokens": run.max_new_tokens, "sampling_temperature": run.sampling_temperature}
    return DistillationConfig(
        **{**arguments_of(run, run.steps), **run.more},
        objective=run.objective,
        temperature=run.temperature,
        ce_weight=run.ce_weight,
        on_policy=run.on_policy,
        memory_budget=run.memory_budget,
        dataset_text_field=run.column,
        assistant_only_loss=run.assistant_only_loss,
        max_length=run.block_size,
        **{name: value for name, value in sampling.items() if value is not None},
    )


def _teacher(run: Distilling, tokenizer: Any) -> Any:
    """The teachers; a model with another vocabulary is asked in its own tokens."""
    from ..teachers import load

    names = run.teachers if len(run.teachers) > 1 else run.teachers[0]
    return load(names, tokenizer=tokenizer, weights=run.teacher_weights, tail=run.tail, k=run.k)


def _documents(run: Distilling) -> tuple[Any, Any]:
    """The documents to train on, and those held out."""
    rows = load_documents(run.dataset, run.split, run.column)
    if len(rows) < 2:
        raise ValueError(f"dataset {run.dataset!r} has one row, but two are needed: one is held out")
    parts = rows.train_test_split(test_size=min(run.eval_blocks, len(rows) // 2), seed=run.seed)
    return parts["train"], parts["test"]
