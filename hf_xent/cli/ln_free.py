"""`hf-xent ln-free`: convert, verify and report on models without LayerNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from .app import Json, check_dtype, err, out, print_json

app = typer.Typer(help="Models without LayerNorm: convert, verify, report.", no_args_is_help=True)
MODEL_HELP = "Path (or Hub id) of a causal LM whose norms were removed, in any form."


@app.command()
def convert(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    output: Annotated[Path, Argument(help="Folder for the converted model and its tokenizer.")],
    to: Annotated[
        str,
        Option(help="'eps-trick', which stock classes load, or 'true': no norms at all, with a class of its own."),
    ] = "true",
    eps: Annotated[
        float | None,
        Option(help="Of the trick: 1e12 as in the released models; 1e6 fits into float16 [default: 1e12]."),
    ] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Write an LN-free model in another form, with a card for `hf-xent publish`; print how far its logits differ."""
    import torch

    from .. import ln_free

    if to not in ("eps-trick", "true"):
        raise ValueError(f"--to is {to!r}: choose 'eps-trick' or 'true'")
    if to == "true" and eps is not None:
        raise ValueError(f"eps is {eps}, which a true model does not have: leave it out")
    check_dtype(dtype)
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise ValueError(f"output is {str(output)!r}, the model's own folder: choose another")
    kind = getattr(torch, dtype)
    with err.status(f"converting {model}"):
        loaded, tokenizer = ln_free.load(model, torch.float32)
        true = ln_free.form_of(loaded) == "true"
        if to == "true":
            made = (loaded if true else ln_free.to_true(loaded)).to(kind)
        else:
            source = loaded if true or ln_free.form_of(loaded) == "removable" else ln_free.to_true(loaded)
            made = ln_free.to_eps_trick(source, 1e12 if eps is None else eps, kind)
        error, size = ln_free.parity(loaded, made)
        ln_free.save(made, tokenizer, output)
    summary = {"from": model, "to": to, "output": str(output), "dtype": dtype, "parity": error, "logits": size}
    if as_json:
        print_json(summary)
        return
    out.print(f"[green]{to}[/] in {output}, {dtype}: logits differ by {error:.1e} of {size:.1e}", highlight=False)


@app.command()
def verify(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    against: Annotated[str | None, Option(help="Another model, whose logits must be the same.")] = None,
    dtype: Annotated[str, Option(help="Dtype to load in; 'auto' for the model's own.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check that nothing normalizes, and that KV cache and padding change nothing; exit code 1 if not."""
    check_dtype(dtype, "auto")
    from ..ln_free.loading import load
    from ..ln_free.verification import verify as run

    with err.status(f"verifying {model}"):
        other = None if against is None else load(against, dtype)[0]
        found = run(load(model, dtype)[0], other)
    if as_json:
        print_json({name: None if value != value else value for name, value in found.as_dict().items()})
    else:
        out.print(_table(model, found.as_dict()))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def report(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    original: Annotated[str | None, Option(help="The model before fine-tuning.")] = None,
    vanilla: Annotated[str | None, Option(help="The control: fine-tuned on the same data, norms kept.")] = None,
    text: Annotated[str, Option(help="Held-out text: 'pydoc', a file, a folder, or a Hub dataset.")] = "pydoc",
    split: Annotated[str | None, Option(help="Of the text, such as 'test' or 'train[-5%:]'.")] = None,
    sequences: Annotated[int, Option(help="How many sequences of it, from the start.", min=1)] = 64,
    length: Annotated[int, Option(help="Tokens of each.", min=3)] = 128,
    output: Annotated[Path, Option(help="Folder for report.md, report.json and report.png.")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Losses, attribution error, attention sinks, confidence and calibration, beside original and control."""
    import torch

    from .. import data
    from ..ln_free import Report, analyze
    from ..ln_free.loading import load

    found = {}
    tokenizer = load(model)[1]
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, which text needs: save one into its folder")
    rows = data.pack(data.load_text(text, split=split), tokenizer, block_size=length)
    blocks = torch.tensor(list(rows["input_ids"])[:sequences])
    for name, source in (("original", original), ("vanilla", vanilla), ("LN-free", model)):
        if source is not None:
            with err.status(f"analyzing {source}"):
                found[name] = analyze(load(source, torch.float32)[0], blocks)
    made = Report(found)
    page = made.save(output)
    if as_json:
        print_json({name: analysis.as_dict() for name, analysis in found.items()})
        return
    table = Table("", *found, title=f"{blocks.numel()} tokens of {text}")
    for row in made.rows():
        table.add_row(*row)
    out.print(table)
    out.print(f"written: {page}", highlight=False)


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), f"{value:.2g}" if isinstance(value, float) else str(value))
    return table
