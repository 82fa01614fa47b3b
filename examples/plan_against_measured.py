"""The memory that `hf_xent.planning.plan` predicts of a training step on a CPU, beside what the step takes.

Each step runs in a process of its own, whose peak the kernel records; freed blocks go back to the system at once.

    python examples/plan_against_measured.py            # the table of docs/plan.md, five minutes
"""

import sys

import torch
from transformers import BertConfig, GPT2Config, Qwen3Config

import hf_xent
from hf_xent.bench.memory import PeakMemory, return_large_blocks
from hf_xent.planning import Settings, plan
from hf_xent.planning.shapes import build, config_of
from hf_xent.system.processes import Worker

MODELS = {
    "SmolLM2-135M": "smollm2",
    "Qwen3-shaped, 8 layers": Qwen3Config(
        vocab_size=151936, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    ),
    "GPT-2 124M": GPT2Config(),
    "BERT-base (MLM)": BertConfig(architectures=["BertForMaskedLM"]),
}  # fmt: skip
FULL = {"dtype": "fp32", "device": "cpu", "sequence_length": 256}
LORA = {**FULL, "peft": "lora", "gradient_checkpointing": True}


def measured(model, tokens, ours, options) -> int:
    """The peak of the second training step of a random model, bytes beyond those of the process before."""
    worker = Worker("the step", _serve, model, tokens, ours, options, remedy="take fewer tokens")
    try:
        return worker.receive()
    finally:
        worker.close()


def _serve(pipe, model, tokens, ours, options) -> None:
    return_large_blocks()
    torch.manual_seed(0)
    settings = Settings(model, tokens, **options).checked()
    tiny = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)
    _train(tiny, Settings(tiny, 16, **{**options, "sequence_length": 8}).checked(), ours)  # loads all libraries
    with PeakMemory() as before:
        pass
    pipe.send(_train(config_of(model), settings, ours) - before.peak)


def _train(config, settings, ours) -> int:
    """Take two steps, and return the peak of the second one, bytes."""
    model = build(config, settings, "cpu")
    if ours:
        hf_xent.patch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = torch.randint(0, config.vocab_size, (settings.tokens // settings.sequence_length, settings.sequence_length))
    for _ in range(2):
        with PeakMemory() as memory:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak


if __name__ == "__main__":
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    print("| model | training | loss | predicted (MB) | measured (MB) | ratio |\n|---|---|---|---:|---:|---:|")
    for name, model in MODELS.items():
        for how, options in (("all weights", FULL), ("LoRA, checkpointing", LORA)):
            planned = plan(model, tokens, **options)
            for ours, contestant in ((False, "stock"), (True, "hf_xent")):
                predicted, found = planned[contestant].total, measured(model, tokens, ours, options)
                numbers = f"{predicted / 1e6:.0f} | {found / 1e6:.0f} | {predicted / found:.2f}"
                print(f"| {name} | {how} | {contestant} | {numbers} |", flush=True)
