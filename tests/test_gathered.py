"""Heads whose weight is there during their call only: streamed, and equal to one process that has all weights.

Two gloo processes, launched once, run all of ZeRO, FSDP and DDP (support/sharded.py); offloading needs one process.
"""

from importlib.util import find_spec

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch.nn import functional as F

import hf_xent
from hf_xent import detection
from hf_xent.lazy import LazyLogits
from hf_xent.patching import compare, patch, patch_state, unpatch
from support import sharded
from support.models import assert_same_gradients, batch, gradients, tiny, tiny_tokenizer
from support.oracle import Largest
from support.ranks import run_ranks
from support.sharded import ddp, fsdp1, fsdp2, one_process, zero

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, which advises on merging and saving
ROOT = {"apart": ()}
SILENT = {"silent": True}
CASES = {  # function, loss, where it is computed, options
    "ZeRO-3": (zero, "cross_entropy", "model", {}),
    "ZeRO-3, EMO": (zero, "emo", "model", {}),
    "ZeRO-3, tied, softcap": (zero, "focal", "model", {"name": "gemma2 softcap"}),
    "ZeRO-3, cross-entropy of logits": (zero, "cross_entropy", "function", {}),
    "ZeRO-3, statistics": (zero, "focal", "statistics", {}),
    "ZeRO-3, statistics, torch's backward": (zero, "focal", "statistics", {"direct": True}),
    "ZeRO-3, a copy of the head": (zero, "emo", "copy", {}),
    "ZeRO-3, a rank without labels": (zero, "cross_entropy", "model", SILENT),
    "ZeRO-3, a rank without labels, statistics": (zero, "focal", "statistics", SILENT),
    "ZeRO-3, dense logits": (zero, "cross_entropy", "dense", {}),
    "ZeRO-2": (zero, "cross_entropy", "model", {"stage": 2}),
    "ZeRO-2, statistics": (zero, "focal", "statistics", {"stage": 2}),
    "FSDP1": (fsdp1, "cross_entropy", "model", ROOT),
    "FSDP1, flat": (fsdp1, "emo", "model", {**ROOT, "original": False}),
    "FSDP1, statistics": (fsdp1, "focal", "statistics", ROOT),
    "FSDP1, flat, a copy of the head": (fsdp1, "emo", "copy", {**ROOT, "original": False}),
    "FSDP1, a rank without labels": (fsdp1, "cross_entropy", "model", {**ROOT, **SILENT}),
    "FSDP1, head apart": (fsdp1, "cross_entropy", "model", {}),
    "FSDP1, head apart, patched after": (fsdp1, "focal", "model", {"patched_first": False}),
    "FSDP1, head apart, dense logits": (fsdp1, "cross_entropy", "dense", {}),
    "FSDP1, head apart, flat": (fsdp1, "emo", "model", {"original": False}),
    "FSDP1, head apart, statistics": (fsdp1, "focal", "statistics", {}),
    "FSDP1, head apart, flat, a copy of it": (fsdp1, "emo", "copy", {"original": False}),
    "FSDP1, head apart, a rank without labels": (fsdp1, "cross_entropy", "model", SILENT),
    "FSDP1, head apart, a rank without labels, statistics": (fsdp1, "focal", "statistics", SILENT),
    "FSDP2, a rank without labels": (fsdp2, "emo", "model", SILENT),
    "FSDP2, a rank without labels, statistics": (fsdp2, "focal", "statistics", SILENT),
    "DDP, a rank without labels": (ddp, "emo", "model", SILENT),
    "DDP, a rank without labels, statistics": (ddp, "focal", "statistics", SILENT),
}
LORA = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": False}


def plain(model):
    return model


def lora(model, **options):
    torch.manual_seed(5)
    targets = ["q_proj"] if options else ["q_proj", "lm_head"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options, **LORA))


def saved(model):
    return lora(model, modules_to_save=["lm_head"])


TRAINED = {"plain": plain, "LoRA on the head": lora, "modules_to_save": saved}
KINDS = ["ZeRO-3", "FSDP1", "FSDP1, head apart"]


def skip_without_deepspeed(name):
    if name.startswith("ZeRO"):
        pytest.importorskip("deepspeed", reason="pip install deepspeed")


def everything(rank, folder):
    """All that the tests below look at; the trainer comes last, since it changes how models are made from then on."""
    deepspeed = find_spec("deepspeed") is not None
    here = lambda name: deepspeed or not name.startswith("ZeRO")  # noqa: E731
    found = {name: case(rank, loss, where, **more) for name, (case, loss, where, more) in CASES.items() if here(name)}
    for kind in filter(here, KINDS):
        found |= {(kind, name): sharded.training(rank, kind, change) for name, change in TRAINED.items()}
        found[kind, "16 bits"] = sharded.sixteen_bits(rank, kind)
        found[kind, "largest"] = sharded.largest(rank, kind)
    found["unit with more"] = sharded.unit_with_more(rank)
    if deepspeed:
        found["trainer"] = sharded.trainer(rank, folder)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    return run_ranks(2, everything, folder, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name, ranks):
    skip_without_deepspeed(name)
    _, loss, where, more = CASES[name]
    value, grads = one_process(more.get("name", "llama"), loss, more.get("silent", False))
    for rank in ranks:
        ours, our_grads, counts, reason = rank[name]
        torch.testing.assert_close(ours, value)
        assert_same_gradients(our_grads, grads)
        assert counts == (int(where in ("model", "function")), int(where == "dense"), 0) and not reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINED)
def test_steps_evaluations_and_logits_equal_stock(kind, name, ranks):
    skip_without_deepspeed(kind)
    for i, rank in enumerate(ranks):
        found, counts = rank[kind, name]
        for ours, stock in zip(found, sharded.stock_training(i, TRAINED[name]), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
        assert counts == (9, 1, 0)  # four losses, five calls of argmax; the logits that were asked for


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_no_worse_than_stock(kind, ranks):
    skip_without_deepspeed(kind)
    for rank in ranks:
        stock, ours, truth, counts = rank[kind, "16 bits"]
        for found, same, exact in zip(ours, stock, truth, strict=True):
            assert abs(found - exact) <= 2 * abs(same - exact) + 1e-3
        assert counts == (2, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_as_large_as_the_logits(kind, ranks):
    skip_without_deepspeed(kind)
    for rank in ranks:
        largest, parameters = rank[kind, "largest"]
        assert largest <= parameters < 8 * 32 * 3000 / 3, "nothing above DeepSpeed's bucket of all gradients"


def test_a_head_that_is_freed_with_other_modules_is_bypassed(ranks):
    for rank in ranks:
        stock, ours, counts, reason = rank["unit with more"]
        torch.testing.assert_close(ours, stock)
        assert counts == (0, 1) and "FSDP frees the head together with other modules" in reason


def test_trainers_under_zero3_equal_stock(ranks):
    skip_without_deepspeed("ZeRO-3")
    for rank in ranks:
        stock, ours, emo = (rank["trainer"][loss] for loss in ("stock", "cross_entropy", "emo"))
        for mine, theirs in zip(ours[0], stock[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert ours[1] == pytest.approx(stock[1], rel=1e-5)
        assert emo[0][0][0] == pytest.approx(stock[0][0][0], rel=1e-5), "EMO starts from the value of cross-entropy"
        assert emo[0][2][0] < emo[0][0][0]
        assert ours[2] == emo[2] == (8, 0, 0)  # two batches in three steps, two of the evaluation


def to_disk(model, folder):
    places = {"model": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, offload_dir=folder, main_device="cpu")


def to_cpu(model, folder):
    cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
    return model


def step(model, **inputs):
    out = model(**inputs)
    out.loss.backward()
    return out, gradients(model)


@pytest.mark.parametrize("loss", [None, "emo", "focal"])
@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_offloaded_head_streams(offload, patched_first, loss, tmp_path):
    ids, labels = batch()
    model = tiny()
    if loss is None:
        expected, grads = step(model, input_ids=ids, labels=labels)
    else:  # by the head that is here
        expected, grads = step(patch(model, loss), input_ids=ids, labels=labels)
    logits = unpatch(model)(input_ids=ids).logits.detach()
    del grads["lm_head.weight"]  # accelerate's copies of it, and their gradients, are gone after the call
    model = offload(patch(tiny(), loss) if patched_first else tiny(), tmp_path)
    if not patched_first:
        patch(model, loss)
    out, found = step(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert model.lm_head.weight.is_meta and type(out.logits) is LazyLogits
    assert torch.equal(out.logits.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(out.logits + 0, logits)
    state = patch_state(model)
    assert (state.streamed, state.materialized, state.bypassed) == (2, 1, 0)
    unpatch(model)
    assert "_compiled_call_impl" not in model.lm_head.__dict__
    assert type(model(input_ids=ids, labels=labels).logits) is torch.Tensor


def test_an_offloaded_head_makes_nothing_as_large_as_the_logits(tmp_path):
    model = to_disk(tiny(vocab_size=3000), tmp_path)
    patch(model, memory_budget=4 * 8 * 3000)
    ids = torch.randint(3000, (8, 32))
    with Largest() as largest:
        model(input_ids=ids, labels=ids).loss.backward()
    assert largest.numel <= 3000 * 32, "the weight itself"


def test_an_adapter_on_an_offloaded_head():
    """Its matrices are there, and the weight only in the head's call."""
    model, (ids, labels) = lora(tiny()), batch()
    expected, grads = step(model, input_ids=ids, labels=labels)
    cpu_offload(model.base_model.model.lm_head.base_layer, execution_device=torch.device("cpu"))
    patch(model)
    out, found = step(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


ADAPTERS = {
    "IA3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["lm_head"], r=4),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["lm_head"], r=4, init_weights=False),
    "LoRA with a bias": lambda: peft.LoraConfig(target_modules=["lm_head"], lora_bias=True, **LORA),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_scale_or_add_products_of_an_offloaded_head(name):
    torch.manual_seed(3)
    model, (ids, labels) = peft.get_peft_model(tiny(), ADAPTERS[name]()), batch()
    expected, grads = step(model, input_ids=ids, labels=labels)
    cpu_offload(model.base_model.model.lm_head.base_layer, execution_device=torch.device("cpu"))
    patch(model).zero_grad()
    out, found = step(model, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert (patch_state(model).streamed, patch_state(model).materialized) == (1, 0)


@pytest.mark.parametrize("loss", [None, "focal"])
def test_token_weights_with_an_offloaded_head(loss, tmp_path):
    ids, labels = batch()
    inputs = {"input_ids": ids, "labels": labels, "token_weights": torch.rand(labels.shape)}
    expected, grads = step(patch(tiny(), loss), **inputs)
    del grads["lm_head.weight"]
    model = patch(to_disk(tiny(), tmp_path), loss)
    out, found = step(model, **inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same_gradients(found, grads)
    assert (patch_state(model).streamed, patch_state(model).materialized, patch_state(model).bypassed) == (1, 0, 0)


def test_arithmetic_on_logits_of_an_offloaded_head(tmp_path):
    """Factors and biases per token, class weights, the sum of a product with itself."""
    ids, labels = batch()
    model, factor = patch(to_disk(tiny(), tmp_path), always=True), torch.rand(97) + 0.5
    z, lazy = tiny()(input_ids=ids).logits, model(input_ids=ids).logits
    change = lambda x: 0.5 * x * factor + factor - 0.25 * factor  # noqa: E731
    torch.testing.assert_close(change(lazy).logsumexp(-1), change(z).logsumexp(-1))
    weigh = lambda x: F.cross_entropy(x.flatten(0, 1), labels.flatten(), factor, label_smoothing=0.1)  # noqa: E731
    torch.testing.assert_close(weigh(lazy), weigh(z))
    torch.testing.assert_close((lazy * factor + lazy).logsumexp(-1), (z * factor + z).logsumexp(-1))
    assert (patch_state(model).streamed, patch_state(model).materialized) == (3, 0)


def test_verification_and_comparison_of_an_offloaded_head(tmp_path):
    found = compare(patch(to_disk(tiny(), tmp_path), verify=True))
    assert found.equal and found.lean and (found.vocabulary, found.hidden) == (97, 32)


def test_results_after_unpatching_and_in_autocast(tmp_path):
    model, (ids, labels) = patch(to_disk(tiny(), tmp_path)), batch()
    expected = tiny()(input_ids=ids).logits
    logits = model(input_ids=ids, labels=labels).logits
    unpatch(model)
    torch.testing.assert_close(logits.dense(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        stock = tiny()(input_ids=ids, labels=labels)
        ours = patch(model)(input_ids=ids, labels=labels)
    assert ours.logits.dtype == stock.logits.dtype
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-2, atol=1e-2)


def test_logits_that_a_custom_function_gets_are_refused(tmp_path):
    """Its gradient of the logits cannot reach a weight that is not there."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    model, (ids, labels) = patch(to_disk(tiny(), tmp_path)), batch()
    total = Twice.apply(model(input_ids=ids, labels=labels).logits).sum()
    with pytest.raises(RuntimeError, match=r"custom autograd function, but the head's weight .* out.logits.dense"):
        total.backward()
    Twice.apply(model(input_ids=ids, labels=labels).logits.dense()).sum().backward()
    assert model.model.norm.weight.grad is not None


def test_a_head_with_a_hook_of_the_users_is_bypassed(tmp_path):
    model, (ids, labels) = to_disk(tiny(), tmp_path), batch()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output / 2)
    expected = model(input_ids=ids, labels=labels).loss
    patch(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)
    state = patch_state(model)
    assert (state.streamed, state.bypassed) == (0, 1) and "it has a hook" in state.reason


def test_a_head_that_was_compiled_is_compiled_again_afterwards(tmp_path):
    model = to_disk(tiny(), tmp_path)
    model.lm_head.compile(backend="eager")
    compiled = model.lm_head._compiled_call_impl
    ids, labels = batch()
    patch(model)(input_ids=ids, labels=labels)
    assert patch_state(model).streamed == 1
    assert unpatch(model).lm_head._compiled_call_impl is compiled


def test_generation_with_an_offloaded_head_is_the_stock_one(tmp_path):
    ids, _ = batch(rows=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tiny().generate(input_ids=ids, **options)
    model = hf_xent.patch(to_disk(tiny(), tmp_path))
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert patch_state(model).streamed == 0


@pytest.mark.parametrize("score", ["min_k_pp", "binoculars", "fast_detect_pair"])
def test_scores_of_models_with_offloaded_heads(score, tmp_path):
    tokenizer, texts = tiny_tokenizer(), ["the quick brown fox", "over the lazy dog jumps the fox"]
    second = lambda model: {} if score == "min_k_pp" else {"reference": model}  # noqa: E731
    expected = detection.score(score, tiny(), tokenizer, texts, **second(tiny("qwen3")))
    model, other = (to_disk(tiny(name), tmp_path / name) for name in ("llama", "qwen3"))
    found = detection.score(score, model, tokenizer, texts, **second(other))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(find_spec("trl.kernels") is None, reason="TRL's fused head is new in TRL 1.16")
def test_trls_fused_head_with_an_offloaded_head(tmp_path):
    """What TRL's trainers take their losses from: log-probabilities and statistics of every token."""
    ids, labels = batch()
    logp = tiny()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    model = patch(to_disk(tiny(), tmp_path))
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    valid = labels[:, 1:] != -100
    expected = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    torch.testing.assert_close(out.log_probs[valid], expected[valid])
    torch.testing.assert_close(out.entropy[valid], -(logp.exp() * logp).sum(-1)[valid])
    assert (patch_state(model).streamed, patch_state(model).materialized, patch_state(model).bypassed) == (1, 0, 0)


@pytest.mark.skipif(find_spec("trl.kernels") is None, reason="TRL's fused head is new in TRL 1.16")
def test_trls_float32_head_that_is_offloaded(tmp_path):
    """Products of 16-bit hidden states and weights in float32, in the head's call."""
    from trl.trainer.utils import add_fused_lm_head

    ids, labels = batch()
    log_probs = []
    for offload in (False, True):
        model = patch(tiny(dtype=torch.bfloat16))
        if offload:
            to_disk(model, tmp_path)
        add_fused_lm_head(model, cast_lm_head_to_fp32=True)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        log_probs.append(out.log_probs[out.label_mask])
        assert (patch_state(model).streamed, patch_state(model).materialized, patch_state(model).bypassed) == (1, 0, 0)
    assert log_probs[0].dtype == torch.float32
    torch.testing.assert_close(log_probs[1], log_probs[0])
