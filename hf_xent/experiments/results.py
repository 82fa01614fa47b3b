"""Results of fine-tuning runs: all numbers as JSON, and a summary by which runs are compared."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .finetuning import Outcome, Run, Tuning


def write_results(folder: Path, run: Tuning, outcomes: list[Any]) -> Path:
    """Write the run and everything its arms measured to `results.json` in a folder; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps({"run": asdict(run), "outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))
    return path


def summarize(run: Run, outcomes: list[Outcome]) -> dict[str, Any]:
    """A summary of one arm, or of both with the time and memory that ours saves over the stock loss.

    Args:
        run: The settings of the run.
        outcomes: One outcome, or those of STOCK and PATCHED in this order.

    Returns:
        `model`, `dataset`, `loss`, `steps`, and `runs`: arm -> its losses (nats per token), `seconds_per_step` (the
        median), `tokens_per_second` and `peak_memory_mib`. Of two arms also `largest_loss_difference` (relative),
        `step_time_ratio` (the median over pairs of steps), `memory_saved_mib` and `memory_saved` (a share).
    """
    summary: dict[str, Any] = {
        "model": run.model,
        "dataset": run.dataset,
        "loss": run.loss,
        "steps": run.steps,
        "runs": {outcome.arm: numbers(outcome) for outcome in outcomes},
    }
    if len(outcomes) == 2:
        stock, ours = outcomes
        pairs = zip(_steady(stock.seconds), _steady(ours.seconds), strict=True)
        summary["largest_loss_difference"] = max(
            abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True)
        )
        summary["step_time_ratio"] = statistics.median(b / a for a, b in pairs)
        summary["memory_saved_mib"] = (stock.peak - ours.peak) / 2**20
        summary["memory_saved"] = 1 - ours.peak / stock.peak
    return summary


def numbers(outcome: Outcome) -> dict[str, float]:
    """Losses, times and memory of one outcome."""
    median = statistics.median(_steady(outcome.seconds))
    return {
        "first_loss": outcome.losses[0],
        "last_loss": outcome.losses[-1],
        "eval_before": outcome.eval_before,
        "eval_after": outcome.eval_after,
        "seconds_per_step": median,
        "tokens_per_second": outcome.tokens_per_step / median,
        "peak_memory_mib": outcome.peak / 2**20,
    }


def _steady(seconds: list[float]) -> list[float]:
    """The seconds without those of the first step, which also allocates gradients and the optimizer's state."""
    return seconds[1:] or seconds
