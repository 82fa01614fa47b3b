"""`hf-xent distill`: train from a teacher, and write down what a teacher says."""

from __future__ import annotations

import typer

from .distill_cache import cache
from .distill_train import train

app = typer.Typer(help="Distillation without logits: train, or write down what a teacher says.", no_args_is_help=True)
app.command()(train)
app.command()(cache)
