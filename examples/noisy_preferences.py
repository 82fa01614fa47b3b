"""A preference task with annotators who err with known probabilities.

A prompt asks to explain a Python topic in at most 4 or 8 words. The answers are the topic's first sentence in CPython's
documentation (no download), cut after 3 to 12 words: with u the number of words beyond the limit,

    P(a wins over b) = sigmoid((u_b - u_a) / 2)          and the annotator's label is drawn from that

so a trainer's margins and a model's answers can be compared with the truth, as spo_dpo.py does for several arms.
"""

import random
from typing import Any

import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, mean_squared_error
from torch.nn import functional as F

from hf_xent import data
from hf_xent.generation import sampling


def sentences(split: str) -> list[tuple[str, list[str]]]:
    """Topics, each with the words of its first paragraph that is prose and long enough to be cut."""
    topics = []
    for page in data.load_text("pydoc", split=split):
        texts = [" ".join(part.split()) for part in page["text"].split("\n\n")]
        prose = [text.split() for text in texts if len(text.split()) > 12 and text[0].isalpha()]
        topics += [(page["topic"], words) for words in prose[:1]]
    return topics


def pairs(count: int, seed: int, held_out: bool) -> Dataset:
    """Pairs of answers, the noisy winner first, with its probability to win; held-out topics are not in training."""
    rng, rows = random.Random(2 * seed + held_out), []
    topics = sentences("train[80%:]" if held_out else "train[:80%]")
    for _ in range(count):
        topic, words = rng.choice(topics)
        limit, sizes = rng.choice((4, 8)), rng.sample(range(3, 13), 2)
        over = [max(0, size - limit) for size in sizes]
        p = float(torch.sigmoid(torch.tensor((over[1] - over[0]) / 2)))
        answers = [" " + " ".join(words[:size]) for size in sizes]
        if rng.random() >= p:
            answers, p = answers[::-1], 1 - p
        prompt = f"Explain {topic.lower()} in Python in a sentence of at most {limit} words. Sentence:"
        row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        rows.append(row | {"preference_prob": p, "limit": limit})
    return Dataset.from_list(rows)


@torch.no_grad()
def judged(trainer: Any) -> dict[str, float]:
    """The margins beta Delta on held-out pairs against the truth; accuracy leaves out pairs with probability 1/2."""
    z: list[float] = []
    for batch in trainer.get_eval_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        tensors = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = trainer.model(**tensors).logits[:, :-1]
        nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view_as(labels[:, 1:])
        chosen, rejected = nll.sum(1).chunk(2)
        delta = rejected - batch["ref_chosen_logps"] - chosen + batch["ref_rejected_logps"]
        z += (trainer.args.beta * delta).tolist()
    truth, margin = torch.tensor(trainer.eval_dataset["preference_prob"]), torch.tensor(z)
    clear = truth != 0.5
    return {
        "accuracy": accuracy_score(truth[clear] > 0.5, margin[clear] > 0),
        "squared error": mean_squared_error(truth, margin.sigmoid()),
        "margin size": margin.abs().mean().item(),
    }


def answered(model: Any, tokenizer: Any, rows: Dataset, tokens: int) -> dict[str, float]:
    """The number of words of greedy answers, and the share of answers within the limit."""
    prompts = tokenizer(rows["prompt"][:])["input_ids"]
    samples = sampling.responses(model, prompts, tokens=tokens, temperature=0.0)
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    words = [len(text.strip().split("\n")[0].split()) for text in texts]
    within = [n <= limit for n, limit in zip(words, rows["limit"], strict=True)]
    return {"words": sum(words) / len(words), "within limit": sum(within) / len(within)}
