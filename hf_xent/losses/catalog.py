"""What the registry says about itself: one row a loss, read from its docstrings and dataclass fields."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import Field, fields
from itertools import pairwise
from typing import Any

from .base import Loss


def build(registry: Mapping[str, type], loss: str, options: dict[str, Any]) -> Any:
    """An entry of a registry of dataclasses by 'name' or 'name:key=value, ...', with more options beside it.

    Options given as text are read as Python literals, else as words. Raises: ValueError, as `hf_xent.losses.get`.
    """
    name, _, text = str(loss).partition(":")
    if name not in registry:
        raise ValueError(f"loss is {name!r}: choose one of {', '.join(registry)}, or pass a loss as an object")
    written = parse(text)
    if twice := [option for option in options if option in written]:
        raise ValueError(f"loss is {loss!r} with {twice[0]}={options[twice[0]]!r} beside it: set {twice[0]} once")
    options = written | {k: literal(v) if isinstance(v, str) else v for k, v in options.items()}
    known = tuple(field.name for field in fields(registry[name]))
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"loss {name!r} does not take {', '.join(unknown)}: its options are {', '.join(known) or 'none'}"
        )
    try:
        return registry[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name!r} cannot take {options}: {error}") from error


def row(name: str, loss: type[Loss]) -> dict[str, Any]:
    """As JSON: `name`, `class`, `summary`, `formula`, `source`, `statistics`, `options` (defaults) and their `help`."""
    doc = inspect.getdoc(sys.modules[loss.__module__]) or ""
    formula = next(line for line in doc.splitlines() if line.startswith("    "))  # parts are spaces apart
    return {
        "name": name,
        "class": loss.__name__,
        "summary": doc.splitlines()[0],
        "formula": "; ".join(part.strip() for part in formula.split("   ") if part.strip()),
        "source": section(doc, "Source"),
        "statistics": section(doc, "Statistics"),
        "options": {f.name: f.default for f in options(loss)},
        "help": {f.name: _help(loss)[f.name] for f in options(loss)},
    }


def options(loss: type[Loss]) -> tuple[Field[Any], ...]:
    """The fields of a loss, its hyper-parameters."""
    return fields(loss)  # type: ignore[arg-type]  # the base is no dataclass, every registered loss is one


def section(doc: str, title: str) -> str:
    """The text after `title:` in a docstring, up to the next section or blank line, on one line."""
    found = re.search(rf"^{title}:(.*?)(?=\n\n|\n(?:Source|Statistics|Relations):|\Z)", doc, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"the docstring has no '{title}:' line: write one, every loss has it")
    return " ".join(found[1].split()).removesuffix(".")


def parse(text: str) -> dict[str, Any]:
    """Options written as text: 'gamma=3, variant=emo2' is {'gamma': 3, 'variant': 'emo2'}. Raises: ValueError."""
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
    except (SyntaxError, ValueError):  # a ValueError for what no source has, such as a null character
        call = None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise ValueError(f"options are {text!r}: write them as key=value, key=value")
    names = [str(keyword.arg) for keyword in call.keywords]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"options are {text!r}: set {twice[0]} once")
    return {str(keyword.arg): literal(ast.unparse(keyword.value)) for keyword in call.keywords}


def literal(text: str) -> Any:
    """A Python literal, or inf, -inf and nan, which have none; else the text as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return float(text) if text.strip() in ("inf", "-inf", "nan") else text


def _help(loss: type) -> dict[str, str]:
    """Field -> the string under it, its own and inherited."""
    texts: dict[str, str] = {}
    for cls in reversed(loss.__mro__[:-1]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts
