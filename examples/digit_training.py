"""What the two examples of `hf_xent.continuous` share: arms, and training that stops on validation rows."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback, GPT2Config, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_xent.continuous import DigitModel, DigitModelConfig, Quantiles

HEADS: dict[str, dict[str, Any]] = {
    "factorised": {"kind": "factorised"},
    "factorised, same network": {"kind": "factorised", "layers": 1, "width": 48},
    "autoregressive": {"kind": "autoregressive", "layers": 1, "width": 48},
    "random order": {"kind": "random_order", "layers": 1, "width": 48},
}
SIZE = {"n_embd": 64, "n_layer": 2, "n_head": 4}
QUIET = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "no", "report_to": "none"}


def untrained(quantiles: Quantiles, rows: Tensor, positions: int, **options: Any) -> DigitModel:
    """A model of vectors like rows [N, D], with the decoder of all arms."""
    ends = {"bos_token_id": None, "eos_token_id": None}
    backbone = GPT2Config(vocab_size=1, n_positions=positions + 1, **ends, **SIZE)
    scale = {"mean": rows.mean(0).tolist(), "std": rows.std(0).clamp(min=1e-3).tolist()}
    return DigitModel(DigitModelConfig(backbone, **quantiles.to_dict(), **scale, **options))


def trained(make: Any, train: list[Any], valid: list[Any], seed: int, **options: Any) -> DigitModel:
    """The model of the epoch with the least loss of validation rows, before the loss did not fall for two."""
    set_seed(seed)
    with TemporaryDirectory() as folder:
        config = TrainingArguments(
            output_dir=str(Path(folder)), seed=seed, per_device_eval_batch_size=128,
            lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.05, save_total_limit=1, save_only_model=True,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", use_cpu=True, disable_tqdm=True, **QUIET,
            **options,
        )  # fmt: skip
        stop = EarlyStoppingCallback(early_stopping_patience=2)
        trainer = Trainer(make(), config, train_dataset=train, eval_dataset=valid, callbacks=[stop])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval()


def items(values: Tensor, labels: Tensor | None = None, **others: Tensor) -> list[dict[str, Tensor]]:
    """Sequences [B, T, D] as rows for a trainer; each predicts itself if there are no labels."""
    columns = {"values": values, "labels": values if labels is None else labels, **others}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(values))]
