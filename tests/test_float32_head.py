"""TRL's `cast_lm_head_to_fp32` on a patched model: float32 products, streamed, equal to TRL's own numbers."""

import copy
import warnings

import datasets
import peft
import pytest
import torch
import trl
from packaging.version import Version
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hf_xent
from hf_xent.patching import patch, patch_state, unpatch
from hf_xent.patching.trl import STATISTICS, FusedHead, is_float32_forward
from support.models import V, batch, gradients, tiny, tiny_tokenizer
from support.oracle import Largest, assert_close_at_scale

if Version(trl.__version__) < Version("1.16"):
    pytest.skip("TRL's fused head came with 1.15 and runs on CPUs from 1.16 on", allow_module_level=True)

from trl.trainer.utils import add_fused_lm_head

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
NAMES = ["llama", "llama tied", "gemma2 softcap", "granite scale", "cohere scale", "mixtral aux loss"]


def fused(model, temperature=0.7):
    add_fused_lm_head(model, temperature=temperature, outputs=tuple(STATISTICS), cast_lm_head_to_fp32=True)
    return model


def answer(model, autocast=False):
    """Outputs of a call of the fused head, and every gradient of a loss of two of them."""
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (out.log_probs.square().sum() + out.entropy.exp().sum()).backward()
    return out, gradients(model)


def counts(model):
    state = patch_state(model)
    return state.streamed, state.materialized, state.bypassed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_equals_trls_own_kernel(name, dtype, autocast):
    """16-bit models, and mixed precision, whose backbone runs under autocast and whose head does not."""
    theirs, expected = answer(fused(tiny(name, dtype=dtype)), autocast)
    model = patch(fused(tiny(name, dtype=dtype)))
    ours, found = answer(model, autocast)
    assert ours.keys() == theirs.keys()
    for field, value in theirs.items():
        torch.testing.assert_close(ours[field], value, rtol=2e-5, atol=2e-5, msg=lambda m, f=field: f"{f}: {m}")
    assert found.keys() == expected.keys()
    for parameter, grad in expected.items():
        assert_close_at_scale(found[parameter].float(), grad.float(), 2e-2, parameter)
    assert counts(model) == (1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_that_of_float32(dtype):
    """Against float64 products of the same 16-bit hidden states and weights; without the option it is larger by far."""
    hidden, errors = [], []
    ids, labels = batch()
    for cast in (True, False):
        model = tiny(dtype=dtype)
        add_fused_lm_head(model, cast_lm_head_to_fp32=cast)
        patch(model)
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        handle.remove()
        logp = F.linear(hidden.pop()[:, :-1].double(), model.lm_head.weight.double()).log_softmax(-1)
        truth = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        errors.append(float((out.log_probs - truth)[out.label_mask].abs().max()))
    assert errors[0] < 5e-6 and errors[1] > 100 * errors[0], errors


def test_no_logits_and_no_float32_copy_of_the_head():
    model = patch(fused(tiny(dtype=torch.bfloat16, vocab_size=4096)), memory_budget=16 * 4096 * 4)
    ids = torch.randint(4096, (4, 60))
    with Largest() as largest:
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    weight = model.lm_head.weight
    assert largest.numel == weight.numel() and weight.grad.dtype == torch.bfloat16
    assert largest.numel < ids.numel() * 4096


def test_logits_that_are_read_are_float32():
    """A hook that reads them makes them, in the precision that was asked for."""
    model, (ids, labels) = patch(fused(tiny(dtype=torch.bfloat16), temperature=1.0)), batch()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append((args[0], out + 0.0)))
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    handle.remove()
    hidden, logits = seen[0]
    torch.testing.assert_close(logits, F.linear(hidden.float(), model.lm_head.weight.float()))
    expected = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs[out.label_mask], expected[out.label_mask])


def test_a_head_that_cannot_be_lazy_multiplies_in_float32_too(monkeypatch):
    """Its weight is taken away after its call, so that the logits are made in it."""
    _, expected = answer(fused(tiny(dtype=torch.bfloat16)))
    monkeypatch.setattr("hf_xent.patching.hooks.why_not_gathered", lambda *_: "offloaded")
    theirs = answer(fused(tiny(dtype=torch.bfloat16)))[0]
    model = patch(fused(tiny(dtype=torch.bfloat16)))
    ours, found = answer(model)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=2e-5, atol=2e-5)
    for parameter, grad in expected.items():
        assert_close_at_scale(found[parameter].float(), grad.float(), 2e-2, parameter)
    assert counts(model) == (0, 0, 1)


def test_logits_that_something_else_rounded_are_an_error():
    model, (ids, labels) = patch(fused(tiny(dtype=torch.bfloat16))), batch()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.dense().bfloat16())
    with pytest.raises(RuntimeError, match=r"cast_lm_head_to_fp32 is True, but .* its logits in torch\.bfloat16"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_head_streams(dora):
    """TRL's fused head multiplies by `lm_head.weight`, and leaves the adapter out."""
    config = peft.LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False, use_dora=dora)
    model, (ids, labels) = peft.get_peft_model(tiny(dtype=torch.bfloat16), config), batch()
    logits = model(input_ids=ids).logits[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    fused(model.get_base_model(), temperature=1.0)
    patch(model)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs[out.label_mask], expected[out.label_mask], rtol=2e-2, atol=5e-2)
    assert counts(model) == (1, 0, 0)


def longer(completions, **_):
    return [float(len(completion)) for completion in completions]


def train(folder, model, **options):
    """Three steps of GRPO with an entropy bonus and a reference, the head in float32, the model in 16 bits."""
    arguments = trl.GRPOConfig(
        str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, save_strategy="no", seed=0, bf16=False, num_generations=2,
        max_completion_length=6, temperature=0.9, beta=0.1, cast_lm_head_to_fp32=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["the cat", "a dog", "one bird", "the fish"] * 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model, longer, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer(), **options
        )
        trainer.train()
    return [
        {k: v for k, v in entry.items() if not any(t in k for t in ("time", "per_second", "flos"))}
        for entry in trainer.state.log_history
    ]


@pytest.fixture(scope="module", params=["llama", "llama tied"])
def saved(request, tmp_path_factory):
    """TRL loads the reference model from where the policy came from."""
    folder = tmp_path_factory.mktemp("model")
    tiny(request.param, std=0.05, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_grpo_trains_as_it_does_without_the_patch(saved, tmp_path):
    """Patched before the trainer puts its forward on the head, or by a callback after it did."""
    load = lambda: AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)  # noqa: E731
    stock = train(tmp_path, stock_model := load())
    model = patch(load())
    ours = train(tmp_path, model)
    state = patch_state(model)
    assert state.streamed >= 3 and state.materialized == 0, state
    by_callback = train(tmp_path, called := load(), callbacks=[hf_xent.PatchCallback()])
    assert "_hf_xent" not in called.__dict__
    for entries in (ours, by_callback):
        assert len(entries) == len(stock) and any("loss" in entry for entry in stock)
        for found, expected in zip(entries, stock, strict=True):
            assert found == pytest.approx(expected, rel=1e-2, abs=2e-3)
    for (name, found), expected in zip(model.named_parameters(), stock_model.parameters(), strict=True):
        assert_close_at_scale(found.detach().float(), expected.detach().float(), 2e-2, name)
    # what TRL put on the head is there, and makes its logits when no loss is asked for
    ids = torch.randint(V, (2, 5))
    assert model(input_ids=ids).logits.dtype == torch.float32 and state.materialized == 0
    loss = model(input_ids=ids, labels=ids).loss
    unpatch(model)
    assert is_float32_forward(model.lm_head.forward) and FusedHead.installed(model) is not None
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_copies_run_their_own_head():
    """TRL's forward of the head is bound to the original's weight."""
    model, (ids, labels) = patch(fused(tiny(dtype=torch.bfloat16))), batch()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    out = clone(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs[out.label_mask], -torch.tensor(V).log().expand(int(out.label_mask.sum())))
