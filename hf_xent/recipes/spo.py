"""Train on preferences, and on missing key phrases (SPO).

Data: 'prompt', 'chosen' and 'rejected'; texts or conversations.
Example: hf-xent spo --model_name_or_path smollm2 --dataset_name pairs.jsonl --gamma_w 0.2 --use_peft --max_steps 100
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .preferences import PreferenceRecipe


class SPO(PreferenceRecipe):
    """`SPOTrainer` from the command line."""

    trainer, config = "SPOTrainer", "spo:SPOConfig"
    shown: ClassVar[Mapping[str, str]] = {
        name: text for name, text in PreferenceRecipe.shown.items() if name != "label_smoothing"
    } | {"loss_type": "Any loss of trl.DPOConfig: sigmoid, ipo, hinge, ..."}
