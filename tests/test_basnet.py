"""BASNet: its layers against the published wiring, any size of image, losses of every output, and deep supervision."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

from hf_xent import classes
from hf_xent.models.basnet import BasnetConfig, BasnetForSemanticSegmentation
from hf_xent.trainers import ClassConfig, ClassTrainer
from support.composites import install

WIDTHS = [3, 4, 5, 6, 4, 5]
TINY = {"hidden_sizes": WIDTHS, "depths": [2, 1, 1, 1, 2, 1], "refine_size": 4, "num_channels": 2}
SMALL = {"hidden_sizes": [3, 4], "depths": [1, 1], "refine_size": 3, "refine_depth": 1, "num_channels": 1}


def build(labels=1, **options):
    torch.manual_seed(0)
    return BasnetForSemanticSegmentation(BasnetConfig(**{**TINY, **options}, num_labels=labels)).eval()


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def masks(*shape, labels=2):
    found = torch.randint(labels, shape, generator=torch.Generator().manual_seed(2))
    found.view(-1)[1], found.view(-1)[-1] = 255, -100
    return found


def test_the_default_is_the_published_network():
    """Numbers of parameters layer by layer, as the authors list their layers."""
    conv, plain = (lambda a, b: 9 * a * b + b + 2 * b), (lambda a, b: 9 * a * b + 2 * b)  # with bias; with norms
    block = lambda a, b: plain(a, b) + plain(b, b)  # noqa: E731
    stem = conv(3, 64)
    resnet = 3 * block(64, 64)
    for a, b, more in ((64, 128, 3), (128, 256, 5), (256, 512, 2)):
        resnet += block(a, b) + more * block(b, b) + a * b + 2 * b
    deeper, bridge = 6 * block(512, 512), 3 * conv(512, 512)
    decoder = 2 * (conv(1024, 512) + 2 * conv(512, 512)) + conv(1024, 512) + conv(512, 512) + conv(512, 256)
    for a in (256, 128):
        decoder += conv(2 * a, a) + conv(a, a) + conv(a, a // 2)
    decoder += conv(128, 64) + 2 * conv(64, 64)
    sides = sum(9 * a + 1 for a in (512, 512, 512, 256, 128, 64, 64))
    refine = (9 * 64 + 64) + 5 * conv(64, 64) + 4 * conv(128, 64) + (9 * 64 + 1)
    with torch.device("meta"):
        model = BasnetForSemanticSegmentation(BasnetConfig(num_labels=1))
    found = [sum(p.numel() for p in part.parameters()) for part in (model, model.refine)]
    assert found == [stem + resnet + deeper + bridge + decoder + sides + refine, refine]
    assert found[0] == 87_060_360
    dilated = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.dilation == (2, 2)]
    assert len(dilated) == 5, "three of the bridge, two of the deepest stage of the decoder"


class Wiring:
    """The published wiring for six stages, from weights by name: logits of refined, d_1 ... d_6 and bridge."""

    def __init__(self, weights, depths, width):
        self.weights, self.depths, self.size = weights, depths, width

    def conv(self, name, x, stride=1, holes=1):
        bias, kernel = self.weights.get(f"{name}.bias"), self.weights[f"{name}.weight"]
        return F.conv2d(x, kernel, bias, stride, holes * (kernel.shape[-1] // 2), holes)

    def norm(self, name, x):
        mean, var, weight, bias = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def unit(self, name, x, holes=1):
        return self.norm(f"{name}.1", self.conv(f"{name}.0", x, 1, holes)).clamp(min=0)

    def block(self, name, x, stride):
        y = self.norm(f"{name}.norm1", self.conv(f"{name}.conv1", x, stride)).clamp(min=0)
        y = self.norm(f"{name}.norm2", self.conv(f"{name}.conv2", y))
        if f"{name}.shortcut.0.weight" in self.weights:
            x = self.norm(f"{name}.shortcut.1", self.conv(f"{name}.shortcut.0", x, stride))
        return (x + y).clamp(min=0)

    @staticmethod
    def up(x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear")

    def __call__(self, image):
        x, h = self.unit("predict.stem", image), []
        for k, depth in enumerate(self.depths):
            pooled = k >= 4
            x = F.max_pool2d(x, 2, ceil_mode=True) if pooled else x
            for i in range(depth):
                x = self.block(f"predict.encoder.{k}.{i + pooled}", x, 2 if 1 <= k <= 3 and i == 0 else 1)
            h.append(x)
        for i in range(3):
            x = self.unit(f"predict.bridge.{i}", x, 2)
        outputs = [self.up(self.conv("predict.heads.6", x), image)]
        for k in (5, 4, 3, 2, 1, 0):
            x = torch.cat([x if k == 5 else self.up(x, h[k]), h[k]], 1)
            for i in range(3):
                x = self.unit(f"predict.decoder.{k}.{i}", x, 2 if k == 5 and i else 1)
            outputs.append(self.up(self.conv(f"predict.heads.{k}", x), image))
        return [self.refined(outputs[-1]), *outputs[::-1]]

    def refined(self, d1):
        x, seen = self.conv("refine.stem", d1), []
        for i in range(4):
            seen.append(self.unit(f"refine.encoder.{i}", x))
            x = F.max_pool2d(seen[-1], 2, ceil_mode=True)
        x = self.unit("refine.bridge", x)
        for i in range(4):
            x = self.unit(f"refine.decoder.{i}", torch.cat([self.up(x, seen[3 - i]), seen[3 - i]], 1))
        return d1 + self.conv("refine.head", x)


@pytest.mark.parametrize(("size", "labels"), [((64, 64), 1), ((33, 21), 1), ((50, 1), 2)])
def test_values_and_gradients_are_those_of_the_published_wiring(size, labels):
    model, image = build(labels).double(), images(2, 2, *size).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # otherwise 0 and 1
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    found = model(image)
    weights = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in model.state_dict().items()}
    expected = Wiring(weights, TINY["depths"], 4)(image)
    assert found.logits.shape == (2, labels, *size) and len(found.side_logits) == 7
    directions = [images(*z.shape).double() / (k + 1) for k, z in enumerate(expected)]
    for given, reference in zip((found.logits, *found.side_logits), expected, strict=True):
        torch.testing.assert_close(given, reference)
    sum((z * d).sum() for z, d in zip((found.logits, *found.side_logits), directions, strict=True)).backward()
    sum((z * d).sum() for z, d in zip(expected, directions, strict=True)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, msg=name)
        assert p.grad.abs().max() > 0, name


def test_without_refinement_the_first_output_is_d1():
    whole, image = build(), images(1, 2, 19, 32)
    part = build(refine=False)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("refine.")})
    (d1, *rest), found = whole(image).side_logits, part(image)
    torch.testing.assert_close(found.logits, d1)
    for side, reference in zip(found.side_logits, rest, strict=True):
        torch.testing.assert_close(side, reference)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_the_loss_is_the_cross_entropy_of_every_output(labels):
    model, image, y = build(labels), images(2, 2, 20, 17), masks(2, 20, 17, labels=max(labels, 2))
    found = model(image, labels=y)
    known, expected = (y >= 0) & (y != 255), 0
    for z in (found.logits, *found.side_logits):
        if labels == 1:
            expected = expected + F.binary_cross_entropy(z.double().sigmoid()[:, 0][known], y[known].double())
        else:
            expected = expected + F.cross_entropy(z.double(), y.masked_fill(~known, -100))
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-6)
    larger = F.interpolate(y[:, None].float(), scale_factor=2)[:, 0].long()
    assert model(image, labels=larger).loss.isfinite(), "labels may be finer than images"
    nothing = model(image, labels=torch.full_like(y, 255)).loss
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_low_precision_has_finite_losses_of_confident_logits():
    """In half precision a sigmoid is 1 from 9 on, and a confident mistake has no gradient; losses read logits."""
    for dtype in (torch.bfloat16, torch.float16):
        model = build().to(dtype)
        with torch.no_grad():
            model.predict.heads[-1].bias.fill_(-100)
        found = model(images(1, 2, 16, 16).to(dtype), labels=torch.ones(1, 16, 16, dtype=torch.long))
        found.loss.backward()
        assert found.logits.dtype == dtype and found.loss.dtype == torch.float32 and 100 < found.loss < 200
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.predict.heads[-1].bias.grad.item() == pytest.approx(-1, rel=0.01)


def test_saved_weights_statistics_and_outputs_load(tmp_path):
    model, image = build(labels=2).train(), images(3, 2, 21, 30)
    model(image)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again) is BasnetForSemanticSegmentation and again.config.hidden_sizes == WIDTHS
    torch.testing.assert_close(again(image).side_logits, model(image).side_logits, rtol=0, atol=0)
    assert model.predict.stem[1].running_mean.any(), "its norms have seen images"


def test_refusals_of_the_network():
    for options, message in (
        ({"hidden_sizes": [4, 5], "depths": [1]}, "hidden_sizes has 2 numbers and depths 1: give one for each stage"),
        ({"hidden_sizes": []}, "hidden_sizes has 0 numbers"),
        ({"hidden_sizes": [4, 0]}, "hidden_sizes has the number 0: give 1 or more"),
        ({"refine_depth": 0}, "refine_depth has the number 0"),
        ({"num_channels": -1}, "num_channels has the number -1"),
    ):
        with pytest.raises(ValueError, match=message):
            BasnetConfig(**options)
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 8, 8\): give images of 2 channels"):
        build()(images(2, 3, 8, 8))


class Still(BasnetForSemanticSegmentation):
    """With norms that do not look at the batch, so that rows do not depend on each other."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def small(labels):
    torch.manual_seed(0)
    return Still(BasnetConfig(**SMALL, num_labels=labels))


def rows(count=4):
    """As a data set: masks with other numbers of labelled pixels."""
    y = masks(count, 9, 8)
    y[0, :6] = -100
    return [{"pixel_values": x, "labels": m} for x, m in zip(images(count, 1, 9, 8), y, strict=True)]


def trainer_of(folder, model, loss, **options):
    config = ClassConfig(
        output_dir=str(folder), report_to="none", remove_unused_columns=False, max_grad_norm=0,
        per_device_eval_batch_size=4, **{
            "save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1,
            "optim": "sgd", **options,
        },
    )  # fmt: skip
    return ClassTrainer(model, config, loss=loss, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize(("loss", "labels"), [("hybrid", 1), ("hybrid:terms=bce", 2), ("cross_entropy", 2)])
@pytest.mark.parametrize("weights", [None, [0.5], [0.25, 0.0, 2.0]])
def test_any_loss_is_added_over_outputs(loss, labels, weights, tmp_path):
    model, objective = small(labels).eval(), classes.get(loss)
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("pixel_values", "labels")}
    ids = batch["labels"].masked_fill(batch["labels"] == 255, -100)
    trainer = trainer_of(tmp_path, model, loss, deep_supervision=weights)
    found = trainer.compute_loss(model, batch)
    outputs = model(batch["pixel_values"])

    def value(z):
        if objective.labels == "masks":
            return objective(z, ids)
        return objective(z.movedim(1, -1)[ids >= 0], ids[ids >= 0]).mean()

    each = {None: [1, 1, 1], 1: 3 * weights if weights else []}.get(weights and len(weights), weights)
    expected = value(outputs.logits) + sum(w * value(z) for w, z in zip(each, outputs.side_logits, strict=True))
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    given, reference = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in (found, expected))
    torch.testing.assert_close(given, reference)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.item(), rel=1e-4), "evaluation has the same loss"


def test_without_supervision_side_outputs_are_not_trained(tmp_path):
    model = small(1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer_of(tmp_path, model, "hybrid", deep_supervision=[0]).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"refine.head.weight", "predict.heads.0.weight"} <= moved
    assert not moved & {"predict.heads.1.weight", "predict.heads.2.weight"}


def test_accumulated_batches_are_one_batch(tmp_path):
    """Pixels are counted over all of a step, whose images have other numbers of them."""
    found = []
    for size in (4, 1):
        model = small(2)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = trainer_of(tmp_path / str(size), model, "cross_entropy", class_weights=[0.5, 2.0], **options)
        trainer.train()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_training_resumes_bit_equal(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    torch.manual_seed(0)
    whole = BasnetForSemanticSegmentation(BasnetConfig(**SMALL, num_labels=1))
    trainer_of(tmp_path, whole, "hybrid", **options).train()
    torch.manual_seed(1)
    resumed = BasnetForSemanticSegmentation(BasnetConfig(**SMALL, num_labels=1))
    trainer_of(tmp_path, resumed, "hybrid", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_supervision_that_cannot_take_effect_is_refused(tmp_path):
    for weights in ([], [-1.0], [float("nan")], 1.0, ["1"]):
        with pytest.raises(ValueError, match=r"deep_supervision is .*: give a list of numbers >= 0"):
            trainer_of(tmp_path, small(1), "hybrid", deep_supervision=weights)
    with pytest.raises(
        ValueError, match=r"deep_supervision is \[1.0\], but .* needs the perturbed of the last output: set"
    ):
        trainer_of(tmp_path, small(2), "smooth_adversarial", deep_supervision=[1.0])
    with pytest.raises(ValueError, match="2 weights, but Still returns 3 side_logits: give one for all, or one for"):
        trainer_of(tmp_path, small(1), "hybrid", deep_supervision=[1.0, 2.0]).train()
    plain = SegformerForSemanticSegmentation(SegformerConfig(
        num_channels=1, num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[4], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=4, num_labels=2,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="SegformerForSemanticSegmentation returns no side_logits: leave it out"):
        trainer_of(tmp_path, plain, "hybrid", deep_supervision=[1.0]).train()


def test_example_compares_each_part_with_the_one_before(tmp_path, monkeypatch, without_progress_bars):
    """One image to learn from, to tune on and to test with; nothing runs twice."""
    install(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    for name in ("basnet", "basnet_arms", "masks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import basnet
    import basnet_arms

    monkeypatch.setattr(basnet, "HELD_OUT", 1)
    monkeypatch.setattr(basnet, "ARMS", {arm: basnet.ARMS[arm] for arm in (*basnet.STEPS, "brightness", "all pixels")})
    tiny = {"hidden_sizes": [2, 2, 3], "depths": [1] * 3, "refine_size": 2, "refine_depth": 1}
    monkeypatch.setattr(basnet_arms, "WIDTHS", basnet_arms.WIDTHS | tiny)
    found = basnet.main(train=1, epochs=1, seeds=1, output=tmp_path / "out")
    assert set(found) == set(basnet.ARMS) and all(0 <= row[0]["IoU"] <= 1 for row in found.values())
    assert found["brightness"][0]["IoU"] == 7 / 8, "a pixel of brightness 76 is as bright as one of 77, and no mask"
    assert found["all pixels"][0]["IoU"] == 7 / 64**2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| + SSIM and IoU: BASNet | " in card.split("Each step against the one before")[1]
    figure = np.array(Image.open(tmp_path / "out" / "outputs.png").convert("L"))
    assert figure.std() > 10, "masks are white on black"
    monkeypatch.setattr(basnet, "fit", None)
    assert basnet.main(train=1, epochs=1, seeds=1, output=tmp_path / "out") == found
