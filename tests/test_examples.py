"""The example scripts run as they are, and the two marked lines of run_clm.py are all that patching takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets the old name
def test_osp_rounds_compares_all_arms(tmp_path):
    """On a tiny model and one seed: every arm runs, DPO reads the self-judge's pairs, the card has the table."""
    import runpy

    import datasets

    tokenizer = tiny_tokenizer("what is rain A B answer in at most eight words the letter ")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tiny(std=0.05).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "osp_rounds.py"))
    rows = [{"thing": "rain"}] * 3
    judged = example["program"](rows, ["Rain is water.", "rain", "Rain " * 9], ["Water is wet.", "x", "y"])
    assert judged == [1, 0.5, 0.5]
    found = example["main"](model=str(tmp_path / "model"), prompts=2, rounds=1, seeds=1, output=tmp_path / "out")
    assert set(found) == set(example["ARMS"])
    pairs = datasets.load_from_disk(str(tmp_path / "out" / "self-judge" / "seed-0" / "_pairs" / "round-0"))
    assert found["self-judge"][0]["strength"] == sum(pairs["preference_prob"]) / 2 < 1
    assert found["DPO on the self-judge's pairs"][0]["strength"] == 1
    assert not (tmp_path / "out" / "DPO on the self-judge's pairs").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {arm} |" in card for arm in found)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
def test_spo_dpo_compares_all_arms(tmp_path, monkeypatch):
    """On a tiny model and one seed: every arm trains on the same noisy pairs, the untrained control knows nothing."""
    import runpy

    tiny(std=0.05, vocab_size=90, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "spo_dpo.py"))
    places = example["main"].__globals__
    for name, value in (("HELD_OUT", 8), ("PROMPTS", 2), ("NEW", 4)):
        monkeypatch.setitem(places, name, value)
    found = example["main"](model=str(tmp_path / "model"), steps=1, seeds=1, output=tmp_path / "out")
    assert set(found) == {*example["ARMS"], example["CONTROL"]}
    truth = torch.tensor(example["pairs"](8, 0, held_out=True)["preference_prob"])
    control = found[example["CONTROL"]][0]
    assert control["squared error"] == pytest.approx((truth - 0.5).square().mean().item(), rel=1e-4)
    assert control["mean |margin|"] == pytest.approx(0, abs=1e-7)
    assert all(row[0]["mean |margin|"] > 1e-6 for arm, row in found.items() if arm != example["CONTROL"])
    train = example["pairs"](50, 0, held_out=False)
    assert train["preference_prob"] != example["pairs"](50, 1, held_out=False)["preference_prob"]
    topics = [
        {row["prompt"].split(" in a sentence")[0] for row in rows}
        for rows in (train, example["pairs"](50, 0, held_out=True))
    ]
    assert not topics[0] & topics[1]
