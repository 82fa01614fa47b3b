"""The example scripts run as they are, and the two marked lines of run_clm.py are all that patching takes."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. "


@pytest.fixture(scope="module")
def clm(tmp_path_factory):
    """A folder with a tiny model and a text, where scripts run: `clm(launcher, script, out)` gives the losses."""
    folder = tmp_path_factory.mktemp("clm")
    tiny(std=0.05).save_pretrained(folder / "model")
    tiny_tokenizer(TEXT).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(TEXT[i % 9 :] for i in range(120)))
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(launcher, script, out, batch):
        options = f"""--model_name_or_path model --train_file text.txt --output_dir {out} --block_size 16 --max_steps 4
            --learning_rate 1e-2 --per_device_train_batch_size {batch} --logging_steps 1 --report_to none
            --use_cpu True"""
        command = [sys.executable, *launcher, str(script), *options.split()]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((folder / out / "checkpoint-4" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    return run


def test_run_clm_with_and_without_the_two_lines(clm, tmp_path):
    source = (EXAMPLES / "run_clm.py").read_text()
    stock = "\n".join(line for line in source.splitlines() if "# hf_xent:" not in line)
    assert source.count("# hf_xent:") == 2 and "hf_xent" not in stock.split('"""')[2]
    (tmp_path / "stock.py").write_text(stock)
    theirs, ours = clm([], tmp_path / "stock.py", "stock", 4), clm([], EXAMPLES / "run_clm.py", "patched", 4)
    assert len(theirs) == 4 and theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_launchers_train_as_one_process_does(clm):
    """`ddp.yaml` and torchrun, two ranks of two rows each, against one of four."""
    script, one = EXAMPLES / "run_clm.py", ["--standalone", "--nproc_per_node", "2"]
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "launch" / "ddp.yaml")]
    alone = clm([], script, "alone", 4)
    assert clm([*accelerate, "--main_process_port", "0"], script, "accelerate", 2) == pytest.approx(alone, rel=1e-4)
    assert clm(["-m", "torch.distributed.run", *one], script, "torchrun", 2) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_launch_configurations_are_accelerate_s(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(EXAMPLES / "launch" / f"{name}.yaml"))  # refuses keys it does not know
    assert found.num_processes == 2 and f"{name}.yaml" in (EXAMPLES / "launch" / "README.md").read_text()


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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets the old name
def test_osp_rounds_compares_all_arms(tmp_path):
    """On a tiny model and one seed: every arm runs, DPO reads the self-judge's pairs, the card has the table."""
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
    assert control["margin size"] == pytest.approx(0, abs=1e-7)
    assert all(row[0]["margin size"] > 1e-6 for arm, row in found.items() if arm != example["CONTROL"])
    train = example["pairs"](50, 0, held_out=False)
    assert train["preference_prob"] != example["pairs"](50, 1, held_out=False)["preference_prob"]
    topics = [
        {row["prompt"].split(" in a sentence")[0] for row in rows}
        for rows in (train, example["pairs"](50, 0, held_out=True))
    ]
    assert not topics[0] & topics[1]


def test_kneser_ney_is_a_distribution_and_counts_by_hand(monkeypatch):
    """Bigrams of a b a b a c: after a, b twice and c once; distinct left neighbors 1 (a), 1 (b), 1 (c)."""
    import math

    kneser_ney = runpy.run_path(str(EXAMPLES / "kneser_ney.py"))["kneser_ney"]
    train = [[0, 1, 0, 1, 0, 2]]
    total = sum(math.exp(-kneser_ney(train, [[0, w]], vocabulary=5, order=2)) for w in range(5))
    assert abs(total - 1) < 1e-12
    # counts ab 2, ba 2, ac 1: d_2 = 1 / (1 + 2 * 2) = 0.2; a, b, c once each: d_1 = 3 / (3 + 0) = 1, so p_1 = 1 / 5
    by_hand = (2 - 0.2) / 3 + 0.2 * 2 / 3 * (1 / 5)
    assert abs(kneser_ney(train, [[0, 1]], vocabulary=5, order=2) + math.log(by_hand)) < 1e-12


def test_ln_free_gpt2_compares_all_arms(tmp_path, monkeypatch):
    """From no model at all: pre-trained, resumed from disk, every arm trained, models and plots kept."""
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
    model = tiny("llama", std=0.05, vocab_size=90, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "ln_free_smollm2.py"))
    found = example["main"](model=str(tmp_path / "model"), layers=1, steps=6, output=tmp_path / "out")
    assert found["norms removed"]["mean_nmae"] < 1e-3 < found["vanilla"]["mean_nmae"]
    assert found["original"]["loss"] != found["vanilla"]["loss"]


def test_membership_scores_every_dose(tmp_path, monkeypatch):
    """On a tiny model and one seed: all doses and scores are there, and before the training nothing is known."""
    tiny(std=0.05, vocab_size=90).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "membership.py"))
    monkeypatch.setitem(example["main"].__globals__, "RESAMPLES", 3)
    found = example["main"](model=str(tmp_path / "model"), members=8, words=6, seeds=1, output=tmp_path / "out")
    assert list(found) == [*example["SCORES"], "reference", "reference_gap", "blind"]
    assert all(0 <= rows[0][column] <= 1 for rows in found.values() for column in example["COLUMNS"].values())
    assert found["reference"][0]["0 epochs"] == 0.5 and len(set(found["blind"][0].values())) <= 4
    assert "| dc_pdd:a=0.1 |" in (tmp_path / "out" / "README.md").read_text()


def test_scoring_cost_is_a_ratio_of_the_same_work(tmp_path):
    tiny(std=0.05, vocab_size=90).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "scoring_cost.py"))
    ratios = example["main"](model=str(tmp_path / "model"), texts=4, tokens=12, repetitions=2)
    assert len(ratios) == 2 and min(ratios) > 0


def test_machine_text_compares_all_arms(tmp_path, monkeypatch):
    """Tiny generator and encoder, one seed: arms and controls are measured on every set; texts are generated once."""
    from hf_xent import embedded

    tiny(std=0.05, vocab_size=300).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(embedded, "load", lambda name: (tiny(vocab_size=300), tiny_tokenizer(TEXT)))
    example = runpy.run_path(str(EXAMPLES / "machine_text.py"))
    words, draw = TEXT.replace(",", "").replace(".", "").split(), random.Random(0)
    pages = ["\n\n".join(" ".join(draw.choices(words, k=14)) for _ in range(10)) for _ in range(4)]
    domains = dict.fromkeys(("pydoc", "readme"), lambda: pages)
    for name, value in {"PROMPT": 4, "NEW": 8, "LAYERS": 2, "DOMAINS": domains}.items():
        monkeypatch.setitem(example["main"].__globals__, name, value)
    options = {"encoder": str(tmp_path / "model"), "machines": 9, "steps": 2, "seeds": 1, "output": tmp_path / "out"}
    found = example["main"](**options)
    assert set(found) == {*example["ARMS"], *example["CONTROLS"]}
    names = {metric + name for metric in example["METRICS"] for name in example["SETS"]}
    assert all(names < rows[0].keys() and all(0 <= rows[0][n] <= 1 for n in names) for rows in found.values())
    texts = {path.name: path.read_text() for path in (tmp_path / "out" / "texts").iterdir()}
    assert set(texts) == {"pydoc-1.0.jsonl", "pydoc-0.7.jsonl", "readme-1.0.jsonl"}
    assert example["main"](**options) == found, "nothing is run twice"
    assert {path.name: path.read_text() for path in (tmp_path / "out" / "texts").iterdir()} == texts
    assert all(f"| {arm} |" in (tmp_path / "out" / "README.md").read_text() for arm in found)
