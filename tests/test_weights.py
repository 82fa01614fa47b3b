"""Weights of labels, in calls of a patched model: equal to the loss of dense logits, weighted by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, T5Config

import hf_xent
from hf_xent.losses import CrossEntropy, Focal
from hf_xent.patching import patch_state
from support.models import V, assert_same_gradients, batch, gradients, tiny

LOSSES = [None, "focal:gamma=2", "emo", CrossEntropy(label_smoothing=0.1, z_loss=1e-3)]


def weights_like(labels):
    """Weights between 0 and 2, some of them 0."""
    weights = 2 * torch.rand(labels.shape, generator=torch.Generator().manual_seed(7))
    weights[0, 6] = weights[1, 3] = 0
    return weights


def dense_loss(model, ids, labels, weights, loss=None, head=None):
    """The weighted mean of the paper's formula over dense logits, shifted by hand."""
    logits = model(input_ids=ids).logits[:, :-1].double().reshape(-1, V)
    targets, weights = labels[:, 1:].reshape(-1), weights[:, 1:].reshape(-1).double()
    valid = (targets != -100) & (weights > 0)
    objective = hf_xent.losses.get(loss)
    losses = objective.bind(head).reference(logits[valid], targets[valid], weight=head.double())
    return (losses * weights[valid]).sum() / weights[valid].sum()


@pytest.mark.parametrize("name", ["llama tied", "gemma2 softcap", "granite scale"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_patched_model_weighs_its_labels(name, loss):
    ids, labels = batch()
    weights, stock = weights_like(labels), tiny(name)
    expected = dense_loss(stock, ids, labels, weights, loss, stock.get_output_embeddings().weight.detach().clone())
    expected.backward()
    model = hf_xent.patch(tiny(name), loss, observe=("entropy",))
    found = model(input_ids=ids, labels=labels, token_weights=weights).loss
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model), gradients(stock))
    state = patch_state(model)
    counted = (labels[:, 1:] != -100) & (weights[:, 1:] > 0)
    assert state.materialized == 0 and state.take(training=False)["tokens"] == counted.sum()
    plain = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(plain, hf_xent.patch(tiny(name), loss)(input_ids=ids, labels=labels).loss)


def test_weights_of_zero_and_one_are_a_mask():
    ids, labels = batch()
    keep = weights_like(labels) > 0.7
    model = hf_xent.patch(tiny())
    weighted = model(input_ids=ids, labels=labels, token_weights=keep.float()).loss
    masked = model(input_ids=ids, labels=labels.masked_fill(~keep, -100)).loss
    assert torch.equal(weighted, masked)
    torch.testing.assert_close(model(input_ids=ids, labels=labels, token_weights=3 * keep).loss, masked)


def test_the_number_of_items_divides_the_weighted_sum():
    ids, labels = batch()
    weights, model = weights_like(labels), hf_xent.patch(tiny(), "focal")
    mean = model(input_ids=ids, labels=labels, token_weights=weights).loss
    total = (weights * (labels != -100))[:, 1:].sum()
    summed = model(input_ids=ids, labels=labels, token_weights=weights, num_items_in_batch=7).loss
    torch.testing.assert_close(summed * 7, mean * total)


def test_weights_go_with_labels_that_are_shifted_already():
    ids, labels = batch()
    weights, model = weights_like(labels), hf_xent.patch(tiny())
    expected = model(input_ids=ids, labels=labels, token_weights=weights).loss
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    found = model(input_ids=ids, labels=labels, shift_labels=shifted, token_weights=weights).loss
    torch.testing.assert_close(found, expected)
    last, own = F.pad(weights, (0, 1))[:, 1:], shifted.clone()
    own[:, 5] = -100  # not the labels, shifted: a collator has masked more of them
    masked = model(input_ids=ids, labels=labels, shift_labels=own, token_weights=weights).loss
    rows = model(input_ids=ids).logits.log_softmax(-1).gather(-1, own.clamp(min=0)[..., None]).squeeze(-1)
    mass = last * (own != -100)
    torch.testing.assert_close(masked, -(rows * mass).sum() / mass.sum())


def test_weights_of_an_encoder_decoder_are_not_shifted():
    torch.manual_seed(0)
    config = T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    ids, labels = batch()
    weights = weights_like(labels)
    logits = model(input_ids=ids, labels=labels).logits.reshape(-1, V)
    losses = F.cross_entropy(logits, labels.reshape(-1), reduction="none")
    mass = (weights * (labels != -100)).reshape(-1)
    found = hf_xent.patch(model)(input_ids=ids, labels=labels, token_weights=weights).loss
    torch.testing.assert_close(found, (losses * mass).sum() / mass.sum())


def test_weights_pass_through_an_adapter_and_a_direct_forward():
    ids, labels = batch()
    weights = weights_like(labels)
    model = get_peft_model(hf_xent.patch(tiny()), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = dense_loss(model, ids, labels, weights, None, model.get_output_embeddings().weight.detach())
    for call in (model, model.forward, model.get_base_model().forward):
        found = call(input_ids=ids, labels=labels, token_weights=weights).loss
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_no_worse_than_torch():
    ids, labels = batch()
    weights = weights_like(labels)
    head = tiny().get_output_embeddings().weight.detach()
    truth = dense_loss(tiny(), ids, labels, weights, None, head)
    same = dense_loss(tiny(dtype=torch.bfloat16), ids, labels, weights, None, head)
    model = hf_xent.patch(tiny(dtype=torch.bfloat16))
    found = model(input_ids=ids, labels=labels, token_weights=weights).loss
    assert abs(found - truth) <= 2 * abs(same - truth) + 1e-2 * abs(truth)  # the loss itself is rounded to bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:, 1:], r"token_weights has shape \(3, 10\) but labels have shape \(3, 11\): pass one"),
        (lambda w: -w, r"token_weights has -\d.*: pass finite weights >= 0"),
        (lambda w: w / 0, "token_weights has (nan|inf): pass finite weights >= 0"),
        (lambda w: w.tolist(), "token_weights has type list but labels have shape"),
    ],
)
def test_weights_that_are_none_are_refused(change, message):
    ids, labels = batch()
    model = hf_xent.patch(tiny())
    with pytest.raises(ValueError, match=f"^{message}"):
        model(input_ids=ids, labels=labels, token_weights=change(weights_like(labels)))
    assert model(input_ids=ids, labels=labels).loss > 0, "the next call is as before"


def test_weights_without_an_effect_are_refused():
    ids, labels = batch()
    weights, model = weights_like(labels), hf_xent.patch(tiny())
    with pytest.raises(ValueError, match=r"^token_weights is given without labels"):
        model(input_ids=ids, token_weights=weights)
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    with pytest.raises(RuntimeError, match=r"^token_weights had no effect: the model computes its own loss"):
        model(input_ids=ids, labels=labels, token_weights=weights)
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(logits[:, 3], labels[:, 4])
    with pytest.raises(ValueError, match=r"^token_weights has shape .* of 3 other labels"):
        model(input_ids=ids, labels=labels, token_weights=weights)


def test_weights_are_refused_where_the_model_is_traced(monkeypatch):
    ids, labels = batch()
    model = hf_xent.patch(tiny())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"^token_weights is given, but torch.compile traces the model"):
        model(input_ids=ids, labels=labels, token_weights=weights_like(labels))


def test_an_inner_call_has_no_weights_of_the_outer_one():
    ids, labels = batch()
    weights, model = weights_like(labels), hf_xent.patch(tiny(), Focal(gamma=0.0))
    expected = model(input_ids=ids, labels=labels, token_weights=weights).loss
    inner = hf_xent.patch(tiny())

    def call_another(module, args, output):
        call_another.loss = inner(input_ids=ids, labels=labels).loss

    handle = model.model.register_forward_hook(call_another)
    torch.testing.assert_close(model(input_ids=ids, labels=labels, token_weights=weights).loss, expected)
    handle.remove()
    torch.testing.assert_close(call_another.loss, inner(input_ids=ids, labels=labels).loss)
