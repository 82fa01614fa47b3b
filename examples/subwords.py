"""Which sub-words does a small language model predict best? BPE, WordPiece and the unigram model at three sizes.

    python examples/subwords.py [--text wiki] [--read 600000] [--seeds 3] [--output out/subwords]

A Llama of 2 layers and width 128 learns each vocabulary from nothing, on the texts that the vocabulary is of. Bits per
byte of held-out texts count, all tokens and ends included. Equal means: every run reads the same bytes once, as many
tokens a batch, at one learning rate; models of a size have as many weights. More tokens a byte take more steps. Seeds
are of weights and order: a vocabulary has none. Controls: bytes alone; what token frequencies reach without context
(counts plus 1), and the unigram model over all cuts. Resumable, run by run. Weights start at an sd of 0.08: in a first
attempt at 0.02, which does not count, some seeds learned bigrams alone. It was settled with BPE of 500 tokens only.
What counts was decided before the runs: at each size the difference in bits per byte to BPE, seed by seed. Unigram (or
WordPiece) is better or worse there if the 95 % interval leaves out 0, else no difference was seen at this size.
"""

from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import hf_xent
from hf_xent import data
from hf_xent.data import subwords
from hf_xent.experiments.study import Study

ARMS, BYTES, SIZES = ("bpe", "wordpiece", "unigram"), "bytes", (500, 2000, 8000)
METRICS = ("bits/byte", "bytes/token", "no context", "all cuts", "steps")
CONTEXT, SIZE = 128, {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": CONTEXT + 1, "tie_word_embeddings": True, "initializer_range": 0.08}
TRAINING = {"num_train_epochs": 1, "learning_rate": 2e-3, "warmup_steps": 30, "weight_decay": 0.1, "use_cpu": True}
TRAINING |= {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def trained(tokenizer: Any, texts: list[str], seed: int, output: Path) -> tuple[Any, int]:
    """A model that has read the texts once, and its steps."""
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **SIZE))
    config = hf_xent.XentConfig(str(output), seed=seed, **TRAINING)
    blocks = data.pack(Dataset.from_dict({"text": texts}), tokenizer, CONTEXT + 1)
    trainer = hf_xent.XentTrainer(model, config, train_dataset=blocks)
    trainer.train()
    return hf_xent.patch(model.eval()), trainer.state.global_step


def measured(tokenizer: Any, texts: dict[str, list[str]], seed: int, output: Path) -> dict[str, float]:
    end, size = tokenizer.eos_token_id, len("".join(texts["test"]).encode())
    read, held = ([end, *chain.from_iterable([*row, end] for row in tokenizer(x)["input_ids"])] for x in texts.values())
    counts = torch.tensor(read[1:]).bincount(minlength=len(tokenizer)).double() + 1
    alone = -(counts / counts.sum()).log()[held[1:]].sum().item()
    model, steps = trained(tokenizer, texts["train"], seed, output)
    windows = torch.tensor(held).unfold(0, CONTEXT + 1, CONTEXT)  # each token but the first is predicted in one of them
    parts = [*windows.split(16), torch.tensor([held[len(windows) * CONTEXT :]])]
    with torch.inference_mode():
        nats = sum(model(input_ids=x, labels=x).logits.stats(x, shift=True).nll.sum().item() for x in parts)
    rates = {name: subwords.bits_per_byte(x, size) for name, x in (("bits/byte", nats), ("no context", alone))}
    return rates | {"bytes/token": size / (len(held) - 1 - len(texts["test"])), "steps": steps}


def main(text: str = "wiki", read: int = 600_000, seeds: int = 3, output: Path = Path("out/subwords")) -> Any:
    parts = data.load_text(text).select_columns("text").train_test_split(test_size=0.05, seed=0)  # by document
    ends = accumulate(len(one.encode()) for one in parts["train"]["text"])
    train = [one for one, end in zip(parts["train"]["text"], ends, strict=True) if end <= read]
    texts, shared, found = {"train": train, "test": [*parts["test"]["text"]]}, {"text": text.split(":")[0]}, {}
    for size in SIZES:
        study = Study(f"{size} sub-words", METRICS, ARMS[0], output / str(size), seeds, shared | {"bytes": read})
        made = {arm: subwords.train(train, size, arm) for arm in ARMS} | {BYTES: subwords.train(train, 257, "bpe")}
        cuts = {"unigram": {"all cuts": subwords.likelihood(made["unigram"], texts["test"]).bits_per_byte}}
        for arm, seed in study.runs(made):
            again = arm == BYTES and size != SIZES[0]  # the same run
            run = found[SIZES[0]][arm][seed] if again else measured(made[arm], texts, seed, study.output / arm)
            study.record(arm, seed, **run, **cuts.get(arm, {}))
        found[size] = study.report("Made by `examples/subwords.py` of hf_xent: every run has read the same bytes once.")
    return found


if __name__ == "__main__":
    typer.run(main)
