"""The run of a recipe: evaluated, trained, evaluated again, saved with its card and numbers, and pushed if asked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..experiments.finetuning import PATCHED, Outcome, newest_checkpoint, watching
from ..models.quiet import quiet_loading
from .base import Recipe, Setup
from .registered import RECIPES


@dataclass
class Progress:
    """Who is told of the progress; by default nobody."""

    phase: Callable[[str], None] = lambda phase: None
    total: Callable[[int], None] = lambda steps: None
    step: Callable[[int], None] = lambda step: None
    logs: Callable[[dict[str, float]], None] = field(default=lambda logs: None)


@dataclass
class Result:
    """What a run did; `summary` is what `--json` prints."""

    outcome: Outcome
    summary: dict[str, Any]
    main: bool
    """Whether this is the process that writes and prints, of several."""


def run(
    name: str,
    arguments: Sequence[str] = (),
    *,
    resume: bool = False,
    push: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Runs a trainer as its command does.

    Args:
        name: The recipe, a key of `RECIPES`.
        arguments: As on the command line: `["--config", "run.yaml", "--max_steps", "10"]`.
        resume: Whether to go on from the newest checkpoint in the output folder.
        push: Whether to push the model with its card to the Hub at the end.
        progress: Who is told of the progress.

    Returns:
        Losses, times, memory, both evaluations, and where everything was written.

    Raises:
        ValueError: An argument, the model or the data cannot be used, or there is no checkpoint to resume from.
    """
    from .arguments import parse

    progress, recipe = progress or Progress(), RECIPES.find(name)()
    with quiet_loading():
        progress.phase("loading the libraries")
        data, config, model, given = parse(name, recipe, arguments)
        setup = Setup(data, config, model, given, progress.phase)
        recipe.check(setup)
        if push or config.push_to_hub:
            from .. import hub

            hub.check_rights(config.hub_model_id or Path(config.output_dir).name)  # not after the training
            config.push_to_hub = True
        return _trained(name, recipe, setup, resume, progress)


def _trained(name: str, recipe: Recipe, setup: Setup, resume: bool, progress: Progress) -> Result:
    from transformers import PrinterCallback, set_seed
    from transformers.utils import logging

    from ..bench.memory import PeakMemory

    config = setup.config
    set_seed(config.seed)
    logging.disable_progress_bar()  # of loading and writing weights; those of downloads stay
    trainer = recipe.make(setup)
    trainer.remove_callback(PrinterCallback)  # the caller shows progress and numbers
    watch = watching(progress.step, memory=False)
    trainer.add_callback(watch)
    trainer.add_callback(_telling(progress))
    checkpoint = _checkpoint(config) if resume else None
    evaluates = trainer.eval_dataset is not None
    before = _evaluated(trainer, progress) if evaluates else {}
    first = trainer.state.log_history[-1:] if evaluates else []
    progress.phase("training")
    with PeakMemory(config.device) as memory:
        trainer.train(resume_from_checkpoint=checkpoint)
    after = _evaluated(trainer, progress) if evaluates else {}
    progress.phase("saving")
    trainer.save_model(config.output_dir)
    trainer.state.log_history[:0] = first  # training began a log of its own; the card shows both
    trainer.create_model_card(dataset_name=setup.data.dataset_name)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    outcome = Outcome(
        arm=PATCHED,
        losses=[entry["loss"] for entry in logs],
        seconds=watch.seconds,
        memory=[memory.peak],
        eval_before=before.get("loss", float("nan")),
        eval_after=after.get("loss", float("nan")),
        tokens_per_step=0,
        logs=logs,
        evaluations=[before, after],
    )
    main = trainer.is_world_process_zero()
    summary = _written(name, setup, outcome, trainer) if main else {}
    if config.push_to_hub:
        progress.phase("pushing")
        trainer.push_to_hub(dataset_name=setup.data.dataset_name)
        summary["repository"] = trainer.hub_model_id
    return Result(outcome, summary, main)


def _evaluated(trainer: Any, progress: Progress) -> dict[str, float]:
    """The numbers of an evaluation, without their prefix and without times."""
    progress.phase("evaluating")
    found = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    left_out = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time", "num_tokens")
    return {key: value for key, value in found.items() if isinstance(value, (int, float)) and key not in left_out}


def _checkpoint(config: Any) -> str:
    """The newest checkpoint of a run. Raises: ValueError if there is none, or the run had ended there."""
    from transformers import TrainerState

    folder = config.output_dir
    found = newest_checkpoint(folder)
    state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
    ended = state.global_step >= config.max_steps > 0
    if ended or (config.max_steps <= 0 and (state.epoch or 0) >= config.num_train_epochs):
        raise ValueError(
            f"nothing to resume: {Path(found).name} in {folder} is at the end of the run: set more max_steps or"
            " num_train_epochs"
        )
    return found


def _telling(progress: Progress) -> Any:
    """A callback that tells the number of steps, and the numbers of each log."""
    from transformers import TrainerCallback

    class Telling(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.total(state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            progress.logs(dict(logs or {}))

    return Telling()


def _written(name: str, setup: Setup, outcome: Outcome, trainer: Any) -> dict[str, Any]:
    """The summary, after every number is in results.json and the curves are drawn."""
    import json

    from ..experiments.curves import draw_training

    folder, model = Path(setup.config.output_dir), setup.model.model_name_or_path
    results = folder / "results.json"
    settings = {"recipe": name, "model": model, "dataset": setup.data.dataset_name, **_plain(setup.given)}
    results.write_text(json.dumps({"run": settings, "outcomes": [asdict(outcome)]}, indent=1))
    summary: dict[str, Any] = {
        "recipe": name,
        "model": model,
        "dataset": setup.data.dataset_name,
        "steps": trainer.state.global_step,
        "output": str(folder),
        "results": str(results),
    }
    if outcome.losses:
        summary |= {
            "first_loss": outcome.losses[0],
            "last_loss": outcome.losses[-1],
            "seconds_per_step": statistics.median(outcome.seconds[1:] or outcome.seconds),
            "peak_memory_mib": outcome.peak / 2**20,
            "plot": str(draw_training([outcome], folder / "curves.png", f"{name}: {model} on {settings['dataset']}")),
        }
    return summary | {"before": outcome.evaluations[0], "after": outcome.evaluations[1]}


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as JSON can hold them, without the Hub's token."""
    kept = {key: value for key, value in settings.items() if key != "hub_token"}
    return {
        key: value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
        for key, value in kept.items()
    }
