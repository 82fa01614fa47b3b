"""Two arms of a fine-tuning run side by side: the stock loss and ours, each in its own process.

The processes take their steps in turn, so that other load on the machine slows both alike; each measures its own peak
of memory. Seed, batches and optimizer are the same: only the loss differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

from ..system.processes import Worker
from .finetuning import PATCHED, STOCK, Outcome, Run, fit

Report = Callable[[str, int | str], None]
"""`report(arm, step)` before a step, `report(arm, phase)` when a phase begins."""


def side_by_side(run: Run, report: Report = lambda arm, progress: None) -> list[Outcome]:
    """Train a run with the stock loss and with `run.loss`, one step of each in turn.

    Args:
        run: The run that both arms share.
        report: Called as `report(arm, step)` before a step and as `report(arm, phase)` when a phase begins.

    Returns:
        The outcomes of STOCK and PATCHED, in this order.

    Raises:
        RuntimeError: If an arm failed; the message is that of its error.
    """
    remedy = "try a smaller batch_size"
    workers = {arm: Worker(f"the {arm} run", _serve, run, arm, remedy=remedy) for arm in (STOCK, PATCHED)}
    grace = 0.0  # seconds that a process gets to clean up; none once the other one has failed
    try:
        outcomes = _take_turns(workers, report)
        grace = 30.0
        return outcomes
    finally:
        for worker in workers.values():
            worker.close(grace)


def _take_turns(workers: dict[str, Worker], report: Report) -> list[Outcome]:
    """Let one arm step at a time: the next arm goes on only after the next message of this one has arrived."""
    messages: dict[str, tuple[str, Any]] = {}
    while len(messages) < len(workers):  # both load at the same time, and messages are read as they arrive
        for arm, worker in workers.items():
            if arm not in messages and worker.pipe in wait([w.pipe for a, w in workers.items() if a not in messages]):
                _receive(arm, worker, messages, report)
    while any(kind == "step" for kind, _ in messages.values()):
        for arm, worker in workers.items():
            kind, step = messages[arm]
            if kind == "step":
                report(arm, step)
                worker.send("go")
                del messages[arm]
                while arm not in messages:
                    _receive(arm, worker, messages, report)
    return [Outcome(**messages[arm][1]) for arm in workers]


def _receive(arm: str, worker: Worker, messages: dict[str, tuple[str, Any]], report: Report) -> None:
    """Read one message of an arm: a phase is passed on to `report`, a step or an outcome is kept."""
    kind, value = worker.receive()
    if kind == "error":
        raise RuntimeError(f"the {arm} run failed: {value}")
    if kind == "phase":
        report(arm, value)
    else:
        messages[arm] = (kind, value)


def _serve(pipe: Any, run: Run, arm: str) -> None:
    """Train one arm in this process, and wait for a message of the parent before each step."""
    from ..bench.memory import return_large_blocks

    return_large_blocks()

    def before_step(step: int) -> None:
        pipe.send(("step", step))
        pipe.recv()

    try:
        pipe.send(("outcome", asdict(fit(run, arm, before_step, lambda phase: pipe.send(("phase", phase))))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent has ended, or is about to
    except Exception as error:  # the parent reports any error
        pipe.send(("error", f"{type(error).__name__}: {error}"))
