"""A temperature for every row, from what the classifier says of changed copies of it: `p = softmax(z / T)`.

    T = exp(clamp(g, log 0.1, log 10))          g = b + w . relu(A v + a)
    v = the softmax of every view at the row's own 4 largest classes, view after view

The classifier is not changed, nor is its prediction, since T is positive. Without views g = b: one temperature for all
rows. The order of views is that of `fit`. Rows of fewer than 4 classes have all of them in v.

Source: Liu et al. 2024, arXiv:2404.13016, and its code, for v and the sizes (three views, 71 weights). There T is
clamped itself, so that a row below 0.1 has no gradient from the start on; the exponential, and a start at the best
temperature for all rows (w = 0), are ours.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..options.ranges import check_count, is_number
from ..system.files import replace_atomically
from .inputs import prepared

LEAST, GREATEST = 0.1, 10.0
KIND = "hf_xent_calibrator"


class Calibrator(nn.Module):
    """A map from scores and views to probabilities; see the module's docstring. `calibration.fit` makes one.

    Args:
        outputs: K, the number of scores a row; 1 for one score that is the log-odds of class 1.
        views: V, the number of views; 0 for one temperature.
        hidden: The width of the hidden layer.
        top: How many of the row's largest classes are read of every view.
        temperature: The temperature that it starts from, for all rows.

    Raises:
        ValueError: A size that is no whole number in its range, or a temperature outside of [0.1, 10].
    """

    def __init__(self, outputs: int, views: int = 0, hidden: int = 5, top: int = 4, temperature: float = 1.0):
        super().__init__()
        self.sizes = {"outputs": outputs, "views": views, "hidden": hidden, "top": top}
        for name, value in self.sizes.items():
            check_count(name, value, 0 if name == "views" else 1)
        if not is_number(temperature, f"[{LEAST}, {GREATEST}]"):
            raise ValueError(f"temperature is {temperature!r}: choose a number from {LEAST} to {GREATEST}")
        self.read = min(top, max(outputs, 2))
        self.bias = nn.Parameter(torch.tensor(math.log(temperature), dtype=torch.float64))
        if views:
            self.first = nn.Linear(views * self.read, hidden, dtype=torch.float64)
            self.last = nn.Linear(hidden, 1, bias=False, dtype=torch.float64)
            nn.init.zeros_(self.last.weight)

    def temperatures(self, scores: Any, views: Any = None) -> Tensor:
        """The temperature of every row [M]; arguments and errors are those of a call."""
        return self._temperatures(*self._checked(scores, views))

    def _temperatures(self, z: Tensor, v: Tensor | None) -> Tensor:
        return self.bias.exp().expand(len(z)) if v is None else self.log_temperatures(self.features(z, v)).exp()

    def features(self, scores: Tensor, views: Tensor) -> Tensor:
        """v [M, V * top] of scores [M, C] and views [V, M, C] that `inputs.prepared` has checked."""
        classes = scores.topk(self.read, -1).indices
        seen = views.softmax(-1).gather(-1, classes.expand(len(views), -1, -1))  # [V, M, top]
        return seen.transpose(0, 1).flatten(1)

    def log_temperatures(self, features: Tensor) -> Tensor:
        """log T [M] of features [M, V * top]."""
        g = self.bias + self.last(self.first(features).relu()).squeeze(-1)
        return g.clamp(math.log(LEAST), math.log(GREATEST))

    def logits(self, scores: Any, views: Any = None) -> Tensor:
        """Scores over their temperature [M, C], float64; arguments and errors are those of a call."""
        z, v = self._checked(scores, views)
        return z / self._temperatures(z, v)[:, None]

    def forward(self, scores: Any, views: Any = None) -> Tensor:
        """Calibrated probabilities.

        Args:
            scores: Logits [M, K], as for `fit`; [M] or [M, 1] for one score a row.
            views: Logits of the same changed copies as for `fit`, in that order [V, M, K]; None if it had none.

        Returns:
            [M, C], float64, C = max(2, K); the largest class is that of the scores.

        Raises:
            ValueError: Shapes that differ from those of the fit, views that are missing or not expected, or values that
                are not finite.
        """
        return self.logits(scores, views).softmax(-1)

    def _checked(self, scores: Any, views: Any) -> tuple[Tensor, Tensor | None]:
        z, v, outputs = prepared(scores, views)
        found = {"outputs": outputs, "views": 0 if v is None else len(v)}
        for name, given in (("outputs", "scores"), ("views", "views")):
            if found[name] != self.sizes[name]:
                raise ValueError(
                    f"{given} has {name} = {found[name]}, but the calibrator was fitted with {self.sizes[name]}: pass"
                    " what `fit` had"
                )
        device = self.bias.device
        return z.to(device), None if v is None else v.to(device)

    def save(self, file: str | Path, **metadata: str) -> Path:
        """Write it as safetensors, complete or not at all; returns the path.

        Args:
            file: The file, which is replaced.
            **metadata: Text that is kept beside the weights.
        """
        from safetensors.torch import save_file

        kept = {**metadata, KIND: json.dumps(self.sizes)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        return replace_atomically(Path(file), lambda draft: save_file(tensors, draft, metadata=kept))

    @classmethod
    def load(cls, file: str | Path) -> Calibrator:
        """A calibrator that was saved.

        Raises:
            ValueError: The file holds no calibrator.
            FileNotFoundError: There is no such file.
        """
        from safetensors.torch import load_file

        calibrator = cls(**json.loads(metadata_of(file, KIND)[KIND]))
        calibrator.load_state_dict(load_file(file))
        return calibrator


def metadata_of(file: str | Path, needed: str) -> dict[str, str]:
    """The text beside the weights of a safetensors file. Raises: ValueError if it lacks the key `needed`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"file is {str(file)!r}, which cannot be read ({error}): save it again") from error
    if needed not in metadata:
        raise ValueError(f"file is {str(file)!r}, which has no {needed}: pass a file that was saved as one")
    return metadata
