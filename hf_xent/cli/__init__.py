"""`hf-xent` and its commands. Heavy imports are inside them, so that `--help` is quick."""

from .app import app, main
from .bench import bench, report
from .check import check, losses
from .data import data
from .publish import publish
from .train import train

__all__ = ["app", "main"]

for command in (train, check, losses, bench, report, publish):
    app.command()(command)
app.add_typer(data)
