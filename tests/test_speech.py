"""Waveforms, log-mel features and batches of utterances."""

import struct
import wave

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from hf_xent.speech import PadSpeech, frame_count, log_mel, read_wav, standardized, write_wav
from hf_xent.speech.features import mel_filters


def written(path, content, width, channels=1, rate=8000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


@pytest.mark.parametrize(
    ("width", "content", "expected"),
    [
        (1, bytes([0, 64, 128, 255]), [-1, -0.5, 0, 127 / 128]),
        (2, struct.pack("<4h", -(2**15), -(2**14), 0, 2**15 - 1), [-1, -0.5, 0, 1 - 2**-15]),
        (3, bytes([0, 0, 128, 0, 0, 192, 0, 0, 0, 255, 255, 127]), [-1, -0.5, 0, 1 - 2**-23]),
        (4, struct.pack("<4i", -(2**31), -(2**30), 0, 2**31 - 2**8), [-1, -0.5, 0, 1 - 2**-23]),
    ],
)
def test_samples_of_every_width_are_read(width, content, expected, tmp_path):
    waveform, rate = read_wav(written(tmp_path / "a.wav", content, width, rate=16_000))
    assert rate == 16_000 and waveform.dtype == torch.float32
    assert torch.equal(waveform, torch.tensor(expected))
    stereo, _ = read_wav(written(tmp_path / "b.wav", content, width, channels=2))
    assert torch.equal(stereo, waveform.reshape(2, 2).mean(1))


def test_a_written_waveform_is_read_within_half_a_step(tmp_path):
    waveform = torch.rand(1001, generator=torch.Generator().manual_seed(0)) * 2 - 1
    waveform[0] = 1.0  # one step above the largest number of 16 bits
    again, rate = read_wav(write_wav(tmp_path / "new" / "a.wav", waveform, 8000))
    assert rate == 8000 and (again - waveform)[1:].abs().max() <= 2**-16 and again[0] == 1 - 2**-15
    for bad, message in (
        (torch.tensor([0.0, 1.5]), "waveform has samples up to 1.5: divide it by its peak"),
        (torch.tensor([float("nan")]), "samples up to nan"),
        (torch.zeros(2, 3), r"waveform has shape \(2, 3\): give one waveform"),
        (torch.zeros(0), r"waveform has shape \(0,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_wav(tmp_path / "bad.wav", bad, 8000)


def test_files_that_are_no_samples_are_refused(tmp_path):
    whole = written(tmp_path / "a.wav", bytes(20), 2).read_bytes()
    float_format = whole.replace(struct.pack("<HH", 1, 1), struct.pack("<HH", 3, 1), 1)
    cases = {
        b"": "it ends in its header",
        b"no such format " * 5: "file does not start with RIFF id",
        float_format: "unknown format: 3; give a WAV file of uncompressed PCM samples",
        whole[:-4]: "has 8 of the 10 samples that its header names",
        written(tmp_path / "none.wav", b"", 2).read_bytes(): "has 0 of the 0 samples",
    }
    for content, message in cases.items():
        (tmp_path / "bad.wav").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_wav(tmp_path / "bad.wav")


@pytest.mark.parametrize(("rate", "bins", "samples"), [(8000, 80, 2000), (16_000, 40, 1999), (8000, 23, 150)])
def test_log_mel_is_that_of_transformers(rate, bins, samples):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    length, step = rate * 25 // 1000, rate // 100
    size = 2 ** (length - 1).bit_length()
    filters = mel_filter_bank(size // 2 + 1, bins, 0, rate / 2, rate, norm=None, mel_scale="htk")
    assert np.abs(mel_filters(size // 2 + 1, bins, rate).numpy() - filters).max() < 1e-6
    sound = np.pad(waveform.double().numpy(), (0, max(0, length - samples)))
    options = {"center": False, "power": 2.0, "mel_filters": filters, "log_mel": "log", "mel_floor": 1e-10}
    expected = spectrogram(sound, window_function(length, "hann"), length, step, size, **options).T
    features = log_mel(waveform, rate, bins=bins)
    assert features.shape == expected.shape == (frame_count(samples, rate), bins)
    assert np.abs(features.numpy() - expected).max() < 1e-3
    assert torch.allclose(log_mel(torch.stack([waveform, waveform]), rate, bins=bins)[1], features, atol=1e-5)
    low = log_mel(waveform.bfloat16(), rate, bins=bins)
    assert low.dtype == torch.bfloat16 and torch.equal(
        low, log_mel(waveform.bfloat16().float(), rate, bins=bins).bfloat16()
    )


def test_silence_is_finite_and_bad_waveforms_are_refused():
    assert torch.equal(log_mel(torch.zeros(400), 8000), torch.full((3, 80), 1e-10).log())
    for bad, message in (
        (torch.zeros(()), r"shape \(\)"),
        (torch.zeros(0), r"shape \(0,\)"),
        (torch.zeros(9, dtype=torch.long), "type torch.int64"),
        (torch.tensor([0.0, float("nan")]), "nan or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            log_mel(bad, 8000)
    with pytest.raises(ValueError, match="bins is 128, but of 129 frequencies some bands have none"):
        log_mel(torch.zeros(400), 8000, bins=128)
    with pytest.raises(ValueError, match="bins is 0: choose a whole number of at least 1"):
        log_mel(torch.zeros(400), 8000, bins=0)
    with pytest.raises(ValueError, match="less than a sample at rate 8000"):
        log_mel(torch.zeros(400), 8000, hop=1e-5)


def test_standardized_features_do_not_depend_on_padding():
    draw = torch.Generator().manual_seed(0)
    long, short = torch.randn(9, 4, generator=draw) * 3 + 2, torch.randn(5, 4, generator=draw)
    short[:, 1] = 7.0  # a constant band
    batch = PadSpeech()([{"input_features": long, "labels": [1, 2]}, {"input_features": short, "labels": [3]}])
    lengths = batch["attention_mask"].sum(1)
    batch["input_features"][1, 5:] = 1e4  # what padding holds does not matter
    features = standardized(batch["input_features"], lengths)
    assert torch.allclose(features[0], (long - long.mean(0)) / long.std(0, unbiased=False), atol=1e-5)
    assert torch.allclose(features[1, :5], standardized(short), atol=1e-6) and not features[1, 5:].any()
    assert not features[1, :5, 1].any()
    assert batch["labels"].tolist() == [[1, 2], [3, -100]]


def test_batches_are_padded_on_the_right():
    examples = [{"input_values": torch.ones(n), "labels": range(n), "extra": [1] * n} for n in (3, 5)]
    batch = PadSpeech(ids={"labels": -100, "extra": 0, "none": 0}, multiple=4)(examples)
    assert sorted(batch) == ["attention_mask", "extra", "input_values", "labels"]
    assert batch["input_values"].shape == (2, 8) and batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert torch.equal(batch["input_values"], batch["attention_mask"].float())
    assert batch["labels"].tolist() == [[0, 1, 2, -100, -100], [0, 1, 2, 3, 4]]
    assert PadSpeech()([{"input_features": np.ones((2, 3))}])["input_features"].dtype == torch.float32
    assert batch["extra"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    for bad, message in (
        ([], "neither input_features nor input_values"),
        ([{"labels": [1]}], "neither input_features nor input_values"),
        ([examples[0], {"input_values": torch.ones(2)}], "example 1 has no labels, which others have"),
        ([{"input_values": torch.ones(0)}], "example 0 has input_values of length 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PadSpeech()(bad)
    with pytest.raises(ValueError, match="multiple is 0"):
        PadSpeech(multiple=0)
