"""The documentation is true: its Python blocks run, the loss it adds passes, its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from hf_xent import losses
from support.models import tiny, tiny_tokenizer
from test_losses import build, dense, gradients, problem

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in the tests, a tiny model on disk
FOLDERS = ("docs", "benchmarks", "examples", "model_cards", "hf_xent/hub/templates")
WRITTEN = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
MADE = ("overview.md", "commands.md")  # by the build, see docs/hooks.py; tests/test_site.py follows links to them
TEXT = "the quick brown fox jumps over the lazy dog, again and again, until the dog wakes up. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    tiny(std=0.05).save_pretrained(found)
    tiny_tokenizer(TEXT).save_pretrained(found)
    return found


def run_page(page, folder):
    """Its blocks, in one namespace that has a model, token ids and the operands of its head."""
    model, tokenizer = tiny(std=0.05), tiny_tokenizer(TEXT)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:24]] * 2)
    hidden = model.model(ids).last_hidden_state[:, :-1].detach()
    names = {"model": model, "tokenizer": tokenizer, "ids": ids, "hidden": hidden, "labels": ids[:, 1:]}
    names |= {"weight": model.lm_head.weight, "__name__": "hf_xent.losses.poly", "text": TEXT}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block.replace(HUB_ID, str(folder)), page, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(losses.LOSSES, "poly", None)  # so that what a page registers is gone afterwards
    run_page(page, folder)


def test_the_loss_that_is_added_is_what_it_says(folder, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "poly", None)
    names = run_page("add_a_loss.md", folder)
    p = problem()
    for options in ({}, {"epsilon": -0.5}):
        loss, call = build("poly", options, p)
        found, expected = loss(p.hidden, p.head, p.labels, **call), dense(loss, p).mean()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, p), gradients(expected, p))
    assert names["loss"].isfinite()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_in_the_repository(page):
    text = re.sub(r"{% if .*?{% endif %}", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # of cards to be
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]
    made = MADE if page.parent == DOCS else ()
    assert [link for link in inside if not (page.parent / link).exists() and link not in made] == []


def test_the_picture_of_the_rooms_shows_the_imports():
    """If this fails: `make architecture`."""
    from test_floors import FLOORS, MODULES, imported, part_of

    architecture = runpy.run_path(str(DOCS / "architecture.py"))
    assert {floor: sorted(rooms) for floor, rooms in architecture["floors"]().items()} == {
        floor: sorted(rooms) for floor, rooms in FLOORS.items()
    }
    expected = set()
    for module, path in MODULES.items():
        names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        expected |= {(part_of(module), part_of(name)) for name in names if part_of(module) != part_of(name)}
    picture = (DOCS / "architecture.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'data-from="(\w+)" data-to="(\w+)"', picture)
    assert len(drawn) == len(set(drawn)) and set(drawn) == expected
    assert picture == architecture["draw"]()
