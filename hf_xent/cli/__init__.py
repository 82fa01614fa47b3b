"""`hf-xent`: train, check, losses, bench, report. Heavy imports are inside the commands, so that `--help` is quick."""

from .app import app, main
from .bench import bench, report
from .check import check, losses
from .train import train

__all__ = ["app", "main"]

for command in (train, check, losses, bench, report):
    app.command()(command)
