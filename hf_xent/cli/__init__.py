"""`hf-xent`: train, check, losses, detect, bench, report. Heavy imports are in the commands: `--help` is quick."""

from .app import app, main
from .bench import bench, report
from .check import check, losses
from .detect import detect
from .train import train

__all__ = ["app", "main"]

for command in (train, check, losses, detect, bench, report):
    app.command()(command)
