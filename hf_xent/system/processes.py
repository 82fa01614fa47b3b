"""A function that runs in a new process, and the pipe to it.

worker = Worker("the run of hf_xent", serve, model, remedy="try fewer pairs")    # serve(pipe, model) in a new process
worker.send("step"); answer = worker.receive()                                  # raises Ended if the process has died
worker.close()

The process is spawned, not forked: it inherits no allocator, thread pool or CUDA context. Functions and arguments are
pickled, so the function has to be importable. Several workers are waited for by
`multiprocessing.connection.wait([worker.pipe, ...])`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class Ended(RuntimeError):
    """A process ended, or was killed, before it answered; `exitcode` is that of `multiprocessing`."""

    def __init__(self, message: str, exitcode: int | None):
        super().__init__(message)
        self.exitcode = exitcode


class Worker:
    """A started process with the parent's end of its pipe. It ends when the parent ends, if not before.

    Args:
        name: Its name in error messages, such as 'the stock run'.
        target: Called as `target(pipe, *args)` in the process; its end of the pipe raises EOFError after `close`.
        args: Further arguments of the target.
        remedy: What to try if the process is killed, as part of the error message.
    """

    def __init__(self, name: str, target: Callable[..., None], *args: Any, remedy: str = ""):
        self.name, self.remedy = name, remedy
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=target, args=(child, *args), name=name, daemon=True)
        self.process.start()
        child.close()  # so that the end of the process is the end of its pipe

    def send(self, message: Any) -> None:
        """Send the process a message. Raises: Ended if the process has ended."""
        try:
            self.pipe.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        """Wait for the next message of the process. Raises: Ended if the process ends without one."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def close(self, seconds: float = 10) -> None:
        """Close the pipe and wait for the process to end; after these seconds it is killed."""
        self.pipe.close()
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ended(self) -> Ended:
        self.process.join(5)
        remedy = f": {self.remedy}" if self.remedy else ""
        return Ended(f"{self.name} ended without an answer (killed for memory?){remedy}", self.process.exitcode)
