"""The arms of siamese_ctc.py: what each trains, with the same rows, epochs and rate."""

from __future__ import annotations

from typing import Any

from spoken_models import ctc_model, decoder_model, text_model
from spoken_prompts import END
from transformers import Trainer, TrainingArguments

from hf_xent.speech import PadSpeech
from hf_xent.trainers import SiameseCTCConfig, SiameseCTCTrainer

BATCH = 16


def options(seed: int, epochs: float, rate: float = 4e-3) -> dict[str, Any]:
    """Of the training arguments of every arm."""
    common = {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "max_grad_norm": 5.0}
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 50}
    sizes = {"per_device_train_batch_size": BATCH, "num_train_epochs": epochs, "learning_rate": rate, "seed": seed}
    return {"output_dir": "out/runs", "remove_unused_columns": False, **common, **quiet, **sizes}


def siamese(seed: int, train: list[Any], epochs: float, speech: Any = None, **settings: Any) -> tuple[Any, Any]:
    """A CTC model and, unless `ot_weight` is 0, the text encoder that was trained with it."""
    text = None if settings.get("ot_weight") == 0 else text_model(seed)
    settings |= {} if text is None else {"iterations": 20}  # of 50: a third of the time
    args = SiameseCTCConfig(**options(seed, epochs), **settings)
    trainer = SiameseCTCTrainer(ctc_model(seed) if speech is None else speech, text, args, train_dataset=train)
    trainer.train()
    return trainer.model.eval(), text if text is None else text.eval()


def sequences(train: list[Any], column: str) -> list[Any]:
    """Rows whose labels are a column's letters and the end."""
    return [{"input_features": row["input_features"], "labels": [*row[column], END]} for row in train]


def written_by_decoder(seed: int, train: list[Any], epochs: float, column: str = "labels", model: Any = None) -> Any:
    """An encoder-decoder that was trained to write a column by cross-entropy."""
    model = decoder_model(seed) if model is None else model
    args = TrainingArguments(**options(seed, epochs))
    Trainer(model, args, data_collator=PadSpeech(), train_dataset=sequences(train, column)).train()
    return model.eval()
