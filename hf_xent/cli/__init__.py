"""`hf-xent`: its commands. Heavy imports are inside of them, so that `--help` is quick."""

from .app import app, main
from .bench import bench, report
from .check import check, losses
from .ln_free import app as ln_free
from .train import train

__all__ = ["app", "main"]

for command in (train, check, losses, bench, report):
    app.command()(command)

app.add_typer(ln_free, name="ln-free")
