"""Pages made at build time: the start page from README.md, the commands, results, and the API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
FILES = "https://github.com/hf-xent/hf_xent/blob/main/"
PICTURES = "https://raw.githubusercontent.com/hf-xent/hf_xent/main/"
API = (
    "hf_xent", "hf_xent.ops", "hf_xent.losses", "hf_xent.trainers", "hf_xent.data", "hf_xent.detection",
    "hf_xent.ln_free", "hf_xent.generation.judging", "hf_xent.generation.sampling", "hf_xent.generation.mirostat",
    "hf_xent.metrics.consistency", "hf_xent.metrics.diversity", "hf_xent.hub", "hf_xent.experiments.study",
)  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the pictures and tables of numbers they link to."""
    pages = {"index.md": start(), "commands.md": commands()}
    pages |= {f"results/{page.name}": page.read_text(encoding="utf-8") for page in results("*.md")}
    pages |= {f"api/{name.removeprefix('hf_xent.')}.md": api(name) for name in API if exists(name)}
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


def exists(name: str) -> bool:
    """Whether a module is there as a file or a folder."""
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


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
    """A module's docstring and its public names; those of trainers are in their registry alone."""
    page = f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n"
    if name == "hf_xent.trainers":
        from hf_xent.trainers import METHODS

        page += "".join(f"\n::: {name}.{file}.{public}\n" for file, names in METHODS.items() for public in names)
    return page


def expanded(nav: list[Any], files: Files) -> list[Any]:
    """Folders in the navigation as lists of their pages."""
    found = []
    for entry in nav:
        [(title, place)] = entry.items()
        pages = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri.startswith(place))
        found.append({title: pages if place.endswith("/") else place})
    return found
