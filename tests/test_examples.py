"""The example scripts run as they are, and the two marked lines of run_clm.py are all that patching takes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. "


def test_run_clm_with_and_without_the_two_lines(tmp_path):
    tiny(std=0.05).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXT[i % 9 :] for i in range(120)))
    source = (EXAMPLES / "run_clm.py").read_text()
    stock = "\n".join(line for line in source.splitlines() if "# hf_xent:" not in line)
    assert source.count("# hf_xent:") == 2 and "hf_xent" not in stock.split('"""')[2]
    losses = []
    for name, script in (("stock", stock), ("patched", source)):
        (tmp_path / f"{name}.py").write_text(script)
        command = [sys.executable, f"{name}.py", "--model_name_or_path", "model", "--train_file", "text.txt"]
        command += ["--output_dir", name, "--block_size", "16", "--max_steps", "4", "--learning_rate", "1e-2"]
        command += [
            "--per_device_train_batch_size",
            "4",
            "--logging_steps",
            "1",
            "--report_to",
            "none",
            "--use_cpu",
            "True",
        ]
        path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert all(abs(x - y) <= 1e-4 * x for x, y in zip(*losses, strict=True))


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny model and its tokenizer, which knows some words of the examples."""
    tiny(std=0.05, vocab_size=90, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def compared(name, monkeypatch, model, folder, **changes):
    """The results of an example with one step and one seed, and the example; card and results are on disk."""
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for constant, value in changes.items():
        monkeypatch.setitem(example["main"].__globals__, constant, value)
    found = example["main"](model=model, steps=1, seeds=1, output=folder)
    card = (folder / "README.md").read_text()
    assert all(f"| {arm} |" in card for arm in found)
    assert json.loads((folder / "results.json").read_text())["results"].keys() == found.keys()
    return found, example


def test_emo_lm_compares_all_arms(tmp_path, monkeypatch, model):
    found, example = compared("emo_lm", monkeypatch, model, tmp_path / "out", HELD_OUT=4)
    assert set(found) == {*example["ARMS"], example["CONTROL"]}
    assert all(0 <= rows[0]["distinct-2"] <= 1 for rows in found.values())
    assert found[example["CONTROL"]][0]["entropy"] == found["EMO"][0]["entropy"]


def test_noisefit_qa_compares_all_arms(tmp_path, monkeypatch, model):
    found, example = compared("noisefit_qa", monkeypatch, model, tmp_path / "out", HELD_OUT=4)
    assert set(found) == set(example["ARMS"])
    assert all(0 <= rows[0][name] <= 1 for rows in found.values() for name in ("accuracy", "consistency"))
    assert found["NoiseFiT"][0]["divergence"] > 0 and "divergence" not in found["NEFTune"][0]


def test_noisefit_qa_counts_answers_and_pairs(monkeypatch):
    """Two questions of three samples: two right ones of six, and one agreeing pair of three in each."""
    example = runpy.run_path(str(EXAMPLES / "noisefit_qa.py"))
    made = [[1], [1], [2], [3], [2], [3]]
    monkeypatch.setattr("hf_xent.generation.sample", lambda *args, **kwargs: made)
    words = type("Words", (), {"decode": lambda self, tokens: " " + "-abc"[tokens[0]]})()
    found = example["answers"](None, words, {"prompt": [[0], [0]], "answer": ["a", "d"]}, 0)
    assert found == {"accuracy": pytest.approx(2 / 6), "consistency": pytest.approx(1 / 3)}


def test_f2c_classification_compares_all_arms(tmp_path, monkeypatch, model):
    found, example = compared("f2c_classification", monkeypatch, model, tmp_path / "out", HELD_OUT=4)
    assert set(found) == {*example["ARMS"], example["CONSTANT"]}
    constant = found.pop(example["CONSTANT"])[0]
    assert constant["agreement"] == 1 and constant["accuracy"] == found["untrained"][0]["constant_accuracy"]
    for rows in found.values():
        assert sum(rows[0][name] for name in example["CONTINENTS"]) == pytest.approx(1)
