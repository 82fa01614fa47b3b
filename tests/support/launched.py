"""Run by `accelerate launch` in test_launch.py: trains tiny models stock and patched, and writes both histories."""

import json
import os
import sys

import torch
from torch import distributed as dist
from transformers import Trainer, TrainingArguments

import hf_xent
from support.models import batch, tiny


class Rows(torch.utils.data.Dataset):
    """Rows of unequal length; with `silent`, those of the second rank have no label in the first step."""

    def __init__(self, silent):
        self.rows = []
        for i in range(16):
            ids, _ = batch(rows=1, length=6 + i % 5)
            ids = (ids[0] + i) % 90 + 3
            self.rows.append(
                {"input_ids": ids, "labels": torch.full_like(ids, -100) if silent and i in (1, 3) else ids}
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def collate(rows):
    pad = lambda key, value: torch.nn.utils.rnn.pad_sequence([r[key] for r in rows], True, value)  # noqa: E731
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


class InOrder(Trainer):
    """Rows in their order, so that the silent ones are where they should be."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def history(patched, folder, options):
    model = tiny()
    if patched:
        hf_xent.patch(model)
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=1, per_device_eval_batch_size=2, logging_steps=1,
        report_to="none", disable_tqdm=True, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        ddp_find_unused_parameters=options.pop("unused", None), gradient_accumulation_steps=2,
    )  # fmt: skip
    silent = options.pop("silent", False)
    trainer = InOrder(model, arguments, train_dataset=Rows(silent), eval_dataset=Rows(False), data_collator=collate)
    trainer.train()
    logs = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    found = {"logs": logs, "eval": trainer.evaluate()["eval_loss"], "class": type(trainer.model_wrapped).__name__}
    if patched:
        state = hf_xent.patching.patch_state(model)
        found |= {"streamed": state.streamed, "materialized": state.materialized}
    return found


def main():
    out, runs = sys.argv[1], json.loads(sys.argv[2])
    found = {
        name: [history(patched, f"{out}.d", dict(options)) for patched in (False, True)]
        for name, options in runs.items()
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # No teardown of the interpreter, in which a rank seems to have aborted once ("terminate called without an active
    # exception", as a thread that comes back to Python then does): a launcher takes that for a failed run.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
