"""What users may rely on: the names are frozen here, and every one of them is documented."""

import inspect
import subprocess
import sys

import pytest

import hf_xent
from hf_xent import detection, losses, ops, trainers
from hf_xent import ranking as auc

TRAINERS = """DXOConfig DXOTrainer EMOConfig EMOTrainer F2CConfig F2CTrainer LNRemovalCallback LNRemovalConfig
    LNRemovalTrainer NoiseFiTConfig NoiseFiTTrainer OSPConfig OSPTrainer PatchCallback SPCEConfig SPCETrainer SPO
    SPOConfig SPOOptions SPOTrainer XentConfig XentTrainer"""
PUBLIC = {
    hf_xent: f"""Comparison Head LazyLogits Seam Stats compare detection linear_cross_entropy losses map_logits patch
        seam_of unpatch vocab_loss vocab_stats {TRAINERS}""",
    ops: """DIFFERENTIABLE FORWARD_ONLY STATISTICS Head Payload Shard State Stats dense_stats map_logits merge
        vocab_loss vocab_stats""",
    losses: """CompSum CrossEntropy EISL EMO Focal ForwardKL JSD LOSSES Loss MixCE ReverseKL TaiLr get
        linear_cross_entropy table""",
    auc: """AP AUCM BCE DualSampler LOSSES Objective PAUCCVaR PAUCDRO RankingLoss TPAUCKL get""",
    detection: """BLIND CountedText SCORES Score TextScorer blind evaluate frequencies get score sweep""",
    trainers: TRAINERS,
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_names_are_frozen_and_exist(module):
    assert sorted(module.__all__) == sorted(PUBLIC[module].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name
            members = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
            own = [(n, f) for n, f in members if f.__module__.startswith("hf_xent") and not n.startswith("_")]
            assert all(inspect.getdoc(f) for _, f in own), (name, [n for n, f in own if not inspect.getdoc(f)])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = hf_xent.nonesuch


def test_import_is_light():
    """Trainers, datasets and TRL are loaded when they are used."""
    heavy = ("transformers", "trl", "datasets", "peft", "triton")
    code = f"import sys, hf_xent; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_private_api_of_torch_we_rely_on():
    """If this fails, torch renamed what tells a backward whether its graph is kept (ops/autograd.py), that other ways
    to differentiate are at work (ops/higher.py), or that saved tensors are hooked (lazy/graph.py).
    """
    import torch

    assert isinstance(torch._C._autograd._get_current_graph_task_keep_graph(), bool)
    assert torch._C._are_functorch_transforms_active() is False
    assert torch._C._functorch.is_legacy_batchedtensor(torch.zeros(())) is False
    assert torch._C._functorch.is_batchedtensor(torch.zeros(())) is False
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert callable(torch._C._nn._parse_to)
    assert callable(torch.Tensor._make_wrapper_subclass)
