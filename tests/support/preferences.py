"""What the tests of preference trainers share: eight pairs, a trainer on a tiny model, what it logged."""

import warnings

import datasets
import torch
from transformers import AutoModelForCausalLM

from support.models import tiny_tokenizer

PROMPTS = ["the cat", "a dog", "one bird", "the fish"] * 2
CHOSEN = [" sat on a mat, a red mat", " ran away", " sang a song", " swam in the sea"] * 2
REJECTED = [" stood", " slept all day", " was gone", " ate the worm"] * 2
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def table(**columns):
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, **columns})


def trainer_of(kind, config, folder, source, rows=None, model=None, **options):
    """A trainer and its configuration, by their classes, on the model saved in `source`."""
    common = {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-2, "save_strategy": "no", "seed": 0, "bf16": False, "beta": 0.5,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    adapter = options.pop("peft_config", None)
    arguments = config(str(folder), **{**common, **options})
    model = AutoModelForCausalLM.from_pretrained(source) if model is None else model
    rows = table() if rows is None else rows
    torch.manual_seed(0)  # adapters are random
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=adapter)


def fit(kind, config, *args, resume=None, **options):
    """The same, trained."""
    trainer = trainer_of(kind, config, *args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, *names):
    """What a trainer logged under these names at every step; loss and gradient norm by default."""
    return [[e[name] for name in names or ("loss", "grad_norm")] for e in trainer.state.log_history if "loss" in e]
