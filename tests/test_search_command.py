"""hf-xent search: trials of a fine-tuning run, the best of them as a command of hf-xent train, and its resumption."""

import json
import math
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_xent import cli
from hf_xent.experiments.finetuning import PATCHED, fit
from hf_xent.experiments.searching import Search, applied, check, command, searched
from support.models import tiny, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. " * 8
SPACE = ("learning_rate=1e-4..1e-1:log", "batch_size=1|2")


@pytest.fixture(scope="module", autouse=True)
def no_collection():
    """Garbage of all imported libraries is not collected: that takes longer than these trials do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and a text on disk, as options."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer(TEXT).save_pretrained(folder / "model")
    tiny(std=0.05).save_pretrained(folder / "model")
    (folder / "fox.txt").write_text(TEXT * 4)
    return {"model": str(folder / "model"), "dataset": str(folder / "fox.txt"), "steps": 2, "block_size": 16}


def invoke(inputs, *more):
    options = [word for name, value in inputs.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(cli.app, [str(word) for word in ("search", *options, *more)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def spaces(*texts):
    return [word for text in texts for word in ("--space", text)]


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory):
    """A search of four trials in a folder."""
    folder = tmp_path_factory.mktemp("search")
    result = invoke(inputs, *spaces(*SPACE), "--trials", 4, "--candidates", 2, "--output", folder, "--json")
    return folder, result


def test_the_best_trial_is_the_run_that_its_command_makes(inputs, first, tmp_path):
    folder, result = first
    found = json.loads(result.stdout)
    scores = [trial["score"] for trial in found["trials"]]
    assert len(scores) == 4 and scores == sorted(scores) and found["best"] == found["trials"][0]
    assert "trial 4 of 4" in result.stderr and (folder / "trials.json").exists()
    assert not list(folder.rglob("*.safetensors")), "no trial keeps its model"
    best = found["best"]["parameters"]
    words = shlex.split(found["command"])
    assert words[:2] == ["hf-xent", "train"] and words[words.index("--learning-rate") + 1] == str(best["learning_rate"])
    again = CliRunner().invoke(cli.app, [*words[1:], "--output", str(tmp_path), "--no-save", "--json"])
    after = json.loads(again.stdout)["runs"]["hf_xent"]["eval_after"]
    assert after == pytest.approx(found["best"]["score"], rel=1e-5), "it is the same run, with the same seed"


def test_what_every_trial_loads_is_shown_once(first):
    before, after = first[1].stderr.split("trial 1 of 4", 1)
    assert "tokenize" in before and "trial 4 of 4" in after and "tokenize" not in after and "Loading" not in after


def test_a_search_goes_on_and_others_are_refused(inputs, first):
    folder, before = first
    longer = invoke(inputs, *spaces(*SPACE), "--trials", 6, "--candidates", 2, "--output", folder, "--json")
    found = json.loads(longer.stdout)["trials"]
    known = {trial["number"]: trial for trial in json.loads(before.stdout)["trials"]}
    assert len(found) == 6 and all(known.get(trial["number"], trial) == trial for trial in found)
    assert "trial 4 of 6" not in longer.stderr and "trial 5 of 6" in longer.stderr
    with pytest.raises(ValueError, match=r"has a search with steps=2, not 3: choose another"):
        invoke({**inputs, "steps": 3}, *spaces(*SPACE), "--candidates", 2, "--output", folder)


def test_losses_and_their_options_are_searched_by_cross_entropy(inputs, tmp_path):
    """The score of a focal loss is the cross-entropy of the evaluation, not the focal loss."""
    texts = ["loss=focal|comp_sum:tau=1.2"]
    result = invoke(
        inputs, *spaces(*texts), "--trials", 2, "--candidates", 2, "--method", "random", "--output", tmp_path
    )
    shown = " ".join(result.stdout.split())
    assert "2 trials" in shown and "hf-xent train" in shown and shown.count("failed") == 0
    run = Search(space=texts, **inputs, output=str(tmp_path), trials=2, candidates=2, method="random")
    trials = searched(run)
    focal = next(trial for trial in trials if trial["parameters"]["loss"] == "focal")
    evaluation = fit(applied(run, focal["parameters"]), PATCHED).evaluations[1]
    assert focal["score"] == pytest.approx(math.log(evaluation["perplexity"]), rel=1e-5)
    assert focal["score"] > evaluation["loss"] + 0.01


def test_quiet_prints_the_result_alone(inputs, tmp_path):
    words = ["--quiet", "search", *spaces("learning_rate=1e-3..1e-2"), "--trials", 2, "--candidates", 2, "--json"]
    options = [word for name, value in inputs.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(cli.app, [str(word) for word in (*words, *options, "--output", tmp_path)])
    assert result.stderr == "" and len(json.loads(result.stdout)["trials"]) == 2


def test_the_example_compares_two_searches_at_equal_runs(tmp_path, monkeypatch):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "cem_search.py"))
    (tmp_path / "fox.txt").write_text(TEXT * 4)
    changes = {"SEARCH": {"candidates": 2, "elites": 1.0, "rounds": 2}, "STEPS": 1, "BLOCK": 16, "HELD_OUT": 4}
    for name, value in changes.items():
        monkeypatch.setitem(example["main"].__globals__, name, value)
    options = {"seeds": 1, "output": tmp_path / "out", "text": str(tmp_path / "fox.txt")}
    found = example["main"](**options)
    random, method = (found[arm][0] for arm in example["ARMS"])
    assert random["at half"] == method["at half"], "the first round is the same"
    assert all(row["best loss"] <= row["at half"] and -4 <= row["learning rate"] <= -1 for row in (random, method))
    monkeypatch.setitem(example["main"].__globals__, "loss", None)
    assert example["main"](**options) == found, "nothing is run twice"


def test_the_options_of_a_trial():
    run = Search(space=["loss.gamma=1..2"], loss="focal", lora=4, gradient_checkpointing=True, memory_budget=10)
    parameters = {"learning_rate": 0.001, "loss.gamma": 1.5}
    assert applied(run, parameters).loss == "focal:gamma=1.5"
    assert applied(run, {"loss": "comp_sum:tau=2", "loss.clip": "a"}).loss == "comp_sum:tau=2, clip=a"
    assert command(run, parameters) == (
        "hf-xent train focal:gamma=1.5 --learning-rate 0.001 --lora 4 --gradient-checkpointing --memory-budget 10"
    )
    check(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": ["dataset=a|b"]}, "space has 'dataset': choose among learning_rate, batch_size"),
        ({"space": ["learning_rate=0..1"]}, "learning_rate is 0: choose a positive number"),
        ({"space": ["batch_size=1.5..3"]}, "batch_size is 1.5 in the space: give whole numbers"),
        ({"space": ["batch_size=0..3"]}, "batch_size is 0 in the space: choose at least 1"),
        ({"space": ["lora=1..8"], "lora": 4}, "lora is 4 and searched, too: leave one of the two out"),
        ({"space": ["loss=focal|nonesuch"]}, "loss is 'nonesuch': choose one of"),
        ({"space": ["loss=focal|forward_kl"]}, "it needs a teacher model"),
        ({"space": ["loss.gama=1..2"], "loss": "focal"}, "does not take gama: its options are gamma"),
        ({"space": ["loss.gamma=1..2"], "loss": "focal:gamma=3"}, "set gamma once"),
        ({"space": ["learning_rate=3"], "method": "grid"}, "method is 'grid': choose 'cem' or 'random'"),
        ({"space": ["learning_rate"]}, "describes no values: write name=low..high"),
        ({"space": ["steps=1..2"], "elites": 2.0}, "elites is 2.0: choose a number in"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        check(Search(**options))
