"""The registry of a family, such as losses, scores or data sets, in which each entry is one file and one line.

    LOSSES = Registry("loss", {"focal": "focal:Focal", "emo": "emo:EMO"}, package="hf_xent.losses")
    LOSSES["focal"]                      the class, imported on first use
    LOSSES.build("focal:gamma=3")        an instance, with its options checked
    LOSSES.table()                       the documentation of every entry, read without importing it

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

from .system import renamed

T = TypeVar("T")
_SECTION = re.compile(r"^([A-Z]\w+):(.*?)(?=\n\n|\n[A-Z]\w+:|\Z)", re.DOTALL | re.MULTILINE)


class Registry(MutableMapping[str, T], Generic[T]):
    """Entries of one kind by name. An entry is written 'file:object', or is the object itself if a user adds it.

    Args:
        kind: The name of an entry in messages, such as 'loss'.
        entries: Name -> 'file:object', the file without its ending and relative to `package`.
        package: The package that contains the files.
    """

    def __init__(self, kind: str, entries: Mapping[str, str], package: str):
        self.kind, self.package = kind, package
        self.entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> T:
        entry = self.entries[name]
        if not isinstance(entry, str):
            return entry
        file, _, object_name = entry.partition(":")
        return getattr(import_module(f".{file}", self.package), object_name)

    def __setitem__(self, name: str, entry: T) -> None:
        self.entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # that of Mapping would import the entry
        return name in self.entries

    @property
    def exported(self) -> dict[str, str]:
        """The names under which the package offers its entries: object -> entry, for `__all__` and `__getattr__`."""
        written = {name: entry for name, entry in self.entries.items() if isinstance(entry, str)}
        return {entry.partition(":")[2]: name for name, entry in written.items()}

    def attribute(self, name: str, file_of: Mapping[str, str]) -> Any:
        """What the package offers under a name, loaded now, for its `__getattr__`.

        Args:
            name: The name of an entry's object, or another one.
            file_of: Other public name -> the file that has it, without its ending.

        Raises:
            AttributeError: The package has and had no such name.
        """
        if name in self.exported:
            return self[self.exported[name]]
        if name in file_of:
            return getattr(import_module(f".{file_of[name]}", self.package), name)
        return renamed.attribute(self.package, name)

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

    def instance(self, given: Any, base: type, /, **options: Any) -> Any:
        """The object that was given, if it is a `base`, or else what `build` makes of it.

        Raises:
            ValueError: As `build`, or options stand beside an object.
        """
        if not isinstance(given, base):
            return self.build(given, **options)
        if options:
            raise ValueError(
                f"{self.kind} is an object, {given!r}: set {', '.join(options)} on the object, not beside it"
            )
        return given

    def build(self, text: str, /, **options: Any) -> Any:
        """An instance of an entry. An entry that is not a class is configured by its method `with_options`.

        Args:
            text: 'name' or 'name:key=value, ...'.
            **options: More options. Text values, here or in `text`, are read as Python literals if they can be.

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
        options_in_text = parse(written)
        if repeated := [option for option in options if option in options_in_text]:
            raise ValueError(
                f"{self.kind} is {text!r} with {repeated[0]}={options[repeated[0]]!r} beside it: set {repeated[0]} once"
            )
        options = options_in_text | {key: literal(v) if isinstance(v, str) else v for key, v in options.items()}
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
        """The documentation in an entry's file: `name`, `object`, `summary`, `formula`, `options` (defaults), their
        `help`, and its sections (`source`, `statistics`, `relations`, ...) by their titles.
        """
        path, object_name = self._place(name)
        return {"name": name, "object": object_name, **_documentation(path, object_name)}

    def constants(self, name: str) -> dict[str, Any]:
        """The constants of an entry's class that are literals, also inherited ones, read without importing it."""
        entry = self.entries[name]
        if isinstance(entry, type):  # added by a user, who has imported it
            return {key: value for base in reversed(entry.__mro__) for key, value in vars(base).items()}
        path, object_name = self._place(name)
        return _constants(path, _definition(_tree(path), object_name))

    def _place(self, name: str) -> tuple[Path, str]:
        """The file of an entry, and its name there."""
        entry = self.entries[name]
        if isinstance(entry, str):
            file, _, object_name = entry.partition(":")
            return Path(sys.modules[self.package].__path__[0], *file.split(".")).with_suffix(".py"), object_name
        return Path(str(sys.modules[entry.__module__].__file__)), getattr(entry, "__name__", "")

    def table(self) -> list[dict[str, Any]]:
        """One row per entry, for help texts, the documentation and the README."""
        return [self.row(name) for name in self.entries]


def parse(text: str) -> dict[str, Any]:
    """Options written as text: 'gamma=3, variant=emo2' is {'gamma': 3, 'variant': 'emo2'}.

    Raises:
        ValueError: The text is not of this form, or sets an option twice.
    """
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
    except (SyntaxError, ValueError):  # a ValueError for what source code cannot contain, such as a null character
        call = None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise ValueError(f"options are {text!r}: write them as key=value, key=value")
    names = [str(keyword.arg) for keyword in call.keywords]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"options are {text!r}: set {repeated[0]} once")
    return {str(keyword.arg): literal(ast.unparse(keyword.value)) for keyword in call.keywords}


def literal(text: str) -> Any:
    """The value of a Python literal, or of inf, -inf and nan, which have no literal; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return float(text) if text.strip() in ("inf", "-inf", "nan") else text


def _documentation(path: Path, object_name: str) -> dict[str, Any]:
    """The documentation of one of the classes, functions or constants of a file."""
    tree = _tree(path)
    node = _definition(tree, object_name)
    function_doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
    doc = function_doc or ast.get_docstring(tree) or ""
    formula = next((line for line in doc.splitlines() if line.startswith("    ")), "")  # parts are separated by spaces
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
    types = (ast.ClassDef, ast.FunctionDef)
    return next((node for node in tree.body if isinstance(node, types) and node.name == name), None)


def _options(path: Path, node: ast.AST | None) -> dict[str, tuple[Any, str]]:
    """Option -> (default, help): the fields of a dataclass, also inherited ones; a function's keywords."""
    if isinstance(node, ast.FunctionDef):
        parameters, defaults = node.args.posonlyargs + node.args.args, node.args.defaults
        named = zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True)
        return {parameter.arg: (_value(default), "") for parameter, default in named}
    options: dict[str, tuple[Any, str]] = {}
    if not isinstance(node, ast.ClassDef):
        return options
    for base in reversed(node.bases):
        options |= _options(*_resolved(path, ast.unparse(base)))
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return options
    for field, after in pairwise([*node.body, None]):
        if isinstance(field, ast.AnnAssign) and field.value and "ClassVar" not in ast.unparse(field.annotation):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = " ".join(str(after.value.value).split()) if documented else _help(field.value)  # type: ignore[union-attr]
            name = ast.unparse(field.target)
            options[name] = (_value(field.value), text or options.get(name, (None, ""))[1])
    return options


def _help(default: ast.AST) -> str:
    """The help in the metadata of a dataclass field, as argument parsers read it."""
    for node in ast.walk(default):
        if isinstance(node, ast.Dict):
            written = {ast.unparse(key): value for key, value in zip(node.keys, node.values, strict=True) if key}
            if "'help'" in written:
                return " ".join(str(_value(written["'help'"])).split())
    return ""


def _constants(path: Path, node: ast.AST | None) -> dict[str, Any]:
    """Name -> value of what a class body sets to a literal, without the fields of a dataclass."""
    found: dict[str, Any] = {}
    if not isinstance(node, ast.ClassDef):
        return found
    for base in reversed(node.bases):
        found |= _constants(*_resolved(path, ast.unparse(base)))
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and line.value and "ClassVar" in ast.unparse(line.annotation):
            found[ast.unparse(line.target)] = _value(line.value)
        elif isinstance(line, ast.Assign):
            found |= {ast.unparse(target): _value(line.value) for target in line.targets}
    return found


def _resolved(path: Path, name: str) -> tuple[Path, ast.AST | None]:
    """The file that defines a name: this one, or the file beside it that the name is imported from."""
    tree = _tree(path)
    if (node := _definition(tree, name)) is not None:
        return path, node
    for statement in tree.body:
        sibling = isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module
        if sibling and any(name == alias.name for alias in statement.names):  # type: ignore[attr-defined]
            return _resolved(path.with_name(f"{sibling}.py"), name)
    return path, None


def _value(default: ast.AST) -> Any:
    """A default from its source: a literal, the default of a dataclass field, or a float without a literal."""
    text = ast.unparse(default)
    if isinstance(default, ast.Call):
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in default.keywords}
        text = named.get("default", text)
    return literal(re.sub(r"float\('(-?inf)'\)", r"\1", text).removeprefix("math."))
