"""The earlier names of modules, functions and keywords: they still work, and a DeprecationWarning has the new one."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MODULES = {
    "auc": "ranking",
    "auc.losses": "ranking",
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
    "detection.fingerprints": "models.fingerprints",
    "detection.metrics": "metrics.ranking",
    "detection.modules": "metrics.modules",
    "embedded": "models.packaged",
    "figures": "system.figures",
    "fused_head": "patching.trl",
    "heads": "patching.heads",
    "judging": "generation.judging",
    "lazy.seam": "lazy.state",
    "ln_free.recipes": "trainers.ln_recipes",
    "losses.catalog": "registry",
    "losses.ranges": "options.ranges",
    "mirostat": "generation.mirostat",
    "mode": "models.contexts",
    "ops.fused": "ops.gpu.fused",
    "ops.kernels": "ops.gpu.kernels",
    "ops.parallel": "ops.shard",
    "ops.streaming": "ops.gpu.streaming",
    "ranking.losses": "ranking",  # what `from hf_xent.auc import losses` imports
    "study": "experiments.study",
    "trainers.callback": "callbacks.patching",
}
"""Old module -> new one, both without the name of the package."""

NAMES: dict[str, str] = {
    "cli.detect._scored": "experiments.scoring.score_in_chunks",
    "bench.inputs.export": "bench.inputs.write_activations",
    "bench.inputs.exported": "bench.inputs.read_activations",
    "bench.publish": "bench.pages.write_page",
    "bench.rewrite": "bench.pages.update_readme",
    "data.export": "hub.datasets.export",
    "data.to_hub": "hub.datasets.to_hub",
    "detection.Corpus": "detection.counts.CountedText",
    "detection.counts.Corpus": "detection.counts.CountedText",
    "ln_free.RECIPES": "trainers.ln_recipes.RECIPES",
    "ln_free.Recipe": "trainers.ln_recipes.Recipe",
    "trainers.f2c.Items": "trainers.f2c_items.ItemCollator",
    "trainers.f2c.mixture": "trainers.consensus.mixture",
    "trainers.noise.layers_of": "models.anatomy.layers_of",
    **{
        f"generation.{name}": f"generation.sampling.{name}"
        for name in ("ends", "responses", "sample", "temperature_at", "temperature_of")
    },
    "generation.judging.verdict_tokens": "generation.answering.answer_tokens",
    **{f"ops.algebra.{name}": f"ops.problem.{name}" for name in ("ALIGNMENT", "TENSORS", "Problem", "pieces")},
    **{
        f"ops.algebra.{name}": f"ops.statistics.{name}"
        for name in ("DIFFERENTIABLE", "FORWARD_ONLY", "STATISTICS", "Stats", "wide")
    },
    "ops.algebra.Survey": "ops.tail.Survey",
    **{f"generation.{name}": f"metrics.diversity.{name}" for name in ("distinct", "features", "mauve", "repetition")},
    **{f"models.packaged.{name}": f"models.loading.{name}" for name in ("load", "resolve")},
    "models.packaged.explained": "models.loading.explain_load_errors",
    **{f"ranking.{name}": f"ranking.base.{name}" for name in ("Bounded", "Pairwise", "SURROGATES", "logmeanexp")},
    "models.packaged.publish": "system.files.write_atomically",
    **{
        f"ln_free.norms.{name}": f"ln_free.removal.{name}"
        for name in ("FINAL", "KINDS", "Site", "calibrate", "remove", "restore", "sites")
    },
    "ln_free.norms.is_ln_free": "ln_free.forms.is_ln_free",
    "ln_free.norms.wrap": "ln_free.wrapping.wrap",
    "ln_free.convert.load": "ln_free.loading.load",
    "models.contexts.check_room": "models.anatomy.check_room",
    "models.contexts.positions": "models.anatomy.positions",
    "models.contexts.evaluating": "models.contexts.eval_mode",
    "models.contexts.measuring": "models.contexts.eval_mode_without_autocast",
}
"""Old name in a module that still exists -> its new place."""


def attribute(module: str, name: str) -> Any:
    """The object that was called `name` in a module, for its `__getattr__`. Raises: AttributeError for other names."""
    package, _, inner = module.partition(".")
    old = f"{inner}.{name}" if inner else name
    if old in MODULES:
        return import_module(f"{package}.{old}")
    if old not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new_module, _, new = NAMES[old].rpartition(".")
    _warn(f"{module}.{name}", f"{package}.{NAMES[old]}")
    return getattr(import_module(f"{package}.{new_module}"), new)


def parameters(**names: str) -> Callable[[F], F]:
    """A decorator that lets a function take keywords by their earlier names: `@parameters(old="new")`."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                _warn(f"{function.__name__}({old}=)", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return run  # type: ignore[return-value]  # it has the function's signature

    return wrap


def install(package: str) -> None:
    """Make imports of a package's old modules find the new ones."""
    if not any(isinstance(finder, _Renamed) and finder.package == package for finder in sys.meta_path):
        # first: else the files of a renamed folder would be imported again under its old name, with other classes
        sys.meta_path.insert(0, _Renamed(package))


def _new_module(old: str) -> str | None:
    """The new name of an old module, or of one below an old package; None for any other."""
    parent, _, name = old.rpartition(".")
    if old in MODULES or not parent:
        return MODULES.get(old)
    return f"{new}.{name}" if (new := _new_module(parent)) else None


class _Renamed(MetaPathFinder, Loader):
    """Finds old modules: it returns the new module itself, which then has both names."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == self.package and _new_module(old) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{self.package}.{_new_module(spec.name.partition('.')[2])}"
        _warn(spec.name, new)
        module = import_module(new)
        spec.loader_state = module.__spec__, module.__loader__  # the import system writes the old ones over them
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = module.__spec__.loader_state  # type: ignore[union-attr]  # set above


def _warn(old: str, new: str) -> None:
    """Warn at the line that used the old name; Python hides a DeprecationWarning from elsewhere."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_intermediate(frame):
        frame = frame.f_back
    module, code = frame.f_globals.get("__name__", "<unknown>"), frame.f_code
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    text = f"{old} is now {new}: use the new name"
    warnings.warn_explicit(text, DeprecationWarning, code.co_filename, frame.f_lineno, module, registry)


def _is_intermediate(frame: FrameType) -> bool:
    """Whether a frame is this file's, the import system's, or that of a `__getattr__`, or a registry's `attribute`."""
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    return file == __file__ or "importlib" in file or function in ("__getattr__", "attribute")
