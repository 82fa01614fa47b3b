"""The arms of `localize_digits.py`: a classifier by cross-entropy, then a map of its classes, or a mask for each."""

from pathlib import Path
from typing import Any

import torch
from localize_controls import measured
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_xent.localization import Localizer, localize

ARMS: dict[str, dict[str, Any]] = {
    "CAM": {"alpha": 0, "beta": 0, "background": False}, "CE mask": {"background": False}, "BAS": {},
    "CAM, 16 x 16": {"alpha": 0, "beta": 0, "background": False},
}  # fmt: skip
LAYER = "resnet.encoder.stages.0"  # 16 x 16 cells
SIZES: dict[str, Any] = {"num_channels": 1, "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1],
                         "layer_type": "basic", "id2label": {i: str(i) for i in range(10)}}  # fmt: skip


def train(model: Any, part: dict[str, Any], seed: int, epochs: float, output: Path) -> Any:
    """The model, trained by transformers' `Trainer`."""
    arguments = TrainingArguments(
        str(output / "run"), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=1e-3, seed=seed,
        warmup_steps=30, weight_decay=0.01, save_strategy="no", report_to="none", logging_steps=50, disable_tqdm=True,
    )  # fmt: skip
    pairs = zip(part["pixel_values"], part["labels"], strict=True)
    rows = [{"pixel_values": image, "labels": label} for image, label in pairs]
    Trainer(model, arguments, train_dataset=rows).train()
    return model.eval()


def trained(arm: str, seed: int, beta: float, parts: list[Any], epochs: float, output: Path) -> Any:
    """The model of an arm; all arms of a seed start from one classifier, which had twice the epochs."""
    base = output / f"classifier-{seed}"
    if not base.exists():
        torch.manual_seed(seed)  # for the weights
        classifier = ResNetForImageClassification(ResNetConfig(**SIZES))
        train(classifier, parts[0], seed, 2 * epochs, output).save_pretrained(base)
    torch.manual_seed(seed)
    options = {"beta": beta} | ARMS[arm]
    model = Localizer.from_classifier(ResNetForImageClassification.from_pretrained(base), LAYER, **options)
    train(model, parts[0], seed, epochs, output)
    return model.classifier if "CAM" in arm else model


def scores(arm: str, model: Any, parts: list[Any]) -> dict[str, float]:
    """The metrics on test rows, and the IoU on validation rows."""
    found = [localize(model, part["pixel_values"], layer=LAYER if "16" in arm else None) for part in parts[1:]]
    maps, truth = [x.maps for x in found], [part["masks"] for part in parts[1:]]
    accuracy = (found[1].classes[:, 0] == parts[2]["labels"]).double().mean().item()
    valid = measured([maps[0]] * 2, [truth[0]] * 2)["IoU"]
    return measured(maps, truth) | {"accuracy": accuracy, "validation IoU": valid}
