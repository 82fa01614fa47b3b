"""A registry of a family: losses, ranking losses, scores, data sets, ... each a file, each a line here or there.

    LOSSES = Registry("loss", {"focal": "focal:Focal", "emo": "emo:EMO"}, package="hf_xent.losses")
    LOSSES["focal"]                      the class, imported when it is first asked for
    LOSSES.build("focal:gamma=3")        an instance, with its options checked
    LOSSES.table()                       what every file says of itself, read without importing it

A command that lists or explains the entries imports none of them, so `--help` does not wait for torch.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_SECTION = re.compile(r"^([A-Z]\w+):(.*?)(?=\n\n|\n[A-Z]\w+:|\Z)", re.DOTALL | re.MULTILINE)


class Registry(MutableMapping[str, T], Generic[T]):
    """Entries of one kind by name. An entry is written 'file:object', or is the object itself if a user adds it.

    Args:
        kind: What an entry is called in messages: 'loss'.
        entries: Name -> 'file:object', the file without its ending and relative to `package`.
        package: The package that has the files.
    """

    def __init__(self, kind: str, entries: Mapping[str, str], package: str):
        self.kind, self.package = kind, package
        self.entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self.entries[name]
        if not isinstance(entry, str):
            return entry
        file, _, thing = entry.partition(":")
        return getattr(import_module(f".{file}", self.package), thing)

    def __setitem__(self, name: str, entry: T) -> None:
        self.entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would import the entry
        return name in self.entries

    @property
    def exported(self) -> dict[str, str]:
        """The names under which the package offers its entries: object -> entry, for `__all__` and `__getattr__`."""
        written = {name: entry for name, entry in self.entries.items() if isinstance(entry, str)}
        return {entry.partition(":")[2]: name for name, entry in written.items()}

    def names(self) -> str:
        """All names in one line, for help texts and messages."""
        return ", ".join(self.entries)

    def find(self, name: str) -> T:
        """An entry by name.

        Raises:
            ValueError: The name is unknown; the message lists the known ones.
        """
        if name not in self.entries:
            raise ValueError(f"{self.kind} is {name!r}: choose one of {self.names()}")
        return self[name]

    def build(self, text: str, /, **options: Any) -> Any:
        """An instance of an entry by 'name' or 'name:key=value, ...', with more options beside it.

        Options given as text are read as Python literals, else as words. An entry that is no class is configured by
        its method `with_options`.

        Args:
            text: The name, with options behind it if wanted.
            **options: More options; none may be in the text, too.

        Returns:
            The instance, with its options checked.

        Raises:
            ValueError: The name is unknown, or the entry does not have an option or does not accept its value.
        """
        name, _, written = str(text).partition(":")
        if name not in self.entries:
            raise ValueError(
                f"{self.kind} is {name!r}: choose one of {self.names()}, or pass a {self.kind} as an object"
            )
        own = parse(written)
        if twice := [option for option in options if option in own]:
            raise ValueError(
                f"{self.kind} is {text!r} with {twice[0]}={options[twice[0]]!r} beside it: set {twice[0]} once"
            )
        options = own | {key: literal(v) if isinstance(v, str) else v for key, v in options.items()}
        entry: Any = self[name]
        known = [f.name for f in fields(entry)] if isinstance(entry, type) else [*entry.defaults]
        if unknown := [option for option in options if option not in known]:
            raise ValueError(
                f"{self.kind} {name!r} does not take {', '.join(unknown)}: its options are {', '.join(known) or 'none'}"
            )
        try:
            return entry(**options) if isinstance(entry, type) else entry.with_options(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.kind} {name!r} cannot take {options}: {error}") from error

    def row(self, name: str) -> dict[str, Any]:
        """What an entry's file says: `name`, `object`, `summary`, `formula`, `options` (defaults), their `help`, and
        its sections (`source`, `statistics`, `relations`, ...) by their titles.
        """
        entry = self.entries[name]
        if isinstance(entry, str):
            file, _, thing = entry.partition(":")
            path = Path(sys.modules[self.package].__path__[0], *file.split(".")).with_suffix(".py")
        else:
            path, thing = Path(str(sys.modules[entry.__module__].__file__)), getattr(entry, "__name__", "")
        return {"name": name, "object": thing, **_described(path, thing)}

    def table(self) -> list[dict[str, Any]]:
        """One row an entry, for help texts, the documentation and the README."""
        return [self.row(name) for name in self.entries]


def parse(text: str) -> dict[str, Any]:
    """Options written as text: 'gamma=3, variant=emo2' is {'gamma': 3, 'variant': 'emo2'}.

    Raises:
        ValueError: The text is not of this form, or sets an option twice.
    """
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


def _described(path: Path, thing: str) -> dict[str, Any]:
    """What a file says of one of its classes, functions or constants."""
    tree = _tree(path)
    node = _definition(tree, thing)
    own = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
    doc = own or ast.get_docstring(tree) or ""
    formula = next((line for line in doc.splitlines() if line.startswith("    ")), "")  # parts are spaces apart
    options = _options(path, node)
    return {
        "summary": doc.splitlines()[0] if doc else "",
        "formula": "; ".join(part.strip() for part in formula.split("   ") if part.strip()),
        **{title.lower(): " ".join(text.split()).removesuffix(".") for title, text in _SECTION.findall(doc)},
        "options": {option: default for option, (default, _) in options.items()},
        "help": {option: text for option, (_, text) in options.items()},
    }


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _definition(tree: ast.Module, name: str) -> ast.AST | None:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((node for node in tree.body if isinstance(node, kinds) and node.name == name), None)


def _options(path: Path, node: ast.AST | None) -> dict[str, tuple[Any, str]]:
    """Option -> (default, help): the fields of a dataclass, its own and inherited; a function's keyword defaults."""
    if isinstance(node, ast.FunctionDef):
        parameters, defaults = node.args.posonlyargs + node.args.args, node.args.defaults
        named = zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True)
        return {parameter.arg: (_value(default), "") for parameter, default in named}
    found: dict[str, tuple[Any, str]] = {}
    if not isinstance(node, ast.ClassDef):
        return found
    for base in reversed(node.bases):
        found |= _options(*_resolved(path, ast.unparse(base)))
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return found
    for field, after in pairwise([*node.body, None]):
        if isinstance(field, ast.AnnAssign) and field.value and "ClassVar" not in ast.unparse(field.annotation):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = " ".join(str(after.value.value).split()) if said else ""  # type: ignore[union-attr]
            name = ast.unparse(field.target)
            found[name] = (_value(field.value), text or found.get(name, (None, ""))[1])
    return found


def _resolved(path: Path, name: str) -> tuple[Path, ast.AST | None]:
    """Where a name of a file is defined: there, or in a file beside it that it imports the name from."""
    tree = _tree(path)
    if (node := _definition(tree, name)) is not None:
        return path, node
    for statement in tree.body:
        beside = isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module
        if beside and any(name == alias.name for alias in statement.names):  # type: ignore[attr-defined]
            return _resolved(path.with_name(f"{beside}.py"), name)
    return path, None


def _value(default: ast.AST) -> Any:
    """A default as it is written: a literal, that of a dataclass field, or a float that has no literal."""
    text = ast.unparse(default)
    if isinstance(default, ast.Call):
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in default.keywords}
        text = named.get("default", text)
    return literal(re.sub(r"float\('(-?inf)'\)", r"\1", text).removeprefix("math."))
