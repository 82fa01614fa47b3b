"""Images as sequences of small vectors, whose numbers are predicted one after another: scikit-learn's digits.

    python examples/digit_head.py [--output out/digit-head]          # 3 seeds

An image of 8 x 8 pixels, each 0 to 16, is 16 patches of 2 x 2. A decoder reads the class and the patches so far; a
`DigitHead` predicts the 4 pixels of the next one. With 17 levels nothing is lost, so nats are those of the pixels.
Arms: factorised, one linear layer; factorised, with the network of the others, which does not see pixels of its patch;
autoregressive; random order. Controls without a decoder: pixel frequencies of a class; and a linear Gaussian model of
each pixel from the class and all pixels before, cut at whole numbers. Metrics: nats a pixel of test images; accuracy on
test images of a classifier trained on samples, and accuracy on samples of one trained on images; ms a sampled image.
Seeds set split (1,200 to train, 250 to stop, 347 to test), weights and order.

Decided before: an order pays if the 95 % interval of nats, autoregressive less factorised, is below 0; that is due to
seeing digits, not to the larger head, if the same holds against the same network.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from digit_baselines import FITTED, patches
from digit_errors import pictures, reconstruction
from digit_training import HEADS, items, trained, untrained
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from hf_xent.continuous import Quantiles
from hf_xent.experiments.study import Study

PARTS, LEVELS = [1200, 250, 347], 17
METRICS = ("nats", "trained on samples", "tested on samples", "ms")
TRAINING: dict[str, Any] = {"num_train_epochs": 10, "learning_rate": 6e-3, "per_device_train_batch_size": 32}


def neural(arm: str, seed: int, parts: Any, wanted: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of a model, and its samples of the classes that are wanted, as patches."""
    (x, y), (vx, vy), (tx, ty) = parts
    rows = x.flatten(0, 1)
    make = partial(untrained, Quantiles.fit(rows, LEVELS), rows, x.shape[1], classes=10, **HEADS[arm])
    model = trained(make, items(x, classes=y), items(vx, classes=vy), seed, **TRAINING)
    with torch.no_grad():
        found = {"nats": float(model(tx, labels=tx, classes=ty).loss)}
        if arm == "random order":
            orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
            found["nats, other orders"] = sum(float(model(tx, labels=tx, classes=ty, order=o).loss) for o in orders) / 3
    start = time.perf_counter()
    drawn = model.generate(x.new_zeros(len(wanted), 0, x.shape[2]), x.shape[1], seed=seed, classes=wanted)
    return {**found, "ms": 1000 * (time.perf_counter() - start) / len(wanted)}, drawn


def accuracies(drawn: torch.Tensor, wanted: torch.Tensor, parts: Any) -> dict[str, float]:
    """What a classifier tells of samples, both ways."""
    (x, y), _, (tx, ty) = [(values.flatten(1), labels) for values, labels in parts]
    learnt, real = SVC().fit(drawn.flatten(1), wanted), SVC().fit(x, y)
    return {"trained on samples": learnt.score(tx, ty), "tested on samples": real.score(drawn.flatten(1), wanted)}


def main(seeds: int = 3, samples: int = 600, output: Path = Path("out/digit-head")) -> dict[str, Any]:
    """Every arm under every seed, then reconstruction by bits."""
    digits = load_digits()
    values, labels = patches(torch.tensor(digits.images, dtype=torch.float32)), torch.tensor(digits.target)
    study = Study("Pixels", METRICS, "factorised", output, seeds, {"samples": samples, "parts": PARTS, **TRAINING})
    wanted = torch.arange(samples) % 10
    for arm, seed in study.runs([*HEADS, *FITTED, "real images"]):
        picks = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).split(PARTS)
        parts = [(values[i], labels[i]) for i in picks[:3]]
        found, drawn, classes = {}, *parts[0]
        if arm != "real images":
            classes, (found, drawn) = wanted, FITTED.get(arm, neural)(arm, seed, parts, wanted)
        if seed == 0:
            pictures(drawn, classes, output / f"{arm}.png")
        study.record(arm, seed, **found, **accuracies(drawn, classes, parts))
    return study.report("Made by `examples/digit_head.py` of hf_xent.\n\n" + reconstruction(digits.data))


if __name__ == "__main__":
    typer.run(main)
