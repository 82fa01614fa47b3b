"""The house: imports point down or stay level and close no circle, files and functions stay short, and the lower
floors load without the libraries above them.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_xent"
FLOORS = {
    0: ("ops", "options", "system", "registry"),
    1: (
        *("losses", "ranking", "classes", "data", "hub", "models", "metrics", "laws", "rasch", "calibration", "caches"),
        *("continuous", "speech"),
    ),
    2: ("lazy", "patching", "robust", "attention"),
    3: (
        *("trainers", "callbacks", "detection", "generation", "ln_free", "teachers", "retrieval", "adapt"),
        *("localization",),
    ),
    4: ("bench", "experiments", "cem", "recipes", "planning", "dashboard", "integrations"),
    5: ("cli", "hf_xent"),  # hf_xent is the package's own __init__, which shows what all floors offer
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts}


def name_of(path):
    """`hf_xent/ops/__init__.py` is hf_xent.ops."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module):
    """The part of the package a module belongs to; its own __init__ and __main__ are `hf_xent`."""
    return module.removesuffix(".__main__").split(".")[min(1, module.removesuffix(".__main__").count("."))]


def imported(source, module, is_package):
    """Dotted names of hf_xent that a module's source imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hf_xent")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            if base.split(".")[0] == "hf_xent":
                # `from . import ops` imports a module, `from . import patch` a name of the package itself
                yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)


def upward(source, module, is_package=False):
    """Imports of a module that point to a higher floor."""
    floor = FLOOR_OF[part_of(module)]
    return sorted({name for name in imported(source, module, is_package) if FLOOR_OF[part_of(name)] > floor})


def graph():
    """Module -> the modules of hf_xent it imports, wherever in the file it does, type checkers' imports included."""
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    edges = {m: set(imported(sources[m], m, MODULES[m].name == "__init__.py")) - {m} for m in MODULES}
    return {module: {name for name in names if name in MODULES} for module, names in edges.items()}


def circles(edges):
    """Sets of nodes that reach one another, each a sorted list."""
    reach = {node: set(targets) for node, targets in edges.items()}
    for middle in reach:
        for node in reach:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    found = {
        tuple(sorted(other for other in reach[node] if node in reach[other])) for node in reach if node in reach[node]
    }
    return sorted(map(list, found))


def test_every_module_has_a_floor():
    assert len(MODULES) > 10
    homeless = sorted({part_of(module) for module in MODULES} - set(FLOOR_OF))
    assert not homeless, f"put {', '.join(homeless)} on a floor: FLOORS here, and the table in CONTRIBUTING.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    path = MODULES[module]
    found = upward(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, f"{module} is on floor {FLOOR_OF[part_of(module)]} but imports {', '.join(found)} from above"


def test_files_close_no_circle():
    """The package's own __init__ shows what all rooms offer when it is asked, and `system.renamed` imports by name."""
    edges = graph()
    edges["hf_xent"] = set()
    assert circles(edges) == []


def test_rooms_close_no_circle():
    """Also across rooms of one floor."""
    edges = {part_of(module): set() for module in MODULES}
    for module, names in graph().items():
        edges[part_of(module)] |= {part_of(name) for name in names} - {part_of(module)}
    edges["hf_xent"] = set()
    assert circles(edges) == []


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}}, [["a", "b", "c"], ["d", "e"]]),
    ],
)
def test_circles_are_seen(edges, found):
    assert circles(edges) == found


def test_the_top_has_rooms_and_the_registry_alone():
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py", "registry.py"]


LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "hf_xent.ops.gpu.kernels._stats_fwd": "a Triton kernel: one pass, whose parts share two dozen tiles in registers",
}
"""What may be longer than the rest, each with its reason."""


def functions(tree, prefix):
    """(dotted name, lines) of every function, methods and inner functions too."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{node.name}" if hasattr(node, "name") else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node.end_lineno - node.lineno + 1
        yield from functions(node, name)


def test_files_and_functions_are_short():
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    files = {module for module, source in sources.items() if source.count("\n") > 300}
    assert files == set(LONG_FILES), "cut it along its ideas, or name it with a reason"
    lengths = [pair for module, source in sources.items() for pair in functions(ast.parse(source), module)]
    assert {name for name, lines in lengths if lines > 60} == set(LONG_FUNCTIONS)


@pytest.mark.parametrize(
    ("module", "is_package", "source", "found"),
    [
        ("hf_xent.ops.chunked", False, "from .algebra import Head", []),
        ("hf_xent.ops.chunked", False, "from ..losses import get", ["hf_xent.losses"]),
        ("hf_xent.ops.chunked", False, "from .. import losses", ["hf_xent.losses"]),
        ("hf_xent.ops.chunked", False, "from .. import patch", ["hf_xent"]),
        ("hf_xent.ops", True, "from ..losses.base import Loss", ["hf_xent.losses.base"]),
        ("hf_xent.ops", True, "from . import reference", []),
        ("hf_xent.losses", True, "from ..ops import Head\nfrom .base import Loss", []),
        ("hf_xent.losses.base", False, "import torch, hf_xent.ops, hf_xent.cli", ["hf_xent.cli"]),
        ("hf_xent.losses.base", False, "import hf_xent", ["hf_xent"]),
        ("hf_xent.data", True, "def load():\n    from hf_xent import trainers", ["hf_xent.trainers"]),
        ("hf_xent.patching", False, "if TYPE_CHECKING:\n    from .cli import main", ["hf_xent.cli"]),
        ("hf_xent.patching", False, "from .lazy import LazyLogits\nfrom hf_xent.losses import get", []),
        ("hf_xent", True, "from . import losses\nfrom .patching import patch", []),
    ],
)
def test_the_walk_sees(module, is_package, source, found):
    assert upward(source, module, is_package) == found


@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("hf_xent.ops, hf_xent.losses", {"transformers", "trl", "peft", "datasets", "triton"}),
        ("hf_xent", {"trl", "peft", "datasets"}),
        ("hf_xent.patching", {"trl", "peft", "datasets"}),
        ("hf_xent.cli", {"transformers", "trl", "peft", "datasets"}),  # `hf-xent --help` is quick
    ],
)
def test_heavy_libraries_wait(imports, absent):
    code = f"import sys, {imports}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not absent & set(run.stdout.split())
