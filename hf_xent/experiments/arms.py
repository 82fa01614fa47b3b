"""Two arms of a fine-tuning run side by side: the stock loss and ours, each in its own process.

The processes take their steps in turn, so that whatever else the machine does slows both alike; each reads its own peak
of memory. Same seed, same batches, same optimizer: only the loss differs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

from .finetuning import PATCHED, STOCK, Outcome, Run, fit

Report = Callable[[str, int | str], None]
"""`report(arm, step)` before a step, `report(arm, phase)` when a phase begins."""


def side_by_side(run: Run, report: Report = lambda arm, progress: None) -> list[Outcome]:
    """Train a run under the stock loss and under its own, one step of each in turn.

    Args:
        run: The run that both arms share.
        report: Called as `report(arm, step)` before a step and as `report(arm, phase)` when a phase begins.

    Returns:
        The outcomes of STOCK and PATCHED, in this order.

    Raises:
        RuntimeError: If an arm failed, with its message.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for arm in (STOCK, PATCHED):
        pipes[arm], child_end = context.Pipe()
        process = context.Process(target=_serve, args=(run, arm, child_end), daemon=True)
        process.start()
        child_end.close()
        processes.append(process)
    try:
        outcomes = _take_turns(pipes, report)
        for process in processes:  # let them clean up after themselves
            process.join(timeout=30)
        return outcomes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _take_turns(pipes: dict[str, Any], report: Report) -> list[Outcome]:
    """Let one arm step at a time: the next arm may go only after this one's next message has come."""
    messages: dict[str, tuple[str, Any]] = {}
    while len(messages) < len(pipes):  # both load at the same time, and messages are read as they come
        for arm, pipe in pipes.items():
            if arm not in messages and pipe in wait([p for a, p in pipes.items() if a not in messages]):
                _receive(arm, pipe, messages, report)
    while any(kind == "step" for kind, _ in messages.values()):
        for arm, pipe in pipes.items():
            kind, step = messages[arm]
            if kind == "step":
                report(arm, step)
                pipe.send("go")
                del messages[arm]
                while arm not in messages:
                    _receive(arm, pipe, messages, report)
    return [Outcome(**messages[arm][1]) for arm in pipes]


def _receive(arm: str, pipe: Any, messages: dict[str, tuple[str, Any]], report: Report) -> None:
    """Read one message of an arm: a phase is passed on to `report`, a step or an outcome is kept."""
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


def _serve(run: Run, arm: str, pipe: Any) -> None:
    """Train one arm in its own process, and wait for the parent's word before each step."""
    from ..bench.memory import return_large_blocks

    return_large_blocks()

    def before_step(step: int) -> None:
        pipe.send(("step", step))
        pipe.recv()

    try:
        pipe.send(("outcome", asdict(fit(run, arm, before_step, lambda phase: pipe.send(("phase", phase))))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent has ended, or is about to
    except Exception as error:  # whatever it is, the parent reports it
        pipe.send(("error", f"{type(error).__name__}: {error}"))
