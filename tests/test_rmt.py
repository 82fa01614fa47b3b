"""Robust Mean Teacher and entropy minimisation on streams, beside the formulas written out on plain tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_xent.adapt import RMT, EntropyMinimization, ImageViews, SoundViews, TextViews, source_prototypes
from hf_xent.adapt.rmt import contrast, nearest
from hf_xent.adapt.source import labels_of
from hf_xent.adapt.streams import batch_statistics
from support.models import tiny_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}


class Poisoned:
    """Labels that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError("labels were read")


def vit(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.3, **SMALL)
    return ViTForImageClassification(config).eval()


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **sizes)).eval()


def pixels(rows=4, seed=1):
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches(count, rows=4):
    return [{"pixel_values": pixels(rows, seed)} for seed in range(count)]


def rows_of(count=12):
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels(count, 7))]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(stream):
    state = stream._state()
    optimizer = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    return {**state["tensors"], **optimizer, "generator": state["generator"], "counts": torch.tensor(state["counts"])}


def plain_sce(z, e):
    q, t = z.softmax(-1), e.softmax(-1)
    return -((t * q.log()).sum(-1) + (q * t.log()).sum(-1)) / 2


def plain_contrast(views, temperature):
    """Every view an anchor, one at a time."""
    flat, costs = F.normalize(views, dim=-1).flatten(0, 1), []
    for i in range(len(flat)):
        others = [j for j in range(len(flat)) if j != i]
        total = sum(torch.exp(flat[i] @ flat[j] / temperature) for j in others)
        mates = [j for j in others if j // views.shape[1] == i // views.shape[1]]
        costs.append(-sum((flat[i] @ flat[j] / temperature - total.log()) for j in mates) / len(mates))
    return sum(costs) / len(costs)


def plain_features(model, x):
    return model.vit(x).last_hidden_state[:, 0]


def shifted(inputs, generator):
    return {"pixel_values": inputs["pixel_values"].roll(1, -1) + 0.1}


@pytest.mark.parametrize(("temperature", "value"), [(0.1, 0.710264), (1.0, 1.257093)])
def test_the_contrastive_toy(temperature, value):
    views = torch.tensor([[[1, 0], [1, 0.2], [1, 0.4]], [[0, 1], [0.2, 1], [0.1, 1]]])
    assert contrast(views, temperature).item() == pytest.approx(value, abs=1e-6)
    assert plain_contrast(views, temperature).item() == pytest.approx(value, abs=1e-6)


def test_nearest_is_by_cosine():
    means = torch.tensor([[10.0, 0], [0, 0.1], [-1, -1]])
    found = nearest(torch.tensor([[0.1, 3.0], [2, 1], [-5, -4]]), means)
    assert torch.equal(found, means[[1, 0, 2]])


def test_loss_and_gradient_are_those_of_the_formula():
    """All three terms, one step of plain gradient descent, and then the teacher's."""
    model, source, generator = vit(), rows_of(), torch.Generator()
    means = torch.randn(3, 16)
    weights = {"target_weight": 0.7, "contrast_weight": 0.5, "source_weight": 0.3}
    rmt = RMT(
        model, source=source, prototypes=means, augment=shifted, optimizer="sgd", learning_rate=0.1, momentum=0.9,
        source_batch_size=5, **weights,
    )  # fmt: skip
    for parameter in rmt.teacher.model.parameters():
        parameter.mul_(1.1)  # a teacher that differs
    own, taught, projector = copy.deepcopy(model), copy.deepcopy(rmt.teacher.model), copy.deepcopy(rmt.projector)
    generator.set_state(rmt.generator.get_state())
    x = pixels()
    changed = shifted({"pixel_values": x}, None)["pixel_values"]
    picked = [source[i] for i in torch.randperm(len(source), generator=generator)[:5].tolist()]
    z, z_changed, e = own(x).logits, own(changed).logits, taught(x).logits
    f, f_changed = plain_features(own, x), plain_features(own, changed)
    closest = means[(F.normalize(f, dim=-1) @ F.normalize(means, dim=-1).T).argmax(1)]
    loss = 0.7 * (plain_sce(z, e.detach()) + plain_sce(z_changed, e.detach())).mean() / 2
    loss = loss + 0.5 * plain_contrast(projector(torch.stack([closest, f, f_changed], 1)), 0.1)
    source_logits = own(torch.stack([row["pixel_values"] for row in picked])).logits
    loss = loss + 0.3 * F.cross_entropy(source_logits, torch.tensor([row["labels"] for row in picked]))
    expected = [*own.parameters(), *projector.parameters()]
    gradients = torch.autograd.grad(loss, expected, allow_unused=True)
    assert torch.allclose(rmt.predict({"pixel_values": x}), (z + e).detach(), atol=1e-5)
    moved = [p if g is None else p - 0.1 * g for p, g in zip(expected, gradients, strict=True)]
    for ours, theirs in zip([*model.parameters(), *rmt.projector.parameters()], moved, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for mean, before, now in zip(rmt.teacher.model.parameters(), taught.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.9 * before + 0.1 * now)
    assert rmt.steps == 1 and not any(p.requires_grad for p in rmt.teacher.model.parameters())


def test_ce_is_the_cross_entropy_of_the_teacher_alone():
    model = vit()
    rmt = RMT(model, consistency="ce", contrast_weight=0, augment=shifted, learning_rate=0)
    e, z = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    assert rmt._agreed(z, e).item() == pytest.approx(F.cross_entropy(z, e.softmax(-1)).item(), abs=1e-6)
    both = RMT(vit(), contrast_weight=0)._agreed(z, e)
    assert both.item() == pytest.approx(plain_sce(z, e).mean().item(), abs=1e-6)


def test_equal_outputs_leave_their_entropy():
    z = torch.randn(5, 3)
    entropy = torch.distributions.Categorical(logits=z).entropy().mean().item()
    assert RMT(vit(), contrast_weight=0)._agreed(z, z).item() == pytest.approx(entropy, abs=1e-6)


def test_no_gradient_through_the_teacher():
    e = torch.randn(4, 3, requires_grad=True)
    z = torch.randn(4, 3, requires_grad=True)
    RMT(vit(), contrast_weight=0)._agreed(z, e).backward()
    assert e.grad is None and z.grad.abs().sum() > 0


def test_without_steps_the_prediction_is_twice_the_logits():
    model = vit()
    rmt = RMT(model, learning_rate=0, momentum=0.5)
    before = parameters(model)
    for batch in batches(3):
        with torch.no_grad():
            expected = 2 * model(**batch).logits
        assert torch.allclose(rmt.predict(batch), expected, atol=1e-6)
    assert same(parameters(model), before)


def test_the_teacher_is_the_closed_form_of_its_average():
    """theta + m^k (theta_0 - theta) for a model that stays at theta."""
    rmt = RMT(vit(), learning_rate=0, contrast_weight=0)
    first = parameters(rmt.teacher.model)
    with torch.no_grad():
        for parameter in rmt.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    for batch in batches(6):
        rmt.predict(batch)
    for (name, now), mean in zip(rmt.model.named_parameters(), rmt.teacher.model.parameters(), strict=True):
        torch.testing.assert_close(mean, now + 0.999**6 * (first[name] - now))


class Untouchable:
    def __len__(self):
        raise AssertionError("the source was touched")

    __getitem__ = __iter__ = __len__


def test_source_weight_0_never_touches_the_source():
    rmt = RMT(vit(), source=Untouchable(), source_weight=0)
    assert len([*rmt.stream(batches(2))]) == 2 and rmt.prototypes is None


def test_a_vit_changes_nothing_but_parameters():
    model = vit().train()
    with_buffer = copy.deepcopy(model)
    model.register_buffer("counted", torch.arange(3.0))
    with_buffer.register_buffer("counted", torch.arange(3.0))
    modes = [m.training for m in model.modules()]
    before, attributes = parameters(model), sorted(vars(model))
    rmt = RMT(model)
    rmt.predict(batches(1)[0])
    assert [m.training for m in model.modules()] == modes and sorted(vars(model)) == attributes
    assert same(dict(model.named_buffers()), dict(with_buffer.named_buffers()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model._forward_hooks


def test_batch_norm_uses_the_batch_and_keeps_its_running_statistics():
    model, x = resnet(), pixels(6) * 3
    rmt, tent = RMT(model, learning_rate=0), EntropyMinimization(resnet(), learning_rate=0)
    kept = {name: b.clone() for name, b in model.named_buffers()}
    trained = copy.deepcopy(model).train()  # batch statistics; there is no dropout
    with torch.no_grad():
        expected = trained(x).logits
        assert not torch.allclose(model(x).logits, expected, atol=1e-2)
    assert torch.allclose(rmt.predict({"pixel_values": x}), 2 * expected, atol=1e-5)
    assert torch.allclose(tent.predict({"pixel_values": x}), expected, atol=1e-5)
    assert same(dict(model.named_buffers()), kept)
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match="batch has one row, whose BatchNorm"), batch_statistics([flat]):
        flat(torch.rand(1, 4))
    with pytest.raises(KeyError), batch_statistics([model]):
        raise KeyError
    assert same(dict(model.named_buffers()), kept)


def test_entropy_minimisation_moves_norms_alone_down_its_gradient():
    model, x = vit(), pixels()
    tent, before = EntropyMinimization(model, optimizer="sgd", learning_rate=0.1), parameters(model)
    own = copy.deepcopy(model)
    logp = own(x).logits.log_softmax(-1)
    (-(logp.exp() * logp).sum(-1).mean()).backward()
    logits = tent.predict({"pixel_values": x})
    assert torch.allclose(logits, own(x).logits.detach(), atol=1e-6)  # from before the step
    gradients = {name: p.grad for name, p in own.named_parameters()}
    for name, p in model.named_parameters():
        step = 0.1 * gradients[name] if "norm" in name else 0
        assert torch.allclose(p, before[name] - step, atol=1e-6), name
    surer = [
        torch.distributions.Categorical(logits=tent.predict({"pixel_values": x})).entropy().mean() for _ in range(9)
    ]
    assert surer[-1] < surer[0]


ARMS = {
    "rmt": lambda model: RMT(model, source=rows_of(), source_batch_size=4),
    "free": lambda model: RMT(model, contrast_weight=0, optimizer="sgd", learning_rate=0.05),
    "entropy": lambda model: EntropyMinimization(model),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_stream_goes_on_to_the_bit(arm, tmp_path):
    whole = ARMS[arm](vit())
    logits = [*whole.stream(batches(5))]
    first = ARMS[arm](vit())
    assert torch.equal(torch.stack([*first.stream(batches(2))]), torch.stack(logits[:2]))
    assert first.save(tmp_path) == tmp_path / "stream.pt"
    second = ARMS[arm](vit())
    second.load(tmp_path)
    again = [*second.stream(batches(5)[second.steps :])]
    assert torch.equal(torch.stack(again), torch.stack(logits[2:]))
    assert same(everything(second), everything(whole)) and second.steps == 5


@pytest.mark.parametrize("arm", ARMS)
def test_reset_begins_again_to_the_bit(arm, tmp_path):
    stream = ARMS[arm](vit())
    start, logits = everything(stream), [*stream.stream(batches(3))]
    stream.save(tmp_path)
    for go_back in (stream.reset, lambda: (stream.load(tmp_path), stream.reset())):
        go_back()
        assert same(everything(stream), start) and stream.steps == 0
        assert torch.equal(torch.stack([*stream.stream(batches(3))]), torch.stack(logits))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("place", ["views", "optimizer", "teacher", "inside the optimizer"])
def test_an_interrupted_step_is_no_step(arm, place, monkeypatch):
    stream = ARMS[arm](vit())
    stream.predict(batches(1)[0])
    before = everything(stream)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "views" and arm != "entropy":
            stream.augment = lambda inputs, generator: (torch.rand(3, generator=generator), stop())
        elif place == "optimizer":
            patch.setattr(stream._optimizer, "step", stop)
        elif place == "inside the optimizer":
            half = next(iter(stream.learned.values()))
            patch.setattr(stream._optimizer, "step", lambda: (half.data.add_(1), stop()))
        else:
            patch.setattr(stream, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            stream.predict(batches(2)[1])
    assert same(everything(stream), before) and all(p.grad is None for p in stream.learned.values())
    if arm != "entropy":
        stream.augment = None
    twin = ARMS[arm](vit())
    expected = [*twin.stream(batches(2))][1]
    assert torch.equal(stream.predict(batches(2)[1]), expected)


def test_labels_are_not_read():
    plain, poisoned = ARMS["rmt"](vit()), ARMS["rmt"](vit())
    batch = batches(1)[0]
    with_labels = {"labels": Poisoned(), **batch, "label": Poisoned()}
    assert torch.equal(poisoned.predict(with_labels), plain.predict(batch))
    entropy = EntropyMinimization(vit())
    assert torch.equal(entropy.predict(with_labels), EntropyMinimization(vit()).predict(batch))


def test_global_random_numbers_are_left_alone():
    model = vit()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rmt = RMT(model, source=rows_of(), seed=3)
    rmt.warm_up(rows_of(), 2)
    rmt.predict(batches(1)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    other = RMT(vit(), source=rows_of(), seed=4)
    assert not torch.equal(other.projector[0].weight, rmt.projector[0].weight)


def test_one_row_and_half_precision_inputs():
    one, wide_inputs = ARMS["rmt"](vit()), ARMS["rmt"](vit())
    x = pixels(1).half()
    logits = one.predict({"pixel_values": x})
    assert logits.shape == (1, 3) and logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert torch.equal(logits, wide_inputs.predict({"pixel_values": x.float()}))
    assert torch.isfinite(torch.cat([p.flatten() for p in one.model.parameters()])).all()
    streams = [ARMS["rmt"](vit()) for _ in range(3)]
    found = [streams[0].predict({"pixel_values": x})]
    for stream, mode in zip(streams[1:], (torch.no_grad(), torch.inference_mode()), strict=True):
        with mode:  # also where gradients are switched off around it
            found.append(stream.predict({"pixel_values": x.clone()}))
        assert same(everything(stream), everything(streams[0]))
    assert all(torch.equal(one, found[0]) for one in found)


def test_warm_up_rises_and_is_where_reset_goes():
    model, rates = vit(), []
    rmt = RMT(model, learning_rate=0.04, optimizer="sgd", source_batch_size=4)
    inner = rmt._optimizer.step
    rmt._optimizer.step = lambda: (rates.append(rmt._optimizer.param_groups[0]["lr"]), inner())
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in rows_of()]
    taught = parameters(rmt.teacher.model)
    rmt.warm_up(unlabelled, 4)
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04]) and rmt.warmed == 4 and rmt.steps == 0
    assert not same(parameters(rmt.teacher.model), taught)
    warm = everything(rmt)
    rmt.predict(batches(1)[0])
    assert rates[-1] == 0.04
    with pytest.raises(ValueError, match="warm up first"):
        rmt.warm_up(unlabelled, 9)
    rmt.reset()
    assert same(everything(rmt), warm)


def test_warm_up_goes_on_where_it_was_stopped(tmp_path):
    whole, parts = ARMS["rmt"](vit()), ARMS["rmt"](vit())
    whole.warm_up(rows_of(), 4)
    inner, calls = parts.teacher.update, []

    def third_fails(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        inner(model)

    parts.teacher.update = third_fails
    with pytest.raises(KeyboardInterrupt):
        parts.warm_up(rows_of(), 4)
    assert parts.warmed == 2
    parts.save(tmp_path)
    fresh = ARMS["rmt"](vit())
    fresh.load(tmp_path)
    fresh.warm_up(rows_of(), 4)
    assert same(everything(fresh), everything(whole))


def test_prototypes_are_class_means_and_kept(tmp_path, monkeypatch):
    model, rows, file = vit(), rows_of(), tmp_path / "means.pt"
    with torch.no_grad():
        seen = plain_features(model, torch.stack([row["pixel_values"] for row in rows]))
    expected = torch.stack([seen[k::3].mean(0) for k in range(3)])
    found = source_prototypes(model, rows, batch_size=5, file=file)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(RMT(model, source=rows).prototypes, expected, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr("hf_xent.adapt.source.features", Untouchable())
        assert torch.equal(source_prototypes(model, rows, file=file), found)
    other = source_prototypes(vit(1), rows, file=file)  # another model's are not taken for its own
    assert not torch.allclose(other, found, atol=1e-3)
    with pytest.raises(ValueError, match="class 2"):
        source_prototypes(model, [row for row in rows if row["labels"] < 2])


@pytest.fixture(scope="module")
def texts():
    tokenizer = tiny_tokenizer("the quick brown fox jumps over the lazy dog")
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SMALL)).eval(), tokenizer


def test_texts_and_sounds_adapt_too(texts):
    model, tokenizer = texts
    ids = torch.randint(3, len(tokenizer), (4, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": Poisoned()}
    before = parameters(model)
    views = TextViews(replacement=1, kept=(int(ids[0, 0]),), share=0.5)
    rmt = RMT(model, augment=views)
    assert rmt.predict(batch).shape == (4, 3) and not same(parameters(model), before)
    with pytest.raises(
        ValueError, match=r"augment is None, and the batch has input_ids, attention_mask: give augment=T"
    ):
        RMT(model).predict(batch)
    config = ASTConfig(num_mel_bins=8, max_length=12, patch_size=4, frequency_stride=4, time_stride=4, **SMALL)
    hearing = RMT(ASTForAudioClassification(config).eval())
    assert hearing.predict({"input_values": torch.randn(2, 12, 8)}).shape == (2, 3) and hearing.steps == 1


def test_views_of_texts_keep_special_tokens(texts):
    _, tokenizer = texts
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(4).repeat(50, 5)
    made = TextViews(replacement=9, kept=(0, 2), share=0.4)({"input_ids": ids, "other": 1}, generator)
    changed = made["input_ids"] != ids
    assert made["other"] == 1 and not changed[(ids == 0) | (ids == 2)].any()
    assert changed[(ids == 1) | (ids == 3)].float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert (made["input_ids"][changed] == 9).all()
    views = TextViews.of(tokenizer, share=0.2)
    assert set(views.kept) == set(tokenizer.all_special_ids) and views.share == 0.2


class Processor:
    image_mean, image_std = [0.5, 0.4, 0.3], [0.5, 0.2, 0.1]


def test_views_of_images_are_in_the_range_of_the_processor():
    x = (torch.rand(8, 3, 10, 12) - 0.5) * torch.tensor([2, 4, 6.0]).view(3, 1, 1)
    low, high = torch.tensor([-1.0, -2, -3]).view(3, 1, 1), torch.tensor([1.0, 3, 7]).view(3, 1, 1)
    views = ImageViews.of(Processor(), noise=2, brightness=1, flip=True)
    made = views({"pixel_values": x}, torch.Generator().manual_seed(0))["pixel_values"]
    assert (made >= low - 1e-6).all() and (made <= high + 1e-6).all()
    assert ((made - low).abs() < 1e-6).any() and ((made - high).abs() < 1e-6).any()
    own = ImageViews(noise=2)({"pixel_values": x}, torch.Generator().manual_seed(0))["pixel_values"]
    assert (own.amax((0, 2, 3)) <= x.amax((0, 2, 3))).all() and (own.amin((0, 2, 3)) >= x.amin((0, 2, 3))).all()


def test_views_of_images_do_what_they_say():
    still = {"contrast": 0, "brightness": 0, "shift": 0, "blur": 0, "noise": 0}
    x, generator = torch.rand(40, 2, 9, 11), torch.Generator().manual_seed(0)

    def made(**options):
        return ImageViews(**{**still, **options})({"pixel_values": x}, generator)["pixel_values"]

    assert torch.allclose(made(), x, atol=1e-6)
    mirrored = made(flip=True)
    as_they_were = torch.isclose(mirrored, x, atol=1e-5).flatten(1).all(1)
    turned = torch.isclose(mirrored, x.flip(-1), atol=1e-5).flatten(1).all(1)
    assert (as_they_were ^ turned).all() and 8 < turned.sum() < 32
    assert made(blur=2)[:, :, 3:6, 3:6].var() < x[:, :, 3:6, 3:6].var()
    flat = torch.full((40, 1, 9, 9), 0.5)
    bounded = ImageViews(low=0, high=1, **{**still, "noise": 0.1})({"pixel_values": flat}, generator)["pixel_values"]
    assert (bounded - 0.5).std().item() == pytest.approx(0.1, rel=0.1)
    point = torch.zeros(60, 1, 21, 21)
    point[:, :, 10, 10] = 1
    moved = ImageViews(low=0, high=1, **{**still, "shift": 0.2})({"pixel_values": point}, generator)["pixel_values"]
    places = moved.flatten(1).argmax(1)
    distances = torch.stack([places // 21 - 10, places % 21 - 10]).abs()
    assert distances.max() <= 5 and distances.float().mean() > 1.5  # a fifth of 21 pixels, and rounding
    one = ImageViews()({"pixel_values": x}, torch.Generator().manual_seed(1))["pixel_values"]
    assert torch.equal(one, ImageViews()({"pixel_values": x}, torch.Generator().manual_seed(1))["pixel_values"])


def test_views_of_sounds_have_a_gain_and_noise():
    x = torch.randn(5, 400)
    louder = SoundViews(gain=0.5, noise=0)({"input_values": x}, torch.Generator().manual_seed(0))["input_values"] / x
    assert torch.allclose(louder, louder[:, :1].expand_as(x), atol=1e-4) and 0.5 <= louder.min() < louder.max() <= 1.5
    noisy = SoundViews(gain=0, noise=0.1)({"input_features": x}, torch.Generator().manual_seed(0))["input_features"]
    assert ((noisy - x).std(1) / x.std(1)).tolist() == pytest.approx([0.1] * 5, rel=0.15)


def test_what_is_refused():
    model = vit()
    for options, words in (
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"optimizer": "lion"}, "optimizer is 'lion': choose adam or sgd"),
        ({"consistency": "kl"}, "consistency is 'kl': choose sce or ce"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"temperature": 0}, "temperature is 0"),
        ({"source_weight": 1}, "source_weight is 1, but there are no source rows"),
        ({"contrast_weight": 0, "prototypes": torch.ones(3, 16)}, "prototypes are given, but contrast_weight is 0"),
        ({"target_weight": 0, "contrast_weight": 0}, "all weights are 0"),
        ({"source_batch_size": 0}, "source_batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"prototypes": torch.ones(2, 16)}, r"prototypes have the shape \(2, 16\): give \[3, 16\]"),
    ):
        with pytest.raises(ValueError, match=words):
            RMT(model, **options)
    number = vit()
    number.config.id2label = {0: "size"}
    with pytest.raises(ValueError, match="model has 1 outputs, not one for each class"):
        EntropyMinimization(number)
    with pytest.raises(ValueError, match="without parameters to learn"):
        RMT(vit().requires_grad_(False))
    with pytest.raises(ValueError, match=r"torch.float16, where small steps are rounded away"):
        EntropyMinimization(vit().half())
    with pytest.raises(ValueError, match="without parameters to learn"):
        EntropyMinimization(nn.Sequential(nn.Linear(2, 2)))


def test_a_batch_that_cannot_be_learned_from_changes_nothing():
    stream = ARMS["rmt"](vit())
    before = everything(stream)
    with pytest.raises(ValueError, match=r"the batch has the loss nan: look for nan in it"):
        stream.predict({"pixel_values": pixels() * float("nan")})
    with pytest.raises(ValueError, match=r"batch has no rows in pixel_values"):
        stream.predict({"pixel_values": pixels(0)})
    assert same(everything(stream), before)


def test_a_state_of_something_else_is_refused(tmp_path):
    stream = ARMS["rmt"](vit())
    stream.predict(batches(1)[0])
    stream.save(tmp_path)
    before = everything(stream)
    with pytest.raises(ValueError, match=r"which has no stream.pt"):
        stream.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"temperature is 1, but .*stream.pt was saved with 0.1: use that"):
        RMT(vit(), source=rows_of(), source_batch_size=4, temperature=1).load(tmp_path)
    with pytest.raises(ValueError, match=r"method is 'EntropyMinimization'"):
        EntropyMinimization(vit()).load(tmp_path)
    with pytest.raises(ValueError, match=r"another model, which differs in model\."):
        RMT(resnet(), source=rows_of(), source_batch_size=4).load(tmp_path)
    assert same(everything(stream), before)


def test_adapters_learn_alone():
    """Parameters without a gradient are left alone, and frozen ones of the teacher stay with them."""
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    before = parameters(model)
    rmt = RMT(model, contrast_weight=0, learning_rate=0.1)
    rmt.predict(batches(1)[0])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_what_is_no_model_and_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="model is 'vit': load it first"):
        RMT("vit")
    with pytest.raises(ValueError, match="source has rows with pixel_values: give their labels"):
        labels_of({"pixel_values": torch.rand(2, 1, 4, 4)})
