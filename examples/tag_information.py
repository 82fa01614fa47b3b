"""What the words of a sentence say about its tags: a model's loss without the words, less its loss with them.

    python examples/tag_information.py brown:FOLDER [--models out/encoder_decoder/models] [--output out/tag_information]

`given` is the loss with the words, of the models that encoder_decoder_sizes.py has kept; `alone` is that of a model of
the same size and training that has read no words. Information is `alone - given`, nats per tag, and infogain its share
of `alone` (Henighan et al. 2020, arXiv:2010.14701); with 95 % intervals over sentences (hf_xent.retrieval). The control
is a third model, trained and measured with the words of other sentences of the same length: its information should be
none, up to what the length tells. `swapped` is the loss of the first model given another sentence's words.
Decided before: words inform if the interval excludes 0 in every seed, and the control's holds values of less than 0.05.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tag_models
import typer
from encoder_decoder_sizes import KEPT
from transformers import PegasusForConditionalGeneration
from word_tags import END, Row, WordTags

import hf_xent
from hf_xent.experiments.study import Study
from hf_xent.retrieval import infogain
from hf_xent.retrieval.information import others

WORDS, CONTROL = "words of the sentence", "words of another sentence"
METRICS = ("alone", "given", "information", "low", "high", "infogain", "swapped")


def swapped(rows: list[Row]) -> list[Row]:
    """The tags of each row beside the words of another row of its length."""
    found, lengths = list(rows), np.array([len(row["labels"]) for row in rows])
    for length in np.unique(lengths):
        places = np.flatnonzero(lengths == length)
        for place, other in zip(places, places[others(len(places))], strict=True):
            found[place] = {**rows[place], "input_ids": rows[other]["input_ids"]}
    return found


def numbers(given: Any, swapped: Any, alone: Any) -> dict[str, float]:
    """The columns of the table."""
    found = infogain(given.sums, alone.sums, given.tokens)
    edges = found.mutual.low, found.mutual.high
    row = (found.alone, found.given, found.mutual.value, *edges, found.share, swapped.mean)
    return dict(zip(METRICS, row, strict=True))


def main(
    source: str,
    steps: int = 600,
    seeds: int = 3,
    models: Path = Path("out/encoder_decoder/models"),
    output: Path = Path("out/tag_information"),
) -> dict[str, Any]:
    """Every seed; returns the metrics by arm and seed."""
    settings = {"source": source.partition(":")[0], "steps": steps, "rate": tag_models.RATE}
    study = Study("Information of words about tags", METRICS, CONTROL, output, seeds, settings)
    data = WordTags(source)
    pairs = [swapped(part) for part in (data.train, data.test)]
    without = [[{**row, "input_ids": [END]} for row in part] for part in (data.train, data.test)]
    for _, seed in study.runs([CONTROL]):
        if not (place := models / f"seed-{seed}").exists():
            raise ValueError(f"models is {models}, which has no seed-{seed}: run encoder_decoder_sizes.py first")
        kept = hf_xent.patch(PegasusForConditionalGeneration.from_pretrained(place))
        alone, control = (
            tag_models.train(tag_models.new(*KEPT, seed), rows, steps, seed, str(output / "run"))
            for rows, _ in (without, pairs)
        )
        nothing = tag_models.measured(alone, without[1])
        for arm, model, parts in ((WORDS, kept, (data.test, pairs[1])), (CONTROL, control, (pairs[1], data.test))):
            study.record(arm, seed, **numbers(*(tag_models.measured(model, rows) for rows in parts), nothing))
    return study.report("Made by `examples/tag_information.py` of hf_xent. Nats per tag; intervals over sentences.")


if __name__ == "__main__":
    typer.run(main)
