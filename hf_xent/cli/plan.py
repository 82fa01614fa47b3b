"""`hf-xent plan`: the memory of a training step, from a model's configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument

from ..planning.settings import Settings
from .app import unpack_packaged
from .options import Json, options_from
from .output import emit, err, literal

if TYPE_CHECKING:
    from ..planning import Plan

GB = 2**30
MODEL_HELP = "The model: 'smollm2' (packaged), or any Hub id or path of a language model; only its config.json is read."


@options_from(Settings, positional=("model",), model=Annotated[str, Argument(help=MODEL_HELP)])
def plan(settings: Settings, as_json: Json = False) -> None:
    """Estimate the peak memory of a training step.

    A model's configuration is all that is read.

    The stock step of transformers, TRL's fused head, Liger, cut-cross-entropy and hf_xent are compared by component,
    at the moment at which each takes the most; with --gpu, so are the largest batches that fit. No weights are loaded.

    Example: hf-xent plan Qwen/Qwen3-0.6B --tokens 8192 --dtype bf16 --gpu H100
    """
    settings.checked()
    from ..planning import plan as planned

    unpack_packaged(settings.model)
    with err.status(f"planning {settings.model}"):
        options = asdict(settings)
        found = planned(options.pop("model"), options.pop("tokens"), **options)
    emit(found.as_dict(), _table(found), *_lines(found), as_json=as_json)


def _table(found: Plan) -> Table:
    setting = found.settings
    table = Table(title=f"{found.model}: {setting.tokens:,} tokens a device, {setting.dtype}, GiB at the peak")
    table.add_column("", no_wrap=True)
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "sum"):
        table.add_column(
            {"gradients": "grad", "optimizer": "optim", "activations": "activ"}.get(name, name), justify="right"
        )
    if found.gpu_bytes is not None:
        table.add_column("fits", justify="right")
    for peak in found.peaks:
        numbers = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.logits, peak.total)
        fits = [] if peak.largest_tokens is None else [_short(peak.largest_tokens)]
        table.add_row(peak.name, *(f"{x / GB:.2f}" for x in numbers), *fits)
    return table


def _short(tokens: int) -> str:
    """A number of tokens in at most six characters."""
    return f"{tokens:,}" if tokens < 100_000 else f"{tokens / 1000:,.0f}k"


def _lines(found: Plan) -> list[str]:
    million = f"{found.parameters / 1e6:,.1f} million parameters, {found.trained / 1e6:,.1f} million trained"
    line = f"{million}; sequences of {found.sequence_length} tokens."
    if found.gpu_bytes is not None:
        line += f" fits: the most tokens in {found.gpu_bytes / GB:.1f} GiB ({found.settings.gpu}, less a reserve)."
    return [line, literal(found.source)]
