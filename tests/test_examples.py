"""The example scripts run as they are, and the two marked lines of run_clm.py are all that patching takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_emo_lm_compares_all_arms(tmp_path, monkeypatch):
    """On a tiny model and one seed: every arm trains, the control has EMO's entropy, the card has the table."""
    import runpy

    tiny(std=0.05, vocab_size=90).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "emo_lm.py"))
    monkeypatch.setitem(example["main"].__globals__, "HELD_OUT", 4)
    found = example["main"](model=str(tmp_path / "model"), steps=1, seeds=1, output=tmp_path / "out")
    assert set(found) == {*example["ARMS"], example["CONTROL"]} and all(len(rows) == 1 for rows in found.values())
    assert all(0 <= row["distinct-2"] <= 1 for [row] in found.values())
    assert found[example["CONTROL"]][0]["entropy"] == found["EMO"][0]["entropy"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        all(f"| {arm} |" in card for arm in found)
        and json.loads((tmp_path / "out" / "results.json").read_text()) == found
    )


def test_kneser_ney_is_a_distribution_and_counts_by_hand(monkeypatch):
    """Bigrams of a b a b a c: after a, b twice and c once; distinct left neighbors 1 (a), 1 (b), 1 (c)."""
    import math
    import runpy

    kneser_ney = runpy.run_path(str(EXAMPLES / "kneser_ney.py"))["kneser_ney"]
    train = [[0, 1, 0, 1, 0, 2]]
    total = sum(math.exp(-kneser_ney(train, [[0, w]], vocabulary=5, order=2)) for w in range(5))
    assert abs(total - 1) < 1e-12
    # counts ab 2, ba 2, ac 1: d_2 = 1 / (1 + 2 * 2) = 0.2; a, b, c once each: d_1 = 3 / (3 + 0) = 1, so p_1 = 1 / 5
    by_hand = (2 - 0.2) / 3 + 0.2 * 2 / 3 * (1 / 5)
    assert abs(kneser_ney(train, [[0, 1]], vocabulary=5, order=2) + math.log(by_hand)) < 1e-12


def test_ln_free_gpt2_compares_all_arms(tmp_path, monkeypatch):
    """From no model at all: pre-trained, resumed from disk, every arm trained, models and plots kept."""
    import runpy

    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(TEXT[i % 9 :] * 12)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2}
    import pretrain_gpt2

    monkeypatch.setattr(pretrain_gpt2, "SIZE", pretrain_gpt2.SIZE | small)
    monkeypatch.setattr(pretrain_gpt2, "CONTEXT", 16)
    monkeypatch.setattr(pretrain_gpt2, "VOCABULARY", 270)
    example = runpy.run_path(str(EXAMPLES / "ln_free_gpt2.py"))
    options = {"text": str(tmp_path / "text"), "pretraining": 4, "steps": 15, "seeds": 1, "sequences": 8}
    found = example["main"](**options, output=tmp_path / "out")
    assert set(found) == set(example["ARMS"])
    assert found["vanilla"][0]["NMAE (%)"] > 1 > 0.1 > found["LN-free"][0]["NMAE (%)"]
    assert (tmp_path / "out" / "curves.png").exists() and (tmp_path / "out" / "report.md").exists()
    assert "with all norms replaced and no training" in (tmp_path / "out" / "README.md").read_text()
    yardstick = pretrain_gpt2.main(text=options["text"], steps=4, output=tmp_path / "out" / "gpt2")
    assert yardstick["kneser-ney 3"] < yardstick["gpt2"]  # four steps have learned nothing, trigrams the whole text


def test_ln_free_smollm2_removes_the_last_layers(tmp_path):
    import runpy

    model = tiny("llama", std=0.05, vocab_size=90, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "ln_free_smollm2.py"))
    found = example["main"](model=str(tmp_path / "model"), layers=1, steps=6, output=tmp_path / "out")
    assert found["norms removed"]["mean_nmae"] < 1e-3 < found["vanilla"]["mean_nmae"]
    assert found["original"]["loss"] != found["vanilla"]["loss"]
