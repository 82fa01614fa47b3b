"""Plugins for axolotl, LLaMA-Factory and ms-swift.

With the trainer's package the test uses it; without, a stand-in that calls what the package's source calls, in its
order and with its arguments: axolotl 0.19.0 (`integrations/base.py`, `loaders/model.py`, `train.py`), LLaMA-Factory
0.9.5 (`hparams/parser.py`, `train/tuner.py`) and ms-swift 4.6.0 (`callbacks/mapping.py`, `trainers/mixin.py`).
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pydantic import create_model
from transformers import Trainer, TrainingArguments

import hf_xent
from hf_xent.integrations import axolotl, llamafactory, ms_swift
from hf_xent.patching import patch_state
from support.models import V, tiny

PLUGIN = "hf_xent.integrations.axolotl.XentPlugin"
ROWS = Dataset.from_dict({"input_ids": [[1, 5, 7, 9, 11, 3]] * 8, "labels": [[1, 5, -100, 9, 11, 3]] * 8})


def trainer_of(model, folder, callbacks=()):
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", seed=1
    )
    return Trainer(model, args, train_dataset=ROWS, callbacks=list(callbacks))


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def seen(callback):
    """The same callback class, which keeps what a patched model counted before it is as it was."""
    counts = []

    class Seen(callback):
        def on_train_end(self, args, state, control, **kwargs):
            found = patch_state(kwargs["model"])
            counts.append((found.streamed, found.materialized))
            super().on_train_end(args, state, control, **kwargs)

    return Seen, counts


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(1)
    return losses_of(trainer_of(tiny(std=0.05), tmp_path_factory.mktemp("stock")))


# axolotl


def axolotl_config(**options):
    """The options as axolotl's own class has them after validation, its fields beside the plugin's."""
    others = dict.fromkeys((*axolotl.OTHERS, "batch_size"), (object, None))
    return create_model("AxolotlInputConfig", __base__=axolotl.XentArgs, **others)(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut_cross_entropy": True}, "cut_cross_entropy is True .plugin CutCrossEntropyPlugin.*set cut_cross_entropy"),
        ({"liger_fused_linear_cross_entropy": True}, "LigerPlugin"),
        ({"chunked_cross_entropy": True, "xent_loss": "focal"}, "chunked_cross_entropy: false"),
        ({"use_eaft": True}, "use_eaft is True"),
        ({"kd_trainer": 1.0}, "KDPlugin"),
        ({"xent_loss": "nonesuch"}, "nonesuch"),
        ({"xent_loss": "forward_kl"}, "xent_loss is 'forward_kl'.*teacher"),
        ({"xent_tail": 2.0}, "tail is 2.0"),
        ({"xent_loss": "emo", "xent_tail": 1e-3}, "tail"),
    ],
)
def test_axolotls_options_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        axolotl_config(**options)


def test_axolotls_defaults_change_nothing():
    config = axolotl_config(liger_fused_linear_cross_entropy=False)
    assert (config.xent_loss, config.xent_tail) == (None, 0.0)


def test_axolotls_model_is_patched_while_it_trains(tmp_path, stock):
    config = axolotl_config(xent_tail=1e-6)
    plugin = axolotl.XentPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(import_module(module), name) is axolotl.XentArgs
    torch.manual_seed(1)
    trainer = trainer_of(tiny(std=0.05), tmp_path)
    plugin.post_model_load(config, trainer.model)
    found = losses_of(trainer)
    assert (patch_state(trainer.model).streamed, patch_state(trainer.model).materialized) == (2, 0)
    for _ in range(2):  # as `train.py` does
        plugin.post_train(config, trainer.model)
    with pytest.raises(ValueError, match="not patched"):
        patch_state(trainer.model)
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)


def test_axolotl_hears_of_a_patch_without_effect():
    plugin, model = axolotl.XentPlugin(), tiny()
    plugin.post_model_load(axolotl_config(), model)
    patch_state(model).bypass("its head has an adapter that cannot be streamed")
    with pytest.warns(UserWarning, match="XentPlugin had no effect: its head has an adapter"):
        plugin.post_train(axolotl_config(), model)


@pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not there; its pins are not this project's")
def test_axolotl_loads_the_plugin():
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.integrations.config import merge_input_args

    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    plugin = manager.plugins[PLUGIN]
    assert isinstance(plugin, BasePlugin) and isinstance(plugin, axolotl.XentPlugin)
    _, config = merge_input_args()
    common = {"base_model": "here", "datasets": [{"path": "there", "type": "alpaca"}], "learning_rate": 1e-3}
    common |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "plugins": [PLUGIN]}
    assert config(**common, xent_loss="focal:gamma=2", xent_tail=1e-3).xent_loss == "focal:gamma=2"
    with pytest.raises(ValueError, match="use_eaft: false"):
        config(**common, use_eaft=True)
    model = tiny()
    manager.post_model_load(SimpleNamespace(plugins=[PLUGIN], xent_loss="emo", xent_tail=0.0), model)
    assert patch_state(model).materialized == 0


# LLaMA-Factory


@pytest.fixture
def factory(monkeypatch):
    """The two functions that `run` calls: `read_args(args)` and `run_exp(args, callbacks)`."""
    calls = []

    def read_args(args=None):
        return args if args is not None else sys.argv[1:]

    def run_exp(args=None, callbacks=None):
        calls.append((read_args(args), callbacks))

    for name, names in {"hparams": {"read_args": read_args}, "train.tuner": {"run_exp": run_exp}}.items():
        module = ModuleType(f"llamafactory.{name}")
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "llamafactory", ModuleType("llamafactory"))
    monkeypatch.setitem(sys.modules, "llamafactory.train", ModuleType("llamafactory.train"))
    return calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "rm"}, "stage is 'rm', without.*choose pt, sft, dpo, kto"),
        ({"enable_liger_kernel": True}, "enable_liger_kernel is True: Liger's kernels.*enable_liger_kernel: false"),
        ({"use_unsloth": "true"}, "use_unsloth is true"),
        (["--stage", "sft", "--use_dft_loss"], "use_dft_loss is true"),
        (["--use_eaft_loss=True", "--stage", "pt"], "use_eaft_loss is True"),
        ({"use_mca": True}, "Megatron"),
    ],
)
def test_llama_factorys_options_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=message):
        llamafactory.run(options)
    assert factory == []


@pytest.mark.parametrize("line", [["--stage", "sft", "--use_unsloth", "false", "--do_train"], []])
def test_llama_factory_trains_with_the_callback(factory, monkeypatch, tmp_path, stock, line):
    monkeypatch.setattr(sys, "argv", ["train_xent.py", *line])
    callback, counts = seen(hf_xent.PatchCallback)
    monkeypatch.setattr(llamafactory, "PatchCallback", callback)
    llamafactory.run()
    [(given, callbacks)] = factory
    assert given == line
    torch.manual_seed(1)
    found = losses_of(trainer_of(tiny(std=0.05), tmp_path, callbacks))
    assert counts == [(2, 0)]
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)


# ms-swift


@pytest.fixture
def swift(monkeypatch):
    """ms-swift's map of callbacks, of which it calls `callbacks_map[name](args, trainer)`."""
    if find_spec("swift.callbacks" if find_spec("swift") else "swift"):
        return import_module("swift.callbacks").callbacks_map
    module = ModuleType("swift.callbacks")
    module.callbacks_map = {"lisa": type("LISACallback", (), {"__module__": "swift.callbacks.lisa"})}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", module)
    return module.callbacks_map


def swift_trainer(ranks=1):
    return SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=ranks))


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"use_liger_kernel": True}, 1, "use_liger_kernel is True.*leave it out"),
        ({"loss_type": "cross_entropy"}, 1, "loss_type is cross_entropy"),
        ({"enable_dft_loss": True}, 1, "enable_dft_loss"),
        ({"label_smoothing_factor": 0.1}, 1, "label_smoothing_factor is 0.1"),
        ({}, 2, "sequence_parallel_size is 2"),
    ],
)
def test_ms_swifts_options_are_refused(swift, options, ranks, message):
    ms_swift.register()
    with pytest.raises(ValueError, match=message):
        swift["xent"](SimpleNamespace(**options), swift_trainer(ranks))


def test_ms_swifts_own_callbacks_stay(swift):
    with pytest.raises(ValueError, match="name is 'lisa', a callback that ms-swift has"):
        ms_swift.register("lisa")


def test_ms_swift_trains_with_the_callback(swift, monkeypatch, tmp_path, stock):
    callback, counts = seen(hf_xent.PatchCallback)
    monkeypatch.setattr(ms_swift, "PatchCallback", callback)
    assert ms_swift.register("ours", tail=1e-6) is swift["ours"]
    torch.manual_seed(1)
    trainer = trainer_of(tiny(std=0.05), tmp_path)
    trainer.template = swift_trainer().template
    trainer.add_callback(swift["ours"](trainer.args, trainer))
    found = losses_of(trainer)
    assert counts == [(2, 0)]
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)


def test_another_loss_is_the_one_that_is_trained(swift, tmp_path):
    ms_swift.register(loss="focal:gamma=2")
    model = tiny(std=0.05)
    ids = torch.tensor(ROWS["input_ids"][:4])
    labels = torch.tensor(ROWS["labels"][:4])[:, 1:].flatten()
    logits = model(input_ids=ids).logits[:, :-1].reshape(-1, V)
    logp = logits.log_softmax(-1)[labels >= 0].gather(1, labels[labels >= 0, None])
    expected = (-((1 - logp.exp()) ** 2) * logp).mean().item()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(swift["xent"](trainer.args, swift_trainer()))
    assert losses_of(trainer)[0] == pytest.approx(expected, abs=1e-4)
