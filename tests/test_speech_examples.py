"""The example of voice separation, on a few seconds of made sounds: all arms in one seed, and nothing is run twice."""

import gzip
import json
import runpy
from pathlib import Path

import pytest
import torch

from hf_xent import speech

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path):
    """Packages as they unpack: high noise for prompts, and low noise for music."""
    draw = torch.Generator().manual_seed(0)
    for language, voice in (("en", "en_US_f_Allison"), ("fr", "fr_CA_f_June")):
        keys = [f"digits/{i}" for i in range(10)]
        document = tmp_path / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        document.parent.mkdir(parents=True)
        document.write_bytes(gzip.compress("".join(f"{key}: {key[-1]}\n" for key in keys).encode()))
        for key in keys:
            high = torch.randn(4001, generator=draw).diff() / 8
            speech.write_wav(tmp_path / f"usr/share/asterisk/sounds/{voice}/{key}.wav", high, 8000)
    for i in range(5):
        low = torch.randn(16_001, generator=draw).unfold(0, 2, 1).sum(1) / 8
        speech.write_wav(tmp_path / f"usr/share/asterisk/moh/{i}.wav", low, 8000)
    return tmp_path


@pytest.mark.slow
def test_a_voice_is_found_in_music(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "voice_separation.py"))
    out = folder / "out"
    found = example["main"](str(folder), steps=8, seeds=1, seconds=1, output=out)
    assert found.keys() == example["ARMS"].keys()
    assert json.loads((out / "results.json").read_text())["results"].keys() == found.keys()
    assert example["main"](str(folder), steps=8, seeds=1, seconds=1, output=out) == found
    rows = {arm: seeds[0] for arm, seeds in found.items()}
    for arm, row in rows.items():
        assert row.keys() == ({"bins", "floor"} if arm == "majority" else {*example["METRICS"], "floor"})
    assert rows["ideal mask"]["bins"] == 1 and rows["majority"]["bins"] >= 0.5
    assert rows["ideal mask"]["other music"] > rows["mixture"]["other music"] + 5
    assert rows["mixture"]["other music"] == pytest.approx(0, abs=1), "mixtures are at 0 dB"
    assert len({rows[arm]["other music"] for arm in ("network", "autoencoder", "voice in mixture")}) == 3
    for name in ("mixture", "voice", "found", "rest"):
        assert len(speech.read_wav(out / f"network/{name}.wav")[0]) == 8000
    assert (out / "network/spectrograms.png").stat().st_size > 10_000
