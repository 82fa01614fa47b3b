"""The metrics as modules of `evaluate`, one folder each, loaded by path.

tpr = evaluate.load(str(hf_xent.metrics.modules.path("tpr_at_fpr")))
tpr.compute(predictions=scores, references=labels, fpr=0.01)         # {"tpr_at_fpr": 0.42}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import evaluate


def path(name: str) -> Path:
    """The folder of a metric's module.

    Args:
        name: A metric's name, such as 'tpr_at_fpr'.

    Returns:
        The folder, for `evaluate.load`.

    Raises:
        ValueError: An unknown name.
    """
    here = Path(__file__).parent
    known = sorted(folder.name for folder in here.iterdir() if (folder / f"{folder.name}.py").exists())
    if name not in known:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(known)}")
    return here / name


def wrap(metric: Callable[..., float]) -> type[evaluate.Metric]:
    """Makes a metric a module of `evaluate`.

    Args:
        metric: A function of labels, scores and options.

    Returns:
        A class of metrics whose `compute` takes predictions (scores), references (labels) and the options.
    """
    features = datasets.Features(
        {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}  # float32 would make ties
    )

    class Wrapped(evaluate.Metric):
        def _info(self) -> Any:
            description = inspect.getdoc(metric) or ""
            inputs = "predictions: the score of each text, larger for label 1; references: labels 0 and 1"
            return evaluate.MetricInfo(
                description=description, citation="", inputs_description=inputs, features=features
            )

        def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
            return {metric.__name__: metric(references, predictions, **options)}

    Wrapped.__name__ = metric.__name__
    return Wrapped
