"""A voice out of music: a network of masks over spectrograms, trained on real prompts and real music.

    apt-get download asterisk-core-sounds-{en,fr}{,-wav} asterisk-moh-opsound-wav
    for package in *.deb; do dpkg -x $package sounds; done
    python examples/voice_separation.py sounds [--output out/voice_separation]

Mixtures are at 0 dB, 8 kHz. Training: 70 % of the English prompts, three pieces of one artist. Validation: 10 %, and
a piece of another artist. Tests, of two minutes at most: the other prompts with a piece of a third artist ('other
music') or with the ends of the three pieces ('known music'); French prompts, another speaker's, with the third piece.
Arms, of as many steps each: the network; after the authors' pre-training, an autoencoder of the masked mixture, for a
quarter of the steps; after one that has to find the masked mixture in the mixture. The floor of the mask, of eleven, is
the best on validation. Controls: the mixture; the mean training mask of each frequency; the more frequent class of the
test for all bins, whose share is what 'bins', the accuracy of masks, has to exceed; the ideal mask, which knows it all.
Decided before: the network separates if its voice, in other music, is more than 3 dB above the static mask with its
95 % interval over seeds; a pre-training helps if the interval of its difference to the network is above 0.
"""

from pathlib import Path
from typing import Any

import torch
import typer
from voice_networks import PRETRAINING, ideal, ratios, trained
from voice_sounds import Pair, sounds

from hf_xent.experiments.study import Study
from hf_xent.models.mask_net import MaskNetConfig
from hf_xent.speech import STFT, majority, separate, static_mask, voice_mask, write_wav
from hf_xent.speech.masks import accuracy
from hf_xent.speech.plots import spectrograms

ARMS = dict.fromkeys(("mixture", "static mask", "majority", "ideal mask", *PRETRAINING))
METRICS = ("other music", "binary mask", "its music", "bins", "known music", "French")
FLOORS = [round(0.05 * i, 2) for i in range(11)]


def listen(folder: Path, model: Any, sound: Pair, floor: float, stft: STFT) -> None:
    """Ten seconds to hear, and to see."""
    voice, music = (part[: 10 * stft.rate] for part in sound)
    found, rest = separate(model, voice + music, floor=floor)
    mask = voice_mask(model, (voice + music)[None])[0]
    for name, waveform in {"mixture": voice + music, "voice": voice, "found": found, "rest": rest}.items():
        write_wav(folder / f"{name}.wav", waveform / waveform.abs().max().clamp(min=1e-6), stft.rate)
    pictures = {"mixture": voice + music, "mask of the network": mask, "voice, found": found, "voice": voice}
    spectrograms(folder / "spectrograms.png", pictures, stft)


def main(folder: str, steps: int = 1200, seeds: int = 3, seconds: float = 120, output: Path = Path("out/voice")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Voice", METRICS, "static mask", output, seeds, {"steps": steps, "seconds": seconds})
    stft = STFT.of(MaskNetConfig())
    parts = sounds(folder, stft, seconds)
    known = ideal((parts.voice[: len(parts.music)], parts.music[: len(parts.voice)]), stft)
    truths = {name: ideal(sound, stft) for name, sound in parts.tests.items()}
    truth, shape = truths["other music"], truths["other music"].shape
    half = torch.full((1, 1), 0.5)  # voice and music are both the mixture
    controls = {"mixture": half, "static mask": static_mask(known), "majority": torch.full((1, 1), majority(truth))}
    for arm, seed in study.runs(ARMS):
        floor, masks = 0.0, truths if arm == "ideal mask" else dict.fromkeys(truths, controls.get(arm, half))
        if arm in PRETRAINING:
            model = trained(arm, seed, parts, steps, output / "run")
            valid = voice_mask(model, sum(parts.valid)[None])[0]
            floor = max(FLOORS, key=lambda h: ratios(valid, parts.valid, stft, floor=h)[0])
            masks = {name: voice_mask(model, sum(sound)[None])[0] for name, sound in parts.tests.items()}
            if not seed:
                listen(output / arm.replace(" ", "_"), model, parts.tests["other music"], floor, stft)
        row = {"bins": accuracy(masks["other music"].expand(shape), truth), "floor": floor}
        if arm != "majority":
            found = {name: ratios(masks[name], sound, stft, floor=floor) for name, sound in parts.tests.items()}
            binary = ratios(masks["other music"], parts.tests["other music"], stft, binary=True)[0]
            row |= {name: voice for name, (voice, _) in found.items()}
            row |= {"its music": found["other music"][1], "binary mask": binary}
        study.record(arm, seed, **row)
    return study.report("Made by `examples/voice_separation.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
