"""Where a class is in an image: background activation suppression, `Localizer`, and maps of any classifier."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTConfig,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
)

from hf_xent.localization import (
    Localizer,
    LocalizerConfig,
    background_activation,
    cam,
    frozen_call,
    localize,
    mask_area,
    overlay,
    overlays,
    suppression_loss,
)
from hf_xent.localization.maps import largest_boxes
from hf_xent.localization.replay import as_grid, record, times

TOKENS = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
CONFIGS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], layer_type="basic"),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], num_stages=3),
    "mobilenet": MobileNetV2Config(image_size=32, depth_multiplier=0.1, classifier_dropout_prob=0.0),
    "swin": SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
    ),
    "vit": ViTConfig(image_size=32, patch_size=8, **TOKENS),
    "deit": DeiTConfig(image_size=32, patch_size=8, architectures=["DeiTForImageClassification"], **TOKENS),
}
"""Stages of maps, of tokens, and blocks of tokens with one and two special ones."""
LAYERS = {"resnet": "resnet.encoder.stages.1", "convnext": "convnext.encoder.stages.1", "vit": "vit.layers.0",
          "mobilenet": "mobilenet_v2.layer.11", "swin": "swin.encoder.layers.1", "deit": "deit.layers.0"}  # fmt: skip


def classifier(name, **options):
    """A tiny classifier of three classes, in evaluation, with logits that differ between classes."""
    torch.manual_seed(0)
    classes = {"id2label": {0: "x", 1: "y", 2: "z"}}
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | classes | options)
    model = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pictures(count=2, **options):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), **options)


LABELS = torch.tensor([0, 2])


def two_classes(score, ce):
    """Logits [1, 2] with that score of class 0, and that cross-entropy of it."""
    return torch.tensor([[score, score + math.log(math.expm1(ce))]])


def test_the_loss_of_the_toy_is_that_of_the_formula():
    labels = torch.zeros(1, dtype=torch.long)
    whole, masked, erased = two_classes(2.0, 0.5), two_classes(3.0, 0.7), two_classes(1.0, 0.1)
    background = background_activation(whole, erased, labels)
    assert background.item() == 0.5
    area = mask_area(torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))
    assert area.item() == 0.25
    loss = suppression_loss(whole, labels, masked=masked, background=background, area=area, alpha=0.5, beta=1.5)
    assert loss.item() == pytest.approx(1.725, abs=1e-6)
    alone = suppression_loss(whole, labels, masked=masked, area=area, alpha=0, beta=0)
    assert alone.item() == nn.functional.cross_entropy(whole, labels).item()


@pytest.mark.parametrize(
    ("whole", "outside", "value", "slope"),
    [
        (2.0, 1.0, 0.5, 0.5),  # 1 / s
        (2.0, 2.0, 1.0, 0.5),  # nothing is erased
        (2.0, 4.0, 1.0, 0.25),  # 1 / b, where the authors have none
        (1e-3, 4.0, 1.0, 0.25),  # bounded where the class has hardly any activation
        (-1.0, 4.0, 1.0, 0.25),
        (2.0, -1.0, 0.0, 0.0),
        (-2.0, -1.0, 1.0, 0.0),
        (-1.0, -2.0, 0.0, 0.0),
    ],
)
def test_suppression_is_the_share_of_activation_that_remains(whole, outside, value, slope):
    labels = torch.zeros(1, dtype=torch.long)
    for saturate, expected in ((False, slope), (True, slope if outside <= whole else 0.0)):
        logits = torch.tensor([[whole, 7.0]], requires_grad=True)
        erased = torch.tensor([[outside, 9.0]], requires_grad=True)
        bas = background_activation(logits, erased, labels, saturate=saturate)
        assert bas.item() == value
        (bas.sum() + 0 * logits.sum()).backward()
        torch.testing.assert_close(erased.grad, torch.tensor([[expected, 0.0]]))
        assert not logits.grad.any()


def test_areas_count_valid_positions_alone():
    masks, valid = torch.tensor([[1.0, 0.5, 9.0], [3.0, 3.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mask_area(masks, valid).tolist() == [0.75, 0.0]
    assert mask_area(torch.ones(2, 3, 5)).tolist() == [1.0, 1.0]


def test_a_frozen_call_moves_inputs_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    x = torch.randn(5, 3, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    out = frozen_call(net, x)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    out.square().sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rest_of_a_network_is_the_network(name):
    """Replayed with its own features, a network returns its logits; with others, what it returns for a hook's."""
    model, x = classifier(name), pictures()
    localizer = Localizer.from_classifier(model)
    assert localizer.config.layer == LAYERS[name]
    outputs, forward = record(model, localizer.config.layer, x)
    assert torch.equal(forward.replay(forward.features).logits, outputs.logits)
    torch.testing.assert_close(forward.replay(forward.features, frozen=True).logits, outputs.logits)

    grid = as_grid(forward.features, (32, 32))
    mask = torch.rand(2, *grid.shape[2:], generator=torch.Generator().manual_seed(2))
    blank = record(model, localizer.config.layer, torch.zeros(1, 3, 32, 32))[1].features
    masked = times(forward.features, mask, blank)
    expected = grid * mask[:, None] + as_grid(blank, (32, 32)) * (1 - mask[:, None])
    torch.testing.assert_close(as_grid(masked, (32, 32)), expected)
    torch.testing.assert_close(as_grid(times(forward.features, mask), (32, 32)), grid * mask[:, None])
    special = forward.features.shape[1] - mask[0].numel()
    if grid is not forward.features:
        assert special == {"vit": 1, "deit": 2}.get(name, 0)
        assert torch.equal(masked[:, :special], forward.features[:, :special])

    def hook(module, args, output):
        return masked if isinstance(output, torch.Tensor) else (masked, *output[1:])

    handle = model.get_submodule(localizer.config.layer).register_forward_hook(hook)
    expected = model(x).logits
    handle.remove()
    assert not torch.allclose(expected, outputs.logits)
    assert torch.equal(forward.replay(masked).logits, expected)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_what_came_before_a_layer_is_not_computed_again():
    model, ran = classifier("resnet"), []
    _, forward = record(model, LAYERS["resnet"], pictures())
    for name in ("resnet.embedder.embedder", "resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0",
                 "resnet.encoder.stages.2.layers.0"):  # fmt: skip
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    forward.replay(forward.features)
    assert ran == ["resnet.encoder.stages.2.layers.0"]


def test_a_module_that_runs_before_and_after_the_layer_computes_after_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.layer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.shared(self.layer(self.shared(x)))

    torch.manual_seed(0)
    net, x, other = Net(), torch.randn(2, 3), torch.randn(2, 3)
    _, forward = record(net, "layer", x)
    torch.testing.assert_close(forward.replay(other), net.shared(other))
    with pytest.raises(ValueError, match="'shared', which ran 2 times"):
        record(net, "shared", x)
    with pytest.raises(ValueError, match="layer is 'nothing'"):
        record(net, "nothing", x)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_that_of_the_formula_and_suppression_moves_the_mask_alone(name, training):
    """Against passes with a hook, and a copy of the network without gradients."""
    x, labels = pictures(6).double(), torch.arange(6) % 3
    localizer = Localizer.from_classifier(classifier(name).double(), alpha=0.5, beta=1.5)
    nn.init.normal_(localizer.generator.weight)
    assert all(module.p == 0 for module in localizer.modules() if isinstance(module, nn.Dropout))
    localizer.train(training)
    reference = copy.deepcopy(localizer)
    outputs = localizer(x, labels=labels)
    mask = outputs.maps[torch.arange(6), labels]

    layer, net = localizer.config.layer, reference.classifier
    target = net.get_submodule(layer)
    features = record(copy.deepcopy(net), layer, x)[1].features.detach()
    blank = record(copy.deepcopy(net).eval(), layer, torch.zeros_like(x[:1]))[1].features.detach()
    blank = blank if localizer.config.blank else None
    maps = reference.generator(as_grid(record(net, layer, x)[1].features, (32, 32))).sigmoid()
    torch.testing.assert_close(maps, outputs.maps)
    mask = maps[torch.arange(6), labels]

    def logits(share, constant=False):
        def hook(module, args, output):
            found = output if isinstance(output, torch.Tensor) else output[0]
            found = times(features if constant else found, share, blank)
            return found if isinstance(output, torch.Tensor) else (found, *output[1:])

        handle = target.register_forward_hook(hook)
        net.requires_grad_(not constant)
        found = net(x).logits
        net.requires_grad_(True)
        handle.remove()
        return found

    whole, kept, erased = logits(torch.ones_like(mask)), logits(mask), logits(1 - mask, constant=True)
    torch.testing.assert_close(outputs.logits, whole)
    ce = nn.functional.cross_entropy
    s, b = (z.gather(1, labels[:, None])[:, 0] for z in (whole.detach(), erased))
    # the ratio by hand, where it is not above 1, and its value elsewhere
    share = b.relu() / (torch.maximum(s.relu(), torch.where(b > s, b, s).relu().detach()) + 1e-8)
    share = torch.where((b > s) & (b <= 0), 1.0, share)
    expected = ce(whole, labels) + 0.5 * ce(kept, labels) + share.mean() + 1.5 * mask.mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.loss.dtype == torch.float64

    wanted = torch.autograd.grad(expected, list(reference.parameters()), allow_unused=True)
    found = torch.autograd.grad(outputs.loss, list(localizer.parameters()), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_without_its_terms_the_loss_is_cross_entropy():
    model, x = classifier("vit"), pictures()
    plain = model(x, labels=LABELS).loss
    off = Localizer.from_classifier(model, alpha=0, beta=0, background=False)
    torch.testing.assert_close(off(x, labels=LABELS).loss, plain)
    assert off(x).loss is None


def test_an_empty_mask_suppresses_nothing_and_grows():
    """Everything is left in the background: BAS is 1, its gradient raises the mask; a full mask has the area 1."""
    model, x = classifier("resnet"), pictures()
    with torch.no_grad():
        model.classifier[1].bias += 10  # activations are positive
    localizer = Localizer.from_classifier(model, alpha=0, beta=0)
    _, forward = record(model, localizer.config.layer, x)
    logits = model(x).logits
    mask = torch.zeros(2, 4, 4, requires_grad=True)
    erased = forward.replay(times(forward.features.detach(), 1 - mask), frozen=True).logits
    bas = background_activation(logits, erased, LABELS)
    assert bas.tolist() == [1.0, 1.0]
    (slope,) = torch.autograd.grad(bas.sum(), mask)
    step = 1e-3
    moved = forward.replay(times(forward.features, 1 + step * slope), frozen=True).logits
    assert (background_activation(logits, moved, LABELS) < 1).all()  # against the gradient, less is left

    nothing = forward.replay(times(forward.features, torch.zeros(2, 4, 4))).logits
    erased = forward.replay(times(forward.features, 1 - torch.ones(2, 4, 4)), frozen=True).logits
    assert torch.equal(nothing, erased) and mask_area(torch.ones(2, 4, 4)).tolist() == [1.0, 1.0]


def test_frozen_passes_leave_batch_norm_alone():
    localizer = Localizer.from_classifier(classifier("resnet"), alpha=0).train()
    norm = localizer.classifier.resnet.encoder.stages[2].layers[0].layer[0].normalization
    before = norm.num_batches_tracked.item()
    localizer(pictures(), labels=LABELS)
    assert norm.num_batches_tracked.item() == before + 1  # of the pass for logits


def test_checkpointed_layers_give_the_same_gradients():
    plain, checkpointed = (Localizer.from_classifier(classifier("vit")).train() for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    new = hasattr(checkpointed, "activation_checkpointing_enable")  # its name since transformers 5
    enable = "activation_checkpointing_enable" if new else "gradient_checkpointing_enable"
    getattr(checkpointed.classifier, enable)({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(pictures(), labels=LABELS).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(ValueError, match="does not support"):
        getattr(plain, enable)()


def test_a_trainer_trains_it_and_evaluates_logits(tmp_path):
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pictures(6))]
    model = Localizer.from_classifier(classifier("resnet"))
    arguments = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=3, report_to="none", use_cpu=True,
                                  save_strategy="no", learning_rate=1e-2)  # fmt: skip
    before = model.generator.weight.clone()
    shapes = []
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows,
                      compute_metrics=lambda p: shapes.append(p.predictions.shape) or {})  # fmt: skip
    trainer.train()
    assert not torch.equal(model.generator.weight, before)
    assert math.isfinite(trainer.evaluate()["eval_loss"]) and shapes == [(6, 3)]


def test_half_precision_is_close():
    x, inner = pictures(), classifier("vit")
    with torch.no_grad():
        inner.classifier.bias += 5  # no activation is near 0, where BAS jumps
    model = Localizer.from_classifier(inner)
    exact = model(x, labels=LABELS).loss
    loss = model.bfloat16()(x.bfloat16(), labels=LABELS).loss
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.03 * exact  # eight bits of mantissa


def test_options_are_checked():
    model = classifier("vit")
    for options, message in (({"alpha": -1}, "alpha is -1"), ({"beta": float("nan")}, "beta is nan"),
                             ({"top_classes": 0}, "top_classes is 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LocalizerConfig(**options)
    localizer = Localizer.from_classifier(model)
    for labels in (LABELS[:1], LABELS.float(), torch.eye(3)[:2]):
        with pytest.raises(ValueError, match="labels has shape"):
            localizer(pictures(), labels=labels)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="is a copy that"):
        patch.setattr(localizer, "parameters", lambda: iter(()))  # as of torch's copies
        localizer(pictures())
    with pytest.raises(ValueError, match="special_tokens is 3"):
        Localizer.from_classifier(model, special_tokens=3)
    with pytest.raises(ValueError, match="features has shape"):
        Localizer.from_classifier(model, layer="classifier")
    with pytest.raises(ValueError, match="threshold is 2"):
        localize(localizer, pictures(), threshold=2)
    with pytest.raises(ValueError, match="top_classes is 1, and labels"):
        localize(localizer, pictures(), top_classes=1, labels=LABELS)
    with pytest.raises(ValueError, match="layer is 'x', but a Localizer"):
        localize(localizer, pictures(), layer="x")
    with pytest.raises(ValueError, match="has no list of two or more layers"):
        Localizer.from_classifier(nn.Linear(2, 2))


@pytest.mark.parametrize(("shape", "size", "special", "grid"), [
    ((1, 197, 2), (224, 224), None, (14, 14)), ((1, 19, 2), (32, 64), None, (3, 6)), ((1, 8, 2), (16, 32), 0, (2, 4)),
    ((1, 9, 2), (32, 32), 5, (2, 2)), ((1, 2, 5, 7), (32, 32), None, (5, 7)),
])  # fmt: skip
def test_tokens_are_a_grid_of_the_shape_of_the_image(shape, size, special, grid):
    features = torch.arange(math.prod(shape), dtype=torch.float).reshape(shape)
    found = as_grid(features, size, special)
    assert found.shape[2:] == grid
    if len(shape) == 3:
        assert torch.equal(found.flatten(2).transpose(1, 2), features[:, -math.prod(grid) :])


def test_class_activation_maps_are_those_of_the_weights_of_a_linear_head():
    model, x = classifier("resnet"), pictures()
    features = model.resnet(x).last_hidden_state
    weights = model.classifier[1].weight[LABELS]
    expected = torch.einsum("bd,bdhw->bhw", weights, features).relu()
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(cam(model, x, LABELS), expected)
    torch.testing.assert_close(cam(Localizer.from_classifier(model), x, LABELS), expected)
    assert torch.equal(cam(model, x), cam(model, x, model(x).logits.argmax(1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_classifier_has_maps(name):
    model, x = classifier(name).train(), pictures()
    maps = cam(model, x)
    assert maps.shape[0] == 2 and maps.amin() >= 0 and maps.amax((1, 2)).tolist() == [1.0, 1.0]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_head_that_reads_the_first_token_needs_an_earlier_layer():
    model, x = classifier("vit"), pictures()
    with pytest.raises(ValueError, match=r"layer is 'vit\.layers\.3', from whose patches no logit"):
        cam(model, x, layer="vit.layers.3")
    torch.testing.assert_close(cam(model, x), cam(model, x, layer="vit.layers.2"))


def test_masks_and_boxes_are_those_of_the_maps():
    model, x = classifier("resnet"), pictures()
    localizer = Localizer.from_classifier(model).train()
    nn.init.normal_(localizer.generator.weight)
    found = localize(localizer, x, threshold=0.3, top_classes=2)
    assert localizer.training and found.classes.shape == (2, 2)
    outputs = localizer.eval()(x)
    top = outputs.logits.topk(2).indices
    expected = torch.stack([outputs.maps[i, top[i]].mean(0) for i in range(2)])[:, None]
    expected = nn.functional.interpolate(expected, (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(found.maps, expected)
    assert torch.equal(found.masks, found.maps > 0.3) and not found.maps.requires_grad
    chosen = outputs.maps[torch.arange(2), LABELS][:, None]
    given = localize(localizer, x, labels=LABELS).maps
    torch.testing.assert_close(given, nn.functional.interpolate(chosen, (32, 32), mode="bilinear")[:, 0])
    maps = nn.functional.interpolate(cam(model, x, LABELS)[:, None], (32, 32), mode="bilinear")
    torch.testing.assert_close(localize(model, x, labels=LABELS).maps, maps[:, 0])
    early = cam(model, x, LABELS, layer=LAYERS["resnet"])
    assert early.shape == (2, 4, 4) and maps.shape[1:] != early.shape[1:]
    early = nn.functional.interpolate(early[:, None], (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(localize(model, x, labels=LABELS, layer=LAYERS["resnet"]).maps, early)


@pytest.mark.parametrize(("name", "layer"), [("convnext", "convnext.encoder.stages.1"), ("vit", "vit.layers.2")])
def test_a_norm_takes_out_a_factor_but_not_a_blank_image(name, layer):
    """Masks of zeros have no gradient where a norm comes next; with features of a blank image they have."""
    model, x, slopes = classifier(name), pictures(), []
    assert Localizer.from_classifier(model).config.blank
    assert not Localizer.from_classifier(classifier("resnet")).config.blank
    forward, empty = (record(model, layer, images)[1] for images in (x, torch.zeros_like(x)))
    for blank in (None, empty.features):
        mask = torch.full((2, 4, 4), 0.5, requires_grad=True)
        scores = forward.replay(times(forward.features, mask, blank), frozen=True).logits
        slopes.append(torch.autograd.grad(scores.square().sum(), mask)[0].abs().mean())
    assert slopes[0] < 1e-3 * slopes[1]


def test_boxes_hold_the_largest_part():
    masks = torch.zeros(2, 6, 7, dtype=torch.bool)
    masks[0, 0, 0:2] = True
    masks[0, 2:5, 3:7] = True
    masks[0, 5, 2] = True  # touches by a corner alone
    assert largest_boxes(masks).tolist() == [[3, 2, 7, 5], [0, 0, 0, 0]]
    masks = torch.rand(20, 9, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    for mask, (left, top, right, bottom) in zip(masks, largest_boxes(masks).tolist(), strict=True):
        parts, _ = ndimage.label(mask)
        sizes, boxes = np.bincount(parts.flat)[1:], ndimage.find_objects(parts)
        best = [boxes[i] for i in np.flatnonzero(sizes == sizes.max())]
        assert (slice(top, bottom), slice(left, right)) in best


def test_overlays_mix_image_and_mask(tmp_path):
    image = np.array([[0, 255], [0, 255]], np.uint8)
    picture = overlay(image, [[0, 0], [1, 0.5]], color=(1, 0, 0), opacity=0.5)
    np.testing.assert_allclose(picture, [[[0, 0, 0], [1, 1, 1]], [[0.5, 0, 0], [1, 0.75, 0.75]]])
    assert overlay(torch.randn(3, 4, 5), torch.rand(4, 5)).shape == (4, 5, 3)
    np.testing.assert_allclose(overlay(image[None], [[0, 0], [0, 0]])[..., 0], image / 255)
    with pytest.raises(ValueError, match="image has shape"):
        overlay(image, [[1.0]])
    file = overlays([image], {"CAM": [np.eye(2)]}, tmp_path / "figure.png", known=[np.eye(2)], titles=["3"])
    assert file.read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="masks has 0 of CAM for 1 images"):
        overlays([image], {"CAM": []}, tmp_path / "figure.png")


def test_a_localizer_of_a_vision_transformer_is_saved_and_loaded(tmp_path):
    inner = classifier("vit", id2label={0: "a", 1: "b", 2: "c"})
    model, x = Localizer.from_classifier(inner, alpha=0.25), pictures()
    model.save_pretrained(tmp_path)
    back = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(back) is Localizer and back.config.alpha == 0.25 and back.config.id2label[2] == "c"
    for key, value in model(x, labels=LABELS).items():
        torch.testing.assert_close(back(x, labels=LABELS)[key], value)
