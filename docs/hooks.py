"""Pages made at build time: the start page from README.md, the commands, results, and the API."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
FILES = "https://github.com/hf-xent/hf_xent/blob/main/"
PICTURES = "https://raw.githubusercontent.com/hf-xent/hf_xent/main/"
ROOMS = "ops losses ranking patching lazy trainers data detection ln_free hub bench registry"
FILES_OF_ROOMS = """callbacks.patching callbacks.membership generation.sampling generation.mirostat generation.judging
    metrics.ranking metrics.consistency metrics.calibration metrics.diversity models.loading experiments.study"""
API = ("hf_xent", *(f"hf_xent.{name}" for name in sorted(f"{ROOMS} {FILES_OF_ROOMS}".split())))
"""Packages and modules that users call, a page each."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the pictures and tables of numbers they link to."""
    pages = {"index.md": start(), "commands.md": commands()}
    pages |= {f"results/{page.name}": page.read_text(encoding="utf-8") for page in results("*.md")}
    pages |= {f"api/{name.removeprefix('hf_xent.')}.md": api(name) for name in API}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for file in (*results("*.png"), *results("*.csv")):
        files.append(File.generated(config, f"results/{file.name}", content=file.read_bytes()))
    config.nav = expanded(config.nav, files)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead to benchmarks/results in the repository lead to the site's results/."""
    return re.sub(r"\]\(\.\./((?:\.\./)*)benchmarks/results/", r"](\1results/", markdown)


def results(pattern: str) -> list[Path]:
    """What was measured, committed."""
    return sorted((ROOT / "benchmarks" / "results").glob(pattern))


def start() -> str:
    """The README: what it links to on GitHub is on the site where the site has it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(rf"\]\((?:{FILES}|{PICTURES})benchmarks/results/", "](results/", text)
    return re.sub(rf"\]\({FILES}docs/", "](", text)


def commands() -> str:
    """Every command's own help."""
    from hf_xent import cli

    def shown(*path: str) -> str:
        found = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
        assert found.exit_code == 0, found.output
        return f"{'#' * (len(path) + 1)} {' '.join(('hf-xent', *path))}\n\n```text\n{found.output.strip()}\n```\n"

    from typer.main import get_command

    def walk(command: Any, path: tuple[str, ...]) -> list[str]:
        parts = [shown(*path)]
        for name, part in getattr(command, "commands", {}).items():
            parts += walk(part, (*path, name))
        return parts

    return "\n".join(walk(get_command(cli.app), ()))


def api(name: str) -> str:
    """A page of a module: its docstring, then its public names by the files they are written in.

    A name may be loaded only when it is asked for (`__getattr__`), which is more than a look at the files can tell.
    """
    module = importlib.import_module(name)
    names = sorted(getattr(module, "__all__", ()), key=str.lower)
    title = f"# {name}\n"
    if not names:
        return f"{title}\n{reference(name, show_root_heading='false')}"
    page = [title, reference(name, show_root_heading="false", members="false")]
    if name == "hf_xent":  # all of these are described on the page of their package
        return "\n".join(
            (*page, "| name | what it is |", "|---|---|", *(contents(module, public) for public in names), "")
        )
    files: dict[str, list[str]] = {}
    for public in names:
        file, _, inner = home(module, public).rpartition(".")
        files.setdefault(file, []).append(inner)
    for file, inside in sorted(files.items(), key=lambda item: item[0] != name):
        if file == name:
            page += [reference(f"{name}.{public}", heading=public) for public in inside]
        elif file.startswith(f"{name}."):
            page.append(
                reference(file, heading=file.removeprefix(f"{name}."), members=f"[{', '.join(dict.fromkeys(inside))}]")
            )
        else:
            page.append(f"Elsewhere: {', '.join(f'[`{public}`][{file}.{public}]' for public in inside)}.\n")
    return "\n".join(page)


def reference(name: str, **options: str) -> str:
    """What mkdocstrings replaces by the description of a name."""
    return "\n".join((f"::: {name}", "    options:", *(f"      {key}: {value}" for key, value in options.items()), ""))


def contents(module: Any, public: str) -> str:
    """A row of a table: a public name, which leads to its description, and the first line of that."""
    thing, place = getattr(module, public), home(module, public)
    link = f"{place.removeprefix('hf_xent.')}.md" if inspect.ismodule(thing) else None
    first = (inspect.getdoc(thing) or "").partition("\n")[0].replace("|", "\\|")
    return f"| [`{public}`]({link}) | {first} |" if link else f"| [`{public}`][{place}] | {first} |"


def home(module: Any, public: str) -> str:
    """Where a public name is written down; a constant is where it is imported from, or in the module itself."""
    thing = getattr(module, public)
    if inspect.ismodule(thing):
        return thing.__name__
    if inspect.isclass(thing) or inspect.isfunction(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"{module.__name__}.{public}"


def expanded(nav: list[Any], files: Files) -> list[Any]:
    """Folders in the navigation as lists of their pages."""
    found = []
    for entry in nav:
        [(title, place)] = entry.items()
        pages = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri.startswith(place))
        found.append({title: pages if place.endswith("/") else place})
    return found
