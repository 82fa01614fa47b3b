"""Zero-shot classifiers of tiny two-tower models and of other encoders: their logits, their heads, attacks on them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from hf_xent import robust
from hf_xent.models.embeddings import class_texts, embedded
from hf_xent.models.projection import ProjectionConfig, ProjectionHead
from hf_xent.models.zero_shot import ZeroShot
from support.encoders import PROCESSOR, TOWERS, D, K, clip, draw, images, texts, vit
from support.models import tiny_tokenizer

EVERY = pytest.mark.parametrize("name", TOWERS)
METHODS = {
    "pixel_values": "get_image_features",
    "input_ids": "get_text_features",
    "input_features": "get_audio_features",
}


def head_of(size=D, std=0.5):
    """A head that is not the identity."""
    head = ProjectionHead(ProjectionConfig(size, 5))
    with torch.no_grad():
        for i, weight in enumerate(head.parameters()):
            weight.copy_(std * draw(*weight.shape, seed=i))
    return head


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@EVERY
def test_logits_are_cosines_of_a_towers_features(name):
    model, batch = TOWERS[name][0](), TOWERS[name][1]()
    with torch.no_grad():
        raw = getattr(model, METHODS[next(iter(batch))])(**batch).pooler_output.double().numpy()
        found = ZeroShot(model, draw(K, D), scale=7.0)(**batch, labels=torch.zeros(6)).logits
    np.testing.assert_allclose(found.numpy(), 7 * unit(raw) @ unit(draw(K, D).double().numpy()).T, rtol=1e-4, atol=1e-5)
    assert np.ptp(found.numpy(), axis=0).max() > 0.1, "rows differ"


def test_clip_gives_its_own_logits():
    model, pixels, words = clip(), images(), texts()
    with torch.no_grad():
        expected = model(**pixels, **words).logits_per_image
        centers = model.get_text_features(**words).pooler_output
        torch.testing.assert_close(ZeroShot(model, centers)(**pixels).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_classes_of_names_are_read_by_the_text_tower():
    model, tokenizer = clip(), tiny_tokenizer()
    found = class_texts(model, tokenizer, ["quick fox", "dog", "the lazy dog"], ["a {}.", "{}"])
    two = [model.get_text_features(**tokenizer([text], return_tensors="pt")) for text in ("a dog.", "dog")]
    mean = sum(output.pooler_output for output in two)
    torch.testing.assert_close(ZeroShot(model, found).centers[1], F.normalize(mean, dim=-1)[0], rtol=1e-4, atol=1e-5)


def test_the_scale_is_the_encoders_own():
    scales = [ZeroShot(TOWERS[name][0](), draw(K, D)).scale for name in ("CLIP images", "SigLIP texts", "CLAP sounds")]
    models = [TOWERS[name][0]() for name in ("CLIP images", "SigLIP texts", "CLAP sounds")]
    names = ("logit_scale", "logit_scale", "logit_scale_a")
    assert scales == pytest.approx([getattr(m, n).exp().item() for m, n in zip(models, names, strict=True)])
    assert ZeroShot(vit(), draw(K, D)).scale == 100


@torch.no_grad()
def test_a_new_head_is_the_identity():
    model, rows, head = clip(), draw(5, D), ProjectionHead(ProjectionConfig(D))
    assert torch.equal(head(rows), rows) and head.inner.weight.std() > 0
    plain, headed = (ZeroShot(model, draw(K, D), h)(**images()).logits for h in (None, head))
    torch.testing.assert_close(headed, plain)  # of unit length twice
    moved = ZeroShot(model, draw(K, D), head_of(), scale=3.0)
    w1, b1, w2, b2 = (p.double().numpy() for p in head_of().parameters())
    e = unit(model.get_image_features(**images()).pooler_output.double().numpy())
    inner = e @ w1.T + b1
    gelu = inner * np.vectorize(lambda u: 0.5 * (1 + torch.special.erf(torch.tensor(u / 2**0.5)).item()))(inner)
    logits = 3 * unit(e + gelu @ w2.T + b2) @ unit(draw(K, D).double().numpy()).T
    np.testing.assert_allclose(moved(**images()).logits.numpy(), logits, rtol=1e-4, atol=1e-5)


def test_the_head_is_less_than_a_hundredth_of_clip():
    """Counted, not loaded."""
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
        head = ProjectionHead(ProjectionConfig(model.config.projection_dim))
    found = ZeroShot(model, draw(K, 512), head, scale=100.0)
    assert found.share() == pytest.approx(262_912 / (151_277_313 + 262_912))
    assert ZeroShot(model, draw(K, 512), scale=100.0).share() == 0


@pytest.mark.parametrize("head", [None, head_of()], ids=["no head", "head"])
def test_what_was_saved_is_loaded(head, tmp_path):
    model = ZeroShot(vit(), draw(K, D), head, scale=2.5)
    model.save_pretrained(tmp_path / "new")
    back = ZeroShot.from_pretrained(tmp_path / "new", vit())
    assert torch.equal(back(**images()).logits, model(**images()).logits) and back.scale == 2.5
    assert not [file for file in (tmp_path / "new").iterdir() if file.stat().st_size > 5000], "without the encoder"
    with pytest.raises(OSError, match=r"centers\.safetensors"):
        ZeroShot.from_pretrained(tmp_path, vit())


@EVERY
def test_every_tower_is_attacked_through_the_head(name):
    model, batch = TOWERS[name][0](), TOWERS[name][1]()
    zero_shot = ZeroShot(model, draw(K, D), head_of(), scale=5.0)
    labels = zero_shot(**batch).logits.argmax(-1)
    found = robust.attack(
        zero_shot, batch, labels, epsilon=2.0 if "texts" in name else 0.5, steps=20, method="pgd", processor=PROCESSOR
    )
    key = next(iter(batch))
    with torch.no_grad():
        if key == "input_ids":
            with embedded(model, found.inputs):
                logits = zero_shot(**batch).logits
            padding = batch["attention_mask"] == 0
            assert torch.equal(found.inputs[padding], zero_shot.get_input_embeddings()(batch[key])[padding])
        else:
            logits = zero_shot(**{**batch, key: found.inputs}).logits
    assert torch.equal(logits.argmax(-1) != labels, found.flipped) and found.flipped.any() and found.clean.all()
    assert all(parameter.grad is None for parameter in zero_shot.parameters())


@pytest.mark.parametrize(
    ("centers", "scale", "message"),
    [
        (draw(D), None, r"centers have the shape \(8,\)"),
        (draw(1, D), None, r"centers have the shape \(1, 8\)"),
        (torch.zeros(K, D), None, "give finite ones above 0"),
        (draw(K, D) / 0, None, "give finite ones above 0"),
        (draw(K, D), 0, "scale is 0: choose"),
        (draw(K, D), float("nan"), "scale is nan: choose"),
    ],
)
def test_refusals(centers, scale, message):
    with pytest.raises(ValueError, match=message):
        ZeroShot(vit(), centers, scale=scale)


@pytest.mark.parametrize("options", [{"size": 0}, {"hidden_size": 0}, {"hidden_size": 2.5}])
def test_widths_are_whole_numbers(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        ProjectionHead(ProjectionConfig(**options))


def test_an_encoder_without_hidden_states_is_refused():
    class Plain(nn.Module):
        config = None

        def forward(self, **inputs):
            return None

    with pytest.raises(ValueError, match="model is a Plain"):
        ZeroShot(Plain(), draw(K, D))(**images())


def test_centers_of_another_encoder_are_refused():
    model = ZeroShot(clip(), draw(3, D + 1))
    with pytest.raises(ValueError, match=f"features are {D} numbers, centers {D + 1}: make both by one encoder"):
        model(**images())
