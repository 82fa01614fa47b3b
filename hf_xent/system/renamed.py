"""Modules and names under which they were known before: they still work, and a DeprecationWarning names the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "auc": "ranking",
    "calls": "patching.calls",
    "cli.arms": "experiments.arms",
    "cli.plot": "experiments.curves",
    "cli.quiet": "models.quiet",
    "comparison": "patching.comparison",
    "consistency": "metrics.consistency",
    "data.parquet": "hub.datasets",
    "data.variants": "trainers.variants",
    "detection.callback": "callbacks.membership",
    "detection.corpus": "detection.counts",
    "detection.metrics": "metrics.ranking",
    "detection.modules": "metrics.modules",
    "embedded": "models.packaged",
    "figures": "system.figures",
    "fused_head": "patching.trl",
    "heads": "patching.heads",
    "judging": "generation.judging",
    "ln_free.recipes": "trainers.ln_recipes",
    "ln_free.tokens": "metrics.calibration",
    "losses.ranges": "options.ranges",
    "mirostat": "generation.mirostat",
    "mode": "models.contexts",
    "ops.fused": "ops.gpu.fused",
    "ops.kernels": "ops.gpu.kernels",
    "ops.parallel": "ops.shard",
    "ops.streaming": "ops.gpu.streaming",
    "study": "experiments.study",
    "trainers.callback": "callbacks.patching",
}
"""Old module -> new one, both without the name of the package."""

NAMES: dict[str, str] = {
    "bench.inputs.export": "bench.inputs.write_activations",
    "bench.inputs.exported": "bench.inputs.read_activations",
    "bench.publish": "bench.pages.write_page",
    "bench.rewrite": "bench.pages.update_readme",
    "data.export": "hub.datasets.export",
    "data.to_hub": "hub.datasets.to_hub",
    "ln_free.RECIPES": "trainers.ln_recipes.RECIPES",
    "ln_free.Recipe": "trainers.ln_recipes.Recipe",
    **{
        f"generation.{name}": f"generation.sampling.{name}"
        for name in ("distinct", "repetition", "responses", "sample", "features", "mauve", "temperature_of")
    },
    "generation.temperature_at": "generation.sampling.temperature_at",
    "generation.ends": "generation.sampling.ends",
}
"""Old name in a module that is still there -> where it is now."""


def attribute(module: str, name: str) -> Any:
    """What was called `name` in a module, for its `__getattr__`. Raises: AttributeError for a name it never had."""
    package, _, inner = module.partition(".")
    old = f"{inner}.{name}" if inner else name
    if old in MODULES:
        return import_module(f"{package}.{old}")
    if old not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, new = NAMES[old].rpartition(".")
    _warn(f"{module}.{name}", f"{package}.{NAMES[old]}")
    return getattr(import_module(f"{package}.{home}"), new)


def install(package: str) -> None:
    """Imports of old modules of a package find the new ones."""
    if not any(isinstance(finder, _Renamed) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(_Renamed(package))


class _Renamed(MetaPathFinder, Loader):
    """Finds what no other finder does; the module it gives is the new one itself, under both names."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == self.package and old in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{self.package}.{MODULES[spec.name.partition('.')[2]]}"
        _warn(spec.name, new)
        module = import_module(new)
        self.kept = module.__spec__, module.__loader__  # the import system writes the old ones over them
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = self.kept


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}: use the new name", DeprecationWarning, stacklevel=_outside())


def _outside() -> int:
    """The stack level of the first caller that is neither this file nor the import system."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or "importlib" in frame.f_code.co_filename
    ):
        level, frame = level + 1, frame.f_back
    return level - 1
