"""A voice out of a mixture: transforms, masks, the network, pre-training, and the ratio that measures it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

from hf_xent.metrics.signals import si_sdr
from hf_xent.models.mask_net import MaskNet, MaskNetConfig
from hf_xent.speech import (
    STFT,
    Mixtures,
    apply_mask,
    floored,
    ideal_binary_mask,
    joined,
    majority,
    separate,
    softened,
    static_mask,
    voice_mask,
    write_wav,
)
from hf_xent.speech.masks import accuracy
from hf_xent.speech.plots import spectrograms
from hf_xent.speech.stft import features
from hf_xent.trainers import ClassConfig, ClassTrainer


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(labels=1, seed=0, **options):
    """A small network whose running statistics are those of noise."""
    torch.manual_seed(seed)
    sizes = {"channels": (3, 4, 4), "dilations": (1, 2), "window_length": 32, "hop_length": 8, **options}
    model = MaskNet(MaskNetConfig(num_labels=labels, **sizes))
    for _ in range(5):
        model(pixel_values=noise(2, 1, 17, 40) - 2)
    return model.eval()


@pytest.mark.parametrize(("window", "hop"), [(32, 8), (32, 16), (30, 7), (256, 64)])
@pytest.mark.parametrize("length", [1, 7, 31, 32, 100, 1023])
def test_the_transform_has_an_inverse_for_any_length(window, hop, length):
    stft, waveform = STFT(window, hop), noise(2, length)
    spectrum = stft.spectrum(waveform)
    assert spectrum.shape == (2, stft.frequencies, 1 + math.ceil(length / hop))
    assert (stft.waveform(spectrum, length) - waveform).abs().max() < 1e-5
    assert torch.allclose(stft.spectrum(waveform[1]), spectrum[1], atol=1e-5)


def test_the_transform_is_the_formula():
    stft, waveform = STFT(8, 4), noise(19).double()
    padded = np.concatenate([np.zeros(4), waveform.numpy(), np.zeros(8)])
    n = np.arange(8)
    weights = np.sin(np.pi * n / 8) ** 2
    frames = np.stack([padded[i * 4 : i * 4 + 8] for i in range(6)], 1)
    expected = np.exp(-2j * np.pi * np.outer(np.arange(5), n) / 8) @ (frames * weights[:, None])
    assert np.allclose(stft.spectrum(waveform).numpy(), expected / np.sqrt((weights**2).sum()))
    loud = STFT().spectrum(noise(64_000))
    assert abs(float(loud.abs().square().mean()) - 1) < 0.02
    assert torch.equal(features(torch.tensor([0j, 1 + 0j])), torch.tensor([math.log(1e-3), 0.0]))


def test_transforms_that_lose_samples_are_refused():
    for options, message in (
        ({"window": 32, "hop": 17}, "hop is 17: choose at most half of the window, 16"),
        ({"window": 1}, "window is 1"),
        ({"window": 31}, "window is 31: choose an even number"),
        ({"rate": 0}, "rate is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            STFT(**options)
    with pytest.raises(ValueError, match=r"spectrum has shape \(17, 3\): 100 samples have \[17, 14\]"):
        STFT(32, 8).waveform(torch.zeros(17, 3, dtype=torch.complex64), 100)


def test_masks():
    voice, music = torch.tensor([[2.0, -3.0, 0.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    mask = ideal_binary_mask(voice, music)
    assert mask.tolist() == [[True, False, False]]
    assert torch.allclose(softened(mask), torch.tensor([[0.98, 0.02, 0.02]]))
    assert floored(torch.tensor([0.1, 0.35, 0.9]), 0.35).tolist() == pytest.approx([0, 0.35, 0.9])
    masks = torch.tensor([[[1, 1, 0, 1], [0, 0, 0, 1]]] * 3)
    assert static_mask(masks).tolist() == [[0.75], [0.25]] and majority(masks) == 0 and majority(masks[:, :1]) == 1
    assert accuracy(torch.tensor([0.5, 0.4, 0.9]), torch.tensor([1, 1, 0])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"accompaniment has shape \(1, 2\)"):
        ideal_binary_mask(voice, music[:, :2])
    with pytest.raises(ValueError, match=r"floor is 1.5"):
        floored(voice, 1.5)
    with pytest.raises(ValueError, match=r"smoothing is 0.5"):
        softened(mask, 0.5)


def test_the_ratio_of_signal_to_distortion():
    signal, other = np.random.default_rng(0).normal(size=(2, 500))
    other -= signal * (signal @ other) / (signal @ signal)
    assert si_sdr(signal, 3.7 * signal, zero_mean=False) == np.inf and si_sdr(signal, -signal) == np.inf
    expected = 10 * np.log10((signal @ signal) / (0.09 * other @ other))
    assert si_sdr(signal, 5 * (signal + 0.3 * other), zero_mean=False) == pytest.approx(expected)
    assert si_sdr(signal, other, zero_mean=False) < -280 and si_sdr(signal, 0 * signal) == -np.inf
    assert si_sdr(signal, signal + 7) == np.inf and si_sdr(signal, signal + 7, zero_mean=False) < 0
    both = si_sdr(np.stack([signal, other]), np.stack([signal + other, signal + other]), zero_mean=False)
    assert both.shape == (2,) and both[0] == pytest.approx(-both[1])
    assert si_sdr(torch.ones(3), torch.tensor([1.0, 1.0, 0.0]), zero_mean=False) == pytest.approx(10 * np.log10(2))
    for bad, message in (
        ((signal, signal[:9]), r"estimate has the shape \(9,\) and signal \(500,\)"),
        ((0 * signal, signal), "signal is silent, or constant"),
        ((0 * signal + 0.1, signal), "signal is silent, or constant"),
        ((signal, signal * np.nan), "nan or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            si_sdr(*bad)


@pytest.mark.parametrize("labels", [1, 2])
def test_masks_of_parts_are_those_of_the_whole(labels):
    model, waveform = net(labels), noise(2, 900)
    stft = STFT(32, 8)
    whole = voice_mask(model, waveform, chunk=10_000)
    assert whole.shape == (2, 17, 114) and 0 < float(whole.min()) < float(whole.max()) < 1
    scaled = waveform / waveform.square().mean(-1, keepdim=True).sqrt()
    logits = model(pixel_values=features(stft.spectrum(scaled))[:, None]).logits
    share = logits[:, 0].sigmoid() if labels == 1 else logits.softmax(1)[:, 1]
    assert torch.allclose(whole, share.detach(), atol=1e-6)
    for chunk in (1, 13, 50, 114):
        assert torch.allclose(voice_mask(model, waveform, chunk=chunk), whole, atol=1e-5)
    assert model.config.context == 2 * 3 - 1 + 3


def test_voice_and_accompaniment_add_up_to_the_mixture():
    model, waveform = net(), noise(2, 333)
    voice, rest = separate(model, waveform, 8000)
    assert voice.shape == waveform.shape and torch.allclose(voice + rest, waveform, atol=1e-5)
    one, other = separate(model, waveform[1])
    assert torch.allclose(one, voice[1], atol=1e-5) and torch.allclose(other, rest[1], atol=1e-5)
    assert torch.allclose(separate(model, 100 * waveform)[0], 100 * voice, atol=1e-3)
    half = separate(model, waveform.bfloat16())[0]
    assert half.dtype == torch.bfloat16 and (half - separate(model, waveform.bfloat16().float())[0]).abs().max() < 0.02
    low = separate(net().bfloat16(), waveform)[0]
    assert low.dtype == torch.float32 and (low - voice).abs().max() < 0.1
    silent = separate(model, torch.zeros(50))
    assert not silent[0].any() and not silent[1].any()
    model.train()
    separate(model, waveform)
    assert model.training and model.down[0].training


def test_masks_that_are_given():
    stft, waveform = STFT(32, 8), noise(3, 200)
    spectrum = stft.spectrum(waveform)
    share = torch.rand(spectrum.shape, generator=torch.Generator().manual_seed(0))
    voice, rest = apply_mask(share, waveform, floor=0.4, stft=stft)
    expected = stft.waveform(torch.where(share >= 0.4, share, 0) * spectrum, 200)
    assert torch.allclose(voice, expected, atol=1e-6)
    other = torch.where(1 - share >= 0.4, 1 - share, 0)
    assert torch.allclose(rest, stft.waveform(other * spectrum, 200), atol=1e-6)
    ones = apply_mask(torch.ones(17, 1), waveform, stft=stft)
    assert torch.allclose(ones[0], waveform, atol=1e-5) and not ones[1].any()
    voice, rest = apply_mask(share, waveform, binary=True, stft=stft)
    assert torch.allclose(voice + rest, waveform, atol=1e-5)
    assert torch.allclose(voice, apply_mask(share >= 0.5, waveform, stft=stft)[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"waveform has shape \(200,\): give mixtures"):
        voice_mask(net(), waveform[0])
    for mask, message in (
        (torch.ones(16, 1), r"mask has shape \(16, 1\), the spectrum \(3, 17, 26\)"),
        (torch.ones(2, 3, 17, 26), "mask has shape"),
        (torch.full((17, 1), 1.1), "values outside of"),
        (torch.full((17, 1), float("nan")), "values outside of"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_mask(mask, waveform, stft=stft)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_segformer_separates_too(labels):
    torch.manual_seed(0)
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [1, 1], "sr_ratios": [2, 1],
             "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [1, 1]}  # fmt: skip
    config = SegformerConfig(num_channels=1, num_labels=labels, num_encoder_blocks=2, decoder_hidden_size=8, **sizes)
    model, waveform = SegformerForSemanticSegmentation(config).eval(), noise(900)
    voice, rest = separate(model, waveform, stft=STFT(32, 8))
    assert torch.allclose(voice + rest, waveform, atol=1e-5) and voice.abs().max() > 0.1
    with pytest.raises(ValueError, match="configuration has no window_length: pass stft"):
        separate(model, waveform)
    model.config.num_channels = 3
    with pytest.raises(ValueError, match="the model reads 3 channels, a spectrogram has one"):
        separate(model, waveform, stft=STFT(32, 8))


def test_what_cannot_be_separated_is_refused():
    model = net()
    for waveform, options, message in (
        (noise(99), {"rate": 16_000}, "rate is 16000, but the model has learned from 8000 samples a second: resample"),
        (noise(2, 2, 9), {}, r"waveform has shape \(2, 2, 9\)"),
        (noise(0), {}, r"waveform has shape \(0,\)"),
        (torch.zeros(9, dtype=torch.int16), {}, "type torch.int16"),
        (noise(9) * float("nan"), {}, "nan or infinite"),
        (noise(9), {"floor": -0.1}, "floor is -0.1"),
        (noise(9), {"floor": 0.1, "binary": True}, "a binary mask has no shares"),
        (noise(9), {"chunk": 0}, "chunk is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            separate(model, waveform, **options)
    model.classifier = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"logits have shape \(1, 3, 17, 14\): choose a model of images"):
        separate(model, noise(99))


def test_the_loss_of_a_mask_is_softened_cross_entropy():
    x, labels = noise(2, 1, 17, 9), noise(2, 17, 9, seed=1) > 0
    one, two = net(1), net(2)
    z = one(pixel_values=x).logits[:, 0]
    expected = F.binary_cross_entropy_with_logits(z, softened(labels))
    for given in (labels, labels.long(), softened(labels)):
        assert torch.allclose(one(pixel_values=x, labels=given).loss, expected)
    part = labels.long()
    part[0], part[1, 3] = -100, 255
    rows = torch.ones_like(part[1], dtype=torch.bool)
    rows[3] = False
    expected = F.binary_cross_entropy_with_logits(z[1][rows], softened(labels)[1][rows])
    assert torch.allclose(one(pixel_values=x, labels=part).loss, expected)
    assert one(pixel_values=x, labels=torch.full_like(part, -100)).loss == 0
    loss = two(pixel_values=x, labels=labels).loss
    smoothed = F.cross_entropy(two(pixel_values=x).logits, labels.long(), label_smoothing=0.04)
    assert torch.allclose(loss, smoothed), "two classes, smoothed twice as much, are the same loss"
    targets = noise(2, 17, 9, seed=2)
    assert torch.allclose(one(pixel_values=x, targets=targets).loss, (z - targets).square().mean())
    loss.backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in two.parameters())


def test_the_network_takes_any_size_and_says_what_does_not_fit():
    model = net()
    for shape in ((1, 1, 1, 1), (2, 1, 129, 3), (1, 1, 6, 50)):
        out = model(pixel_values=noise(*shape), output_hidden_states=True)
        assert out.logits.shape == shape and len(out.hidden_states) == 3 + 2 + 2
    for bad, message in (
        ({"pixel_values": noise(1, 2, 17, 9)}, r"pixel_values has shape \(1, 2, 17, 9\)"),
        ({"pixel_values": noise(1, 1, 17, 9), "labels": noise(1, 1, 17, 9)}, r"labels has shape \(1, 1, 17, 9\)"),
        ({"pixel_values": noise(1, 1, 17, 9), "targets": noise(1, 9)}, r"targets has shape \(1, 9\)"),
        ({"pixel_values": noise(1, 1, 9, 9), "targets": noise(1, 9, 9), "labels": noise(1, 9, 9)}, "are both given"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**bad)
    for options, message in (
        ({"channels": ()}, "channels is"), ({"channels": (0,)}, "channels is"), ({"dilations": (0,)}, "dilations is"),
        ({"smoothing": 0.5}, "smoothing is 0.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MaskNetConfig(**options)
    with pytest.raises(ValueError, match="num_labels is 3: a mask has 1 label, or 2"):
        MaskNet(MaskNetConfig(num_labels=3))


def test_a_saved_network_separates_the_same(tmp_path):
    model, waveform = net(2), noise(300)
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again) is MaskNet and STFT.of(again.config) == STFT(32, 8)
    assert torch.equal(separate(again, waveform)[0], separate(model, waveform)[0])


def test_mixtures_are_drawn_by_their_index():
    voice, music, stft = noise(400), noise(300, seed=1), STFT(32, 8)
    options = {"count": 4, "frames": 6, "stft": stft, "gain": 6.0}
    rows = {kind: Mixtures(voice, music, kind=kind, **options) for kind in ("masks", "autoencoder", "voice")}
    seen, label = (rows["masks"][2][name] for name in ("pixel_values", "labels"))
    assert seen.shape == (1, 17, 6) and label.shape == (17, 6) and label.dtype == torch.long
    kept, coded = rows["voice"][2], rows["autoencoder"][2]
    assert torch.equal(kept["pixel_values"], seen) and torch.equal(kept["targets"], coded["targets"])
    assert torch.equal(coded["pixel_values"][0], coded["targets"])
    assert torch.equal(kept["targets"][label == 1], seen[0][label == 1])
    assert (kept["targets"][label == 0] == math.log(1e-3)).all()
    assert torch.equal(rows["masks"][2]["pixel_values"], seen) and torch.equal(rows["masks"][-2]["labels"], label)
    other = Mixtures(voice, music, seed=1, **options)
    assert not torch.equal(other[2]["labels"], label) and not torch.equal(rows["masks"][1]["labels"], label)
    assert len(other) == 4 and len(list(other)) == 4
    plain = Mixtures(voice[:40], music[:40], count=1, frames=6, stft=stft)[0]  # one place alone
    parts = stft.spectrum(voice[:40]), stft.spectrum(music[:40])
    assert torch.equal(plain["labels"].bool(), ideal_binary_mask(*parts))
    assert torch.allclose(plain["pixel_values"][0], features(sum(parts) / 2**0.5), atol=1e-5)
    for change, message in (
        ({"kind": "x"}, "kind is 'x': choose one of masks"), ({"count": 0}, "count is 0"), ({"frames": 1}, "frames is"),
        ({"gain": -1.0}, "gain is -1.0"), ({"frames": 60}, "voice is shorter than 472 samples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Mixtures(voice, music, **{**options, **change})


def test_files_are_joined_at_one_level(tmp_path):
    files = [write_wav(tmp_path / f"{i}.wav", noise(100, seed=i).clamp(-1, 1) / 4, 8000) for i in range(2)]
    sound = joined(files, 8000)
    assert sound.shape == (200,) and float(sound.square().mean()) == pytest.approx(1)
    with pytest.raises(ValueError, match="has 8000 samples a second, not 16000"):
        joined(files, 16_000)
    with pytest.raises(ValueError, match="files is empty"):
        joined([], 8000)
    with pytest.raises(ValueError, match="silent"):
        joined([write_wav(tmp_path / "s.wav", torch.zeros(9), 8000)], 8000)


def sounds():
    """A tone and noise: what a network can tell apart in a few steps."""
    time = torch.arange(4000) / 8000
    return 2**0.5 * torch.sin(2 * torch.pi * 1000 * time), noise(4000)


@pytest.mark.parametrize("way", ["class trainer", "trainer"])
def test_training_finds_a_tone_in_noise(way, tmp_path):
    tone, hiss = sounds()
    model = net(2 if way == "class trainer" else 1)
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "learning_rate": 0.02, "max_steps": 30,
               "report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "seed": 0,
               "disable_tqdm": True, "use_cpu": True}  # fmt: skip
    stft = STFT(32, 8)
    if way == "trainer":  # pre-training first
        rows = Mixtures(tone, hiss, 20, 32, "voice", stft)
        trainer = Trainer(model, TrainingArguments(**{**options, "max_steps": 5}), train_dataset=rows)
        first = trainer.train().training_loss
        assert math.isfinite(first)
        Trainer(model, TrainingArguments(**options), train_dataset=Mixtures(tone, hiss, 120, 32, stft=stft)).train()
    else:
        config = ClassConfig(loss="cross_entropy:label_smoothing=0.04", **options)
        ClassTrainer(model, config, train_dataset=Mixtures(tone, hiss, 120, 32, stft=stft)).train()
    mixture = tone + noise(4000, seed=5)
    voice, rest = separate(model, mixture)
    assert si_sdr(tone, voice) > si_sdr(tone, mixture) + 5 and si_sdr(mixture - tone, rest) > 0


def test_the_loss_of_the_trainer_is_that_of_the_network(tmp_path):
    tone, hiss = sounds()
    model = net(2)
    rows = Mixtures(tone, hiss, 4, 32, stft=STFT(32, 8))
    config = ClassConfig(
        output_dir=str(tmp_path), loss="cross_entropy:label_smoothing=0.04", report_to="none", use_cpu=True,
        remove_unused_columns=False, per_device_eval_batch_size=4,
    )  # fmt: skip
    found = ClassTrainer(model, config, train_dataset=rows, eval_dataset=rows).evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}
    with torch.no_grad():
        assert found == pytest.approx(float(model.eval()(**batch).loss), rel=1e-4)


def test_a_picture_has_waveforms_and_masks(tmp_path):
    stft, waveform = STFT(32, 8), noise(400)
    parts = {"mixture": waveform, "mask": torch.rand(17, 51), "voice": waveform / 2}
    whole = spectrograms(tmp_path / "new" / "a.png", parts, stft)
    part = spectrograms(tmp_path / "b.png", parts, stft, seconds=0.02)
    pictures = []
    for file in (whole, part):
        with Image.open(file) as picture:
            pictures.append(np.asarray(picture))
    assert pictures[0].shape == pictures[1].shape and pictures[0].shape[1] > 1000
    assert (pictures[0] != pictures[1]).any()
    for bad, message in (({}, "parts has nothing"), ({"mask": torch.rand(16, 51)}, "parts has mask"),
                         ({"batch": noise(2, 2, 9)}, "parts has batch")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            spectrograms(tmp_path / "c.png", bad, stft)
