"""Attacks on classifiers of transformers: images, sounds and texts, padding, dtypes, states, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from hf_xent.classes import predict, resize
from hf_xent.models.embeddings import token_embedding
from hf_xent.models.zero_shot import ZeroShot
from hf_xent.robust import Attack, attack
from hf_xent.robust.inputs import ball_of, bounds, target_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
PROCESSOR = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.2, 0.5])
METHODS = ("pgd", "pma", "apgd:loss=targeted", "pma_plus")


def louder(model):
    """The same model with larger weights, so that inputs matter."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "norm" not in name:
                value.mul_(4)
    return model.eval()


@torch.no_grad()
def level(model, batch):
    """The same model with classes of equal mean logits, so that it does not decide for one of them always."""
    logits = model(**batch).logits
    head = model.classifier
    head.bias -= logits.mean(0)
    return model


def vit(**more):
    torch.manual_seed(0)
    return louder(tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **SMALL, **more)))


def pixels(rows=6):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PROCESSOR.image_mean, PROCESSOR.image_std))
    return (torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - mean) / std


def wav2vec2():
    torch.manual_seed(0)
    sizes = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 8}
    model = tf.Wav2Vec2ForSequenceClassification(
        tf.Wav2Vec2Config(**SMALL, **sizes, **groups, feat_extract_norm="layer")
    )
    x = torch.randn(5, 200) * torch.tensor([1.0, 0.1, 3, 1, 1])[:, None]
    mask = torch.ones(5, 200, dtype=torch.long)
    mask[1:3, 150:], x[1:3, 150:] = 0, 0
    return louder(model), {"input_values": x, "attention_mask": mask}, "input_values"


def ast():
    torch.manual_seed(0)
    config = tf.ASTConfig(**SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=12, num_mel_bins=8)
    return louder(tf.ASTForAudioClassification(config)), {"input_values": torch.randn(5, 12, 8)}, "input_values"


def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = tf.WhisperConfig(**sizes, num_mel_bins=4, max_source_positions=6, num_labels=3, classifier_proj_size=8)
    model, batch = louder(tf.WhisperForAudioClassification(config)), {"input_features": torch.randn(5, 4, 12)}
    return level(model, batch), batch, "input_features"


def text(kind):
    torch.manual_seed(0)
    more = {"vocab_size": 20, "pad_token_id": 0}
    if kind == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **more))
    elif kind == "gpt2":
        config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, num_labels=3, **more)
        model = tf.GPT2ForSequenceClassification(config)
    else:
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL, num_key_value_heads=2, **more))
    ids = torch.randint(1, 20, (5, 7))
    ids[1, 5:], ids[3, 2:] = 0, 0
    return louder(model), {"input_ids": ids, "attention_mask": (ids != 0).long()}, "input_ids"


KINDS = {
    "wav2vec2": wav2vec2,
    "ast": ast,
    "whisper": whisper,
    "bert": lambda: text("bert"),
    "gpt2": lambda: text("gpt2"),
    "llama": lambda: text("llama"),
}


def units(batch, name, given, norm):
    """The units of the documentation's table, row by row in numpy."""
    mask = batch.get("attention_mask")
    found = []
    for i, row in enumerate(given.double().numpy()):
        kept = row if mask is None else row[mask[i].bool().numpy()]
        if name == "input_ids":
            lengths = np.linalg.norm(kept, axis=-1)
            found.append(lengths.mean() / (1 if norm == "2" else kept.shape[-1] ** 0.5))
        else:
            found.append(kept.std() * (kept.size**0.5 if norm == "2" else 1))
    return torch.tensor(found)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("kind", KINDS)
def test_sounds_and_texts(kind, norm):
    """What is returned makes the model wrong, is within epsilon of each row's unit, and leaves padding alone."""
    model, batch, name = KINDS[kind]()
    labels = model(**batch).logits.argmax(-1)
    given = token_embedding(model)(batch["input_ids"]).detach() if name == "input_ids" else batch[name]
    epsilon = 0.5
    found = attack(model, batch, labels, epsilon, 16, "pma", norm=norm)
    assert found.flipped.any()
    assert found.clean.all()
    assert found.inputs.shape == given.shape
    if name == "input_ids":
        layer = token_embedding(model)
        handle = layer.register_forward_hook(lambda *_: found.inputs)
        logits = model(**batch).logits
        handle.remove()
    else:
        logits = model(**{**batch, name: found.inputs}).logits
    assert (logits.argmax(-1) != labels).tolist() == found.flipped.tolist()
    change = (found.inputs - given).double()
    if norm == "inf":
        sizes = change.abs().flatten(1).amax(1)
    else:
        sizes = change.norm(dim=-1).amax(1) if name == "input_ids" else change.flatten(1).norm(dim=1)
    sizes = sizes / units(batch, name, given, norm)
    assert (sizes <= epsilon * (1 + 1e-4)).all()
    assert (sizes > 0.5 * epsilon).all()
    if (mask := batch.get("attention_mask")) is not None:
        assert (change[mask == 0] == 0).all()
        assert (change[mask == 1] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_attacked_as_it_is_alone(kind):
    model, batch, _ = KINDS[kind]()
    model.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    labels = model(**batch).logits.argmax(-1)
    found = attack(model, batch, labels, 0.1, 6, "pma")
    for i in range(len(labels)):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        alone = attack(model, row, labels[i : i + 1], 0.1, 6, "pma")
        assert alone.flipped[0] == found.flipped[i]
        torch.testing.assert_close(alone.inputs[0], found.inputs[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images(dtype):
    """Bounds and epsilon are per channel; a model in bfloat16 is judged on what is returned."""
    model, x = vit().to(dtype), pixels().to(dtype)
    labels = model(pixel_values=x).logits.argmax(-1)
    for method in METHODS:
        found = attack(model, {"pixel_values": x}, labels, 0.1, 20, method, processor=PROCESSOR)
        assert found.flipped.any()
        assert (model(pixel_values=found.inputs).logits.argmax(-1) != labels).tolist() == found.flipped.tolist()
        std = torch.tensor(PROCESSOR.image_std).view(3, 1, 1)
        change = (found.inputs.float() - x.float()).abs() * std
        assert (change.amax((0, 2, 3)) <= 0.1 * (1 + 1e-5)).all()
        assert (change.amax((0, 2, 3)) > 0.09).all()


def test_embeddings_in_half_precision():
    model, batch, _ = text("bert")
    model.to(torch.bfloat16)
    labels = model(**batch).logits.argmax(-1)
    found = attack(model, batch, labels, 0.5, 16, "pma")
    assert found.inputs.dtype == torch.bfloat16
    handle = token_embedding(model).register_forward_hook(lambda *_: found.inputs)
    assert (model(**batch).logits.argmax(-1) != labels).tolist() == found.flipped.tolist()
    handle.remove()
    target = target_of(model, batch, labels)
    assert (ball_of(target, 0.5, "inf").distance(found.inputs.float(), target.center()) <= 1 + 1e-5).all()


def test_zero_shot_classes():
    torch.manual_seed(0)
    encoder, x = vit(), pixels()
    model = ZeroShot(encoder, torch.randn(4, 16), scale=30.0)
    labels = model(pixel_values=x).logits.argmax(-1)
    found = attack(model, {"pixel_values": x}, labels, 0.2, 16, "pma", processor=PROCESSOR)
    assert found.flipped.any()
    assert (model(pixel_values=found.inputs).logits.argmax(-1) != labels).tolist() == found.flipped.tolist()


def test_rows_that_are_wrong_before_are_left_alone():
    model, x = vit(), pixels()
    labels = model(pixel_values=x).logits.argmax(-1)
    labels[2] = (labels[2] + 1) % 3
    found = attack(model, {"pixel_values": x}, labels, 1e-4, 4, "pma", processor=PROCESSOR)
    assert found.clean.tolist() == [True, True, False, True, True, True]
    assert found.flipped.tolist() == [False, False, True, False, False, False]
    assert torch.equal(found.inputs[2], x[2])
    assert found.passes == 6 + 5 * 6  # one of every row, then two phases of two steps and a look at the last point
    nothing = attack(model, {"pixel_values": x[2:3]}, labels[2:3], 1e-4, 4, "pma", processor=PROCESSOR)
    assert nothing.passes == 1


# Losses


@pytest.mark.parametrize("loss", ["aspects:questions=6", "svm", "comp_sum"])
def test_classes_of_a_loss(loss):
    """Outputs beside the classes are not classes."""
    model, x = vit(), pixels()
    resize(model, loss)
    with torch.no_grad():
        model.classifier.weight.normal_()
        level(model, {"pixel_values": x})
        model.classifier.bias[3:] = 100.0  # an argmax of all outputs would be one of these
    labels = predict(model, model(pixel_values=x).logits)
    found = attack(model, {"pixel_values": x}, labels, 0.1, 16, "pma", processor=PROCESSOR)
    assert found.clean.all()
    assert found.flipped.any()
    changed = predict(model, model(pixel_values=found.inputs).logits)
    assert (changed != labels).tolist() == found.flipped.tolist()
    with pytest.raises(ValueError, match="the model has 3 classes"):
        attack(model, {"pixel_values": x}, labels + 3, 0.1, processor=PROCESSOR)


@pytest.mark.parametrize("loss", ["ordinal:kind='coral'", "squared_error", "hl_gauss:low=0, high=1"])
def test_losses_that_decide_otherwise_are_refused(loss):
    model = vit()
    resize(model, loss)
    with pytest.raises(ValueError, match=r"does not decide for the largest of .* logits: attack a classifier"):
        attack(model, {"pixel_values": pixels()}, torch.zeros(6, dtype=torch.long), 0.1, processor=PROCESSOR)


# States


class Noisy(nn.Module):
    """Dropout and batch norm before two classes; it draws a random number a pass, and may be interrupted."""

    def __init__(self, passes=10**9):
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.passes = passes

    def forward(self, input_values):
        torch.rand(()), np.random.default_rng(0)  # as wav2vec2 does for each layer
        self.passes -= 1
        if not self.passes:
            raise KeyboardInterrupt
        return SimpleNamespace(logits=self.linear(self.drop(self.norm(input_values))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("passes", [10**9, 5])
def test_everything_is_left_as_it_was(method, passes):
    """Modes, buffers, gradients, hooks and random numbers, also after an interrupt."""
    torch.manual_seed(0)
    model, x = Noisy(passes), torch.randn(6, 8)
    model.train()
    model.drop.eval()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.ones(2, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, given = torch.get_rng_state(), x.clone()
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    run = (model, {"input_values": x}, labels, 0.01, 12, method)
    if passes == 5:
        with pytest.raises(KeyboardInterrupt):
            attack(*run)
    else:
        assert attack(*run).clean.any()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (model, model.norm, model.drop, model.linear)] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.linear.parameters()] == [True, False]
    assert torch.equal(model.linear.weight.grad, torch.ones(2, 8))
    assert model.norm.weight.grad is None
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert torch.is_grad_enabled()


def test_an_interrupt_removes_the_embeddings():
    model, batch, _ = text("bert")
    model.classifier.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        attack(model, batch, torch.zeros(5, dtype=torch.long), 0.1)
    assert not token_embedding(model)._forward_hooks


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it(context):
    model, x = vit(), pixels()
    labels = model(pixel_values=x).logits.argmax(-1)
    expected = attack(model, {"pixel_values": x}, labels, 0.1, 12, "pma", processor=PROCESSOR)
    with context():
        found = attack(model, {"pixel_values": x * 1}, labels * 1, 0.1, 12, "pma", processor=PROCESSOR)
        assert not torch.is_grad_enabled()
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.flipped, expected.flipped)


# Ranges of images


@pytest.mark.parametrize(
    ("processor", "low", "high"),
    [
        (SimpleNamespace(image_mean=[0.5], image_std=[0.25]), [-2], [2]),
        (SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5], image_std=[0.5])), [-1], [1]),
        (SimpleNamespace(image_mean=0.5, image_std=0.5, do_rescale=True, rescale_factor=1 / 255), [-1], [1]),
        (SimpleNamespace(do_normalize=False, image_mean=[0.5], image_std=[0.5]), [0], [1]),
        (SimpleNamespace(do_normalize=False, rescale_factor=1 / 127.5, rescale_offset=True), [-1], [1]),
        (SimpleNamespace(do_normalize=False, rescale_factor=1.0), [0], [255]),
    ],
)
def test_bounds_of_processors(processor, low, high):
    found = bounds(processor)
    assert found[0] == pytest.approx(low)
    assert found[1] == pytest.approx(high)


def test_videos_have_bounds_per_channel():
    x = pixels(2).unsqueeze(1).expand(2, 3, 3, 8, 8)
    labels = torch.zeros(2, dtype=torch.long)
    ball = ball_of(target_of(nn.Linear(1, 1), {"pixel_values": x}, labels), 0.1, "inf", PROCESSOR)
    assert ball.high.shape == (2, 1, 3, 1, 1)
    torch.testing.assert_close(ball.unit.flatten(), 1 / torch.tensor(PROCESSOR.image_std))


# What is refused


def asked(**changes):
    """The arguments of an attack on images, but for some."""
    model, x = vit(), pixels()
    given = {"model": model, "batch": {"pixel_values": x}, "labels": model(pixel_values=x).logits.argmax(-1)}
    return {**given, "epsilon": 0.1, "steps": 2, "processor": PROCESSOR, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epsilon": 0}, "epsilon is 0: choose a number above 0"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"norm": 1}, "norm is '1': choose inf or 2"),
        ({"method": "fgsm"}, "attack is 'fgsm': choose one of"),
        ({"processor": None}, "processor is NoneType without image_mean and image_std.*pass the image processor"),
        ({"processor": SimpleNamespace(image_mean=[0.5], image_std=[0.0])}, "all std above 0"),
        ({"processor": SimpleNamespace(image_mean=[0.5] * 2, image_std=[0.5] * 2)}, "has 2 channels"),
        ({"batch": {"pixel_values": pixels() * 255}}, "outside of the processor's .*: pass the processor that made"),
        ({"batch": {"pixel_values": pixels() * float("nan")}}, "nan or infinite"),
        ({"batch": {"pixel_values": pixels().to(torch.uint8)}}, "pixel_values are torch.uint8"),
        ({"batch": {"pixel_values": pixels()[:0]}, "labels": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"batch": {}}, "batch has no inputs: give one of pixel_values"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 0])}, "labels are 0 to 3, but the model has 3 classes"),
        ({"labels": torch.full((6,), -100)}, "labels are -100 to -100"),
        ({"labels": torch.zeros(6)}, "labels are torch.float32: pass the ids"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels are \[5\], logits \[6, 3\]"),
    ],
)
def test_bad_input_is_refused_in_a_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as error:
        attack(**asked(**changes))
    assert "\n" not in str(error.value)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="attack takes no radius: its options are norm, processor, seed"):
        attack(**asked(radius=1))


def test_classifiers_of_tokens_and_values_are_refused():
    ids, labels = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    tokens = tf.BertForTokenClassification(tf.BertConfig(**SMALL, vocab_size=20))
    with pytest.raises(ValueError, match="attack a classifier of whole rows"):
        attack(tokens, {"input_ids": ids}, labels, 0.1)
    value = tf.BertForSequenceClassification(tf.BertConfig(**{**SMALL, "num_labels": 1}, vocab_size=20))
    with pytest.raises(ValueError, match="the model has one output"):
        attack(value, {"input_ids": ids}, labels, 0.1)


def test_texts_of_an_encoder_and_a_decoder_are_refused():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20, "num_labels": 3}
    model = tf.T5ForSequenceClassification(tf.T5Config(**sizes))
    with pytest.raises(ValueError, match="whose decoder reads the embeddings too"):
        attack(model, {"input_ids": torch.ones(2, 4, dtype=torch.long)}, torch.zeros(2, dtype=torch.long), 0.1)


def test_a_mask_of_another_length_is_refused():
    model, batch, _ = wav2vec2()
    batch["attention_mask"] = batch["attention_mask"][:, :7]
    with pytest.raises(ValueError, match=r"attention_mask is \[5, 7\], input_values \[5, 200\]"):
        attack(model, batch, torch.zeros(5, dtype=torch.long), 0.1)


def test_an_attack_of_ones_own():
    """An object is taken as it is."""

    class Nothing(Attack):
        def find(self, target, ball, steps, seed):
            from hf_xent.robust.ascent import Found

            return Found(target.center(), torch.zeros(len(target.labels), dtype=torch.bool), 0)

    found = attack(**asked(method=Nothing()))
    assert not found.flipped.any()
    assert torch.equal(found.inputs, pixels())


def test_labels_and_norms_as_users_write_them():
    torch.manual_seed(0)
    model, x = (
        tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **SMALL)),
        torch.rand(4, 3, 8, 8) - 0.5,
    )
    labels = [0, 1, 2, 0]
    options = {"epsilon": 0.1, "steps": 2, "processor": PROCESSOR}
    expected = attack(model, {"pixel_values": x}, torch.tensor(labels), norm="2", **options)
    for given in (labels, torch.tensor(labels, dtype=torch.int32), torch.tensor(labels, dtype=torch.uint8)):
        found = attack(model, {"pixel_values": x}, given, norm=2, **options)
        assert found.flipped.tolist() == expected.flipped.tolist() and found.passes == expected.passes
    with pytest.raises(ValueError, match="model is 'vit': load it first"):
        attack("vit", {"pixel_values": x}, torch.tensor(labels), **options)
