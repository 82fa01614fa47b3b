"""The trainers' commands as users meet them: help, examples, the page, references, and what each recipe refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_xent import cli, data
from hf_xent.cli.grouped import GROUPS
from hf_xent.data.text import load_rows
from hf_xent.models.quiet import quiet_loading
from hf_xent.recipes import RECIPES, run
from hf_xent.recipes.arguments import parse
from hf_xent.recipes.base import Setup
from hf_xent.recipes.formats import read_formats
from support.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trainers_cli.md").read_text(encoding="utf-8")
APP = typer.main.get_command(cli.app)


def commands_of(page):
    """The words of each `hf-xent` line of a page, also of those that accelerate starts."""
    text = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)))
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    lines = [re.sub(r"^accelerate launch .*?-m hf_xent", "hf-xent", line) for line in lines]
    return [shlex.split(line)[1:] for line in lines if line.startswith("hf-xent ")]


def checked(words, monkeypatch):
    """Reads a command as its program does, up to the run."""
    monkeypatch.chdir(ROOT)
    name = words[0]
    if name in RECIPES:
        rest = words[2:] if name == "ln-free" else words[1:]
        assert name != "ln-free" or words[1] == "train"
        own = ("--resume", "--push", "--json", "--help", "--help-all")
        with quiet_loading():
            parse(name, RECIPES[name](), [word for word in rest if word not in own])
        return
    command, rest, path = APP.commands[name], words[1:], name
    while hasattr(command, "commands"):
        path, command, rest = rest[0], command.commands[rest[0]], rest[1:]
    if not {"--help", "--help-all"} & {*rest}:
        with command.make_context(f"hf-xent {path}", list(rest)):
            pass


@pytest.mark.parametrize("name", RECIPES)
def test_the_example_of_a_recipe_parses(name, monkeypatch):
    row = RECIPES.row(name)
    assert len(row["summary"]) <= 66 and row["summary"].endswith(".")
    words = shlex.split(row["example"])
    assert words[0] == "hf-xent" and words[1] == name
    checked(words[1:], monkeypatch)


@pytest.mark.parametrize("words", commands_of(PAGE), ids=" ".join)
def test_the_page_has_commands_that_parse(words, monkeypatch):
    checked(words, monkeypatch)


def test_the_page_names_every_trainer_and_file():
    assert all(f"`{name}" in PAGE for name in (*RECIPES, "distill train", "classify"))
    assert {words[0] for words in commands_of(PAGE)} >= {"distill", "classify", "emo", "spce"}


def test_commands_are_listed_in_groups_without_cuts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli.app, ["--help"]).stdout
    assert "..." not in shown.partition("\nTrain:")[2] and max(map(len, shown.splitlines())) <= 80
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(APP.commands) and len(listed) == len(set(listed))
    assert all(f"\n{title}:" in shown for title in GROUPS) and "\nMore:" not in shown


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ln-free"])
def test_defaults_in_help_are_values(name):
    from hf_xent.cli.recipes import sections

    assert not any("default_factory" in text for _, rows in sections(name) for _, text in rows)


@pytest.mark.parametrize("group", ["data", "distill", "ln-free", "scaling"])
def test_commands_of_a_group_are_listed_in_full(group, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli.app, [group, "--help"]).stdout
    assert "..." not in shown.partition("Commands:\n")[2] and max(map(len, shown.splitlines())) <= 80
    assert all(f"\n  {name} " in shown for name in APP.commands[group].commands)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ln-free"])
def test_help_fits_a_terminal(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli.app, [name, "--help"]).stdout
    assert max(map(len, shown.splitlines())) <= 80 and "Data:" in shown and "Example: hf-xent" in shown


def test_packaged_preferences_are_as_reliable_as_they_say():
    rows = data.load("preferences", split="train")
    shares = {p: [row["own"] for row in rows if row["preference_prob"] == p] for p in (0.6, 0.8, 1.0)}
    assert sum(map(len, shares.values())) == len(rows) > 300 and all(shares[1.0])
    for p in (0.6, 0.8):  # four standard errors of a share
        assert abs(sum(shares[p]) / len(shares[p]) - p) < 4 * (p * (1 - p) / len(shares[p])) ** 0.5
    assert all(len(row["chosen"].split()) == len(row["rejected"].split()) for row in rows)
    assert load_rows("preferences", "train[:2]").to_list() == rows.select(range(2)).to_list()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and rows of several kinds."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny(std=0.05).save_pretrained(folder)
    tiny_tokenizer("the quick brown fox A B " * 8).save_pretrained(folder)
    pairs = {"prompt": "the quick", "chosen": " fox", "rejected": " brown", "preference_prob": 0.75}
    for name, row in {"pairs": pairs, "texts": {"text": "the fox", "label": "yes"}}.items():
        (folder / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 6), encoding="utf-8")
    (folder / "pairs.csv").write_text(
        "prompt,chosen,rejected,preference_prob\nthe, fox, brown,0.75\n", encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize("name", ["spce", "spo"])
def test_the_reference_of_adapters_is_the_model_without_them(name, folder, tmp_path):
    """After training, the reference's log-probabilities are still those of the model on disk."""
    words = ["--model_name_or_path", folder, "--dataset_name", folder / "pairs.jsonl", "--use_peft", "--lora_r", 2]
    words += ["--output_dir", tmp_path, "--max_steps", 2, "--learning_rate", 0.5, "--eval_rows", 2]
    recipe = RECIPES[name]()
    with quiet_loading():
        trainer = recipe.make(Setup(*parse(name, recipe, [str(word) for word in words])))
        trainer.train()
    assert trainer.ref_model is None
    batch = trainer.data_collator([trainer.eval_dataset[0]])
    batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad(), quiet_loading():
        reference = trainer.compute_ref_log_probs(trainer.model, batch)[0]
        start = AutoModelForCausalLM.from_pretrained(folder)
        logits = [m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (start, trainer.model)]
    kept = batch["completion_mask"][:1, 1:]
    logps = [x[:1, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:1, 1:, None])[..., 0] for x in logits]
    disk, trained = ((logp * kept).sum() for logp in logps)
    torch.testing.assert_close(reference[0], disk, rtol=1e-4, atol=1e-4)
    assert abs(trained - disk) > 2e-3, "the adapters have learned"


def test_strengths_of_a_table_are_numbers(folder):
    rows = RECIPES["spce"].rows(str(folder / "pairs.csv"), None)
    assert rows["preference_prob"][:] == [0.75]


REFUSED = [
    ("spce", ["--dataset_name", "texts.jsonl"], "texts.jsonl has no column chosen and no rejected, but text, label"),
    ("spce", ["--lora_alpha", "3"], "lora_alpha is 3, but use_peft is False"),
    ("osp", ["--judge", "reference", "--judge_model", "x"], "judge is 'reference' beside judge_model 'x'"),
    ("osp", ["--judge_question", "{prompt} {first}"], "judge_question has no {second}"),
    ("f2c", ["--dataset_name", "texts.jsonl"], "formats is not given, and only 'cities' has formats of its own"),
    ("f2c", ["--formats", "none.yaml"], "formats is none.yaml, which is not a readable YAML file"),
    ("dxo", ["--dataset_name", "texts.jsonl"], "has the labels yes: name the one that counts as 1 with --positive"),
    ("dxo", ["--dataset_name", "texts.jsonl", "--positive", "no"], "positive is 'no', but .* has the labels yes"),
    ("dxo", ["--dataset_name", "pairs.jsonl", "--text_column", "prompt"], "has no column label, labels, target"),
    ("dxo", ["--max_length", "1"], "max_length is 1: choose 2 or more"),
    ("self-distil-qa", [], "weights are not those of a LlamaForQuestionAnswering, which would start from random"),
    ("encoder-calibration", ["--use_peft"], "use_peft is True, but the encoder is frozen"),
    ("encoder-calibration", ["--class_template", "a photo"], "class_template is 'a photo': write {}"),
    ("siamese-ctc", [], "dataset_name is not given, and no sounds are packaged"),
    ("siamese-ctc", ["--dataset_name", "x"], "text_encoder is not given, but ot_weight is 0.1"),
    ("siamese-ctc", ["--dataset_name", "x", "--ot_weight", "0", "--text_encoder", "y"], "text_encoder has no effect"),
    ("siamese-ctc", ["--dataset_name", "x", "--upper_case", "--lower_case"], "lower_case and upper_case are both"),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED, ids=[f"{n} {' '.join(w)}" for n, w, _ in REFUSED])
def test_recipes_refuse_what_they_cannot_use(name, words, message, folder, tmp_path):
    words = [str(folder / word) if (folder / word).is_file() and word != "" else word for word in words]
    model = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path), "--max_steps", "1"]
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        run(name, [*model, *words])


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("no list", "formats are|formats is no list"),
        ([{"template": "{text}?"}], "formats are .*: give a list, each with 'template"),
        ([{"template": "{text}?", "answers": [True, False]}], "write texts, in quotation marks"),
        ([{"template": "{text}?", "answers": ["Yes", "No"]}], "pass at least two formats"),
    ],
)
def test_formats_are_checked(formats, message):
    with pytest.raises(ValueError, match=message):
        read_formats(formats)
    assert len(read_formats(None).formats) == 5
