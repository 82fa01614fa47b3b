"""What is published beside the wheel says what the wheel says: the conda recipe, the citation, the issue forms."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hf_xent
from test_packaging import CORE, PROJECT

ROOT = Path(__file__).parents[1]
RECIPE = yaml.safe_load((ROOT / "distribution" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge has another name


def filled(text):
    """A line of the recipe with its variables."""
    return re.sub(r"\$\{\{ (\w+) \}\}", lambda found: RECIPE["context"][found[1]], text)


def asked(lines):
    """Name -> the specifier, of lines such as 'numpy >=1.26'."""
    return {
        name: Requirement(f"x{rest}").specifier for name, _, rest in (filled(line).partition(" ") for line in lines)
    }


def test_the_conda_recipe_asks_for_what_the_wheel_asks_for():
    run = asked(RECIPE["requirements"]["run"])
    assert run.pop("python") == Requirement(f"x{PROJECT['project']['requires-python']}").specifier
    assert run == {CONDA_NAMES.get(core.name, core.name): core.specifier for core in CORE}
    [backend] = map(Requirement, PROJECT["build-system"]["requires"])
    assert asked(line for line in RECIPE["requirements"]["host"] if line.startswith("hatchling")) == {
        backend.name: backend.specifier
    }


def test_the_conda_recipe_is_of_this_package():
    project, context = PROJECT["project"], RECIPE["context"]
    assert RECIPE["schema_version"] == 1 and RECIPE["build"]["noarch"] == "python"
    assert Version(context["version"]) == Version(Version(hf_xent.__version__).base_version)
    assert (context["name"], RECIPE["about"]["license"]) == (project["name"], project["license"])
    assert (ROOT / RECIPE["about"]["license_file"]).exists() and RECIPE["about"]["summary"] == project["description"]
    assert RECIPE["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in project["scripts"].items()]
    assert filled(RECIPE["source"]["url"]).endswith(f"/hf_xent-{context['version']}.tar.gz")
    assert re.fullmatch("[0-9a-f]{64}", RECIPE["source"]["sha256"])
    known = {"schema_version", "context", "package", "source", "build", "requirements", "tests", "about", "extra"}
    assert set(RECIPE) == known


def test_the_citation_has_this_version():
    """Its schema is version 1.2.0 of the citation file format, which requires the first four keys."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "abstract"} <= set(found)
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["version"] == hf_xent.__version__ and found["license"] == PROJECT["project"]["license"]
    assert found["repository-code"] == PROJECT["project"]["urls"]["Homepage"]
    assert [author["name"] for author in found["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_what_the_site_takes(path):
    """As GitHub's syntax for issue forms has it: a name, a description, and elements of five types."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    assert form["name"] and form["description"]
    identifiers = [element["id"] for element in form["body"] if element["type"] != "markdown"]
    assert len(identifiers) == len(set(identifiers)) and all(re.fullmatch(r"[\w-]+", name) for name in identifiers)
    for element in form["body"]:
        assert element["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert element["type"] == "markdown" or element["attributes"]["label"]
        if element["type"] in ("dropdown", "checkboxes"):
            assert all(isinstance(x, str) or x["label"] for x in element["attributes"]["options"])


def test_there_are_forms_and_their_links_stand():
    assert {path.stem for path in FORMS} == {"bug", "feature", "method"}
    config = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text(encoding="utf-8"))
    assert all(set(link) == {"name", "url", "about"} for link in config["contact_links"])
    assert (ROOT / "SECURITY.md").exists() and (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").exists()
