"""`hf-xent ln-free`: convert, verify and report on models without LayerNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from .options import AutoDType, DType, Json, Split, Text, check_dtype
from .output import emit, err

app = typer.Typer(help="Models without LayerNorm: train, convert, report.", no_args_is_help=True)
Model = Annotated[str, Argument(help="Path or Hub id of a causal LM whose norms were removed, in any form.")]


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, Argument(help="Folder for the converted model and its tokenizer.")],
    to: Annotated[
        str,
        Option(
            help="'eps-trick', which stock classes load, or 'true', which has no norms and needs a class of hf_xent."
        ),
    ] = "true",
    eps: Annotated[
        float | None,
        Option(help="The trick's epsilon: 1e12 as in the released models; 1e6 fits into float16 [default: 1e12]."),
    ] = None,
    dtype: DType = "float32",
    as_json: Json = False,
) -> None:
    """Write an LN-free model in another form.

    A card for `hf-xent publish` is written beside it, and the difference of the logits is printed.

    Example: hf-xent ln-free convert out/ln_free out/true --to true
    """
    import torch

    from .. import ln_free

    if to not in ("eps-trick", "true"):
        raise ValueError(f"--to is {to!r}: choose 'eps-trick' or 'true'")
    if to == "true" and eps is not None:
        raise ValueError(f"eps is {eps}, but a 'true' model has no epsilon: leave it out")
    check_dtype(dtype)
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise ValueError(f"output is {str(output)!r}, which is the folder of the model: choose another")
    torch_dtype = getattr(torch, dtype)
    with err.status(f"converting {model}"):
        loaded, tokenizer = ln_free.load(model, torch.float32)
        form = ln_free.form_of(loaded)
        if to == "true":
            converted = (loaded if form == "true" else ln_free.to_true(loaded)).to(torch_dtype)
        else:
            source = loaded if form in ("true", "removable") else ln_free.to_true(loaded)
            converted = ln_free.to_eps_trick(source, 1e12 if eps is None else eps, torch_dtype)
        error, size = ln_free.parity(loaded, converted)
        ln_free.save(converted, tokenizer, output)
    summary = {"from": model, "to": to, "output": str(output), "dtype": dtype, "parity": error, "logits": size}
    line = f"[green]{to}[/] in {output}, {dtype}: logits differ by {error:.1e} of {size:.1e}"
    emit(summary, line, as_json=as_json)


@app.command()
def verify(
    model: Model,
    against: Annotated[str | None, Option(help="Another model, whose logits must be the same.")] = None,
    dtype: AutoDType = "auto",
    as_json: Json = False,
) -> None:
    """Check that nothing in a model normalizes its hidden states.

    The KV cache and padding must not change the results either. The exit code is 1 if a check fails.

    Example: hf-xent ln-free verify out/true --against out/ln_free
    """
    check_dtype(dtype, "auto")
    from ..ln_free.loading import load
    from ..ln_free.verification import verify as run

    with err.status(f"verifying {model}"):
        other = None if against is None else load(against, dtype)[0]
        verification = run(load(model, dtype)[0], other)
    results = verification.as_dict()
    without_nan = {name: None if value != value else value for name, value in results.items()}
    emit(without_nan, _table(model, results), as_json=as_json)
    if not verification.passed:
        raise typer.Exit(1)


@app.command()
def report(
    model: Model,
    original: Annotated[str | None, Option(help="The model before fine-tuning.")] = None,
    vanilla: Annotated[
        str | None, Option(help="The control: a model fine-tuned on the same data with its norms kept.")
    ] = None,
    text: Text = "pydoc",
    split: Split = None,
    sequences: Annotated[int, Option(help="How many sequences of the text, from its start.", min=1)] = 64,
    length: Annotated[int, Option(help="How many tokens each sequence has.", min=3)] = 128,
    output: Annotated[Path, Option(help="Folder for report.md, report.json and report.png.")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Analyze a model beside its original and a control.

    The report has losses, attribution error, attention sinks, confidence and calibration.

    Example: hf-xent ln-free report out/true --original openai-community/gpt2 --split 'train[-5%:]'
    """
    import torch

    from .. import data
    from ..ln_free import Report, analyze
    from ..ln_free.loading import load

    tokenizer = load(model)[1]
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, but the text has to be tokenized: save one into its folder")
    rows = data.pack(data.load_text(text, split=split), tokenizer, block_size=length)
    blocks = torch.tensor(list(rows["input_ids"])[:sequences])
    analyses = {}
    for name, source in (("original", original), ("vanilla", vanilla), ("LN-free", model)):
        if source is not None:
            with err.status(f"analyzing {source}"):
                analyses[name] = analyze(load(source, torch.float32)[0], blocks)
    comparison = Report(analyses)
    page = comparison.save(output)
    table = Table("", *analyses, title=f"{blocks.numel()} tokens of {text}")
    for row in comparison.rows():
        table.add_row(*row)
    as_dicts = {name: analysis.as_dict() for name, analysis in analyses.items()}
    emit(as_dicts, table, f"written: {page}", as_json=as_json)


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), f"{value:.2g}" if isinstance(value, float) else str(value))
    return table
