"""The Spaces of distribution/spaces: their functions, and their pages asked over HTTP on this machine."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from hf_xent.detection import SCORES
from support.models import tiny, tiny_tokenizer

SPACES = Path(__file__).parents[1] / "distribution" / "spaces"
CONFIG = LlamaConfig(vocab_size=1000, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
TEXTS = "the quick brown fox\n\nthe lazy dog jumps over the brown fox"


@pytest.fixture(scope="module")
def apps():
    """The module of each Space by its folder's name."""
    pytest.importorskip("gradio", reason="gradio is in the extra 'dev' alone")
    found = {}
    for folder in ("memory", "detection"):
        spec = importlib.util.spec_from_file_location(f"space_{folder}", SPACES / folder / "app.py")
        found[folder] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[folder])
    return found


def ask(folder, name, *arguments):
    """The answer of a Space's page, which is launched in a process of its own."""
    command = [sys.executable, Path(__file__).parent / "support" / "space.py", SPACES / folder / "app.py", name]
    done = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("folder", ["memory", "detection"])
def test_folder_is_a_space(folder):
    text = (SPACES / folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["sdk"] == "gradio" and header["sdk_version"].count(".") == 2
    assert (SPACES / folder / header["app_file"]).is_file()
    assert header["license"] == "apache-2.0" and header["tags"] and len(header["short_description"]) <= 60
    requirements = (SPACES / folder / "requirements.txt").read_text(encoding="utf-8")
    assert requirements.startswith("hf-xent[")


def test_memory(apps):
    table, bars, line = apps["memory"].memory("", CONFIG.to_json_string(), 64, "H100", sequence_length=16)
    assert list(table["loss"]) == apps["memory"].NAMES
    assert len(bars) == 5 * 5 and bars["GiB"].sum() == pytest.approx(table["sum"].sum(), abs=0.2)
    assert (table["fits"] > 0).all() and "sequences of 16 tokens" in line
    assert apps["memory"].source_of(" gpt2 ", None) == "gpt2"  # as the page's empty editor says it
    with pytest.raises(ValueError, match="is no JSON"):
        apps["memory"].memory("", "{", 64, "H100")


@pytest.mark.slow
def test_memory_over_http():
    arguments = ["", json.dumps(CONFIG.to_dict()), 64, "bf16", "LoRA", "adamw", True, "24"]
    table, _, line = ask("memory", "memory", *arguments)
    assert table["headers"][0] == "loss" and len(table["data"]) == 5
    assert "Left out" in line


@pytest.fixture
def folder(tmp_path):
    tiny(std=0.05).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_detection(apps, folder):
    app = apps["detection"]
    assert set(app.SCORES) <= set(SCORES)
    found = app.scores(TEXTS, list(app.SCORES), folder)
    assert len(found) == 2 and found.shape[1] == 1 + len(app.SCORES)
    assert all(math.isfinite(x) for x in found["loss (lower: yes)"])
    for pasted, names in (("\n \n", ["loss"]), ("a\n\n" * 40, ["loss"]), ("a", [])):
        with pytest.raises(ValueError, match=r"paste 1 to 32|choose at least one"):
            app.scores(pasted, names, folder)


@pytest.mark.slow
def test_detection_over_http(folder):
    table, warning = ask("detection", "scores", TEXTS, ["loss", "min_k_pp"], folder)
    assert table["headers"][1:] == ["loss (lower: yes)", "min_k_pp (higher: yes)"] and len(table["data"]) == 2
    assert "no evidence" in warning
