"""patch(): a model's own forward over lazy logits gives stock loss and stock gradients; unpatch leaves no trace."""

import copy
import gc
import inspect
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MethodType

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

import hf_xent
from hf_xent.lazy import LazyLogits, PatchState, next_token_labels
from hf_xent.lazy.tensor import ANSWERS, Recipe
from hf_xent.losses import CrossEntropy, Focal
from hf_xent.patching import compare, lazily, patch, patch_state, patched, unpatch
from support.models import CONFIGS, SETTINGS, V, assert_same_gradients, batch, checkpointing, gradients, tiny


def run(model, **inputs):
    """Loss and gradients of one call."""
    out = model(**inputs)
    out.loss.backward()
    return out, gradients(model)


def both_ways(model, **inputs):
    stock, stock_grads = run(model, **inputs)
    patch(model)
    ours, our_grads = run(model, **inputs)
    state = patch_state(model)
    unpatch(model)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_same_gradients(our_grads, stock_grads)
    return ours, stock, state


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_stock(name):
    ids, labels = batch()
    ours, stock, state = both_ways(tiny(name), input_ids=ids, labels=labels)
    assert isinstance(ours.logits, LazyLogits) and (state.streamed, state.materialized) == (1, 0)
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
    assert patch_state(model).streamed == 2, "labels given by position make the head lazy too"


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
    assert patch_state(model).streamed == 1
    assert abs(loss - exact.loss) <= 2 * abs(stock.loss - exact.loss) + 1e-5
    stock.loss.backward()
    stock_grads = gradients(model)
    loss.backward()
    ours, name = gradients(model), "lm_head.weight"
    assert ours[name].dtype == torch.float32
    error, allowed = (ours[name] - exact_grads[name]).norm(), (stock_grads[name] - exact_grads[name]).norm()
    assert error <= 2 * allowed + 1e-5


def test_patched_again_after_accelerate_has_wrapped_the_forward_of_an_earlier_patch():
    """As after a training under autocast: the wrapper stays, and holds a forward that asks for the patch there is."""
    model, (ids, labels) = patch(tiny()), batch()
    cast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(cast), model)
    expected = unpatch(model)(input_ids=ids, labels=labels).loss.item()
    patch(model)
    for call in (model, model.forward):  # the second goes past the hooks
        assert call(input_ids=ids, labels=labels).loss.item() == pytest.approx(expected, rel=1e-2)
    assert patch_state(model).streamed == 2


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
    assert patch_state(model).streamed == 0


def test_always_streams_a_loss_computed_outside():
    model, (ids, labels) = tiny(), batch()
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    logits = patch(model, always=True)(input_ids=ids).logits
    torch.testing.assert_close(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), expected)
    assert patch_state(model).materialized == 0


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
    assert patch_state(loaded).streamed == 2
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
    assert patch_state(model).materialized == 0
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
    class OwnFormula(type(tiny())):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            return (logits.logsumexp(-1) - logits.gather(-1, labels[..., None]).squeeze(-1)).mean(), logits

    torch.manual_seed(0)
    model, (ids, _) = OwnFormula(CONFIGS["llama"]()), batch()
    patch(model)
    assert model(ids, labels=ids)[0] > 0 and patch_state(model).streamed == 2, "it streams whatever the formula"
    patch(model, loss=Focal())
    with pytest.raises(RuntimeError, match="without a cross-entropy of its head's logits"):
        model(ids, labels=ids)


def test_another_loss_of_logits_is_an_error_in_a_traced_program_too():
    objective, (_, labels) = patch(tiny(), loss=Focal()).loss_function, batch()
    with pytest.raises(RuntimeError, match=r"Focal.*torch_compile=True"):
        torch.compile(objective, backend="eager")(torch.randn(*labels.shape, V), labels)


def test_the_forward_past_the_hooks_streams_too():
    """Whoever calls `model.forward`, now or bound before the patch, gets the same answers."""
    model, (ids, labels) = tiny(), batch()
    expected, stock = run(model, input_ids=ids, labels=labels)
    signature, dense = inspect.signature(model.forward), model.forward(input_ids=ids).logits
    for loss in (None, Focal(gamma=0.0)):
        patch(model, loss)
        out = model.forward(input_ids=ids, labels=labels)
        torch.testing.assert_close(out.loss, expected.loss)
        out.loss.backward()
        assert_same_gradients(gradients(model), stock)
        assert (patch_state(model).streamed, patch_state(model).bypassed) == (1, 0)
    assert inspect.signature(model.forward) == signature
    torch.testing.assert_close(model.forward(input_ids=ids).logits, dense, rtol=0, atol=0)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    assert clone.forward(input_ids=ids, labels=labels).logits.dense().abs().max() == 0
    unpatch(model)
    assert "forward" not in model.__dict__


def test_a_head_called_on_its_own_is_counted():
    model, (ids, _) = patch(tiny()), batch()
    hidden = model.model(input_ids=ids).last_hidden_state
    assert type(model.lm_head(hidden)) is torch.Tensor
    assert patch_state(model).bypassed == 1 and "outside of a call" in patch_state(model).reason
    with lazily(model):
        assert type(model.lm_head(hidden)) is LazyLogits


def test_training_without_labels_is_counted_as_bypassed():
    model, (ids, labels) = patch(tiny()).train(), batch()
    model(input_ids=ids, labels=labels)
    model(input_ids=ids)
    state = patch_state(model)
    assert (state.streamed, state.bypassed) == (1, 1) and "always=True" in state.reason
    with torch.no_grad():
        model(input_ids=ids)
    with lazily(model):
        model(input_ids=ids)
    assert state.bypassed == 1


def test_an_interrupted_call_leaves_nothing_behind():
    model, (ids, labels) = patch(tiny()), batch()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.norm.register_forward_hook(interrupt)
    for call in (model, model.forward):
        with pytest.raises(KeyboardInterrupt):
            call(input_ids=ids, labels=labels)
    handle.remove()
    assert type(model(input_ids=ids).logits) is torch.Tensor
    del call
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def replicas(model, count):
    """What `torch.nn.parallel.replicate` makes, on one device, with clones in place of broadcasts."""
    modules = list(model.modules())
    place = {m: i for i, m in enumerate(modules)}
    made = []
    for _ in range(count):
        copies = [m._replicate_for_data_parallel() for m in modules]
        values = {id(p): p.clone() for p in model.parameters()}
        for module, twin in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                setattr(twin, name, None if child is None else copies[place[child]])
            for name, p in module._parameters.items():
                setattr(twin, name, None if p is None else values[id(p)])
        made.append(copies[0])
    return made


def meet(module):
    """Two threads wait for each other in a module's call, so that both are inside of their models' calls at once."""
    together = threading.Barrier(2)

    def wait(*_):
        together.wait(20)

    module.register_forward_hook(wait)


@pytest.mark.parametrize("loss", [None, "focal", "emo"])
@pytest.mark.parametrize("past_hooks", [False, True])
def test_replicas_in_threads_have_their_own_calls(loss, past_hooks):
    """nn.DataParallel: losses and gradients are those of one model, and the original keeps its patch."""
    model, (ids, labels) = patch(tiny(), loss, observe=("entropy",)), batch(rows=4)
    out, expected = run(model, input_ids=ids, labels=labels, num_items_in_batch=40)
    meet(model.model)
    first, second = replicas(model, 2)

    def call(replica, rows):
        target = replica.forward if past_hooks else replica
        return target(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=40)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(call, (first, second), (slice(2), slice(2, 4))))
    assert all(isinstance(part.logits, LazyLogits) for part in parts)
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, out.loss)
    total.backward()
    assert_same_gradients(gradients(model), expected)
    state = patch_state(model)
    assert (state.streamed, state.materialized, state.bypassed) == (3, 0, 0)
    assert state.sums[False]["tokens"] == 2 * (labels[:, 1:] != -100).sum()
    assert model.lm_head.__dict__["forward"].layer is model.lm_head
    unpatch(model)
    assert "forward" not in model.lm_head.__dict__ and "forward" not in model.__dict__


def test_two_threads_call_one_model():
    """One asks for a loss, the other generates: neither sees the other's call."""
    model, (ids, labels) = patch(tiny()), batch()
    meet(model.model)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(lambda: model(input_ids=ids, labels=labels).logits)
        plain = pool.submit(lambda: model(input_ids=ids).logits)
        assert isinstance(asked.result(), LazyLogits) and type(plain.result()) is torch.Tensor


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel():
    model, (ids, labels) = patch(tiny().cuda(), loss="emo", observe=("entropy",)), batch(rows=4)
    labels = ids.clone()
    expected, stock = run(model, input_ids=ids.cuda(), labels=labels.cuda())
    loss = nn.DataParallel(model)(input_ids=ids.cuda(), labels=labels.cuda()).loss.mean()
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    assert_same_gradients(gradients(model), stock)
    assert patch_state(model).streamed == 3


def test_patched_for_the_occasion_restores_what_was_there():
    model, (ids, labels) = tiny(), batch()
    places = dict(model.__dict__), dict(model.lm_head.__dict__)
    with patched(model, always=True) as same:
        assert same is model and isinstance(model(input_ids=ids).logits, LazyLogits)
    assert (model.__dict__.keys(), model.lm_head.__dict__.keys()) == tuple(place.keys() for place in places)
    patch(model, Focal(gamma=3.0), observe=("entropy",), memory_budget=12345)
    loss, objective, state = model(input_ids=ids, labels=labels).loss, model.loss_function, patch_state(model)
    before = replace(state, sums=dict(state.sums))
    with pytest.raises(ZeroDivisionError), patched(model):
        assert patch_state(model) is not state and patch_state(model).options["memory_budget"] == 12345
        assert model(input_ids=ids, labels=labels).loss != loss, "its own cross-entropy"
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="nonesuch"), patched(model, "nonesuch"):
        pass
    assert compare(model).equal
    assert patch_state(model) is state and state == before and model.loss_function is objective
    assert model(input_ids=ids, labels=labels).loss == loss and state.streamed == before.streamed + 1
    assert unpatch(model).__dict__.keys() == places[0].keys()


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
        patch_state(tiny())


def test_a_refused_patch_leaves_the_earlier_one():
    model = patch(tiny(), loss=Focal())
    with pytest.raises(ValueError, match="nonesuch"):
        patch(model, loss="nonesuch")
    assert isinstance(model.loss_function.loss, Focal) and patch_state(model).streamed == 0


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
    """Doctored where the loss is streamed: the streamed loss is off by one per mille."""
    real = CrossEntropy.of
    monkeypatch.setattr(CrossEntropy, "of", lambda self, stats: real(self, stats) * 1.001)
    model = tiny()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not compute the same loss"):
        patch(model, verify=True)
    assert "_hf_xent" not in model.__dict__
    monkeypatch.undo()
    assert hf_xent.patch(model, verify=True) is model


def scaled_after_the_head(patch, model):
    real = LazyLogits.of
    patch.setattr(LazyLogits, "of", staticmethod(lambda *args, **options: real(*args, **options) * 1.001))


def without_bias(patch, model):
    real = LazyLogits.of
    of = lambda h, raw, state, **options: real(h, replace(raw, bias=None), state, **options)  # noqa: E731
    patch.setattr(LazyLogits, "of", staticmethod(of))


def another_softcap(patch, model):
    real = Recipe.head
    patch.setattr(Recipe, "head", lambda self, raw: replace(real(self, raw), softcap=1.5 * 1.001))


def one_gradient_off(patch, model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    off = 1 + max(1e-3, torch.finfo(weight.dtype).eps)  # less is no other number
    weight.register_hook(lambda g: g * off if "_hf_xent" in model.__dict__ else g)


def labels_that(change):
    def doctor(patch, model):
        real = ANSWERS[F.cross_entropy]
        patch.setitem(ANSWERS, F.cross_entropy, lambda x, y, *args, **kw: real(x, change(y.clone()), *args, **kw))

    return doctor


def ignored_first(labels):
    labels[0] = -100
    return labels


DOCTORED = {
    "scale": ("llama", scaled_after_the_head),
    "bias": ("bert bias", without_bias),
    "softcap": ("gemma2 softcap", another_softcap),
    "one gradient": ("llama", one_gradient_off),
    "labels shifted": ("llama", labels_that(lambda labels: labels.roll(1))),
    "a token dropped": ("llama", labels_that(ignored_first)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", DOCTORED)
def test_compare_catches(case, dtype, monkeypatch):
    """What is wrong by one per mille, in a dtype whose rounding is larger too."""
    name, doctor = DOCTORED[case]
    model = tiny(name, dtype=dtype)
    assert compare(model).equal
    doctor(monkeypatch, model)
    found = compare(model)
    assert not found.equal and max(found.exact_loss_error, found.exact_gradient_error) > 100 * found.exact_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_compare_judges_by_the_noise_of_the_model(name, dtype):
    found = compare(tiny(name, dtype=dtype))
    assert found.equal and found.lean, found
    assert max(found.exact_loss_error, found.exact_gradient_error) <= 1e-9
    assert 0 < found.noise < 1 and found.noise < found.tolerance


def test_compare_catches_a_backend_that_errs_in_the_models_dtype_alone(monkeypatch):
    """Sound in float64, a tenth off in bfloat16: only the run as it is can tell."""
    real = CrossEntropy.of

    def of(self, stats):
        return real(self, stats) * (1.0 if stats.lse.dtype == torch.float64 else 1.1)

    monkeypatch.setattr(CrossEntropy, "of", of)
    found = compare(tiny(dtype=torch.bfloat16))
    assert not found.equal and found.exact_loss_error <= 1e-9 and found.loss_error == pytest.approx(0.1, rel=0.1)


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
    assert hf_xent.compare(model).equal and patch_state(model).tail == 0.3
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


FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, by forward mode


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, p: torch.func.grad(loss)(p)["lm_head.weight"],
        pytest.param(lambda loss, p: torch.func.jvp(loss, (p,), (p,)), marks=FORWARD_MODE),
        lambda loss, p: torch.vmap(loss)({k: torch.stack([v, v * 2]) for k, v in p.items()}),
    ],
    ids=["grad", "jvp", "vmap"],
)
def test_torch_func_of_a_patched_model_is_that_of_the_stock_model(transform):
    ids = torch.randint(0, V, (2, 6))
    found = []
    for lazy in (False, True):
        model = tiny().eval()
        model.set_attn_implementation("eager")
        model = patch(model) if lazy else model
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p, model=model):
            return torch.func.functional_call(model, p, (), {"input_ids": ids, "labels": ids}).loss

        found.append(transform(loss, parameters))
    torch.testing.assert_close(*found)
    assert patch_state(model).bypassed and "torch.func" in patch_state(model).reason


def test_full_backward_hooks_of_the_head():
    ids, found = torch.randint(0, V, (2, 6)), []
    for lazy in (False, True):
        torch.manual_seed(0)
        model = patch(tiny().eval()) if lazy else tiny().eval()
        model.lm_head.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,))
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_logits_of_a_teacher_without_gradient_have_none():
    ids, found = torch.randint(0, V, (2, 6)), []
    for lazy in (False, True):
        torch.manual_seed(0)
        model = patch(tiny().eval(), always=True) if lazy else tiny().eval()
        with torch.no_grad():
            teacher = model(input_ids=ids.flip(1)).logits
        student = model(input_ids=ids).logits
        F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean").backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_logits_read_after_a_fused_optimizers_step_are_an_error():
    """The Trainer's default optimizer; it writes without raising a tensor's version."""
    ids, model = torch.randint(0, V, (2, 6)), patch(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"weight was modified in place.*optimizer\.step"):
        out.logits.argmax(-1)


def test_earlier_names_of_the_state_still_work():
    """`Seam`, `seam_of` and `LazyLogits.seam`: the same objects, and a warning that names the new one."""
    model, (ids, labels) = patch(tiny(), observe=("entropy",), tail=0.25, memory_budget=12345), batch()
    state, logits = patch_state(model), model(input_ids=ids, labels=labels).logits
    assert hf_xent.Seam is hf_xent.lazy.Seam is PatchState and isinstance(state, hf_xent.Seam)
    for earlier in (hf_xent.seam_of, hf_xent.patching.seam_of):
        with pytest.warns(DeprecationWarning, match=r"hf_xent\.patching\.patch_state"):
            assert earlier(model) is state
    with pytest.warns(DeprecationWarning, match=r"LazyLogits\.state"):
        assert logits.seam is state is logits.state
    assert (state.observe, state.tail, state.training) == (("entropy",), 0.25, False)
    assert state.options == {"impl": None, "memory_budget": 12345}
    assert (state.streamed, state.materialized, state.bypassed, state.reason, state.why_dense) == (1, 0, 0, "", "")
    count = (labels[:, 1:] != -100).sum()
    assert state.sums[False]["tokens"] == count == state.take(training=False)["tokens"] and not state.sums


@pytest.mark.parametrize("between", ["nothing", "unpatch"])
def test_a_model_is_trained_a_second_time_under_autocast(between, tmp_path):
    """Accelerate leaves its wrapper around a patch's forward, which a second patch must not take for the stock one."""
    from datasets import Dataset

    ids = batch(8)[0].tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    options = {"max_steps": 2, "bf16": True, "use_cpu": True, "save_strategy": "no", "report_to": "none", "seed": 1}

    def train(model):
        config = hf_xent.XentConfig(output_dir=str(tmp_path), disable_tqdm=True, **options)
        hf_xent.XentTrainer(model, config, train_dataset=rows).train()
        return model

    model = train(tiny("gpt2"))
    fresh = tiny("gpt2")
    fresh.load_state_dict(model.state_dict())
    if between == "unpatch":
        unpatch(model)
    again, expected = train(model).state_dict(), train(fresh).state_dict()
    assert all(torch.equal(again[name], x) for name, x in expected.items())
    inputs = torch.tensor(ids)
    logits = unpatch(model)(inputs).logits
    assert isinstance(logits, torch.Tensor) and logits.shape == (8, 11, V)
