"""`hf-xent`: train, check, losses, bench, report, data. Heavy imports are inside the commands: `--help` is quick."""

from .app import app, main
from .bench import bench, report
from .check import check, losses
from .data import data
from .train import train

__all__ = ["app", "main"]

for command in (train, check, losses, bench, report):
    app.command()(command)
app.add_typer(data)
