"""The pages of the API: which modules have one, and what is on it."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

ROOMS = """ops losses ranking classes laws rasch calibration patching lazy trainers teachers retrieval data detection
    ln_free hub bench registry robust adapt caches attention cem speech continuous localization
    recipes planning dashboard"""
FILES_OF_ROOMS = """callbacks.patching callbacks.membership callbacks.curve callbacks.geometry generation.sampling
    generation.mirostat generation.judging generation.calibrated_judge generation.choices generation.labelers
    generation.aspects metrics.ranking metrics.consistency metrics.calibration metrics.diversity metrics.answers
    metrics.geometry models.features models.loading models.embeddings models.zero_shot robust.inputs
    experiments.study experiments.geometry experiments.forecasting data.questions data.crosslingual data.selectors
    classes.spans callbacks.robust_accuracy models.projection data.corruptions experiments.attacking generation.paths
    generation.voting data.subwords data.segmentation data.asterisk data.target_noise speech.plots
    models.mask_net models.basnet models.landmarks models.table metrics.contours metrics.signals metrics.edits
    hub.results hub.rights integrations.axolotl integrations.llamafactory integrations.ms_swift"""
API = ("hf_xent", *(f"hf_xent.{name}" for name in sorted(f"{ROOMS} {FILES_OF_ROOMS}".split())))
"""The packages and modules that users call; each has a page."""


def api_page(name: str) -> str:
    """The page of a module: its docstring, then its public names, grouped by the files that define them.

    The module is imported, since names that `__getattr__` loads on first access cannot be found in its source.
    """
    module = importlib.import_module(name)
    names = sorted(getattr(module, "__all__", ()), key=str.lower)
    title = f"# {name}\n"
    if not names:
        return f"{title}\n{reference(name, show_root_heading='false')}"
    page = [title, reference(name, show_root_heading="false", members="false")]
    if name == "hf_xent":  # all of these are described on the page of their package
        return "\n".join(
            (*page, "| name | what it is |", "|---|---|", *(table_row(module, public) for public in names), "")
        )
    files: dict[str, list[str]] = {}
    for public in names:
        file, _, inner = home(module, public).rpartition(".")
        files.setdefault(file, []).append(inner)
    for file, members in sorted(files.items(), key=lambda item: item[0] != name):
        if file == name:
            page += [reference(f"{name}.{public}", heading=public) for public in members]
        elif file.startswith(f"{name}."):
            page.append(
                reference(file, heading=file.removeprefix(f"{name}."), members=f"[{', '.join(dict.fromkeys(members))}]")
            )
        else:
            page.append(f"Elsewhere: {', '.join(f'[`{public}`][{file}.{public}]' for public in members)}.\n")
    return "\n".join(page)


def reference(name: str, **options: str) -> str:
    """The directive that mkdocstrings replaces by the description of a name."""
    return "\n".join((f"::: {name}", "    options:", *(f"      {key}: {value}" for key, value in options.items()), ""))


def table_row(module: Any, public: str) -> str:
    """A row of a table: a public name, linked to its description, and the first line of its docstring."""
    value, path = getattr(module, public), home(module, public)
    link = f"{path.removeprefix('hf_xent.')}.md" if inspect.ismodule(value) else None
    first = (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")
    return f"| [`{public}`]({link}) | {first} |" if link else f"| [`{public}`][{path}] | {first} |"


def home(module: Any, public: str) -> str:
    """The full path of the definition of a public name; constants count as defined in the module itself."""
    value = getattr(module, public)
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{module.__name__}.{public}"


@cache
def documented() -> dict[str, str]:
    """The full path of every object that the pages describe -> the shortest name that users import."""
    names: dict[str, str] = {}
    for name in API:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            if not inspect.ismodule(getattr(module, public)):
                names.setdefault(home(module, public), f"{name}.{public}")
    return names


def link(path: str) -> str:
    """What leads to the description of an object, from its full path; its name alone if no page describes it."""
    name = documented().get(path)
    return f"[`{name}`][{path}]" if name else f"`{path}`"
