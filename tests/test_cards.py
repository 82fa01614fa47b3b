"""The card of every trainer, as a stranger reads it: complete, true, its links lead somewhere and its code runs."""

import re
from pathlib import Path

import pytest
import yaml
from transformers.pipelines import SUPPORTED_TASKS

from hf_xent import hub
from hf_xent.hub.results import MEANINGS, latest, meaning
from hf_xent.trainers import METHODS
from support import carded

HOSTS = ("https://huggingface.co/", "https://arxiv.org/abs/", "https://github.com/hf-xent/hf_xent")
HEADINGS = ["Use", "Results", "Method", "Loss", "Settings", "Limits", "Citation"]
OF_THE_HUB = {"question-answering", "text2text-generation", "image-text-to-text"}  # tasks without a pipeline any more
QUICK = ("emo", "xent")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in carded.RUNS]
ROOT = Path(__file__).parents[1]


def test_every_trainer_has_a_run():
    assert carded.RUNS.keys() == METHODS.keys()


def table(text):
    """Metric -> (value, meaning), of the card's table."""
    rows = re.findall(r"^\| `([\w/]+)` \| (\S+) \|(?: \S* \|)? (.*) \|$", text, re.MULTILINE)
    return {name: (float(value), words) for name, value, words in rows}


def check_links(text, folder):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert target.startswith(HOSTS) or (folder / target).is_file(), target


@pytest.mark.filterwarnings("ignore")  # of the libraries, which the trainers' own tests look at
@pytest.mark.parametrize("name", EVERY)
def test_the_card_of_a_trainer_is_complete_and_true(name, tmp_path, monkeypatch):
    trainer = carded.trained(name, tmp_path)
    trainer.create_model_card(model_name="made", dataset="me/rows", license="mit")
    trainer.save_model(tmp_path)
    trainer.create_model_card(model_name="made", dataset="me/rows", license="mit")
    card = hub.validate(tmp_path)
    head, text = card.data, card.text
    assert head.pipeline_tag in {*SUPPORTED_TASKS, *OF_THE_HUB} and head.tags[:2] == ["hf_xent", name.replace("_", "-")]
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert found == [heading for heading in HEADINGS if heading in found] and set(HEADINGS) - {"Loss"} <= set(found)
    measured = latest(trainer.state.log_history)
    results = table(text.partition("## Results")[2].partition("## Method")[0])
    assert results.keys() == measured.keys()
    for metric, (value, words) in results.items():
        assert value == pytest.approx(measured[metric], rel=1e-5) and words == meaning(metric) != "", metric
    assert {r.metric_type: r.metric_value for r in head.eval_results or []} == measured
    assert not measured or "control" in text.partition("## Results")[2].partition("## Method")[0]
    assert str(tmp_path) not in card.content and "Deprecated alias" not in text and "`debug`" not in text
    assert f"`{type(trainer).__name__}`" in text and "Versions: " in text
    assert ("The method is that of" in text) or name in ("sft", "xent")
    check_links(text, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["model"] is not None


@pytest.mark.filterwarnings("ignore")
def test_what_was_measured_before_is_beside_it(tmp_path):
    trainer = carded.trained("xent", tmp_path)
    trainer.create_model_card(license="mit")
    first, last = ([e for e in trainer.state.log_history if "eval_loss" in e][i] for i in (0, -1))
    text = (tmp_path / "README.md").read_text()
    assert first["step"] == 0
    assert f"| `loss` | {last['eval_loss']:.6g} | {first['eval_loss']:.6g} | the objective" in text
    assert "| metric | value | before training | meaning |" in text and "is the control of the training" in text


def test_meanings_are_patterns_that_do_not_shadow_each_other():
    plain = [name for name in MEANINGS if re.fullmatch(r"\w+", name)]
    assert len(plain) > 15 and all(meaning(name) == MEANINGS[name] for name in plain)
    assert meaning("top5_accuracy") and meaning("my_own") == ""


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda path: path.stem)
def test_cards_of_the_repository_hold(path, tmp_path):
    (tmp_path / "README.md").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    card = hub.validate(tmp_path)
    assert card.data.base_model and card.data.language and "licence" not in yaml.safe_dump(card.data.to_dict())
    check_links(card.text, path.parent)
