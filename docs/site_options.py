"""Tables of options: `<!-- options: hf_xent.EMOConfig -->` in a page becomes a table of what this class declares.

A name may also be that of a function, and `<!-- options: loss focal -->` is an entry of a registry. The texts are those
of the source: the `help` of a field, the string below it, or the line of its name under `Args:`.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

DIRECTIVE = re.compile(r"^<!-- options: (.+?) -->$", re.MULTILINE)
REGISTRIES = (
    *(f"{room}.LOSSES" for room in ("losses", "classes", "ranking")),
    *("laws.LAWS", "retrieval.registered.RANKINGS", "robust.registered.ATTACKS"),
    *("data.selectors.SELECTORS", "data.registered.DATASETS", "detection.scores.SCORES"),
)
"""An entry is of the first registry of its kind that has its name: a loss of tokens goes before one of classes."""
_SECTION = re.compile(r"^(\w+):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^(\*{0,2}\w+)(?: \(.*?\))?: (.*?)(?=^\*{0,2}\w|\Z)", re.MULTILINE | re.DOTALL)


class Option(NamedTuple):
    """A row of a table: a name, its default as Python writes it, and what it does in Markdown."""

    name: str
    default: str
    help: str


def with_tables(markdown: str, link: Callable[[str], str]) -> str:
    """A page with its tables of options.

    Args:
        markdown: The page.
        link: Returns what leads to the description of an object, from its full path.

    Raises:
        ValueError: A name is unknown or an option is not described, which fails the build.
    """
    return DIRECTIVE.sub(lambda found: table(found[1], link), markdown)


def table(name: str, link: Callable[[str], str]) -> str:
    """The table of a class, a function or an entry of a registry, in Markdown; see `with_tables`."""
    kind, _, entry = name.rpartition(" ")
    registry = _registry(kind, entry) if kind else None
    value = registry[entry] if kind else found(name)
    options = _of_row(registry, entry) if kind else options_of(value)
    if not options:
        raise ValueError(f"<!-- options: {name} -->: it has no options")
    if unexplained := [option.name for option in options if not option.help]:
        raise ValueError(f"<!-- options: {name} -->: {', '.join(unexplained)} has no help text")
    lines = [f"| `{o.name}` | {_code(o.default)} | {escaped(o.help)} |" for o in options]
    described = link(f"{value.__module__}.{value.__qualname__}") if hasattr(value, "__qualname__") else ""
    below = " ".join(filter(None, (described and f"Described in {described}.", _inherited(value))))
    return "\n".join(("| option | default | what it does |", "|---|---|---|", *lines, "", below, ""))


def found(name: str) -> Any:
    """An object by its full path.

    Raises:
        ValueError: There is none.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[end:]:
                value = getattr(value, part)
        except AttributeError:
            break
        return value
    raise ValueError(f"<!-- options: {name} -->: there is no {name}")


def options_of(value: Any) -> list[Option]:
    """The options of a dataclass that classes of this package declare, or the parameters of a function or class."""
    declared: list[Option] = []
    if is_dataclass(value):
        mine = [base for base in value.__mro__ if base.__module__.startswith("hf_xent")]
        names = dict.fromkeys(name for base in mine for name in vars(base).get("__annotations__", ()))
        known = {field.name: field for field in fields(value) if field.init}
        declared = [Option(name, _default(known[name]), _help(value, known[name])) for name in names if name in known]
    return declared or list(_parameters(value))


def _parameters(value: Any) -> Iterator[Option]:
    """The parameters of a function, or of a class with an `__init__` of its own, as those of models are."""
    texts = arguments(inspect.getdoc(value) or "")
    for name, parameter in inspect.signature(value).parameters.items():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = texts.get(stars + name) or texts.get(name, "")
        if stars and not text:
            continue
        required = "" if stars else "required"
        default = required if parameter.default is parameter.empty else _written(parameter.default)
        yield Option(stars + name, default, text)


def arguments(docstring: str) -> dict[str, str]:
    """Name -> text of what a docstring has under `Args:`."""
    section = dict(_SECTION.findall(docstring)).get("Args", "")
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(textwrap.dedent(section))}


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return _written(field.default)
    return "required" if field.default_factory is MISSING else repr(field.default_factory())


def _help(owner: type, field: Field[Any]) -> str:
    """What its class, or the nearest base that says so, tells about a field."""
    for base in owner.__mro__:
        own = vars(base).get("__dataclass_fields__", {}).get(field.name)
        text = own is not None and (own.metadata.get("help") or _strings(base).get(field.name))
        if text := text or arguments((vars(base).get("__doc__") and inspect.getdoc(base)) or "").get(field.name):
            return " ".join(str(text).split())
    return ""


@cache
def _strings(owner: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    if not owner.__module__.startswith("hf_xent"):
        return {}
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    strings = {}
    for field, below in pairwise(tree.body):  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            strings[ast.unparse(field.target)] = str(below.value.value)
    return strings


def _registry(kind: str, name: str) -> Any:
    """The registry that has an entry.

    Raises:
        ValueError: The kind or the name is unknown.
    """
    registries = [found(f"hf_xent.{path}") for path in REGISTRIES]
    for registry in registries:
        if registry.kind == kind and name in registry:
            return registry
    kinds = ", ".join(dict.fromkeys(registry.kind for registry in registries))
    raise ValueError(f"<!-- options: {kind} {name} -->: no {kind} has this name; the kinds are {kinds}")


def _of_row(registry: Any, name: str) -> list[Option]:
    """The options of an entry of a registry, as `hf-xent losses` shows them."""
    row, texts = registry.row(name), arguments(inspect.getdoc(registry[name]) or "")
    return [Option(key, repr(value), row["help"][key] or texts.get(key, "")) for key, value in row["options"].items()]


def _inherited(value: Any) -> str:
    """Where the options come from that a configuration of trainers has beside its own."""
    bases = [base for base in getattr(value, "__mro__", ()) if not base.__module__.startswith("hf_xent")]
    configs = [base for base in bases if is_dataclass(base)]
    if not configs:
        return ""
    library = configs[0].__module__.partition(".")[0]
    return f"It has those of `{library}.{configs[0].__name__}`, too."


def escaped(text: str) -> str:
    """A text for a cell of a Markdown table, in which only what stands between backticks is marked."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(p, quote=False)).replace("$", "&#36;") for p in parts[::2]]
    parts[::2] = plain
    return "".join(parts).replace("|", r"\|")


def _code(default: str) -> str:
    return default if default in ("required", "") else f"`{default}`".replace("|", r"\|")


def _written(value: Any) -> str:
    """A default as Python writes it; functions and classes by their names."""
    return getattr(value, "__name__", None) or repr(value)
