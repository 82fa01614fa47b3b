"""Speech encoders by cross-entropy, CTC, or CTC and transport, on real prompts: what they write, where they lie.

    python examples/siamese_ctc.py FOLDER [--seeds 3] [--output out/siamese_ctc]

FOLDER has Debian's packages asterisk-core-sounds-en, -en-wav, -fr and -fr-wav, unpacked (`hf_xent.data.asterisk`). Rows
are the prompts of up to 2 s that are in both languages, one for each text; 60 drawn by the seed are for the test.

    CE               encoder and decoder, cross-entropy of letters
    CTC              the same encoder with a head of letters, CTC
    CTC + OT         and transport to the states of a text encoder of letters, trained from random weights beside it
    CTC, text later  the model of 'CTC', frozen; then a text encoder is trained to its states by the same transport
    CTC, no text     the model of 'CTC' and a text encoder with random weights

Measured on the test: CER, the character error rate; R@1, how often the nearest transcript of the 60, by the cosine of
mean states, is the right one (chance .017); S, the divergence of speech and its transcript, beside 'S, other' to the
next row's and 'S, order', with the states of the transcript in a random order.

Decided before. The gap is smaller with transport if the 95 % interval of S / (S, other) of 'CTC + OT' minus that of
'CTC, no text', seed by seed, is below 0, and joint training adds to it if that to 'CTC, text later' is. States find
their transcript if the interval of R@1 is above chance. Order counts if S is below 'S, order' in every seed. An arm
writes better if the interval of its CER against CTC is below 0, and writes at all if it is below the better of the
empty answer (1) and the best constant one of 100 training transcripts. All have the same rate, rows and epochs; nothing
is tuned. A few minutes of speech make no recogniser: the claim is about the gap and its order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from siamese_arms import siamese, written_by_decoder
from siamese_measures import constant, gap, greedy
from spoken_models import ctc_model, text_model
from spoken_prompts import split, written

from hf_xent.experiments.study import Study
from hf_xent.metrics.edits import error_rate
from hf_xent.trainers.siamese_collator import SiameseCollator

ARMS = ("CTC", "CTC + OT", "CE", "CTC, no text", "CTC, text later")
METRICS = ("CER", "R@1", "S", "S, other", "S, order", "ratio")


def ran(arm: str, seed: int, folder: str, epochs: float, place: Path) -> dict[str, float]:
    """Trains an arm, keeps its encoder, and measures it."""
    train, test = split(folder, seed)
    answers, batch, text = [written(row["labels"]) for row in test], SiameseCollator()(test), None
    if arm == "CE":
        model = written_by_decoder(seed, train, epochs)
        model.encoder.save_pretrained(place)
    elif arm.startswith("CTC,"):
        model = ctc_model(seed).from_pretrained(place.parent / f"CTC-{seed}").eval()
        text = text_model(seed).eval()
        if arm == "CTC, text later":
            _, text = siamese(seed, train, epochs, model.requires_grad_(False))
    else:
        model, text = siamese(seed, train, epochs, **({"ot_weight": 0} if arm == "CTC" else {}))
        model.save_pretrained(place)
    found = {} if text is None else gap(model.eval().wav2vec2_bert, text, test)
    answered = error_rate(answers, greedy(model, batch))
    return {"CER": answered, "constant CER": constant(train, answers), **found}


def main(folder: str, seeds: int = 3, output: Path = Path("out/siamese_ctc"), epochs: float = 30) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("CTC and transport", METRICS, "CTC", output, seeds, {"epochs": epochs})
    for arm, seed in study.runs(ARMS):
        study.record(arm, seed, **ran(arm, seed, folder, epochs, output / "models" / f"{arm}-{seed}"))
    return study.report(f"Made by `examples/siamese_ctc.py` of hf_xent.\n\n{__doc__}")


if __name__ == "__main__":
    typer.run(main)
