"""Preference tuning when annotators err: DPO, cDPO, PSO and SPO see noisy labels, SPCE how sure they were.

    python examples/spo_dpo.py [--model smollm2] [--steps 6] [--seeds 3] [--output out/spo]

Task: say what a Python topic is in at most 4 or 8 words. Answers are the topic's own first sentence in CPython's
documentation (no download), cut after 3 to 12 words, so a program knows who is right: with u the number of words
beyond the limit, a wins over b with probability sigmoid((u_b - u_a) / 2), and the annotator's label is drawn from that.
Measured on held-out topics, against the program: accuracy of the margin's sign, the mean squared distance of
sigmoid(beta Delta) from the true probability, and greedy answers' length and how many keep the limit. Resumable.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import torch
import typer
from datasets import Dataset
from sklearn.metrics import accuracy_score, mean_squared_error

from hf_xent import SPCEConfig, SPCETrainer, SPOConfig, SPOTrainer, data, embedded
from hf_xent.study import Study

BETA, BATCH, HELD_OUT, PROMPTS, NEW = 0.3, 4, 24, 8, 16
ARMS: dict[str, dict[str, Any]] = {
    "DPO": {}, "SPCE": {}, "cDPO": {}, "PSO": {"method": "pso"}, "SPO": {"gamma_w": 0.2, "gamma_l": 0.0},
}  # fmt: skip
CONTROL = "untrained"
METRICS = ("accuracy", "squared error", "mean |margin|", "words", "within limit")


def pairs(count: int, seed: int, held_out: bool) -> Dataset:
    """Pairs of answers, the noisy winner first, and the probability with which it wins."""
    draw, rows, sentences = random.Random(2 * seed + held_out), [], []
    for page in data.load_text("pydoc", split="train[80%:]" if held_out else "train[:80%]"):
        texts = [" ".join(part.split()) for part in page["text"].split("\n\n")]
        sentences += [(page["topic"], text.split()) for text in texts if len(text.split()) > 12 and text[0].isalpha()][
            :1
        ]
    for _ in range(count):
        topic, words = draw.choice(sentences)
        limit, sizes = draw.choice((4, 8)), draw.sample(range(3, 13), 2)
        over = [max(0, size - limit) for size in sizes]
        p = float(torch.sigmoid(torch.tensor((over[1] - over[0]) / 2)))
        answers = [" " + " ".join(words[:size]) for size in sizes]
        if draw.random() >= p:
            answers, p = answers[::-1], 1 - p
        prompt = f"Explain {topic.lower()} in Python in a sentence of at most {limit} words. Sentence:"
        rows.append(
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "preference_prob": p, "limit": limit}
        )
    return Dataset.from_list(rows)


def trainer_of(arm: str, model_name: str, steps: int, seed: int, output: Path) -> Any:
    """The trainer of an arm; all but SPCE and PSO see labels alone."""
    train, test = pairs(steps * BATCH, seed, held_out=False), pairs(HELD_OUT, seed, held_out=True)
    options = dict(ARMS.get(arm, {}))
    if arm == "cDPO":  # the share of wrong labels, which nobody knows in practice
        options["label_smoothing"] = sum(min(p, 1 - p) for p in train["preference_prob"]) / len(train)
    if arm not in ("SPCE", "PSO"):
        train = train.remove_columns("preference_prob")
    model, tokenizer = embedded.load(model_name)
    last = list(range(model.config.num_hidden_layers * 2 // 3, model.config.num_hidden_layers))
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], layers_to_transform=last)
    kind, config = (SPOTrainer, SPOConfig) if arm == "SPO" else (SPCETrainer, SPCEConfig)
    arguments = config(
        output_dir=str(output / arm), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, beta=BETA,
        per_device_eval_batch_size=8, seed=seed, logging_steps=5, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, lr_scheduler_type="constant", precompute_ref_log_probs=True, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    torch.manual_seed(seed)  # the adapter's first weights
    parts = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "peft_config": lora}
    return kind(model, args=arguments, **parts)


@torch.no_grad()
def judged(trainer: Any) -> dict[str, float]:
    """The trained model's margins on held-out pairs against the truth."""
    z: list[float] = []
    for batch in trainer.get_eval_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        tensors = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logp = trainer.model(**tensors, labels=labels, fused_lm_head=True).log_probs.sum(1)
        chosen, rejected = logp.chunk(2)
        z += (BETA * (chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"])).tolist()
    truth, margin = torch.tensor(trainer.eval_dataset["preference_prob"]), torch.tensor(z)
    clear = truth != 0.5
    return {
        "accuracy": accuracy_score(truth[clear] > 0.5, margin[clear] > 0),
        "squared error": mean_squared_error(truth, margin.sigmoid()),
        "mean |margin|": margin.abs().mean().item(),
    }


@torch.no_grad()
def answered(trainer: Any, tokenizer: Any) -> dict[str, float]:
    """Words of greedy answers to held-out prompts, and the share that keeps its limit."""
    rows = trainer.eval_dataset.select(range(PROMPTS))
    batch = tokenizer(rows["prompt"][:], return_tensors="pt", padding=True, padding_side="left")
    made = trainer.model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    words = [len(text.strip().split("\n")[0].split()) for text in texts]
    kept = [n <= limit for n, limit in zip(words, rows["limit"], strict=True)]
    return {"words": sum(words) / len(words), "within limit": sum(kept) / len(kept)}


def main(model: str = "smollm2", steps: int = 6, seeds: int = 3, output: Path = Path("out/spo")) -> dict[str, Any]:
    """Every arm under every seed, and the model as it is; returns the metrics by arm and seed."""
    settings = {"model": model, "steps": steps, "pairs a step": BATCH, "beta": BETA, "held-out pairs": HELD_OUT}
    study = Study("Noisy preferences", METRICS, "DPO", output, seeds=seeds, settings=settings)
    for arm, seed in study.runs([*ARMS, CONTROL]):
        trainer = trainer_of(arm, model, steps, seed, output)
        if arm != CONTROL:
            trainer.train()
        trainer.model.eval()
        study.record(arm, seed, **judged(trainer), **answered(trainer, trainer.processing_class))
    return study.report("Made by `examples/spo_dpo.py` of hf_xent.", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")


if __name__ == "__main__":
    typer.run(main)
