"""English speech to French text: does it matter how the speech encoder was trained before?

    python examples/speech_translation.py FOLDER [--pretrained out/siamese_ctc/models] [--output out/speech_translation]

The rows, their split and the encoders are those of siamese_ctc.py, which has to be run before, with as many seeds. A
decoder of two layers with random weights, the same for all arms of a seed, is trained with the encoder to write the
French prompt by cross-entropy of letters. Arms are the encoder's start: random weights ('none'), or what 'CE', 'CTC'
and 'CTC + OT' have learned on the English rows of the same training set. 'no speech' has one frame of zeros as its
input, so that it is a language model of French prompts: what it reaches needs no speech.

Measured on the test: nats of a letter, the share of letters that are the likeliest ones, given those before; and 'other
speech', the nats where each row has the speech of the next one.

Decided before. A start helps if the 95 % interval of its difference to 'none' in nats, seed by seed, is below 0. An arm
uses the speech if its nats are below those of 'no speech', and below its own with other speech, in every seed. Rate,
rows and epochs are the same for all; nothing is tuned. No translation of a few minutes of speech is usable: the claim
is about the order of the starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from siamese_arms import sequences, written_by_decoder
from spoken_models import decoder_model
from spoken_prompts import split
from transformers import Wav2Vec2BertModel

from hf_xent.experiments.study import Study
from hf_xent.speech import PadSpeech

ARMS = ("none", "no speech", "CE", "CTC", "CTC + OT")
METRICS = ("nats", "accuracy", "other speech")


def muted(rows: list[Any]) -> list[Any]:
    """Rows without speech."""
    return [{**row, "input_features": torch.zeros_like(row["input_features"][:1])} for row in rows]


@torch.no_grad()
def measured(model: Any, rows: list[Any]) -> dict[str, float]:
    """Nats of a letter and the share of right ones, under the speech of each row and of another one."""
    batch, found = PadSpeech()(sequences(rows, "french")), {}
    kept = batch["labels"] != -100
    for name, shift in (("nats", 0), ("other speech", 1)):
        speech = {key: batch[key].roll(shift, 0) for key in ("input_features", "attention_mask")}
        logits = model(**speech, labels=batch["labels"]).logits[kept]
        found[name] = torch.nn.functional.cross_entropy(logits, batch["labels"][kept]).item()
        found.setdefault("accuracy", (logits.argmax(-1) == batch["labels"][kept]).float().mean().item())
    return found


def ran(arm: str, seed: int, folder: str, epochs: float, pretrained: Path) -> dict[str, float]:
    """Trains an arm and measures it."""
    train, test = (muted(rows) if arm == "no speech" else rows for rows in split(folder, seed))
    place = None if arm in ("none", "no speech") else pretrained / f"{arm}-{seed}"
    encoder = None if place is None else Wav2Vec2BertModel.from_pretrained(place)
    return measured(written_by_decoder(seed, train, epochs, "french", decoder_model(seed, encoder)), test)


def main(
    folder: str,
    pretrained: Path = Path("out/siamese_ctc/models"),
    seeds: int = 3,
    output: Path = Path("out/speech_translation"),
    epochs: float = 15,
) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Speech translation", METRICS, "none", output, seeds, {"epochs": epochs})
    for arm, seed in study.runs(ARMS):
        study.record(arm, seed, **ran(arm, seed, folder, epochs, pretrained))
    return study.report(f"Made by `examples/speech_translation.py` of hf_xent.\n\n{__doc__}")


if __name__ == "__main__":
    typer.run(main)
