"""The README is true: every Python block runs, every hf-xent command runs, its generated parts are as generated."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_xent import cli, embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # offline here: the same model out of the package
SMALLER = {"train": ["--steps", "1", "--batch-size", "1", "--block-size", "16", "--eval-blocks", "1", "--no-save"]}
SMALLER["bench"] = ["--tokens", "32", "--repeats", "1", "--contestants", "dense,hf_xent"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("hf-xent")]


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block.replace(HUB_ID, str(embedded.checkpoint())), "README.md", "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["trainer"].state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_commands_run(line, tmp_path):
    _, command, *rest = shlex.split(line)
    output = ["--output", str(tmp_path)] if command in ("train", "bench") else []
    result = CliRunner().invoke(cli.app, [command, *rest, *SMALLER.get(command, []), *output])
    assert result.exit_code == 0, result.output


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make")}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_table_of_losses_is_generated():
    """If this fails: `hf-xent losses --markdown` between the two comments."""
    shown = re.search(r"<!-- losses -->\n(.*?)<!-- /losses -->", README, re.DOTALL).group(1)
    assert shown == CliRunner().invoke(cli.app, ["losses", "--markdown"]).stdout


def test_table_of_results_is_generated():
    """If this fails: `make report`."""
    from hf_xent.bench.pages import summary
    from hf_xent.bench.rows import from_csv

    shown = re.search(r"<!-- bench -->\n(.*?)<!-- /bench -->", README, re.DOTALL).group(1)
    files = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    assert shown == summary([row for path in files for row in from_csv(path)], "benchmarks/results")


@pytest.mark.slow
def test_example_runs(tmp_path, monkeypatch):
    import runpy

    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "patch_and_train.py"))["main"]
    losses = main(steps=2)
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
