"""The README is true: every Python block runs, every hf-xent command runs, its generated parts are as generated."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_xent import cli, laws
from hf_xent.models import packaged
from support.pictures import write_classifier, write_pictures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = "https://github.com/hf-xent/hf_xent/blob/main/"  # PyPI shows the README too, where relative links lead nowhere
PICTURES = "https://raw.githubusercontent.com/hf-xent/hf_xent/main/"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DEMO = re.search(r"^DEMO = (.*)$", MAKEFILE, re.MULTILINE).group(1)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # offline here: the same model out of the package
SMALLER = {"train": ["--steps", "1", "--batch-size", "1", "--block-size", "16", "--eval-blocks", "1", "--no-save"]}
SMALLER["search"] = ["--trials", "2", "--candidates", "2", "--steps", "1", "--block-size", "16", "--eval-blocks", "1"]
SMALLER["emo"] = ["--max_steps", "1", "--block_size", "16", "--eval_rows", "1", "--per_device_train_batch_size", "1"]
SMALLER["bench"] = ["--tokens", "32", "--repeats", "1", "--contestants", "dense,hf_xent"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("hf-xent")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default sets it
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block.replace(HUB_ID, str(packaged.checkpoint())), "README.md", "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["trainer"].state.global_step == 2


def write_curves(folder):
    """Curves of 8,000 steps under two schedules, as a law has them, for 'runs/*.csv'; their paths."""
    law, step = laws.AnnealingLaw(L0=2.7, A=0.5, alpha=0.5, C=0.5), np.arange(1, 8001)
    constant, left = 1e-3 * np.minimum(1, step / 400), np.cos(np.pi * np.maximum(0, step - 400) / 7600)
    for name, lr in (("constant", constant), ("cosine", constant * (0.5 + 0.5 * left))):
        kept = step[99::100]
        rows = zip(kept, lr[kept - 1], law.predict(lr=lr, step=kept), strict=True)
        first = f"step,lr,loss\n1,{lr[0]},\n"
        (folder / f"{name}.csv").write_text(first + "".join(f"{i},{rate},{loss}\n" for i, rate, loss in rows))
    return " ".join(map(str, sorted(folder.glob("*.csv"))))


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_commands_run(line, tmp_path):
    line = line.replace("runs/*.csv", write_curves(tmp_path)) if "runs/*.csv" in line else line
    if "my/pictures" in line:
        pictures = write_pictures(tmp_path / "pictures")
        classifier = write_classifier(tmp_path / "classifier", pictures)
        line = line.replace("my/pictures", str(pictures)).replace("my/classifier", str(classifier))
    if "show out/emo" in line:  # the folder of the line before
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.5}]}))
        line = line.replace("out/emo --open", str(tmp_path))
    _, command, *rest = shlex.split(line)
    output = ["--output", str(tmp_path)] if command in ("train", "bench", "classify", "attack", "search") else []
    output += ["--output_dir", str(tmp_path)] if command == "emo" else []
    result = CliRunner().invoke(cli.app, [command, *rest, *SMALLER.get(command, []), *output])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """`make demo`, one small step of it: adapters, activations computed again, both losses."""
    smaller = [option for option in SMALLER["train"] if option != "--no-save"]
    result = CliRunner().invoke(
        cli.app, ["train", "--compare", *shlex.split(DEMO), *smaller, "--json", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "results.json").read_text())["run"]
    assert run["lora"] and run["gradient_checkpointing"] and json.loads(result.stdout)["largest_loss_difference"] < 1e-4


def test_the_numbers_of_the_demo_agree():
    """What the text says of the table follows from it, and the demo shows what it is there for."""
    shown = re.search(r"<!-- demo -->\n(.*?)<!-- /demo -->", README, re.DOTALL).group(1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:2] == "| "]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}
    stock, ours = (int(table[arm]["peak memory"].removesuffix(" MiB")) for arm in ("stock", "hf_xent"))
    assert f"{stock - ours} MiB less" in shown and f"{100 * (1 - ours / stock):.0f} %" in shown and ours <= 0.6 * stock
    assert {
        name for name in table["stock"] if "loss" in name and table["stock"][name] != table["hf_xent"][name]
    } == set()
    steps, tokens = re.search(r"(\d+) steps of ([\d,]+) tokens", shown).groups()
    given = dict(re.findall(r"--([a-z-]+) (\d+)", re.search(r"^DEMO = (.*)$", MAKEFILE, re.MULTILINE).group(1)))
    assert given["steps"] == steps and int(given["batch-size"]) * int(given["block-size"]) == int(
        tokens.replace(",", "")
    )


def test_make_targets_exist():
    targets = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make")}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_table_of_losses_is_generated():
    """If this fails: `make report`."""
    shown = re.search(r"<!-- losses -->\n(.*?)<!-- /losses -->", README, re.DOTALL).group(1)
    assert shown == CliRunner().invoke(cli.app, ["losses", "--markdown"]).stdout


def test_table_of_losses_of_classes_is_generated():
    """If this fails: `make report`."""
    shown = re.search(r"<!-- class losses -->\n(.*?)<!-- /class losses -->", README, re.DOTALL).group(1)
    assert shown == CliRunner().invoke(cli.app, ["losses", "--classes", "--markdown"]).stdout


def test_table_of_results_is_generated():
    """If this fails: `make report`."""
    from hf_xent.bench.pages import summary
    from hf_xent.bench.rows import from_csv

    shown = re.search(r"<!-- bench -->\n(.*?)<!-- /bench -->", README, re.DOTALL).group(1)
    files = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    assert shown == summary([row for path in files for row in from_csv(path)], f"{FILES}benchmarks/results")


def test_links_and_pictures_are_absolute_and_in_the_repository():
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", README)
    assert len(links) > 20
    for picture, link in links:
        start = PICTURES if picture else FILES
        assert link.startswith(start), link
        assert (ROOT / link.removeprefix(start).partition("#")[0]).exists(), link


@pytest.mark.slow
def test_example_runs(tmp_path, monkeypatch):
    import runpy

    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "patch_and_train.py"))["main"]
    losses = main(steps=2)
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
