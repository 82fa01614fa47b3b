"""The example scripts run as they are, and the two marked lines of run_clm.py are all that patching takes."""

import gzip
import json
import os
import random
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import hf_xent
import hf_xent.adapt
import hf_xent.calibration
from hf_xent.adapt import ood_score
from support.models import tiny, tiny_tokenizer
from support.two_towers import WORDS, tiny_encoder, word_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
# Ranks whose threads outlive the interpreter may abort in its teardown, after all their work is done ("terminate called
# without an active exception", torch's): launched scripts skip it, as tests/support/launched.py does.
LAUNCHED = """import os, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""
TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. "


@pytest.fixture(scope="module")
def clm(tmp_path_factory):
    """A folder with a tiny model and a text, where scripts run: `clm(launcher, script, out)` gives the losses."""
    folder = tmp_path_factory.mktemp("clm")
    tiny(std=0.05).save_pretrained(folder / "model")
    tiny_tokenizer(TEXT).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(TEXT[i % 9 :] for i in range(120)))
    (folder / "launched.py").write_text(LAUNCHED)
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(launcher, script, out, batch):
        options = f"""--model_name_or_path model --train_file text.txt --output_dir {out} --block_size 16 --max_steps 4
            --learning_rate 1e-2 --per_device_train_batch_size {batch} --logging_steps 1 --report_to none
            --use_cpu True"""
        command = [sys.executable, *launcher, *(["launched.py"] if launcher else []), str(script), *options.split()]
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


def test_examples_are_short():
    """One idea a file."""
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name: count for name, count in lines.items() if count > 80} == {}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_launch_configurations_are_accelerate_s(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(EXAMPLES / "launch" / f"{name}.yaml"))  # refuses keys it does not know
    assert found.num_processes == 2 and f"{name}.yaml" in (EXAMPLES / "launch" / "README.md").read_text()


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny model and its tokenizer, which knows some words of the examples and their verdicts."""
    tiny(std=0.05, vocab_size=90, num_hidden_layers=3, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(f"{TEXT} A B What is rain?")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def compared(name, monkeypatch, model, folder, **changes):
    """The results of an example with one seed, and the example; card and results are on disk.

    Changes in capitals are of its constants, others are its options: one step, if there are none.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))  # some import their task
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for constant in filter(str.isupper, changes):
        monkeypatch.setitem(example["main"].__globals__, constant, changes[constant])
    options = {option: value for option, value in changes.items() if option.islower()} or {"steps": 1}
    found = example["main"](model=model, seeds=1, output=folder, **options)
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
    assert [arm for arm, rows in found.items() if "divergence" in rows[0]] == ["NoiseFiT, sigma 0", "NoiseFiT"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default sets it
def test_distill_compares_all_arms(tmp_path, monkeypatch, model):
    (tmp_path / "t.txt").write_text(TEXT * 40)
    options = {"steps": 2, "data": str(tmp_path / "t.txt"), "HELD_OUT": 4}
    found, example = compared("distill", monkeypatch, model, tmp_path / "out", **options)
    assert set(found) == {*example["ARMS"], example["UNTRAINED"], example["DENSE"]}
    dense, streamed = found[example["DENSE"]][0], found["forward KL"][0]
    assert dense["error"] < 1e-6 and dense["KL"] == pytest.approx(streamed["KL"], abs=1e-6)
    assert all(rows[0]["MiB"] > 0 for arm, rows in found.items() if arm != example["UNTRAINED"])


def test_mirostat_repetition_compares_methods_at_equal_surprise(tmp_path, monkeypatch, model):
    example = runpy.run_path(str(EXAMPLES / "mirostat_repetition.py"))
    names = example["main"].__globals__
    monkeypatch.setitem(names, "load_text", lambda _: {"text": [TEXT * 3] * 5})
    found = example["main"](model=model, tokens=8, rows=2, seeds=1, output=tmp_path / "out")
    assert set(found) == set(names["METHODS"]) and (tmp_path / "out" / "repetition.png").exists()
    line = names["Study"]("line", names["METRICS"], "top-p 1.0", tmp_path / "line", 1)
    for options in names["METHODS"].values():  # all methods on one line, from 1 to 3 bits
        arms = [arm for arm in names["ARMS"] if names["ARMS"][arm] in options]
        for bits, arm in zip(np.linspace(3, 1, len(arms)), arms, strict=True):
            line.record(arm, 0, surprise=bits, spread=1, **{"rep-6": 0.5 - bits / 10})
    for row in example["compared"](line).values():
        assert list(row[0].values()) == pytest.approx([0.35, 0.3, 0.25])
    assert "3.0 bits: 1.000." in (tmp_path / "line" / "equal" / "README.md").read_text()


def test_short_answers_counts_answers_and_pairs(monkeypatch):
    """Two questions of three samples: two right ones of six, and one agreeing pair of three in each."""
    example = runpy.run_path(str(EXAMPLES / "short_answers.py"))
    made = [[1], [1], [2], [3], [2], [3]]
    monkeypatch.setattr("hf_xent.generation.sampling.sample", lambda *args, **kwargs: made)
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


def test_cloze_questions_are_about_what_all_leads_share(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cloze_questions as cloze

    pages = {"en": {"Fox": "Fox was born in 1931 near Dog Hill. It slept.", "Cat": "In 1900."},
             "fr": {"Fox": "Fox, né à Dog Hill en 1931, 1931 fois.", "Chat": "En 1900."}}  # fmt: skip
    monkeypatch.setattr(cloze, "leads", pages.get)
    rows = cloze.aligned(["en", "fr"])
    assert rows["en"]["id"] == rows["fr"]["id"] == ["Fox: 1931", "Fox: Dog Hill"]
    assert rows["en"]["question"] == [
        "Fox was born in ? near Dog Hill. It slept.",
        "Fox was born in 1931 near ? . It slept.",
    ]
    assert rows["fr"][0]["answers"] == {"text": ["1931"], "answer_start": [22]}
    assert cloze.shortened("A b c. " * 80) == ("A b c. " * 57).strip() and cloze.place("19", "In 1900.") == -1


def test_self_distil_qa_compares_all_arms(tmp_path, monkeypatch):
    """Tiny encoder, made-up leads of two languages: every arm runs, and those with a teacher have a divergence."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cloze_questions
    from transformers import BertConfig, BertModel

    words = {"en": "the fox jumps over Dog{} in 19{} and wakes", "fr": "le dog saute sur Dog{} en 19{} et dort"}
    pages = {
        name: {f"T{i}": text.format(i, i) for i in range(10, 19 - 3 * (name == "fr"))} for name, text in words.items()
    }
    monkeypatch.setattr(cloze_questions, "leads", pages.get)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=90, **sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(" ".join(words.values()) * 8).save_pretrained(tmp_path / "model")
    options = {"languages": "en,fr", "epochs": 1, "LAYERS": 1, "FIRST_ROWS": 4}
    found, example = compared("self_distil_qa", monkeypatch, str(tmp_path / "model"), tmp_path / "out", **options)
    assert set(found) == set(example["ARMS"])
    assert [arm for arm, rows in found.items() if "kl" in rows[0]] == list(example["ARMS"])[2:]
    assert all(0 <= rows[0][name] <= 1 for rows in found.values() for name in ("f1", "exact_match", "map_at_k"))
    assert found["weight 1"][0]["weight"] == 1 and 0 <= found["mAP@k"][0]["weight"] <= 1


def test_loss_retrieval_reports_every_ranking(tmp_path, model):
    """A tiny model, two prompts in two languages, and a sound; the second run reads the rows of the first."""
    for name, texts in {"en": ("the fox", "the lazy dog", "[beep]"), "fr": ("le fox", "dog lazy", "(bip)")}.items():
        folder = tmp_path / name / "usr/share/doc" / f"asterisk-core-sounds-{name}"
        folder.mkdir(parents=True)
        lines = "".join(f"key{i}: {text}\n" for i, text in enumerate(texts))
        (folder / f"core-sounds-{name}.txt.gz").write_bytes(gzip.compress(f"; Sounds\n{lines}".encode()))
    example = runpy.run_path(str(EXAMPLES / "loss_retrieval.py"))
    found = example["main"](tmp_path, tmp_path / "out", exact=2, model=model)
    assert found[0].startswith("2 pairs") and "chance of recall@1 0.5" in found[0]
    assert sum(line.startswith(("| candidates", "| sources")) for line in found) == 17
    assert len(list((tmp_path / "out" / "grid" / "rows").iterdir())) == 3
    assert example["main"](tmp_path, tmp_path / "out", exact=2, model=model) == found
    assert (tmp_path / "out" / "results.md").read_text() == "\n".join(found) + "\n"
    from benchmarks import retrieval

    threads = torch.get_num_threads()
    lines = retrieval.page(tmp_path, model, 1, 1).splitlines()
    torch.set_num_threads(threads)
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| trees", "| chains", "| alone"]
    assert "(estimate from 1 pairs each) | 1.0 |" in lines[-1]


def test_aspects_compares_all_arms(tmp_path, monkeypatch, model):
    """Oracle and student are one tiny model; answers are asked once, and shuffled ones are another training."""
    tiny(std=0.5, vocab_size=90, max_position_embeddings=256).save_pretrained(model)
    tiny_tokenizer(f"{TEXT} {'Yes No ' * 40}").save_pretrained(model)
    for i, genre in enumerate("aehjlp" * 2):
        texts = [f"{f'{word}/nn ' * 14}the/at {genre}/nn {word}/nn" for word in TEXT.split()[1:6]]
        (tmp_path / f"c{genre}{i // 6:02}").write_text("\n\n".join(texts))
    options = {
        "encoder": model,
        "corpus": f"brown:{tmp_path}",
        "train": 5,
        "epochs": 1,
        "TEST": 2,
        "QUESTIONS": ("Is it?", "the fox?"),
    }
    found, example = compared("aspects", monkeypatch, model, tmp_path / "out", **options)
    assert set(found) == {*example["ARMS"], "information"}
    assert all(0 <= rows[0][name] <= 1 for rows in found.values() for name in ("accuracy", "macro F1"))
    assert len({rows[0]["loss"] for arm, rows in found.items() if arm in example["ARMS"]}) == 3
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 6 * 5 * 2


@pytest.fixture
def class_losses(tmp_path, monkeypatch):
    """`class_losses(task, arms=None)`: the results of a task with tiny rows and one step, and the module of the task.

    Packages of data that tests lack are stood in for: digits and answers are random, but as many as there are classes.
    """
    from PIL import Image

    monkeypatch.syspath_prepend(str(EXAMPLES))
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(40)]
    digits = {"image": images, "label": [i % 10 for i in range(40)]}
    answers = {"values": draw.integers(1, 7, (60, 24)).tolist(), "label": [i % 6 for i in range(60)]}
    load = hf_xent.data.load
    stand_ins = {"mnist": datasets.Dataset.from_dict(digits), "bfi:N1": datasets.Dataset.from_dict(answers)}
    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: stand_ins.get(name) or load(name, **options))

    def run(task, **sizes):
        example = runpy.run_path(str(EXAMPLES / "class_losses.py"))
        chosen = example["TASKS"][task.partition(":")[0]]
        for name, value in {"RATES": (1e-3,), **sizes}.items():
            monkeypatch.setattr(chosen, name, value)
        training = {name: value for name, value in chosen.TRAINING.items() if name != "num_train_epochs"}
        monkeypatch.setattr(chosen, "TRAINING", {**training, "max_steps": 1, "use_cpu": True})
        found = example["main"](task, seeds=1, output=tmp_path / "out")
        assert set(found) == set(chosen.ARMS) and {row[0]["rate"] for row in found.values()} <= set(chosen.RATES)
        [folder] = (tmp_path / "out").iterdir()
        stored = json.loads((folder / "results.json").read_text())
        for arm, rows in found.items():
            tried = stored["tried"][arm]
            assert rows[0]["validation"] == max(tried.values()) == tried[str(rows[0]["rate"])], arm
        assert all(f"| {arm} |" in (folder / "README.md").read_text() for arm in found)
        monkeypatch.setitem(example["main"].__globals__, "run", None)
        assert example["main"](task, seeds=1, output=tmp_path / "out") == found, "nothing is run twice"
        return found, chosen

    return run


@pytest.mark.slow
def test_class_losses_of_digits(class_losses):
    found, digits = class_losses("mnist:40", TRAIN=24, VALIDATION=16)
    assert all(0 <= rows[0]["accuracy"] <= 1 for rows in found.values())
    assert [arm for arm, rows in found.items() if "NLL" not in rows[0]] == ["L2-SVM"]
    right = [row["labels"] for row in digits.images("train", 0)]
    for share, low, high in (("0", 0, 0), ("40", 0.1, 0.7), ("100", 1, 1)):
        train, validation, test = digits.rows(share, 0)
        wrong = np.mean([row["labels"] != label for row, label in zip([*train, *validation], right, strict=True)])
        assert low <= wrong <= high and [row["labels"] for row in test] == [
            row["labels"] for row in digits.images("test", 0)
        ]


@pytest.mark.slow
def test_class_losses_of_tags(class_losses, tmp_path):
    from transformers import BertConfig, BertModel

    words, sizes = TEXT.split(), {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=90, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "encoder")
    for name in ("ca01", "ca02"):
        lines = [
            " ".join(f"{w}/{('vbd', 'vbd-hl', 'vb', 'nn-vbd')[(i + k) % 4]}" for k, w in enumerate(words))
            for i in range(9)
        ]
        (tmp_path / name).write_text("\n".join([*lines, "short/vbd"]))
    found, past_tense = class_losses(f"tags:{tmp_path}@{tmp_path / 'encoder'}", TRAIN=6, VALIDATION=4, TEST=5)
    assert all(0 <= rows[0][name] <= 1 for rows in found.values() for name in past_tense.METRICS)
    [row, *_] = past_tense.rows(f"tags:{tmp_path}@{tmp_path / 'encoder'}".partition(":")[2], 0)[0]
    assert len(row["labels"]) == len(row["input_ids"]) > len(words)
    labels = [label for label in row["labels"] if label >= 0]
    assert len(labels) == len(words) and labels[:4].count(1) == 2  # vbd and vbd-hl, not vb or nn-vbd


@pytest.mark.slow
def test_class_losses_of_progression(class_losses):
    found, progression = class_losses("diabetes")
    assert [arm for arm, rows in found.items() if "mean absolute error" not in rows[0]] == [
        "PA-BCE, first 6",
        "PA-BCE, all",
    ]
    parts = [part.with_format("numpy") for part in progression.rows("", 0)]
    assert [len(set(part["list_id"][:].tolist())) for part in parts] == [12, 5, 5]
    np.testing.assert_allclose(parts[0]["values"][:].mean(0), 0, atol=1e-6)
    gains = torch.tensor(parts[2]["labels"][:])
    loss = hf_xent.classes.get("pairwise_gain")
    assert progression.ranked(loss, gains[:, None], gains) == {"pairs in order": 1, "first three": 1}
    assert progression.ranked(loss, -gains[:, None], gains)["pairs in order"] == 0
    assert progression.ranked(loss, 0 * gains[:, None], gains)["pairs in order"] == 0.5


@pytest.mark.slow
def test_class_losses_of_answers(class_losses):
    found, answers = class_losses("bfi:N1", RATES=(1e-3, 1e-2), TRAIN=30, VALIDATION=12)
    assert [arm for arm, rows in found.items() if "NLL" not in rows[0]] == ["squared error"]
    assert all(0 <= rows[0]["mean absolute error"] <= 5 >= rows[0]["kappa"] for rows in found.values())
    p = torch.tensor([[0.4, 0.0, 0.0, 0.0, 0.3, 0.3], [0.6, 0.1, 0.1, 0.1, 0.1, 0.0]])
    assert answers.chosen(hf_xent.classes.get("cross_entropy"), p.clamp(min=1e-9).log()).tolist() == [4, 0]
    numbers = torch.tensor([[-3.0], [2.6], [9.0]])
    assert answers.chosen(hf_xent.classes.get("squared_error"), numbers).tolist() == [0, 3, 5]


def test_class_losses_refuses_other_tasks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(ValueError, match="task is 'news': choose one of mnist, tags, diabetes, bfi"):
        runpy.run_path(str(EXAMPLES / "class_losses.py"))["main"]("news", output=tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets the old name
def test_osp_rounds_compares_all_arms(tmp_path, monkeypatch, model):
    """Every arm runs, and DPO reads the self-judge's pairs."""
    found, example = compared("osp_rounds", monkeypatch, model, tmp_path / "out", prompts=2, rounds=1)
    assert set(found) == {example["BASE"], *example["JUDGES"], example["HARD"]}
    pairs = datasets.load_from_disk(str(tmp_path / "out" / "self-judge" / "seed-0" / "_pairs" / "round-0"))
    assert found["self-judge"][0]["strength"] == sum(pairs["preference_prob"]) / 2 < 1
    assert found[example["HARD"]][0]["strength"] == 1 and not (tmp_path / "out" / example["HARD"]).exists()


def test_eight_words_judges_by_the_truth():
    """Right is what names the thing in three to eight words; a tie says nothing, and is no decided pair."""
    example = runpy.run_path(str(EXAMPLES / "eight_words.py"))
    texts = [("Rain is water.", "Water is wet."), ("rain", "x"), ("y", "It is rain.")]
    judged = example["program"]([{"thing": "rain"}] * 3, *zip(*texts, strict=True))
    assert judged == [1, 0.5, 0]
    sides = [{side: [{"content": t}] for side, t in zip(("chosen", "rejected"), pair, strict=True)} for pair in texts]
    rows = [{"thing": "rain", "preference_prob": p, **pair} for p, pair in zip((0.9, 0.6, 0.6), sides, strict=True)]
    assert example["described"](rows) == {"strength": pytest.approx(0.7), "pairs right": 0.5}
    assert example["described"](rows[1:2]) == {"strength": 0.6}


def test_eight_words_measures_answers_and_judgment(monkeypatch, model):
    """One right answer among four samples of each of two things: three pairs each, of which a judge likes four."""
    from hf_xent.models import loading

    lm, tokenizer = loading.load(model)
    example = runpy.run_path(str(EXAMPLES / "eight_words.py"))
    texts = ["It is rain.", "no", "not this", "wet", "wind", "It is wind.", "air", "not this"]
    likes = {"no": 0.9, "wet": 0.8, "wind": 0.7, "air": 0.6, "not this": 0.4}  # how a right one does against it

    def judge(rows, first, second):
        return [likes.get(b, 1 - likes.get(a, 1)) for a, b in zip(first, second, strict=True)]

    monkeypatch.setattr("hf_xent.generation.sampling.responses", lambda model, ids, **options: texts[: len(ids)])
    monkeypatch.setattr("hf_xent.generation.judging.ModelJudge", lambda *parts: judge)
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, rows, **options: rows)
    found = example["evaluate"](lm, tokenizer, example["questions"](["rain", "wind"]), 0)
    brier = (0.1**2 + 0.2**2 + 0.3**2 + 0.4**2 + 2 * 0.6**2) / 6
    expected = {"right": 2 / 8, "words": 14 / 8, "judge accuracy": 4 / 6, "judge Brier": brier}
    assert found == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
def test_spo_dpo_compares_all_arms(tmp_path, monkeypatch, model):
    """Every arm trains on the same noisy pairs, the untrained control knows nothing."""
    found, example = compared("spo_dpo", monkeypatch, model, tmp_path / "out", HELD_OUT=8, PROMPTS=2, NEW=4)
    assert set(found) == {*example["ARMS"], example["CONTROL"]}
    truth = torch.tensor(example["pairs"](8, 0, held_out=True)["preference_prob"])
    control = found[example["CONTROL"]][0]
    assert control["squared error"] == pytest.approx((truth - 0.5).square().mean().item(), rel=1e-4)
    assert control["margin size"] < 4e-5  # 0.3 times differences of sums of 500 nats, each known to 6e-5
    trained = [row[0]["margin size"] for arm, row in found.items() if arm != example["CONTROL"]]
    assert min(trained) > 2 * control["margin size"]


def test_noisy_preferences_holds_topics_out():
    pairs = runpy.run_path(str(EXAMPLES / "noisy_preferences.py"))["pairs"]
    train, test = pairs(50, 0, held_out=False), pairs(50, 0, held_out=True)
    assert train["preference_prob"] != pairs(50, 1, held_out=False)["preference_prob"]
    topics = [{prompt.split(" in a sentence")[0] for prompt in rows["prompt"]} for rows in (train, test)]
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


def test_ln_free_smollm2_removes_all_norms(tmp_path):
    """Attribution is exact without norms, and their two forms are the same model; what diverges is told by its step."""
    tiny("llama", std=0.05, vocab_size=90).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "ln_free_smollm2.py"))
    found = example["main"](model=str(tmp_path / "model"), steps=12, output=tmp_path / "out")
    for arm in [name for name in found if "LN-free" in name]:
        assert found[arm]["mean_nmae"] < 1e-3 < found["vanilla"]["mean_nmae"], arm
        assert max(found[arm][form][0] for form in ("true", "eps trick")) < 1e-4
    assert len({row["loss"] for row in found.values()}) == 3
    (tmp_path / "out" / "LN-free.json").unlink()
    example["ARMS"]["LN-free"]["learning_rate"] = 1e30
    assert example["main"](model=str(tmp_path / "model"), steps=12, output=tmp_path / "out")["LN-free"]["diverged"] < 12


def test_membership_scores_every_dose(tmp_path, monkeypatch, model):
    """All doses and scores are there, and before the training nothing is known."""
    found, example = compared("membership", monkeypatch, model, tmp_path / "out", RESAMPLES=3, members=8, words=6)
    assert list(found) == [*example["SCORES"], "reference", "reference_gap", "blind"]
    assert all(0 <= rows[0][column] <= 1 for rows in found.values() for column in example["COLUMNS"].values())
    assert found["reference"][0]["0 epochs"] == 0.5 and len(set(found["blind"][0].values())) <= 4


def test_scoring_cost_is_a_ratio_of_the_same_work(model):
    example = runpy.run_path(str(EXAMPLES / "scoring_cost.py"))
    ratios = example["main"](model=model, texts=4, tokens=12, repetitions=2)
    assert len(ratios) == 2 and min(ratios) > 0


def test_continuations_reads_prose_where_there_is_some(tmp_path, monkeypatch):
    (tmp_path / "ca01").write_text("He/pps said/vbd ./.")
    pages = runpy.run_path(str(EXAMPLES / "continuations.py"))["pages"]
    assert list(pages(f"brown:{tmp_path}")) == ["He said."]
    assert any("Name: hf" in page for page in pages("readme")) and len(pages("pydoc")) > 50


def test_machine_text_compares_all_arms(tmp_path, monkeypatch, model):
    """Tiny generator and encoder, one seed: arms and controls are measured on every set; texts are generated once."""
    from hf_xent.models import loading

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import continuations
    import text_classifiers

    words, draw, load = TEXT.replace(",", "").replace(".", "").split(), random.Random(0), loading.load
    pages = ["\n\n".join(" ".join(draw.choices(words, k=14)) for _ in range(10)) for _ in range(4)]
    monkeypatch.setattr(loading, "load", lambda name: load(model))
    for name, value in {"PROMPT": 4, "NEW": 8, "pages": lambda domain: pages}.items():
        monkeypatch.setattr(continuations, name, value)
    monkeypatch.setattr(text_classifiers, "LAYERS", 2)
    example = runpy.run_path(str(EXAMPLES / "machine_text.py"))
    options = {"encoder": model, "machines": 9, "steps": 2, "seeds": 1, "output": tmp_path / "out"}
    found = example["main"](**options)
    assert set(found) == {*example["ARMS"], *example["CONTROLS"]}
    names = {metric + name for metric in example["METRICS"] for name in example["SETS"]}
    assert all(names < rows[0].keys() and all(0 <= rows[0][n] <= 1 for n in names) for rows in found.values())
    texts = {path.name: path.read_text() for path in (tmp_path / "out" / "texts").iterdir()}
    assert set(texts) == {"pydoc-1.0.jsonl", "pydoc-0.7.jsonl", "readme-1.0.jsonl"}
    assert example["main"](**options) == found, "nothing is run twice"
    assert {path.name: path.read_text() for path in (tmp_path / "out" / "texts").iterdir()} == texts
    assert all(f"| {arm} |" in (tmp_path / "out" / "README.md").read_text() for arm in found)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mnist:20", "genres"])
def test_calibration_compares_all_arms(tmp_path, monkeypatch, task):
    """Made-up digits and a tiny encoder; every arm has one accuracy, and a second call runs nothing."""
    from PIL import Image
    from transformers import BertConfig, BertModel

    monkeypatch.setattr("hf_xent.calibration.fitting.Training", partial(hf_xent.calibration.Training, steps=5))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits
    import unsure_digits
    import unsure_genres

    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(60)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(60)]})
    load = hf_xent.data.load
    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: rows if name == "mnist" else load(name, **options))
    digits.images.cache_clear()
    for module, sizes in ((digits, {"TRAIN": 20, "VALIDATION": 40}), (unsure_digits, {"EPOCHS": 1}),
                          (unsure_genres, {"TRAIN": 6, "TEST": 8, "PASSES": 2})):  # fmt: skip
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    if task == "genres":
        words = TEXT.split()
        for i, genre in enumerate("aehjlp" * 2):
            texts = [" ".join(f"{w}/nn" for w in draw.permutation(words * 2)[:20]) for _ in range(8)]
            (tmp_path / f"c{genre}{i // 6:02}").write_text("\n\n".join(texts))
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        BertModel(BertConfig(vocab_size=90, **shape)).save_pretrained(tmp_path / "encoder")
        tiny_tokenizer(TEXT).save_pretrained(tmp_path / "encoder")
        task = f"genres:brown:{tmp_path}@{tmp_path / 'encoder'}"
    example = runpy.run_path(str(EXAMPLES / "calibration.py"))
    found = example["main"](task, seeds=1, output=tmp_path / "out")
    digits.images.cache_clear()
    assert set(found) == set(example["ARMS"]) and len({rows[0]["accuracy"] for rows in found.values()}) == 1
    assert all(0 <= rows[0]["ECE"] <= 1 for rows in found.values())
    folder = tmp_path / "out" / task.partition(":")[0]
    assert len([*folder.glob("*.png")]) == 4 * (2 if "mnist" in task else 1)
    assert "Against CA, own" in (folder / "README.md").read_text()
    monkeypatch.setattr("hf_xent.calibration.report", None)
    assert example["main"](task, seeds=1, output=tmp_path / "out") == found, "nothing is run twice"
    with pytest.raises(ValueError, match="task is 'news': choose one of mnist, genres"):
        example["main"]("news")


def test_unknown_topics_compares_all_arms(tmp_path, monkeypatch):
    """Made-up articles of three topics, of which one is held out, and a tiny encoder; nothing is run twice."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import topics
    import unknown_articles
    import unknown_words

    words, encoder = WORDS[-14:], tmp_path / "encoder"
    lines = {
        "noun": [(f"{word} n 1 0 1 0 {i:08}", f"{i:08} 03 n | a {word} of stone") for i, word in enumerate(words)],
        "adj": [("nice a 1 0 1 0 00000099", "00000099 03 a | red and round")],
    }
    for kind, rows in lines.items():
        for file, part in (("index", 0), ("data", 1)):
            (tmp_path / f"{file}.{kind}").write_text("".join(f"{row[part]}\n" for row in rows))
    tiny_encoder("bert").save_pretrained(encoder)
    word_tokenizer().save_pretrained(encoder)
    draw, names = np.random.default_rng(0), ["cat", "dog", "river"]
    labels = [i % 3 for i in range(12)]
    texts = [f"{names[k]} {' '.join(draw.choice(WORDS, 6))}" for k in labels]
    monkeypatch.setattr(unknown_articles, "topics", lambda seed, count, held: (texts, labels, names))
    monkeypatch.setattr(unknown_articles, "HELD", 1)
    monkeypatch.setattr(unknown_articles, "TOKENS", 16)
    monkeypatch.setattr(unknown_articles, "bootstrap", partial(unknown_articles.bootstrap, resamples=5))
    monkeypatch.setattr(unknown_words, "NegativeLabels", partial(hf_xent.adapt.NegativeLabels, quantile=0.5))
    for name, value in {"CANDIDATES": 14, "COUNT": 6, "ROWS": 2}.items():
        monkeypatch.setattr(unknown_words, name, value)
    example = runpy.run_path(str(EXAMPLES / "unknown_topics.py"))
    known = example["main"].__globals__
    for name, value in {"HELD": 1, "FRESH": 3, "EPOCHS": 1}.items():
        monkeypatch.setitem(known, name, value)
    monkeypatch.setitem(known, "ood_score", lambda x, w, t=None, **o: ood_score(x, w, t, **{"groups": 3, **o}))
    call = partial(example["main"], str(encoder), f"wordnet:{tmp_path}", seeds=1, output=tmp_path / "out")
    found = call()
    assert [*found] == [*example["ARMS"]] and topics.NONE == "Uncategorized"
    rows = {arm: row[0] for arm, row in found.items()}
    for row in rows.values():
        assert row["AUROC low"] <= row["AUROC"] <= row["AUROC high"] and 0 <= row["FPR95"] <= 1
    same = {rows[arm]["accuracy"] for arm in example["ARMS"][:4]}
    assert len(same) == 1, "words do not change which topic is predicted"
    assert 0 <= rows["negative labels"]["rank"] <= 1 and rows["prompts, full"]["first"] > 0
    assert len((tmp_path / "out" / "words-0.txt").read_text().split("\n\n")[2].split("\n")) == 6
    assert "difference to random words" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setitem(known, "scored", None)
    assert call() == found


def test_data_selection_compares_all_arms_at_equal_tokens(tmp_path, monkeypatch):
    """Paragraphs of two genres, of which one is the target's; and it runs nothing twice."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import mixed_pool
    import small_lm

    words, draw = {"a": "the fox and a dog", "h": "of acts by law or vote"}, random.Random(0)
    folder, general = tmp_path / "brown", mixed_pool.paragraphs
    folder.mkdir()
    for name in [f"{kind}{i:02}" for kind in "ah" for i in range(1, 9)]:
        lines = [" ".join(f"{draw.choice(words[name[0]].split())}/nn" for _ in range(20)) for _ in range(5)]
        (folder / f"c{name}").write_text("\n\n".join(lines))
    for owner, name, value in (
        (mixed_pool, "OTHERS", 25),
        (mixed_pool, "HELD_OUT", 2),
        (mixed_pool, "paragraphs", lambda text, genre: general(text, genre)[:3]),
        (small_lm, "BLOCK", 32),
    ):
        monkeypatch.setattr(owner, name, value)
    example = runpy.run_path(str(EXAMPLES / "data_selection.py"))
    monkeypatch.setitem(example["main"].__globals__, "BASE_TOKENS", 512)
    options = {"tokens": 256, "seeds": 1, "output": tmp_path / "out"}
    found = example["main"](f"brown:{folder}", **options)
    assert set(found) == {"before", "target alone", *example["ARMS"]}
    rows = {arm: found[arm][0] for arm in example["ARMS"]}
    assert all(0 < row["loss"] < 20 and 0 <= row["precision"] <= 1 for row in rows.values())
    assert rows["shortest"]["length"] == pytest.approx(-1) and rows["longest"]["length"] == pytest.approx(1)
    assert abs(rows["compression"]["length"]) < abs(rows["compression, as published"]["length"])
    assert "compression to shortest: " in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(small_lm.SmallLM, "_train", None)
    assert example["main"](f"brown:{folder}", **options) == found, "nothing is run twice"


def test_attack_comparison_has_all_attacks_at_equal_steps(class_losses, tmp_path, monkeypatch):
    example = runpy.run_path(str(EXAMPLES / "attack_comparison.py"))
    models = example["hardened_digits"]
    sizes = {"TRAIN": 12, "EPOCHS": 1, "HARD_EPOCHS": 1, "HARD_STEPS": 1}
    for owner, changes in ((example["main"].__globals__, {"STEPS": 4, "TEST": 6}), (vars(models), sizes)):
        for name, value in changes.items():
            monkeypatch.setitem(owner, name, value)
    found = example["main"](seeds=1, output=tmp_path / "out")
    assert set(found) == set(example["ARMS"]) and (tmp_path / "out" / "hardened-0").is_dir()
    for rows in found.values():
        assert all(0 <= rows[0][name] <= rows[0][f"{name}, clean"] for name in example["EPSILON"])
        assert 2 <= rows[0]["passes"] <= 2 * (4 + 2 + 2), "both models; a run has two more passes than steps"
    plain, hardened = models.models(0, tmp_path / "out").values()
    assert all(not torch.equal(a, b) for a, b in zip(plain.parameters(), hardened.parameters(), strict=True))
