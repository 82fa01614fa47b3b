"""Trainers from the command line: their arguments, also in files, resume, push, several processes, what is written."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_xent import cli
from hf_xent.recipes import RECIPES, DataArguments, TextArguments, run
from hf_xent.recipes.arguments import COMMON, parse, parser
from hf_xent.recipes.base import split_rows
from hf_xent.recipes.models import refuse_idle_adapters
from hf_xent.recipes.text import tokenized
from support.hub_server import serving
from support.models import tiny, tiny_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. " * 8
ROOT = Path(__file__).parents[1]
runner = CliRunner()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny(std=0.05).save_pretrained(folder)
    tiny_tokenizer(TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{TEXT[:60]} {i}"}) for i in range(24)), encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, texts, tmp_path):
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": texts,
        "output_dir": tmp_path / "out",
        "block_size": 16,
        "max_steps": 2,
        "logging_steps": 1,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", RECIPES)
def test_short_help_names_arguments_that_exist(name):
    """Names and defaults are read from the sources; the parser imports them."""
    from hf_xent.cli.recipes import sections

    known = {action.dest: action for action in parser(name, RECIPES[name]())._actions}
    listed = [flag.removeprefix("--") for _, rows in sections(name) for flag, _ in rows]
    assert set(COMMON) < set(listed) and set(listed) <= set(known) and len(listed) == len(set(listed))
    [(_, own), (_, data), _] = sections(name)
    assert own and data and all(text for _, text in own + data)


def test_a_run_leaves_model_card_and_numbers(arguments, model_folder, tmp_path):
    result = run("emo", [*arguments, "--variant", "emo2", "--learning_rate", "1e-3"])
    folder, summary = tmp_path / "out", result.summary
    written = json.loads((folder / "results.json").read_text())
    assert written["run"]["variant"] == "emo2" and written["run"]["learning_rate"] == 1e-3
    assert written["outcomes"][0]["losses"] == result.outcome.losses and len(result.outcome.losses) == 2
    assert summary["first_loss"] == result.outcome.losses[0] and summary["steps"] == 2
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["after"]["perplexity"] > 1
    trained, start = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert "EMOTrainer" in (folder / "README.md").read_text() and (folder / "curves.png").stat().st_size > 1000


def test_the_command_line_goes_before_the_file_and_the_file_before_defaults(tmp_path, monkeypatch):
    monkeypatch.delenv("ONLY_HERE", raising=False)
    path = tmp_path / "run.yaml"
    settings = {"learning_rate": "1e-4", "max_steps": 7, "use_peft": True, "lora_r": 4, "env": {"ONLY_HERE": 3}}
    path.write_text(yaml.safe_dump(settings))
    data, config, model, given = parse("noisefit", RECIPES["noisefit"](), ["--config", str(path), "--max_steps", "9"])
    assert (config.learning_rate, config.max_steps, model.lora_r, model.use_peft) == (1e-4, 9, 4, True)
    assert config.output_dir == "out/noisefit" and config.disable_tqdm and data.dataset_name == "pydoc"
    assert config.num_train_epochs == 5 and model.model_name_or_path == "smollm2"  # NoiseFiT's own, and ours
    assert given == {"learning_rate": 1e-4, "max_steps": 9, "use_peft": True, "lora_r": 4}
    assert os.environ.pop("ONLY_HERE") == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "config has the unknown name 'learning_rat': did you mean 'learning_rate'"),
        ("- 1", "which holds no names with values"),
        ("a: [", "which is not a readable YAML file"),
        ("env: 3", "which holds no names with values"),
        ("max_steps: many", "--max_steps.*invalid int value: 'many'.*--help-all"),
        ("variant: emo9", "variant is 'emo9'"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run("emo", ["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "no/file.yaml"], "config is no/file.yaml, which is not a readable YAML file"),
        (["--config"], "config is not given"),
        (["--varient", "emo1"], "--varient is no argument of `hf-xent emo`: did you mean 'variant'"),
        (["stray"], "stray is no argument of `hf-xent emo`"),
        (["--learning_rate", "fast"], "learning_rate.*invalid float value: 'fast'"),
        (["--eval_rows", "-1"], "eval_rows is -1: choose 0 or more"),
        (["--block_size", "1"], "block_size is 1: choose 2 or more"),
        (["--lora_r", "8"], "lora_r is 8, but use_peft is False"),
        (["--tail", "2"], "tail"),
    ],
)
def test_bad_arguments_are_refused(words, message, arguments):
    with pytest.raises(ValueError, match=message):
        run("emo", [*arguments, *words])


def test_a_recipe_that_is_not_there():
    with pytest.raises(ValueError, match="recipe is 'nonesuch': choose one of sft, emo"):
        run("nonesuch")


def test_resume_gives_the_same_losses(arguments, tmp_path):
    whole = run("emo", [*arguments, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(tmp_path / "whole")])
    again = [*arguments, "--max_steps", "4", "--save_steps", "2"]
    with pytest.raises(ValueError, match="no checkpoint in"):
        run("emo", again, resume=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "out" / "checkpoint-2")
    found = run("emo", again, resume=True)
    assert found.outcome.losses == pytest.approx(whole.outcome.losses, rel=1e-6) and len(found.outcome.seconds) == 2
    with pytest.raises(ValueError, match=r"nothing to resume: checkpoint-4 .* is at the end of the run: set more max"):
        run("emo", again, resume=True)


def test_adapters_are_trained_and_saved_alone(arguments, tmp_path):
    run("emo", [*arguments, "--use_peft", "--lora_r", "2"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_idle_options_of_adapters_are_refused():
    from trl import ModelConfig

    refuse_idle_adapters(ModelConfig())
    refuse_idle_adapters(ModelConfig(use_peft=True, lora_alpha=3))
    with pytest.raises(ValueError, match="use_dora is True, but use_peft is False"):
        refuse_idle_adapters(ModelConfig(use_dora=True))


def test_rows_are_held_out_once(texts):
    rows = Dataset.from_dict({"x": list(range(10))})
    train, test = split_rows(DataArguments(eval_rows=3), lambda source, split: rows, seed=0)
    assert sorted([*train["x"], *test["x"]]) == list(range(10)) and len(test) == 3
    assert split_rows(DataArguments(eval_rows=0), lambda source, split: rows, seed=0)[1] is None
    seen = []
    given = DataArguments(dataset_name="d", dataset_config="c", dataset_train_split="a", dataset_test_split="b")
    split_rows(given, lambda source, split: seen.append((source, split)), seed=0)
    assert seen == [("d:c", "a"), ("d:c", "b")]
    with pytest.raises(ValueError, match="one row, but one has to be held out: set eval_rows to 0"):
        split_rows(DataArguments(), lambda source, split: rows.select([0]), seed=0)


def test_only_answers_have_labels(tmp_path):
    """Prompts, and turns of others than the assistant, are read and not learned."""
    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    prompts, chats = tmp_path / "prompts.jsonl", tmp_path / "chats.jsonl"
    prompts.write_text(json.dumps({"prompt": "the quick", "completion": " brown fox"}) + "\n")
    turns = [("user", "the quick"), ("assistant", "brown fox"), ("user", "jumps"), ("assistant", "over")]
    chats.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    [row] = tokenized(str(prompts), None, TextArguments(), tokenizer)
    before, after = tokenizer("the quick")["input_ids"], tokenizer(" brown fox", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [*before, *after, tokenizer.eos_token_id]
    assert row["labels"] == [-100] * len(before) + [*after, tokenizer.eos_token_id]
    [row] = tokenized(str(chats), None, TextArguments(), tokenizer)
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert "brown fox" in learned and "over" in learned and "quick" not in learned and "jumps" not in learned
    with pytest.raises(ValueError, match="block_size is 2, which keeps no token of any answer"):
        tokenized(str(prompts), None, TextArguments(block_size=2), tokenizer)


def test_the_command_prints_one_table_or_one_object(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = runner.invoke(cli.app, ["sft", *_without(arguments, "--block_size"), "--max_length", "16"])
    assert shown.exit_code == 0, shown.output
    assert "held-out rows" in shown.stdout and "2 steps" in shown.stdout and "results.json" in shown.stdout
    found = runner.invoke(cli.app, ["emo", *arguments, "--json", "--eval_rows", "0"])
    summary = json.loads(found.stdout)
    assert summary["recipe"] == "emo" and summary["after"] == {} and math.isfinite(summary["last_loss"])


def test_all_arguments_are_listed_on_demand(capsys):
    assert runner.invoke(cli.app, ["emo", "--help-all"]).exit_code == 0
    shown = runner.invoke(cli.app, ["emo", "--help-all"]).stdout
    assert "--gradient_checkpointing_kwargs" in shown and "--variant" in shown and "--lora_target_modules" in shown


def _without(arguments, flag):
    place = arguments.index(flag)
    return arguments[:place] + arguments[place + 2 :]


@pytest.mark.slow
def test_two_processes_train_as_one_and_push(arguments, tmp_path):
    """`accelerate launch -m hf_xent`: one table, one repository, the losses of one process with the same batches."""
    alone = run("emo", [*arguments, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "alone")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command += ["--dynamo_backend", "no", "--mixed_precision", "no", "-m", "hf_xent", "emo", *arguments]
    command += ["--per_device_train_batch_size", "2", "--push", "--hub_model_id", "me/emo", "--json"]
    with serving() as hub:
        where = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_the_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, **where, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path}
        found = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert found.returncode == 0, found.stderr[-4000:]
        files = hub.repos["models/me/emo"].branches["main"]
    summary = json.loads(found.stdout)  # of the first process alone
    assert summary["repository"] == "me/emo" and summary["steps"] == 2
    assert summary["last_loss"] == pytest.approx(alone.summary["last_loss"], rel=1e-5)
    assert summary["after"]["loss"] == pytest.approx(alone.summary["after"]["loss"], rel=1e-5)
    assert {"README.md", "model.safetensors", "results.json", "tokenizer.json"} <= set(files)
    assert b"EMOTrainer" in files["README.md"] and b"hf_of_the_test" not in b"".join(files.values())
