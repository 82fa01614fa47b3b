"""Old names of modules and of what is in them: each warns, names the new one, and leads to the same object."""

import importlib
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest

import hf_xent
from hf_xent import detection
from hf_xent.system.renamed import MODULES, NAMES


@pytest.fixture
def forget():
    """A function after which an old module is as if it had never been imported; at the end all are."""
    known = set()

    def forget(old):
        known.add(old)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"hf_xent.{old}.")]:
            del sys.modules[name]
        parent, _, last = f"hf_xent.{old}".rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may be an old name, too
            vars(importlib.import_module(parent)).pop(last, None)

    yield forget
    for old in known:
        forget(old)


def warning(old, new):
    return pytest.warns(DeprecationWarning, match=rf"^hf_xent\.{old} is now hf_xent\.{new}: use the new name$")


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_the_new_one(old, forget):
    new = importlib.import_module(f"hf_xent.{MODULES[old]}")
    parent, _, last = f"hf_xent.{old}".rpartition(".")
    forget(old)
    with warning(old, MODULES[old]) as caught:
        assert importlib.import_module(f"hf_xent.{old}") is new
    assert len(caught) == 1
    forget(old)
    with pytest.warns(DeprecationWarning, match=rf"\.{last} is now hf_xent\.{MODULES[old]}: use the new name$"):
        exec(f"from {parent} import {last}", names := {})
    assert names[last] is new
    assert new.__spec__.name == new.__name__ == f"hf_xent.{MODULES[old]}"


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_the_new_object(old):
    place, _, name = f"hf_xent.{old}".rpartition(".")
    home, _, new = f"hf_xent.{NAMES[old]}".rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that are imported for the first time
        importlib.import_module(place), importlib.import_module(home)
    with warning(old, NAMES[old]) as caught:
        found = getattr(importlib.import_module(place), name)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert found is getattr(importlib.import_module(home), new)


def test_an_old_name_is_neither_a_new_one_nor_an_old_one_again():
    for old, new in (MODULES | NAMES).items():
        assert new not in MODULES and new not in NAMES, f"{old} leads to {new}, which is an old name"
        assert importlib.util.find_spec(f"hf_xent.{new}" if old in MODULES else f"hf_xent.{new.rpartition('.')[0]}")


@pytest.mark.parametrize(
    ("old", "place", "name"),
    [
        ("mirostat", "hf_xent.mirostat", "Mirostat"),
        ("auc", "hf_xent.auc", "DualSampler"),
        ("auc", "hf_xent.auc.objective", "Objective"),  # a module in an old package
        ("detection.corpus", "hf_xent.detection.corpus", "frequencies"),
    ],
)
def test_a_pickle_that_names_an_old_module_loads(old, place, name, forget):
    package, *inner = MODULES[old], *place.removeprefix(f"hf_xent.{old}").split(".")[1:]
    new = importlib.import_module(".".join(["hf_xent", package, *inner]))
    forget(old)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pickle.loads(f"c{place}\n{name}\n.".encode())
    assert caught and {each.category for each in caught} == {DeprecationWarning}
    assert found is getattr(new, name)
    assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("statement", ["import hf_xent.mirostat", "from hf_xent import mirostat"])
def test_a_script_that_uses_an_old_name_runs_and_is_told_where(statement):
    code = f"{statement}\nimport hf_xent\nfrom hf_xent.generation import mirostat\nassert hf_xent.mirostat is mirostat"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = "<string>:1: DeprecationWarning: hf_xent.mirostat is now hf_xent.generation.mirostat: use the new name"
    assert run.stderr.count("DeprecationWarning") == 1 and told in run.stderr


def test_what_never_was_is_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hf_xent\.nonesuch'"):
        importlib.import_module("hf_xent.nonesuch")
    with pytest.raises(AttributeError, match="module 'hf_xent' has no attribute 'nonesuch'"):
        _ = hf_xent.nonesuch


def test_old_keywords_work_and_warn():
    scores = {"loss": [0.1, 0.9, 0.2, 0.8]}
    expected = detection.evaluate(scores, [1, 0, 1, 0], resamples=10)
    with pytest.warns(DeprecationWarning, match=r"evaluate\(found=\) is now scores=: use the new name") as warned:
        assert detection.evaluate(found=scores, labels=[1, 0, 1, 0], resamples=10) == expected
    assert warned[0].filename == __file__
    assert list(inspect.signature(detection.evaluate).parameters) == ["scores", "labels", "texts", "resamples"]
