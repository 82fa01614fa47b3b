"""Landmarks on rings: matrices, polynomials, windows, the objective, backbones, saving, training, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoModelForKeypointDetection,
    ConvNextConfig,
    ResNetConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
)

from hf_xent.localization import draw_landmarks, split_rings
from hf_xent.localization.plots import COLOR
from hf_xent.models.landmark_graphs import ChebyshevConvolution, around, chebyshev, halved, laplacian, ring_matrices
from hf_xent.models.landmarks import LandmarkConfig, LandmarkModel

BACKBONES = {
    "resnet": ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic",
        out_features=["stage1", "stage2"],
    ),
    "convnext": ConvNextConfig(
        num_channels=1, num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], patch_size=4,
        out_features=["stage1", "stage2"],
    ),
    "swin": SwinConfig(
        image_size=32, num_channels=1, patch_size=4, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2,
        out_features=["stage1", "stage2"],
    ),
}  # fmt: skip


def tiny(backbone="resnet", **options):
    torch.manual_seed(0)
    sizes = {"rings": [5, 6], "latent_size": 4, "latent_map": (2, 2), "width": 8, "order": 3, **options}
    return LandmarkModel(LandmarkConfig(backbone_config=BACKBONES[backbone], **sizes)).eval()


def inputs(count=2, size=(32, 32), nodes=11, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, *size, generator=draw), torch.rand(count, nodes, 2, generator=draw)


def test_matrices_of_a_ring_of_five():
    ring, down, up = ring_matrices([5])
    assert down.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1]]
    assert up.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    assert (up @ down @ torch.arange(5.0)).tolist() == [0.5, 1.5, 2.5, 3.25, 4]
    assert ring.tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]


@pytest.mark.parametrize("wrap", [False, True])
def test_matrices_of_several_rings(wrap):
    rings = [44, 50, 26, 3, 7]
    parts, (ring, down, up) = [ring_matrices([n], wrap) for n in rings], ring_matrices(rings, wrap)
    assert halved(rings) == [22, 25, 13, 2, 4] and down.shape == (66, 130) and up.shape == (130, 66)
    for whole, blocks in zip((ring, down, up), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.block_diag(*blocks))
    assert (down.sum(1) == 1).all() and (up.sum(1) == 1).all() and (ring.sum(1) == 2).all()
    assert torch.equal(ring, ring.T)


def test_rings_are_closed_if_asked():
    """An odd ring is halved, and an even one doubled, across its seam."""
    _, down, up = ring_matrices([5], wrap=True)
    assert down[-1].tolist() == [0.5, 0, 0, 0, 0.5] and torch.equal(up, ring_matrices([5])[2])
    _, down, up = ring_matrices([6], wrap=True)
    assert up[-1].tolist() == [0.5, 0, 0.5] and torch.equal(down, ring_matrices([6])[1])
    assert ring_matrices([6])[2][-1].tolist() == [0, 0, 1]


def test_polynomials_of_a_ring_of_four():
    matrix, first = laplacian(ring_matrices([4])[0]), torch.eye(4)[:, :1]
    assert torch.equal(matrix, -ring_matrices([4])[0] / 2)
    found = chebyshev(first, matrix, 3)[..., 0]
    assert found.tolist() == [[1, 0, 0, 0], [0, -0.5, 0, -0.5], [0, 0, 1, 0]]
    assert chebyshev(first, matrix, 1).shape == (1, 4, 1)


def test_polynomials_are_cosines():
    """T_k(cos a) = cos k a, on the eigenvalues; the convolution is their weighted sum, with all gradients."""
    matrix = laplacian(torch.block_diag(ring_matrices([5])[0], ring_matrices([3])[0])).double()
    values, vectors = torch.linalg.eigh(matrix)
    torch.manual_seed(0)
    x, layer = torch.randn(2, 8, 3, dtype=torch.double, requires_grad=True), ChebyshevConvolution(3, 2, 5).double()
    weight = layer.linear.weight.view(2, 5, 3)
    angles = values.clamp(-1, 1).arccos()
    dense = [(vectors * torch.cos(k * angles)) @ vectors.T for k in range(5)]
    expected = sum(power @ x @ weight[:, k].T for k, power in enumerate(dense)) + layer.linear.bias
    torch.testing.assert_close(layer(x, matrix), expected)
    leaves = (x, layer.linear.weight, layer.linear.bias)
    seed = torch.randn_like(expected)
    for found, wanted in zip(torch.autograd.grad(layer(x, matrix), leaves, seed),
                             torch.autograd.grad(expected, leaves, seed), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted)


def sampled(image, x, y):
    """A bilinear sample at cells x and y, counted from the centre of the first; beyond the border, it goes on."""
    x, y = np.clip(x, 0, image.shape[1] - 1), np.clip(y, 0, image.shape[0] - 1)
    j, i = int(min(np.floor(x), image.shape[1] - 2)), int(min(np.floor(y), image.shape[0] - 2))
    rows = image[i : i + 2, j] * (1 - (x - j)) + image[i : i + 2, j + 1] * (x - j)
    return rows[0] * (1 - (y - i)) + rows[1] * (y - i)


def test_windows_are_means_of_bilinear_samples():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    positions = torch.rand(2, 4, 2, dtype=torch.double) * 1.4 - 0.2  # some are outside
    positions[0, 0], positions[1, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    found = around(maps, positions)
    for b in range(2):
        for n in range(4):
            x, y = (positions[b, n] * torch.tensor([7.0, 5.0]) - 0.5).tolist()
            for c in range(3):
                image = maps[b, c].detach().numpy()
                mean = np.mean([sampled(image, x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
                assert found[b, n, c].item() == pytest.approx(mean)
    torch.testing.assert_close(found[1, 1], maps[1, :, 1:4, 2:5].mean((1, 2)), msg="a whole window, in the middle")
    assert torch.autograd.gradcheck(lambda m: around(m, positions), maps)
    low = around(maps.bfloat16(), positions)
    torch.testing.assert_close(low, around(maps.bfloat16().float(), positions).bfloat16())


def by_hand(model, outputs, labels):
    """The objective of labels that are all known, in numpy."""
    landmarks, mu, logvar = (x.detach().double().numpy() for x in (outputs.landmarks, outputs.mu, outputs.logvar))
    first, second = (x.detach().double().numpy() for x in outputs.provisional)
    down, y = ring_matrices(model.config.rings)[1].double().numpy(), labels.double().numpy()
    kl = -0.5 * np.mean(np.mean(1 + logvar - mu**2 - np.exp(logvar), 1))
    squares = ((landmarks - y) ** 2).mean() + ((first - down @ y) ** 2).mean() + ((second - y) ** 2).mean()
    return squares + model.config.kl_weight * kl


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_objective_reaches_every_weight(backbone):
    model, (images, labels) = tiny(backbone, kl_weight=0.3), inputs()
    outputs = model(images, labels=labels)
    assert outputs.landmarks.shape == (2, 11, 2) and [p.shape[1] for p in outputs.provisional] == [6, 11]
    assert outputs.loss.item() == pytest.approx(by_hand(model, outputs, labels), rel=1e-5)
    outputs.loss.backward()
    backbone_free = {n for n, p in model.named_parameters() if p.grad is None}
    assert not {n for n in backbone_free if not n.startswith("backbone.")}
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.startswith(("decoder", "mu", "logvar")))


def test_gradients_are_those_of_finite_differences():
    model, (images, labels) = tiny(kl_weight=0.3).double(), inputs(1)
    head = model.decoder.landmarks.weight

    def loss(weight, start):
        replaced = {"decoder.landmarks.weight": weight, "mu.bias": start}
        return torch.func.functional_call(model, replaced, (images.double(), labels.double())).loss

    assert loss(head, model.mu.bias).dtype == torch.double
    # a window moves with its provisional position, but has no gradient: what is before the skips is tried without them
    assert torch.autograd.gradcheck(lambda w: loss(w, model.mu.bias), head)
    model = tiny(kl_weight=0.3, skip_maps=[]).double()
    assert torch.autograd.gradcheck(lambda b: loss(model.decoder.landmarks.weight, b), model.mu.bias)


def test_latent_variables_are_drawn_in_training_alone():
    model, (images, _) = tiny(), inputs()
    model.backbone.eval()
    once, again = model(images), model(images)
    torch.testing.assert_close(once.landmarks, again.landmarks)
    torch.testing.assert_close(once.landmarks, model.decoder(once.mu, model.backbone(images).feature_maps)[0])
    model.training = True
    torch.manual_seed(3)
    drawn = model(images)
    torch.manual_seed(3)
    z = drawn.mu + torch.exp(drawn.logvar / 2) * torch.randn_like(drawn.mu)
    torch.testing.assert_close(drawn.landmarks, model.decoder(z, model.backbone(images).feature_maps)[0])
    assert not torch.allclose(drawn.landmarks, once.landmarks)


@pytest.mark.parametrize("gone", [float("nan"), -100.0, float("inf")])
def test_missing_landmarks_count_nowhere(gone):
    """The mean over a pair is unknown if one of both is; what is left is the mean of the others."""
    model, (images, labels) = tiny(kl_weight=0.0), inputs()
    labels[0, 2, 1] = gone  # node 2 of the first ring: with node 3 in row 1 of D
    labels[1] = gone
    outputs = model(images, labels=labels)
    known, halves = [i for i in range(11) if i != 2], [i for i in range(6) if i != 1]
    y, down = labels.where(labels.isfinite(), 0), ring_matrices([5, 6])[1]
    first, second = outputs.provisional
    expected = ((outputs.landmarks - y)[0, known] ** 2).mean() + ((second - y)[0, known] ** 2).mean()
    expected += ((first - down @ y)[0, halves] ** 2).mean()
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model(images, labels=torch.full_like(labels, gone)).loss == 0


def test_images_of_any_size_and_rows_apart():
    """x is relative to the width and y to the height; a row does not depend on the others."""
    model = tiny()
    images, labels = inputs(3, (40, 72))
    together = model(images).landmarks
    torch.testing.assert_close(together[1:2], model(images[1:2]).landmarks)
    assert model(images, labels=labels).loss.isfinite()


def test_without_skips():
    model, (images, labels) = tiny(skip_maps=[], kl_weight=0.0), inputs()
    outputs = model(images, labels=labels)
    assert outputs.provisional is None
    torch.testing.assert_close(outputs.loss, ((outputs.landmarks - labels) ** 2).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, (images, labels) = tiny().to(dtype), inputs()
    outputs = model(images.to(dtype), labels=labels)
    assert outputs.landmarks.dtype == dtype and outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(by_hand(model, outputs, labels), rel=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_and_loaded(tmp_path, backbone):
    model, (images, _) = tiny(backbone, wrap=True), inputs()
    model.save_pretrained(tmp_path)
    back = AutoModelForKeypointDetection.from_pretrained(tmp_path)
    assert type(back) is LandmarkModel and type(back.config.backbone_config) is type(BACKBONES[backbone])
    for (name, kept), loaded in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        torch.testing.assert_close(loaded, kept, msg=name)
    torch.testing.assert_close(back(images).landmarks, model(images).landmarks)


def test_other_rings_on_weights_that_were_trained(tmp_path):
    """What does not fit is made anew, the fixed matrices too."""
    tiny().save_pretrained(tmp_path)
    back = LandmarkModel.from_pretrained(tmp_path, rings=[9], ignore_mismatched_sizes=True)
    fresh = LandmarkModel(back.config)
    for name in ("laplacian", "coarse", "down", "up"):
        torch.testing.assert_close(getattr(back.decoder.graph, name), getattr(fresh.decoder.graph, name))
    assert back(inputs()[0]).landmarks.shape == (2, 9, 2)


def test_a_backbone_that_was_trained(tmp_path):
    torch.manual_seed(5)
    trained, model = AutoBackbone.from_config(BACKBONES["resnet"]).eval(), tiny()
    trained.save_pretrained(tmp_path)
    images, _ = inputs()
    assert not torch.allclose(model.backbone(images).feature_maps[0], trained(images).feature_maps[0])
    model.backbone = type(trained).from_pretrained(tmp_path)
    torch.testing.assert_close(model.backbone(images).feature_maps[0], trained(images).feature_maps[0])
    torch.testing.assert_close(
        model(images).landmarks, model.decoder(model(images).mu, trained(images).feature_maps)[0]
    )


def test_training_learns_where_a_square_is(tmp_path):
    """A square is in one of four places; its corners are the ring. Predictions are landmarks alone."""
    rows = []
    for i, j in [(4, 4), (4, 20), (20, 4), (20, 20)] * 8:
        image = torch.zeros(1, 32, 32)
        image[0, i : i + 8, j : j + 8] = 1
        corners = torch.tensor([[j, i], [j + 8, i], [j + 8, i + 8], [j, i + 8]]) / 32
        rows.append({"pixel_values": image, "labels": corners})
    model = tiny(rings=[4], width=16)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=16, learning_rate=1e-2, report_to="none", seed=0,
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=20,
    )  # fmt: skip

    def mse(found):
        return {"mse": ((found.predictions - found.label_ids) ** 2).mean()}

    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=mse)
    assert trainer.label_names == ["labels"]
    trainer.train()
    found = trainer.predict(rows)
    assert found.predictions.shape == found.label_ids.shape == (32, 4, 2)
    of_the_mean = ((found.label_ids - found.label_ids.mean(0)) ** 2).mean()
    assert found.metrics["test_mse"] < of_the_mean / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rings": []}, r"rings is \[\]: give one number"),
        ({"rings": [5, 2]}, r"rings is \[5, 2\]: .* 3 or more"),
        ({"skip_maps": [0]}, r"skip_maps is \[0\]: name two maps, or none"),
        ({"skip_maps": [0, 2]}, "the backbone returns 2 maps: add stages"),
        ({"width": 7}, "width is 7: choose an even number"),
        ({"latent_map": (2, 0)}, r"latent_map \[2, 0\]"),
        ({"order": 0}, "order 0: choose 1 or more"),
        ({"kl_weight": -1}, "kl_weight is -1: choose 0 or more"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_labels_of_other_rings_are_refused():
    images, _ = inputs()
    with pytest.raises(ValueError, match=r"labels has the shape \(2, 10, 2\): .* \(2, 11, 2\)"):
        tiny()(images, labels=torch.zeros(2, 10, 2))
    with pytest.raises(ValueError, match="order is 0"):
        chebyshev(torch.ones(3, 1), torch.eye(3), 0)


def test_rings_over_images(tmp_path):
    """Known rings in blue, those that were found in orange above them, closed, at their places in pixels."""
    square = np.array([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]])
    rings = split_rings(np.concatenate([square[:3], square]), [3, 4])
    assert [ring.tolist() for ring in rings] == [square[:3].tolist(), square.tolist()]
    images = [np.zeros((40, 60)), np.zeros((3, 40, 60)), np.zeros((40, 60, 3), np.uint8)]
    known = [[square * 0.5]] * 3
    file = draw_landmarks(
        images, {"ours": [rings] * 3, "none": [[]] * 3}, tmp_path / "x.png", known=known, titles="abc"
    )
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    orange = (abs(pixels - np.array(COLOR) * 255).max(-1) < 30).any(1)
    blue = (abs(pixels - [0, 154, 222]).max(-1) < 30).any(1)
    half = len(pixels) // 2
    assert orange[:half].any() and not orange[half + 20 :].any() and blue[:half].any() and blue[half:].any()
    with pytest.raises(ValueError, match=r"landmarks has the shape \(4, 2\): give the 7"):
        split_rings(square, [3, 4])
    with pytest.raises(ValueError, match="ours has rings of 1 images, but there are 3"):
        draw_landmarks(images, {"ours": [rings]}, file)
    with pytest.raises(ValueError, match="found has 0 methods"):
        draw_landmarks(images, {}, file)
