"""The scripts for `uv run` and Hub jobs: what their headers ask for, and each of them on a tiny model."""

import ast
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from support.models import tiny, tiny_tokenizer
from test_packaging import BROUGHT, CORE_NAMES, DISTRIBUTIONS, EXTRAS, PROJECT, names_of

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "scripts").glob("*.py"))
HEADER = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as PEP 723 has it
TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. "


def header(path):
    content = HEADER.search(path.read_text(encoding="utf-8"))["content"]
    return tomllib.loads(
        "".join(line.removeprefix("# ").removeprefix("#") for line in content.splitlines(keepends=True))
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_header_asks_for_what_the_script_imports(path):
    found = header(path)
    assert SpecifierSet(found["requires-python"]) == SpecifierSet(PROJECT["project"]["requires-python"])
    [requirement] = map(Requirement, found["dependencies"])
    assert requirement.name == PROJECT["project"]["name"] and requirement.extras <= set(EXTRAS)
    brought = CORE_NAMES.union(*map(names_of, requirement.extras))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {module.partition(".")[0] for module in modules} - {*sys.stdlib_module_names, "hf_xent"}
    assert {canonicalize_name(BROUGHT.get(top, DISTRIBUTIONS.get(top, top))) for top in tops} <= brought
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_interface_has_a_model_data_and_a_place_to_push_to(path):
    [main] = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    names = {argument.arg for argument in main.args.args}
    assert {"dataset", "split", "output", "push_to_hub"} <= names and {"model", "student"} & names
    assert len(main.args.defaults) == len(main.args.args), "every option has a default"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and the data of every script."""
    found = tmp_path_factory.mktemp("scripts")
    tiny(std=0.05).save_pretrained(found / "model")
    tiny_tokenizer(TEXT * 8).save_pretrained(found / "model")
    rows = {
        "texts": [{"text": TEXT[i : i + 40]} for i in range(8)],
        "pairs": [
            {"prompt": "the", "chosen": " quick fox", "rejected": " dog", "preference_prob": 0.5 + i / 20}
            for i in range(8)
        ],
        "labeled": [{"input": TEXT[3 * i : 3 * i + 30], "label": i % 2} for i in range(12)],
    }
    for name, lines in rows.items():
        (found / name).mkdir()
        (found / name / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return found


def run(name, **options):
    [path] = [path for path in SCRIPTS if path.stem == name]
    return runpy.run_path(str(path))["main"](**options)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Two steps, whose metrics are logged once."""
    monkeypatch.chdir(tmp_path)
    return {"max_steps": 2, "batch_size": 2, "output": str(tmp_path / "out")}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
class TestRuns:
    def test_sft(self, folder, short):
        common = {"model": str(folder / "model"), "dataset": str(folder / "texts"), "learning_rate": 1e-2}
        [loss] = run("sft", **common, **short, max_length=32, lora=2)
        assert 3 < loss < 5  # of 97 tokens: ln 97 is 4.57
        assert (Path(short["output"]) / "adapter_model.safetensors").exists()

    def test_distill(self, folder, short):
        models = {"student": str(folder / "model"), "teacher": str(folder / "model")}
        [loss] = run("distill", **models, dataset=str(folder / "texts"), **short, max_length=32)
        assert abs(loss) < 1e-3  # student and teacher are the same
        assert (Path(short["output"]) / "model.safetensors").exists()

    def test_dpo_spce(self, folder, short):
        options = {"model": str(folder / "model"), "dataset": str(folder / "pairs"), "lora": 2}
        metrics = run("dpo_spce", **options, **short)
        assert 0 <= metrics["rewards/accuracies"] <= 1 and 0 < metrics["rewards/brier"] < 1

    def test_detect_membership(self, folder, tmp_path, capsys):
        options = {"model": str(folder / "model"), "dataset": str(folder / "labeled"), "split": "train"}
        metrics = run(
            "detect_membership", **options, scores="loss,min_k_pp", resamples=20, output=tmp_path / "found.json"
        )
        written = json.loads((tmp_path / "found.json").read_text())["metrics"]
        assert set(metrics) == set(written) == {"loss", "min_k_pp", "blind"}
        assert f"AUROC {metrics['loss']['auroc']:.3f}" in capsys.readouterr().out
