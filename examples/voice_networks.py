"""Networks and controls of `voice_separation.py`, and what is measured of their masks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from voice_sounds import Pair, Sounds

from hf_xent.models.mask_net import MaskNet, MaskNetConfig
from hf_xent.speech import STFT, Mixtures, apply_mask, ideal_binary_mask, si_sdr
from hf_xent.trainers import ClassConfig, ClassTrainer

PRETRAINING = {"network": None, "autoencoder": "autoencoder", "voice in mixture": "voice"}
LOSS = "cross_entropy:label_smoothing=0.04"  # of two classes: each label gives .02 to the other


def trained(arm: str, seed: int, parts: Sounds, steps: int, folder: Path) -> MaskNet:
    """A network after its training, a quarter of whose steps are pre-training if the arm has one."""
    torch.manual_seed(seed)
    model, kind = MaskNet(MaskNetConfig(num_labels=2)), PRETRAINING[arm]
    stft, first = STFT.of(model.config), steps // 4 if kind else 0
    options: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 4e-3, "warmup_steps": 0.05,
        "seed": seed, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False, "logging_steps": 50,
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    if kind:
        rows = Mixtures(parts.voice, parts.music, 4 * first, kind=kind, stft=stft, seed=1000 + seed)
        Trainer(model, TrainingArguments(max_steps=first, **options), train_dataset=rows).train()
    rows = Mixtures(parts.voice, parts.music, 4 * (steps - first), stft=stft, seed=seed)
    ClassTrainer(model, ClassConfig(max_steps=steps - first, **options), loss=LOSS, train_dataset=rows).train()
    return model


def ideal(sound: Pair, stft: STFT) -> Tensor:
    """The mask that knows voice and music."""
    return ideal_binary_mask(*map(stft.spectrum, sound))


def ratios(mask: Tensor, sound: Pair, stft: STFT, **options: Any) -> list[float]:
    """SI-SDR of the voice and of the music, in decibels."""
    found = apply_mask(mask, sound[0] + sound[1], stft=stft, **options)
    return [float(si_sdr(true, estimate)) for true, estimate in zip(sound, found, strict=True)]
