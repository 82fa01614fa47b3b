"""Each page of a method has the same sections, formulas that can be rendered, options that exist and linked results."""

import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from hf_xent import cli
from hf_xent.cli.recipes import RecipeCommand
from hf_xent.recipes import RECIPES
from hf_xent.recipes.arguments import parser

METHODS = Path(__file__).parents[1] / "docs" / "methods"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(METHODS.glob("*.md"))}
SECTIONS = ["When to use it", "Data", "Example", "Options", "What was measured", "Cost", "References"]
AS_TEXT = r"\\[^a-zA-Z]|\\operatorname|\n[-+=#>]"
"""What GitHub would not read as a formula: escaped punctuation, a refused name, the beginning of a list or heading."""

SITE = runpy.run_path(str(METHODS.parent / "site_options.py"))
each_page = pytest.mark.parametrize("page", PAGES)


def without_code(text: str) -> str:
    """The text without its blocks of code, in which a line may begin with '#' or have a '$'."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@each_page
def test_a_page_has_all_sections_in_order(page):
    text = without_code(PAGES[page])
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1 and text.startswith("# ")
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [name for name in found if name in SECTIONS] == SECTIONS


@each_page
def test_a_page_shows_its_formula_before_the_first_section(page):
    pytest.importorskip("latex2mathml", reason="pip install -e .[docs]")
    mathml = runpy.run_path(str(METHODS.parent / "site_formulas.py"))["mathml"]
    text = without_code(PAGES[page])
    assert re.search(r"^\$\$$", text.partition("\n## ")[0], re.MULTILINE)
    blocks = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.*?\$\$|`[^`]*`", "", text, flags=re.DOTALL))
    for formula in (*blocks, *inline):
        assert not re.search(AS_TEXT, formula), formula
        assert mathml(formula.strip()).startswith("<math")


@each_page
def test_the_example_is_python(page):
    section = PAGES[page].partition("\n## Example\n")[2].partition("\n## Options\n")[0]
    assert "```python\n" in section


@each_page
def test_the_options_of_a_page_have_a_table(page):
    section = PAGES[page].partition("\n## Options\n")[2].partition("\n## What was measured\n")[0]
    names = SITE["DIRECTIVE"].findall(section)
    assert names and len(names) == PAGES[page].count("<!-- options")
    for name in names:
        assert SITE["table"](name, str).startswith("| option | default | what it does |\n")


@each_page
def test_a_page_links_to_results_or_says_that_there_are_none(page):
    section = PAGES[page].partition("\n## What was measured\n")[2].partition("\n## Cost\n")[0]
    links = re.findall(r"\]\((\.\./[^)#\s]+)[^)]*\)", section)
    assert [link for link in links if not (METHODS / link).exists()] == []
    studies = [(METHODS / link).read_text() for link in links if link.startswith("../results/")]
    answered = any("planned runs" in study for study in studies)
    assert answered or any("benchmarks/results/" in link for link in links) or "not measured" in section.lower()


def commands() -> list[str]:
    """What the pages tell to type, each once."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", "\n".join(PAGES.values()), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return sorted({" ".join(line.split()) for line in lines if line.startswith("hf-xent ")})


@pytest.mark.parametrize("line", commands())
def test_a_command_and_its_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    command, path = get_command(cli.app), []
    while hasattr(command, "commands"):
        path.append(words.pop(0))
        assert path[-1] in command.commands
        command = command.commands[path[-1]]
    known = {option for parameter in command.params for option in parameter.opts}
    if isinstance(command, RecipeCommand):
        actions = parser(path[0], RECIPES[path[0]]())._actions
        known |= {option for action in actions for option in action.option_strings}
    assert [word for word in words if word.startswith("--") and word not in known] == []
    files = [word for option, word in pairwise(words) if option == "--config"]
    assert [file for file in files if not (METHODS.parents[1] / file).is_file()] == []
