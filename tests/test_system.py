"""Files appear whole, processes that die are told of, the CPU has a name, and old names still work."""

import importlib
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest

import hf_xent
from hf_xent.system import renamed
from hf_xent.system.files import replace_atomically, write_atomically
from hf_xent.system.machine import cpu_name
from hf_xent.system.processes import Ended, Worker


def fill(folder, text):
    def write(draft):
        (draft / "first").write_text(text)
        time.sleep(0.3)
        (draft / "second").write_text(text)

    write_atomically(folder, write)


def test_a_folder_is_whole_between_two_processes(tmp_path):
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    rivals = [context.Process(target=fill, args=(tmp_path / "out", text)) for text in "ab"]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert [rival.exitcode for rival in rivals] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no draft is left
    assert (tmp_path / "out" / "first").read_text() == (tmp_path / "out" / "second").read_text()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    assert replace_atomically(file, lambda draft: draft.write_text("first")) == file and file.read_text() == "first"

    def half(draft):
        assert draft.suffix == ".csv" and draft.parent == file.parent  # a move within a file system is one step
        draft.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_atomically(file, half)
    assert file.read_text() == "first" and list(file.parent.iterdir()) == [file]
    replace_atomically(file, lambda draft: draft.write_text("second"))
    assert file.read_text() == "second"


def test_the_cpu_has_its_name():
    """As `lscpu` tells it, where there is one."""
    if shutil.which("lscpu") is None or "x86" not in platform.machine():
        assert cpu_name()
        return
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    names = [line.split(":", 1)[1].strip() for line in lines.stdout.splitlines() if line.startswith("Model name")]
    assert cpu_name() == names[0]


def square(pipe, offset):
    """What the workers below do: a number comes back as its square, and no number kills the process."""
    while (number := pipe.recv()) is not None:
        pipe.send(number**2 + offset)
    os._exit(7)


def test_a_worker_answers_and_its_death_is_told():
    worker = Worker("the run of squares", square, 1, remedy="try smaller numbers")
    worker.send(3)
    assert worker.receive() == 10
    worker.send(None)
    message = r"the run of squares ended without an answer \(killed for memory\?\): try smaller numbers$"
    with pytest.raises(Ended, match=message) as caught:
        worker.receive()
    assert caught.value.exitcode == 7
    with pytest.raises(RuntimeError, match=message):
        worker.send(3)
    worker.close()
    worker.close()  # once more does no harm


def sleep(pipe):
    pipe.send("asleep")
    time.sleep(60)


def test_a_worker_that_does_not_end_is_killed():
    worker = Worker("sleep", sleep)
    assert worker.receive() == "asleep"
    worker.close(seconds=0.1)
    assert not worker.process.is_alive() and worker.process.exitcode == -9


@pytest.mark.filterwarnings("ignore:.*use the new name:DeprecationWarning")  # of an old module's old package
@pytest.mark.parametrize("old", renamed.MODULES)
def test_old_modules_are_the_new_ones(old, monkeypatch):
    """Under both names, with a warning the first time."""
    monkeypatch.delitem(sys.modules, f"hf_xent.{old}", raising=False)
    new = importlib.import_module(f"hf_xent.{renamed.MODULES[old]}")
    spec = new.__spec__
    with pytest.warns(DeprecationWarning, match=f"hf_xent.{old} is now {new.__name__}"):
        assert importlib.import_module(f"hf_xent.{old}") is new
    assert new.__spec__ is spec


@pytest.mark.parametrize("old", renamed.NAMES)
def test_old_names_are_the_new_things(old):
    home, _, name = renamed.NAMES[old].rpartition(".")
    module, _, former = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"hf_xent.{old} is now hf_xent.{renamed.NAMES[old]}"):
        thing = getattr(importlib.import_module(f"hf_xent.{module}"), former)
    assert thing is getattr(importlib.import_module(f"hf_xent.{home}"), name)


def test_what_is_below_a_renamed_package_is_there_once(monkeypatch):
    """Two copies of a module have two copies of its classes, and `isinstance` fails between them."""
    for old in ("auc", "auc.sampler"):
        monkeypatch.delitem(sys.modules, f"hf_xent.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=r"hf_xent.auc is now hf_xent.ranking"):
        importlib.import_module("hf_xent.auc")
    with pytest.warns(DeprecationWarning, match=r"hf_xent.auc.sampler is now hf_xent.ranking.sampler"):
        sampler = importlib.import_module("hf_xent.auc.sampler")
    assert sampler.DualSampler is hf_xent.ranking.DualSampler


@pytest.mark.filterwarnings("ignore:.*use the new name:DeprecationWarning")
def test_the_old_module_of_ranking_losses_has_them_all():
    """`hf_xent.auc.losses` became a file a loss."""
    losses = importlib.import_module("hf_xent.auc.losses")
    for name in ("RankingLoss", *hf_xent.ranking.LOSSES.exported, "SURROGATES"):
        assert getattr(losses, name) is getattr(hf_xent.ranking, name)
    assert issubclass(losses.TPAUCKL, losses.PAUCDRO) and losses.AP is hf_xent.ranking.LOSSES["ap"]


def test_the_old_module_of_packaged_models_has_all_it_had(monkeypatch):
    """`hf_xent.embedded` became four modules."""
    monkeypatch.delitem(sys.modules, "hf_xent.embedded", raising=False)
    with pytest.warns(DeprecationWarning):
        embedded = importlib.import_module("hf_xent.embedded")
    with pytest.warns(DeprecationWarning, match=r"is now hf_xent.models.loading.load"):
        assert embedded.load is importlib.import_module("hf_xent.models.loading").load
    with pytest.warns(DeprecationWarning, match=r"is now hf_xent.system.files.write_atomically"):
        assert embedded.publish is write_atomically
    assert embedded.DEFAULT in embedded.PACKAGED and callable(embedded.checkpoint) and callable(embedded.cache_folder)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = embedded.nonesuch
