"""A registry: names, options, and what files say of themselves, read without importing them."""

import dataclasses
import subprocess
import sys

import pytest

from hf_xent import losses, ranking
from hf_xent.registry import Registry, literal, parse

FILES = {
    "__init__": '"""A family."""',
    "base": '''
from dataclasses import dataclass, field

class Root:
    uses: tuple = ("nothing",)

@dataclass(frozen=True)
class Base(Root):
    scale: float = field(default=1.0, kw_only=True)
    """What everything is multiplied by."""
''',
    "square": '''
"""The square: large numbers count more.

    loss = x^2 / 2     for x in R

Source: Gauss 1809, Theoria motus,
    section 3.
Relations: Cube is steeper.
"""
from dataclasses import dataclass
from typing import ClassVar

from .base import Base

@dataclass(frozen=True)
class Square(Base):
    """Per number."""

    limit: float = float("inf")
    """The largest value,
    or inf."""
    names: tuple[str, ...] = ("a", "b")
    kind: ClassVar[str] = "even"

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError("limit is negative")
''',
    "shift": '''
"""Functions."""
def shift(x, by: float = 0.5, *, quietly=True):
    """The number and a bit more. Source: nobody."""
    return x + by
''',
    "constant": '''
"""'pi': a number.

Source: Archimedes.
"""
PI = 3.14
''',
}
ENTRIES = {"square": "square:Square", "shift": "shift:shift", "pi": "constant:PI"}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    folder = tmp_path / "family_of_tests"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text.lstrip())
    monkeypatch.syspath_prepend(tmp_path)
    __import__("family_of_tests")
    yield Registry("loss", ENTRIES, package="family_of_tests")
    for name in [name for name in sys.modules if name.startswith("family_of_tests")]:
        del sys.modules[name]


def test_it_reads_files_without_importing_them(registry):
    square, shift, constant = registry.table()
    assert square == {
        "name": "square",
        "object": "Square",
        "summary": "The square: large numbers count more.",
        "formula": "loss = x^2 / 2; for x in R",
        "source": "Gauss 1809, Theoria motus, section 3",
        "relations": "Cube is steeper",
        "options": {"scale": 1.0, "limit": float("inf"), "names": ("a", "b")},
        "help": {"scale": "What everything is multiplied by.", "limit": "The largest value, or inf.", "names": ""},
    }
    assert shift["summary"] == "The number and a bit more. Source: nobody." and shift["options"] == {"by": 0.5}
    assert constant["summary"] == "'pi': a number." and constant["source"] == "Archimedes" and not constant["options"]
    assert not [name for name in sys.modules if name.startswith("family_of_tests.")]


def test_entries_are_imported_when_they_are_asked_for(registry):
    assert list(registry) == list(ENTRIES) and len(registry) == 3 and "pi" in registry and "e" not in registry
    assert registry.names() == "square, shift, pi" and registry.exported == {
        "Square": "square",
        "shift": "shift",
        "PI": "pi",
    }
    assert "family_of_tests.constant" not in sys.modules
    assert registry["pi"] == registry.find("pi") == registry.get("pi") == 3.14
    assert registry.get("e", 2.72) == 2.72
    with pytest.raises(ValueError, match="loss is 'e': choose one of square, shift, pi"):
        registry.find("e")


def test_a_package_offers_its_entries_and_what_other_files_have(registry):
    others = {"Base": "base"}
    assert registry.attribute("PI", others) == 3.14 and registry.attribute("Square", others) is registry["square"]
    assert registry.attribute("Base", others) in registry["square"].__mro__
    with pytest.raises(AttributeError, match="module 'family_of_tests' has no attribute 'Root'"):
        registry.attribute("Root", others)


def test_instances_have_the_options_that_are_written(registry):
    square = registry.build("square:limit=3, scale=-inf")
    assert (square.limit, square.scale) == (3, float("-inf")) and square == registry.build(
        "square", limit="3", scale="-inf"
    )
    assert registry.build("square:names=('c',)").names == ("c",)
    for text, options, message in (
        ("cube", {}, "loss is 'cube': choose one of square, shift, pi, or pass a loss as an object"),
        ("square:size=1", {}, "loss 'square' does not take size: its options are scale, limit, names"),
        ("square:limit=1", {"limit": 2}, "with limit=2 beside it: set limit once"),
        ("square:limit=1, limit=2", {}, "set limit once"),
        ("square:limit", {}, "options are 'limit': write them as key=value, key=value"),
        ("square:limit=-1", {}, "loss 'square' cannot take {'limit': -1}: limit is negative"),
    ):
        with pytest.raises(ValueError) as error:
            registry.build(text, **options)
        assert str(error.value).endswith(message)


def test_a_user_adds_and_removes_an_entry(registry):
    square = registry["square"]
    registry["mine"] = square
    assert registry["mine"] is square and registry.row("mine")["options"] == registry.row("square")["options"]
    assert registry.build("mine:limit=2") == square(limit=2) and "mine" not in registry.exported.values()
    del registry["mine"]
    assert "mine" not in registry


def test_texts_are_read_as_literals_or_words():
    assert parse("gamma=3, variant=emo2, ngrams=(1, 2)") == {"gamma": 3, "variant": "emo2", "ngrams": (1, 2)}
    assert [literal(text) for text in ("1e-3", "True", "None", "-inf", "word")] == [
        1e-3,
        True,
        None,
        float("-inf"),
        "word",
    ]


@pytest.mark.parametrize("family", [losses, ranking], ids=lambda family: family.__name__)
def test_what_is_read_is_what_the_classes_have(family):
    for row in family.LOSSES.table():
        loss = family.LOSSES[row["name"]]
        assert row["object"] == loss.__name__
        assert row["options"] == {field.name: field.default for field in dataclasses.fields(loss)}


def test_a_table_needs_no_torch():
    code = "import sys; from hf_xent import losses; losses.table(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
