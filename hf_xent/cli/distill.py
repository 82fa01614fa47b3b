"""`hf-xent distill`: train from a teacher, and write down what a teacher says."""

from __future__ import annotations

import typer

from .distill_cache import cache
from .distill_train import CONFIGURATION, train
from .extended import extended

app = typer.Typer(help="Distill a teacher, or write down what it says.", no_args_is_help=True)
app.command(cls=extended(CONFIGURATION))(train)
app.command()(cache)
