"""The floors of the package: imports point down or stay, and the lower floors load without the libraries above them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_xent"
FLOORS = {
    0: ("ops", "options", "system", "registry"),
    1: ("losses", "ranking", "data", "hub", "models", "metrics"),
    2: ("lazy", "patching"),
    3: ("trainers", "callbacks", "detection", "generation", "ln_free"),
    4: ("bench", "experiments"),
    5: ("cli", "hf_xent"),  # hf_xent is the package's own __init__, which shows what all floors offer
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts}


def name_of(path):
    """`hf_xent/ops/__init__.py` is hf_xent.ops."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module):
    """The part of the package a module belongs to; the package's own __init__ is `hf_xent`."""
    return module.split(".")[min(1, module.count("."))]


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
    own = FLOOR_OF[part_of(module)]
    return sorted({name for name in imported(source, module, is_package) if FLOOR_OF[part_of(name)] > own})


def test_every_module_has_a_floor():
    assert len(MODULES) > 10
    homeless = sorted({part_of(module) for module in MODULES} - set(FLOOR_OF))
    assert not homeless, f"put {', '.join(homeless)} on a floor: FLOORS here, and the table in CONTRIBUTING.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    path = MODULES[module]
    found = upward(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, f"{module} is on floor {FLOOR_OF[part_of(module)]} but imports {', '.join(found)} from above"


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
