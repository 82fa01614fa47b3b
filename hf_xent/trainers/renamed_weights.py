"""Weights of a checkpoint whose files name them otherwise than the model does, as those of ViT do.

`save_pretrained` writes the names that the Hub knows, and `from_pretrained` translates them. The stock trainer does not
when it resumes or takes the best model: it warns, and goes on with weights that the checkpoint does not have
(transformers issue 43701).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_renamed(model: Any, checkpoint: str) -> None:
    """Loads the weights of a checkpoint, if its files have names that the model does not have; else nothing is done."""
    if not isinstance(model, PreTrainedModel) or set(_names(Path(checkpoint))) <= {*model.state_dict()}:
        return
    loaded = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict(), strict=False)  # the state of a loss is in no file of the model


def _names(folder: Path) -> list[str]:
    """The names of the weights in the files of a folder."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return [*json.loads(index.read_text(encoding="utf-8"))["weight_map"]]
    if not (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return []
    with safe_open(file, "pt") as weights:
        return [*weights.keys()]
