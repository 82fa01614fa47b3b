"""Every network of ours makes the round trip to a Hub, and loads from there where hf_xent is not installed."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, Trainer, TrainingArguments

from support.hub_server import serving
from support.networks import NETWORKS, built, run

PUSH = """
import torch
from support.networks import NETWORKS, built
for name in NETWORKS:
    built(name)[0].push_to_hub(f"me/{name.replace('_', '-')}")
"""
LOAD = """
import sys, torch, transformers
sys.modules["hf_xent"] = None  # importing it is an error
from support.networks import run
folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    given = torch.load(f"{folder}/{name}.pt")
    model = getattr(transformers, given["auto"]).from_pretrained(f"me/{name.replace('_', '-')}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(run(model.eval(), given["inputs"]), f"{folder}/{name}.out")
"""


def python(code, *arguments, **environment):
    """Runs code in a process of its own, in the folder of the tests."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=os.path.dirname(__file__), text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The folder of what the networks compute after they were pushed, and loaded without hf_xent."""
    folder = tmp_path_factory.mktemp("networks")
    for name in NETWORKS:
        model, inputs = built(name)
        torch.save({"auto": model._auto_class, "inputs": inputs}, folder / f"{name}.pt")
    with serving() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_the_test", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        python(PUSH, **environment, HF_HOME=str(folder / "home"))
        python(LOAD, folder, *NETWORKS, **environment, HF_HOME=str(folder / "other"))
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_pushed_computes_the_same_without_hf_xent(elsewhere, name):
    model, inputs = built(name)
    expected, found = run(model, inputs), torch.load(elsewhere / f"{name}.out")
    assert expected.keys() == found.keys() and expected
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


def described(config):
    """A configuration without what saving writes, those within it too."""
    written = {"auto_map", "dtype", "transformers_version", "architectures", "_name_or_path"}
    return {k: described(x) if isinstance(x, dict) else x for k, x in config.items() if k not in written}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_saved_loads_as_the_class_that_is_installed(tmp_path, name):
    model, inputs = built(name)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    back = getattr(transformers, model._auto_class).from_pretrained(tmp_path)
    assert type(back) is type(model) and not back.training
    expected, found = run(model, inputs), run(back, inputs)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    assert described(back.config.to_dict()) == described(model.config.to_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trainer_averages_the_losses_of_accumulated_batches(tmp_path, name):
    """Losses are means over a batch: no network may say that it divides by a number of items that it is given."""
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert not Trainer(built(name)[0], arguments).model_accepts_loss_kwargs
