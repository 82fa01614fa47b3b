"""A tiny run of every trainer, for its card; most are those of the trainer's own tests.

`RUNS` has a function of a folder that returns a trainer, for each file of `hf_xent.trainers`.
"""

import importlib
import warnings

import datasets
import torch

from .models import V, tiny, tiny_tokenizer


def token_rows(prompt=1):
    """Sequences of ten tokens, of which the first are the prompt."""
    drawn = torch.randint(3, V, (12, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "attention_mask": [1] * 10} for ids in drawn]
    )


def of(module, *arguments, **options):
    """The trainer that a test module makes."""
    return lambda folder: importlib.import_module(module).trainer_of(folder, *arguments, **options)


def xent(folder):
    from hf_xent.trainers import XentConfig, XentTrainer

    both = {"train_dataset": token_rows(), "eval_dataset": token_rows(), "processing_class": tiny_tokenizer()}
    return XentTrainer(tiny(std=0.05), XentConfig(str(folder), **QUIET, eval_on_start=True), **both)


def sft(folder):
    from hf_xent.trainers import StreamedSFTConfig, StreamedSFTTrainer

    config = StreamedSFTConfig(str(folder), **QUIET, max_length=16, gradient_checkpointing=False)
    rows = datasets.Dataset.from_dict({"prompt": ["the quick"] * 8, "completion": [" brown fox"] * 8})
    return StreamedSFTTrainer(
        tiny(std=0.05), config, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
    )


def removal(folder):
    from hf_xent.trainers import LNRemovalConfig, LNRemovalTrainer

    config = LNRemovalConfig(str(folder), **QUIET | {"max_steps": 12})
    return LNRemovalTrainer(
        tiny("gpt2", std=0.1),
        config,
        train_dataset=token_rows(),
        eval_dataset=token_rows(),
        processing_class=tiny_tokenizer(),
    )


QUIET = {
    "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "use_cpu": True,
    "bf16": False, "disable_tqdm": True, "learning_rate": 1e-2, "save_strategy": "no",
}  # fmt: skip


def preferences(name):
    def made(folder):
        from hf_xent import trainers

        from . import preferences

        tiny(std=0.05).save_pretrained(folder / "base")
        kinds = (getattr(trainers, f"{name}Trainer"), getattr(trainers, f"{name}Config"))
        rows = preferences.table(preference_prob=[0.2, 0.4, 0.6, 0.9] * 2) if name == "SPCE" else None
        return preferences.trainer_of(*kinds, folder, folder / "base", rows, max_steps=2)

    return made


def f2c(folder):
    module = importlib.import_module("test_f2c")
    items = datasets.Dataset.from_dict({"animal": module.ANIMALS, "label": [0, 1, 0, 1, 0, 1]})
    return module.trainer_of(folder, module.FORMATS.build(items, tiny_tokenizer()))


def on_tokens(module, **options):
    return lambda folder: importlib.import_module(module).trainer_of(folder, token_rows(2), **options)


def distillation(folder):
    module = importlib.import_module("test_distillation")
    return module.trainer_of(folder, module.texts(), max_steps=2)


def eisl(folder):
    return importlib.import_module("test_eisl_trainer").trainer_of(folder, token_rows(2))


RUNS = {
    "classes": of("test_classes"),
    "distillation": distillation,
    "dxo": of("test_dxo"),
    "eisl": eisl,
    "emo": on_tokens("test_emo_trainer"),
    "encoder_calibration": of("test_encoder_calibration"),
    "f2c": f2c,
    "ln_removal": removal,
    "noisefit": on_tokens("test_noisefit"),
    "osp": of("test_osp"),
    "self_distil_qa": of("test_self_distil_qa"),
    "sft": sft,
    "siamese_ctc": of("test_siamese_ctc"),
    "spce": preferences("SPCE"),
    "spo": preferences("SPO"),
    "xent": xent,
}


def trained(name, folder):
    """A trainer that has trained and, if it has rows for it, evaluated."""
    trainer = RUNS[name](folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
    return trainer
