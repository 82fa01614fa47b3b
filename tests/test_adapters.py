"""PEFT's adapters on the head, and weights with a parametrization: loss and every gradient equal the unpatched model's.

Each row is an adapter for linear layers. Those that are streamed make no logits; the others say which layer it is, and
which of its operations needs them.
"""

import re

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from hf_xent.patching import compare, patch, patch_state, unpatch
from support.models import assert_same_gradients, gradients, tiny

# PEFT advises on merging and saving in these configurations
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
V, ROWS, LENGTH = 128, 3, 11  # the width that some adapters want is a multiple of their blocks


def adapted(kind, *targets, train=False, of="llama", bias=False, config=None, **options):
    """A tiny model with an adapter on its head that does something."""
    model = tiny(of, use_cache=False, vocab_size=V, **(config or {}))
    if bias:
        weight, model.lm_head = model.lm_head.weight, nn.Linear(32, V)
        model.lm_head.weight = weight
    config = kind(task_type="CAUSAL_LM", target_modules=list(targets) or ["lm_head"], **options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train(train)


def parametrized(change):
    """A tiny model whose head's weight is computed from other parameters."""
    model = tiny(vocab_size=V)
    change(model.lm_head)
    return model.train()


STREAMED = {
    "LoRA": lambda: adapted(peft.LoraConfig, r=4),
    "LoRA, rank-stabilized, with a bias": lambda: adapted(peft.LoraConfig, r=4, use_rslora=True, lora_bias=True),
    "DoRA": lambda: adapted(peft.LoraConfig, r=4, use_dora=True),
    "DoRA with dropout": lambda: adapted(peft.LoraConfig, r=4, use_dora=True, lora_dropout=0.3, train=True),
    "DoRA inside and on the head": lambda: adapted(peft.LoraConfig, "q_proj", "lm_head", r=4, use_dora=True),
    "DoRA, a head with a bias": lambda: adapted(peft.LoraConfig, bias=True, r=4, use_dora=True),
    "DoRA, softcap": lambda: adapted(peft.LoraConfig, of="gemma2 softcap", r=4, use_dora=True),
    "IA3, a head with a bias": lambda: adapted(peft.IA3Config, bias=True, feedforward_modules=[]),
    "BOFT, a head with a bias": lambda: adapted(peft.BOFTConfig, bias=True, boft_block_size=4),
    "HRA, a scaled head": lambda: adapted(peft.HRAConfig, of="granite scale", r=4),
    "AdaLoRA": lambda: adapted(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "VeRA": lambda: adapted(peft.VeraConfig, r=4),
    "PVeRA": lambda: adapted(peft.PveraConfig, r=4, train=True),
    "LoHa": lambda: adapted(peft.LoHaConfig, r=4),
    "LoKr": lambda: adapted(peft.LoKrConfig, r=4),
    "IA3": lambda: adapted(peft.IA3Config, feedforward_modules=[]),
    "IA3 on hidden states": lambda: adapted(peft.IA3Config, feedforward_modules=["lm_head"]),
    "OFT": lambda: adapted(peft.OFTConfig, r=4, oft_block_size=0),
    "BOFT": lambda: adapted(peft.BOFTConfig, boft_block_size=4),
    "HRA": lambda: adapted(peft.HRAConfig, r=4),
    "FourierFT": lambda: adapted(peft.FourierFTConfig, n_frequency=10),
    "WaveFT": lambda: adapted(peft.WaveFTConfig, n_frequency=10),
    "VB-LoRA": lambda: adapted(peft.VBLoRAConfig, r=4, num_vectors=10, vector_length=4, topk=2),
    "RandLora": lambda: adapted(peft.RandLoraConfig, r=4),
    "HiRA": lambda: adapted(peft.HiraConfig, r=4),
    "DeLoRA": lambda: adapted(peft.DeloraConfig, r=4),
    "DEFT": lambda: adapted(peft.DeftConfig),
    "GLoRA": lambda: adapted(peft.GloraConfig),
    "Lily": lambda: adapted(peft.LilyConfig),
    "MiSS": lambda: adapted(peft.MissConfig, r=4),
    "MiSS, bat": lambda: adapted(peft.MissConfig, r=4, init_weights="bat"),
    "OSF": lambda: adapted(peft.OSFConfig),
    "PEANuT": lambda: adapted(peft.PeanutConfig),
    "PSOFT": lambda: adapted(peft.PsoftConfig),
    "SHiRA": lambda: adapted(peft.ShiraConfig, r=4),
    "TinyLoRA": lambda: adapted(peft.TinyLoraConfig),
    "UniLoRA": lambda: adapted(peft.UniLoraConfig),
    "BEFT": lambda: adapted(peft.BeftConfig),
    "trainable tokens": lambda: adapted(peft.TrainableTokensConfig, "embed_tokens", "lm_head", token_indices=[3, 4]),
    "LoRA with trainable tokens": lambda: adapted(
        peft.LoraConfig, "q_proj", r=4, trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3, 5]}
    ),
    "trainable tokens of a tied head": lambda: adapted(
        peft.LoraConfig,
        "q_proj",
        r=4,
        trainable_token_indices={"embed_tokens": [1, 2]},
        config={"tie_word_embeddings": True},
    ),
    "modules_to_save": lambda: adapted(peft.LoraConfig, "q_proj", r=4, modules_to_save=["lm_head"]),
    "weight_norm": lambda: parametrized(parametrizations.weight_norm),
    "spectral_norm": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "weight_norm as a hook": lambda: parametrized(nn.utils.weight_norm),
    "spectral_norm as a hook": lambda: parametrized(nn.utils.spectral_norm),
}
DENSE = {  # the part of its name, and the operation that needs the logits
    "RoAD": (lambda: adapted(peft.RoadConfig, group_size=4), r"peft\.tuners\.road\..*Tensor\.reshape"),
    "C3A": (lambda: adapted(peft.C3AConfig, block_size=32), r"peft\.tuners\.c3a\..*Tensor\.(__iadd__|add_)"),
    "GraLoRA": (
        lambda: adapted(peft.GraloraConfig, r=4, gralora_k=2),
        r"peft\.tuners\.gralora\..*Tensor\.(__iadd__|add_)",
    ),
    "AdaMSS": (lambda: adapted(peft.AdamssConfig), r"peft\.tuners\.adamss\..*Tensor\.add"),
}
deprecated = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of the hook


class Shapes(TorchDispatchMode):
    """The shapes of what operations return that has a row of the vocabulary for each token, or each with a label."""

    def __init__(self):
        super().__init__()
        self.of_logits = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            floats = isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta and x.shape[-1:] == (V,)
            if floats and x.shape[:-1].numel() in (ROWS * LENGTH, ROWS * (LENGTH - 1), ROWS * (LENGTH - 2)):
                self.of_logits.add(tuple(x.shape))
        return out


def batch():
    ids = torch.randint(3, V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone().index_fill_(1, torch.tensor([2]), -100)}


def run(model):
    torch.manual_seed(0)
    model.zero_grad()
    out = model(**batch())
    out.loss.backward()
    return out.loss.detach(), gradients(model)


def both_ways(build, **options):
    """Checks that stock and patched are equal. Returns the shapes that both made, and the patch's state."""
    with Shapes() as stock:
        loss, expected = run(build())
    model = patch(build(), **options)
    with Shapes() as ours:
        found_loss, found = run(model)
    torch.testing.assert_close(found_loss, loss)
    assert expected.keys() == found.keys()
    assert_same_gradients(found, expected)
    return stock, ours, patch_state(model)


@deprecated
@pytest.mark.parametrize("name", STREAMED)
def test_streamed(name):
    """Nothing has the logits' shape, of which the patched model has two rows at a time."""
    stock, ours, state = both_ways(STREAMED[name], memory_budget=2 * 4 * V)
    assert (state.streamed, state.materialized, state.bypassed, state.why_dense) == (1, 0, 0, "")
    assert stock.of_logits and not ours.of_logits


@pytest.mark.parametrize("name", DENSE)
def test_dense_and_said_to_be(name):
    """What mixes tokens of the vocabulary, or is not a product with a matrix of its size, needs the logits."""
    build, reason = DENSE[name]
    _, _, state = both_ways(build)
    assert state.streamed == 0 and state.materialized >= 1
    assert re.search(reason, state.why_dense), state.why_dense
    found = compare(build())
    assert found.equal and not found.lean
    model = patch(build(), loss="focal")
    with pytest.raises(RuntimeError, match=r"Focal.*adapter on the head.*change that, or train with cross-entropy"):
        model(**batch())


def test_adapters_come_and_go_after_the_patch():
    """The layer around the head is found at each call; without it the head is as it was."""
    expected = tiny(use_cache=False, vocab_size=V)(**batch()).loss
    model = patch(tiny(use_cache=False, vocab_size=V))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=4, use_dora=True))
    torch.testing.assert_close(wrapped(**batch()).loss, expected)  # an adapter that was not trained does nothing
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**batch()).loss, expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).loss, expected)
    state = patch_state(merged)
    assert (state.streamed, state.materialized) == (3, 0)
    unpatch(merged)
    assert not {"forward", "_old_forward"} & merged.lm_head.__dict__.keys()


@pytest.mark.parametrize("name", ["DoRA", "LoHa", "VeRA", "IA3", "trainable tokens"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_low_precision_is_no_worse_than_stock(name, how):
    truth, true_grads = run(STREAMED[name]().to(torch.bfloat16).float() if how == "bfloat16" else STREAMED[name]())

    def mixed(model):
        if how == "bfloat16":
            return run(model.to(torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    stock, stock_grads = mixed(STREAMED[name]())
    model = patch(STREAMED[name]())
    ours, found = mixed(model)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)
    assert abs(ours - truth) <= 2 * abs(stock - truth) + 2e-3
    for key, true in true_grads.items():
        assert found[key].dtype == stock_grads[key].dtype
        errors = [(g[key].double() - true.double()).norm() for g in (found, stock_grads)]
        assert errors[0] <= 2 * errors[1] + 1e-2 * true.double().norm(), key
