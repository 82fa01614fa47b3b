"""A folder of pictures of three classes, and a small classifier that was trained on them."""

import numpy as np
from typer.testing import CliRunner

from hf_xent import cli


def write_pictures(folder):
    """Dark, grey and light pictures in a folder each: thirty in all. Returns the folder."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(30):
        name = ("dark", "grey", "light")[i % 3]
        (folder / name).mkdir(exist_ok=True, parents=True)
        pixels = rng.integers(0, 130, (14, 14)) + 62 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def write_classifier(folder, pictures):
    """A tiny ViT that tells them apart, and its processor. Returns the folder."""
    model = "tiny-vit:hidden=16, layers=1, heads=2"
    words = ["classify", "cross_entropy", "--model", model, "--dataset", pictures, "--output", folder]
    words += ["--steps", 60, "--batch-size", 8, "--learning-rate", 0.02]
    assert CliRunner().invoke(cli.app, [str(word) for word in words]).exit_code == 0
    return folder
