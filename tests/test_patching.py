"""patch(): a model's own forward over lazy logits gives stock loss and stock gradients; unpatch leaves no trace."""

import copy
import io

import pytest
import torch
from models import CONFIGS, SETTINGS, V, assert_same_gradients, batch, checkpointing, gradients, tiny
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

import hf_xent
from hf_xent.lazy import LazyLogits, next_token_labels
from hf_xent.losses import CrossEntropy, Focal
from hf_xent.patching import compare, patch, seam_of, unpatch


def run(model, **inputs):
    """Loss and gradients of one call."""
    out = model(**inputs)
    out.loss.backward()
    return out, gradients(model)


def both_ways(model, **inputs):
    stock, stock_grads = run(model, **inputs)
    patch(model)
    ours, our_grads = run(model, **inputs)
    seam = seam_of(model)
    unpatch(model)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_same_gradients(our_grads, stock_grads)
    return ours, stock, seam


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_stock(name):
    ids, labels = batch()
    ours, stock, seam = both_ways(tiny(name), input_ids=ids, labels=labels)
    assert isinstance(ours.logits, LazyLogits) and (seam.streamed, seam.materialized) == (1, 0)
    torch.testing.assert_close(ours.logits.dense(), stock.logits, rtol=1e-4, atol=1e-5)
    if name in SETTINGS:
        field, value = SETTINGS[name]
        assert getattr(ours.logits.head, field) == pytest.approx(value)


@pytest.mark.parametrize("name", ["llama", "cohere scale", "mixtral aux loss"])
def test_arguments_of_the_loss(name):
    model, (ids, labels) = tiny(name), batch()
    for extra in (
        {"num_items_in_batch": torch.tensor(50)},
        {"num_items_in_batch": 50},
        {"shift_labels": next_token_labels(labels)},
        {"ignore_index": 7},
    ):
        both_ways(model, input_ids=ids, labels=labels.clamp(min=7) if "ignore_index" in extra else labels, **extra)


def test_logits_to_keep_and_tuples():
    model, (ids, labels) = tiny(), batch()
    both_ways(model, input_ids=ids, labels=labels[:, -4:], logits_to_keep=4)
    expected = model(input_ids=ids, labels=labels).loss
    patch(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels, return_dict=False)[0], expected)
    torch.testing.assert_close(model(ids, None, None, None, None, labels).loss, expected)
    assert seam_of(model).streamed == 2, "labels given by position wake the head too"


def test_moe_auxiliary_loss_is_added():
    model, (ids, labels) = tiny("mixtral aux loss"), batch()
    out = patch(model)(input_ids=ids, labels=labels)
    torch.testing.assert_close(
        out.loss,
        F.cross_entropy(out.logits.dense()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + 0.5 * out.aux_loss,
    )


def test_every_label_ignored_is_a_connected_zero():
    model, (ids, labels) = patch(tiny()), batch()
    out, grads = run(model, input_ids=ids, labels=torch.full_like(labels, -100))
    assert out.loss.item() == 0.0
    assert "lm_head.weight" in grads and all(g.abs().max() == 0 for g in grads.values())


def test_gradient_checkpointing_and_frozen_head():
    model, (ids, labels) = tiny(), batch()
    both_ways(checkpointing(model), input_ids=ids, labels=labels)
    model.lm_head.weight.requires_grad_(False)
    both_ways(model, input_ids=ids, labels=labels)


def test_autocast():
    model, (ids, labels) = tiny(), batch()
    exact, exact_grads = run(model, input_ids=ids, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(input_ids=ids, labels=labels)
        loss = patch(model)(input_ids=ids, labels=labels).loss
    assert seam_of(model).streamed == 1
    assert abs(loss - exact.loss) <= 2 * abs(stock.loss - exact.loss) + 1e-5
    stock.loss.backward()
    stock_grads = gradients(model)
    loss.backward()
    ours, name = gradients(model), "lm_head.weight"
    assert ours[name].dtype == torch.float32
    error, allowed = (ours[name] - exact_grads[name]).norm(), (stock_grads[name] - exact_grads[name]).norm()
    assert error <= 2 * allowed + 1e-5


def test_bfloat16_model_is_no_worse_than_stock():
    exact, (ids, labels) = tiny(), batch()
    truth, truth_grads = run(exact.to(torch.bfloat16).float(), input_ids=ids, labels=labels)
    model = exact.to(torch.bfloat16)
    stock, stock_grads = run(model, input_ids=ids, labels=labels)
    ours, our_grads = run(patch(model), input_ids=ids, labels=labels)
    assert abs(ours.loss - truth.loss) <= 2 * abs(stock.loss - truth.loss) + 1e-3
    for name, g in truth_grads.items():
        assert (our_grads[name].float() - g).norm() <= 2 * (stock_grads[name].float() - g).norm() + 1e-5


def test_generation_and_calls_without_labels_are_stock():
    model, (ids, _) = tiny(), batch()
    stock = model(input_ids=ids).logits
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    patch(model)
    assert type(model(input_ids=ids).logits) is torch.Tensor
    torch.testing.assert_close(model(input_ids=ids).logits, stock, rtol=0, atol=0)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), greedy)
    assert seam_of(model).streamed == 0


def test_always_streams_a_loss_computed_outside():
    model, (ids, labels) = tiny(), batch()
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    logits = patch(model, always=True)(input_ids=ids).logits
    torch.testing.assert_close(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), expected)
    assert seam_of(model).materialized == 0


def test_unpatch_leaves_no_trace():
    model, (ids, labels) = tiny(), batch()
    before = (dict(model.__dict__), dict(model.lm_head.__dict__), dict(model._modules), list(model.state_dict()))
    hooks = [len(model._forward_pre_hooks), len(model._forward_hooks)]
    patch(model, loss=Focal())
    assert list(model.state_dict()) == before[3]
    patch(model)
    unpatch(model)
    assert model.__dict__.keys() == before[0].keys() and model.lm_head.__dict__.keys() == before[1].keys()
    assert (
        model._modules.keys() == before[2].keys()
        and [len(model._forward_pre_hooks), len(model._forward_hooks)] == hooks
    )
    assert type(model(input_ids=ids, labels=labels).logits) is torch.Tensor


def test_own_loss_function_is_kept_and_restored():
    model, (ids, labels) = tiny(), batch()
    stock = model.loss_function

    def doubled(logits, labels, vocab_size, **kwargs):
        return 2 * stock(logits, labels, vocab_size, **kwargs)

    model.loss_function = doubled
    both_ways(model, input_ids=ids, labels=labels)
    patch(model, loss=Focal())
    unpatch(model)
    assert model.loss_function is doubled


def test_copies_use_their_own_weights():
    model, (ids, labels) = patch(tiny()), batch()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    out = clone(input_ids=ids, labels=labels)
    assert isinstance(out.logits, LazyLogits) and out.logits.dense().abs().max() == 0
    assert model(input_ids=ids, labels=labels).logits.dense().abs().max() > 0


def test_pickled_and_saved(tmp_path):
    model, (ids, labels) = patch(tiny()), batch()
    loss = model(input_ids=ids, labels=labels).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(input_ids=ids, labels=labels).loss, loss)
    assert seam_of(loaded).streamed == 2
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(stock(input_ids=ids, labels=labels).loss, loss)


def test_other_losses_go_through_the_models_own_setter():
    model, (ids, labels) = tiny("gemma2 softcap"), batch()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
    targets = labels[:, 1:].flatten()
    keep = targets != -100
    for loss in (Focal(gamma=1.5), CrossEntropy(z_loss=1e-2, label_smoothing=0.1)):
        expected = loss.reference(logits[keep], targets[keep])
        patch(model, loss=loss)
        torch.testing.assert_close(
            model(input_ids=ids, labels=labels).loss.double(), expected.mean(), rtol=1e-5, atol=1e-6
        )
        out = model(input_ids=ids, labels=labels, num_items_in_batch=40)
        torch.testing.assert_close(out.loss.double(), expected.sum() / 40, rtol=1e-5, atol=1e-6)
    assert seam_of(model).materialized == 0
    patch(model, loss="cross_entropy")
    torch.testing.assert_close(
        model(input_ids=ids, labels=labels).loss.double(), F.cross_entropy(logits, targets), rtol=1e-5, atol=1e-6
    )


def test_frozen_cost_is_the_pretrained_head():
    """Also with tied embeddings, where a cost that is no copy would move with training."""
    model, (ids, labels) = tiny("llama tied"), batch()
    pretrained = model.lm_head.weight.detach().clone()
    patch(model, loss="emo:variant=emo")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(pretrained))
    out = model(input_ids=ids, labels=labels)
    logits, targets = out.logits.dense()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    units, keep = F.normalize(pretrained, dim=-1), targets != -100
    cosines = units[targets[keep]] @ units.T
    expected = (logits[keep].softmax(-1) * (1 - cosines)).sum(-1).mean()
    torch.testing.assert_close(out.loss, expected)


def test_a_bypassed_loss_is_an_error():
    class OwnLoss(type(tiny())):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            return F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits

    torch.manual_seed(0)
    model, (ids, labels) = OwnLoss(CONFIGS["llama"]()), batch()
    patch(model)
    assert model(ids, labels=labels)[0] > 0 and seam_of(model).streamed == 1, (
        "cross-entropy streams wherever it is written"
    )
    patch(model, loss=Focal())
    with pytest.raises(RuntimeError, match="computed its own loss"):
        model(ids, labels=labels)


def test_compiled_models_run_dense():
    model, (ids, labels) = tiny(), batch()
    expected = model(input_ids=ids, labels=labels).loss
    patch(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids, labels=labels).loss, expected)


class Doctored(nn.Linear):
    """A head that does more than multiply."""

    def forward(self, input):
        return super().forward(input).sort(-1).values


def test_refusals_name_the_model_and_the_remedy():
    with pytest.raises(ValueError, match=r"LlamaModel.*no output embeddings.*language-modeling head"):
        patch(
            LlamaModel(
                LlamaConfig(
                    vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
                )
            )
        )
    with pytest.raises(ValueError, match=r"Linear.*no output embeddings"):
        patch(nn.Linear(3, 4))
    model = tiny()
    model.lm_head = Doctored(32, V, bias=False)
    with pytest.raises(ValueError, match="head is a Doctored"):
        patch(model)
    model = tiny()
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="already has another forward"):
        patch(model)
    with pytest.raises(ValueError, match=r"loss is 'nonesuch': choose one of cross_entropy"):
        patch(tiny(), loss="nonesuch")
    with pytest.raises(ValueError, match="compares with a teacher"):
        patch(tiny(), loss="forward_kl")
    with pytest.raises(ValueError, match=r"not patched: call hf_xent.patch"):
        seam_of(tiny())


def test_a_refused_patch_leaves_the_earlier_one():
    model = patch(tiny(), loss=Focal())
    with pytest.raises(ValueError, match="nonesuch"):
        patch(model, loss="nonesuch")
    assert isinstance(model.loss_function.loss, Focal) and seam_of(model).streamed == 0


def test_nan_weights_give_a_nan_loss():
    model, (ids, labels) = patch(tiny()), batch()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert model(input_ids=ids, labels=labels).loss.isnan()


def test_compare_reports_and_leaves_the_model_alone():
    model, (ids, labels) = tiny("granite scale"), batch()
    model.train()
    report = compare(model)
    assert report.equal and report.materialized == 0 and report.streamed == 1
    assert (report.vocabulary, report.hidden, report.bias, report.head) == (V, 32, False, "lm_head")
    assert report.scale == pytest.approx(1 / 3) and report.as_dict()["equal"] is True
    assert model.training and "_hf_xent" not in model.__dict__ and not gradients(model)
    patch(model, loss=Focal())
    loss = model(input_ids=ids, labels=labels).loss
    assert compare(model).equal
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, loss)


def test_verify_refuses_a_model_that_differs(monkeypatch):
    """Doctored at the seam itself: the streamed loss is off by one per mille."""
    real = CrossEntropy.of
    monkeypatch.setattr(CrossEntropy, "of", lambda self, stats: real(self, stats) * 1.001)
    model = tiny()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not compute the same loss"):
        patch(model, verify=True)
    assert "_hf_xent" not in model.__dict__
    monkeypatch.undo()
    assert hf_xent.patch(model, verify=True) is model


def test_tail_reaches_the_gradient_and_leaves_loss_and_proof_alone():
    ids, labels = batch()
    model = tiny("llama")
    exact = model(input_ids=ids, labels=labels).loss
    stock = torch.autograd.grad(exact, list(model.parameters()))
    hf_xent.patch(model, tail=0.3, verify=True)
    loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, exact)
    found = torch.autograd.grad(loss, list(model.parameters()))
    size = torch.cat([x.flatten() for x in stock]).norm()
    off = torch.cat([(x - y).flatten() for x, y in zip(found, stock, strict=True)]).norm()
    assert 1e-4 * size < off < 0.3 * size
    assert hf_xent.compare(model).equal and seam_of(model).tail == 0.3
    assert model(input_ids=ids, labels=labels).loss == loss


@pytest.mark.parametrize(
    ("name", "loss", "match"),
    [
        ("llama", "emo", "EMO differentiates 'payload'"),
        ("llama", "eisl", "more than a sum"),
        ("llama", None, "tail is 2"),
    ],
)
def test_a_tail_that_cannot_be_is_refused_before_anything_changes(name, loss, match):
    model = tiny(name)
    with pytest.raises(ValueError, match=match):
        hf_xent.patch(model, loss, tail=2 if loss is None else 1e-3)
    assert "forward" not in model.lm_head.__dict__


def test_a_softcap_refuses_the_tail_when_the_loss_is_taken():
    ids, labels = batch()
    model = hf_xent.patch(tiny("gemma2 softcap"), tail=1e-3)
    with pytest.raises(ValueError, match=r"the head has softcap 1\.5: pass tail=0"):
        model(input_ids=ids, labels=labels)
