"""Options that several commands share, and options that are generated from the fields of a dataclass.

@options_from(Run, positional=("loss",), model=Model, dtype=DType)
def train(run: Run, as_json: Json = False) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from .output import redirect_for_json

MODEL_HELP = "The model: 'smollm2' (packaged, offline), or any Hub id or path of a causal LM."
TEXT_HELP = "Text: 'pydoc' (packaged, offline), a text, JSON, CSV or Parquet file, a folder, or a Hub id."
DTYPES = ("float32", "bfloat16", "float16")
SEEDS = {"min": 0, "max": 2**32 - 1}

Model = Annotated[str, Option(help=MODEL_HELP)]
ModelArgument = Annotated[str, Argument(help=MODEL_HELP)]
Text = Annotated[str, Option(help=TEXT_HELP)]
TextArgument = Annotated[str, Argument(help=TEXT_HELP)]
Column = Annotated[str, Option(help="Column that holds the text.")]
Split = Annotated[str | None, Option(help="Split of the data, or a slice of one such as 'train[:10%]'.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the Hub [default: main].")]
CreatePR = Annotated[bool, Option("--create-pr", help="Propose the change as a pull request instead of making it.")]
DType = Annotated[str, Option(help=f"Dtype of the model: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")]
AutoDType = Annotated[
    str, Option(help=f"Dtype to load models in: {', '.join(DTYPES)}, or 'auto' for the one they are saved in.")
]
Json = Annotated[
    bool,
    Option(
        "--json",
        help="Print one JSON object and nothing else on standard output.",
        callback=redirect_for_json,
    ),
]


def check_dtype(dtype: str, *more: str) -> None:
    """Raises: ValueError if `dtype` is not the name of a dtype that models can be loaded in."""
    if dtype not in (*DTYPES, *more):
        raise ValueError(f"dtype is {dtype!r}: choose {', '.join([*more, *DTYPES[:-1]])} or {DTYPES[-1]}")


def options_from(
    settings: type, positional: tuple[str, ...] = (), without: tuple[str, ...] = (), **shared: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass; its first argument is then the instance.

    Args:
        settings: The dataclass; the metadata of a field are arguments of `typer.Option` (`help`, `min`, `max`).
        positional: The fields that are given without a name, in this order.
        without: The fields that are no options, and keep their defaults.
        shared: Field -> an annotated option type, which replaces the metadata of the field.
    """

    def parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation = shared.get(field.name) or Annotated[hint, _option(field, field.name in positional)]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command(settings(**{f.name: values.pop(f.name) for f in offered}), **values)

        offered = [f for f in fields(settings) if f.name not in without]
        hints = get_type_hints(settings)
        _, *others = inspect.signature(command, eval_str=True).parameters.values()
        others = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others]
        signature = inspect.Signature([*(parameter(f, hints[f.name]) for f in offered), *others])
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__signature__ = signature  # type: ignore[attr-defined]  # typer reads it, as inspect documents
        return run

    return wrap


def _option(field: Field[Any], positional: bool) -> Any:
    """The argument or option of a field; a switch that is off by default has no `--no-` form."""
    if positional:
        return Argument(**field.metadata)
    names = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
    return Option(*names, **field.metadata)
