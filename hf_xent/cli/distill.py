"""`hf-xent distill`: train from a teacher, and write down what a teacher says."""

from __future__ import annotations

import typer

from .distill_cache import cache

app = typer.Typer(help="Distillation without logits: write down what a teacher says.", no_args_is_help=True)
app.command()(cache)
