"""RobustAccuracy in transformers' Trainer and ClassTrainer: what it measures, when, that it changes nothing, resume."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from hf_xent.callbacks.robust_accuracy import RobustAccuracy
from hf_xent.robust import attack
from hf_xent.trainers.classes import ClassConfig, ClassTrainer

EPSILON, STEPS = 0.2, 3


class Processor:
    """What an attack reads of an image processor: pixels are from -1 to 1."""

    image_mean = image_std = (0.5,)


def images(count, seed):
    """Two classes: bright on the left, or on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        pixels = torch.rand(1, 8, 8, generator=generator) * 0.6 - 0.6
        pixels[..., :4] += 0.5 * (i % 2)
        pixels[..., 4:] += 0.5 * (1 - i % 2)
        rows.append({"pixel_values": pixels, "labels": i % 2})
    return rows


ROWS, HELD_OUT = images(16, 0), images(10, 1)


def vit():
    """A model with dropout."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet():
    """A model with running means."""
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
    )


def fit(folder, callback=None, *, resume=None, model=None, trainer=Trainer, config=TrainingArguments, **options):
    more = {name: options.pop(name) for name in ("processing_class", "loss", "data_collator") if name in options}
    arguments = config(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1,
        **{"num_train_epochs": 2, "save_strategy": "no", "disable_tqdm": True} | options,
    )  # fmt: skip
    callbacks = [callback] if callback else None
    model = vit() if model is None else model
    made = trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks, **more)
    made.train(resume_from_checkpoint=resume)
    return made


def callback(**options):
    return RobustAccuracy(HELD_OUT, **{"epsilon": EPSILON, "steps": STEPS, "processor": Processor()} | options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accuracies_are_those_of_the_attack_and_are_in_the_history(tmp_path):
    robust = callback(batch_size=6, seed=5)
    trainer = fit(tmp_path, robust)
    assert [(row["step"], row["epoch"]) for row in robust.rows] == [(4, 1), (8, 2)]
    logged = [entry for entry in trainer.state.log_history if "robust_accuracy" in entry]
    assert [{name: entry[name] for name in row} for entry, row in zip(logged, robust.rows, strict=True)] == robust.rows
    found = []
    for part in (HELD_OUT[:6], HELD_OUT[6:]):
        batch = default_data_collator(part)
        labels = batch.pop("labels")
        found.append(attack(trainer.model, batch, labels, EPSILON, STEPS, processor=Processor(), seed=5))
    clean, wrong = (torch.cat([getattr(part, name) for part in found]) for name in ("clean", "flipped"))
    assert robust.rows[-1]["clean_accuracy"] == clean.double().mean().item()
    assert robust.rows[-1]["robust_accuracy"] == (~wrong).double().mean().item()
    assert robust.rows[-1]["robust_accuracy"] < robust.rows[-1]["clean_accuracy"], "something was attacked"


@pytest.mark.parametrize("model", [vit, resnet])
def test_the_training_is_the_same_as_without_bit_by_bit(tmp_path, model):
    """Gradients are accumulated over two batches, between which the callback does not run, and it runs every step."""

    class Seen(RobustAccuracy):
        """Also looks at what may not change around each measurement."""

        def _measure(self, state, model):
            kept = [p.grad for p in model.parameters()], model.training, model.state_dict()
            grads = [None if g is None else g.clone() for g in kept[0]]
            tensors = {name: value.clone() for name, value in kept[2].items()}
            drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
            super()._measure(state, model)
            assert model.training is kept[1]
            for parameter, before, copied in zip(model.parameters(), kept[0], grads, strict=True):
                assert parameter.grad is before and (copied is None or torch.equal(copied, before))
            assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
            assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
            assert np.array_equal(np.random.get_state()[1], drawn[2])

    def noisy(rows):
        """A collator that draws random numbers of all kinds."""
        batch = default_data_collator(rows)
        batch["pixel_values"] += 0.01 * (torch.rand(1) + random.random() + np.random.rand())
        return batch

    options = {"gradient_accumulation_steps": 2, "data_collator": noisy}
    seen = Seen(HELD_OUT, EPSILON, STEPS, every=1, processor=Processor())
    with_it = fit(tmp_path / "with", seen, model=model(), **options)
    alone = fit(tmp_path / "alone", model=model(), **options)
    assert [row["step"] for row in seen.rows] == [1, 2, 3, 4] and losses(with_it) == losses(alone)
    other = alone.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in with_it.model.state_dict().items())


def test_resumed_training_keeps_the_rows_of_its_checkpoint(tmp_path):
    whole, first, second = (callback(every=1) for _ in range(3))
    fit(tmp_path / "whole", whole, model=resnet())
    saved = {"save_strategy": "steps", "save_steps": 3}
    fit(tmp_path / "run", first, model=resnet(), **saved)
    fit(tmp_path / "run", second, model=resnet(), resume=str(tmp_path / "run" / "checkpoint-3"), **saved)
    assert [row["step"] for row in second.rows] == list(range(1, 9))
    assert second.rows == first.rows == whole.rows


def test_a_class_trainer_has_its_own_columns(tmp_path):
    """The trainer's own processor and collator; the last step is measured though it is no third."""
    robust = callback(every=3, processor=None)
    options = {"loss": "focal:gamma=1.0", "processing_class": Processor(), "max_steps": 4}
    fit(tmp_path, robust, trainer=ClassTrainer, config=ClassConfig, **options)
    assert [row["step"] for row in robust.rows] == [3, 4]


def test_texts_are_attacked_under_bf16_without_autocast(tmp_path):
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    rows = [{"input_ids": [2 + i % 2, 5, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    robust = RobustAccuracy(rows, 0.5, 3)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=True, max_steps=2,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    dtypes = []
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *given: dtypes.append(given[-1].dtype))
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[robust]).train()
    assert dtypes.count(torch.bfloat16) == 2 and dtypes.count(torch.float32) == len(dtypes) - 2 > 1
    assert robust.rows[-1]["robust_accuracy"] <= robust.rows[-1]["clean_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": "often"}, "every is 'often': choose a number of steps, or 'epoch'"),
        ({"steps": 0}, "steps is 0"),
        ({"epsilon": 0}, "epsilon is 0: choose a number above 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"method": "fgsm"}, "attack is 'fgsm'"),
        ({"held_out": []}, "held_out is empty"),
        ({"sed": 1}, "RobustAccuracy does not take sed"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RobustAccuracy(**{"held_out": HELD_OUT, "epsilon": EPSILON} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processor": None}, "processor is NoneType without image_mean"),
        ({"norm": "1"}, "norm is '1'"),
        ({"collate": lambda rows: {"pixel_values": torch.zeros(1, 1, 8, 8)}}, "held_out has rows without labels"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_the_training(tmp_path, options, message):
    robust = callback(**options)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, robust)


def test_weights_in_parts_are_refused(tmp_path):
    model = vit()
    model.classifier.weight.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="whose weights are split over processes, and the main process alone attacks"):
        fit(tmp_path, callback(), model=model)


def test_a_model_in_a_wrapper_is_attacked_as_it_is():
    """What a trainer passes to callbacks is the model without the wrapper of several processes."""
    state = type("State", (), {"is_world_process_zero": True, "log_history": [], "global_step": 1, "epoch": 1.0})()
    loader = type("Loader", (), {"collate_fn": staticmethod(default_data_collator)})
    robust, model = callback(), vit()
    given = {"model": model, "train_dataloader": loader, "processing_class": None}
    robust.on_train_begin(None, state, None, **given)
    robust.on_train_end(None, state, None, **given)
    robust.on_epoch_end(None, state, None, **given)
    assert len(robust.rows) == 1 == len(state.log_history)
    other = type("State", (), {"is_world_process_zero": False})()
    quiet = callback()
    quiet.on_train_begin(None, other, None, **given)
    quiet.on_train_end(None, other, None, **given)
    assert not quiet.rows and isinstance(model, nn.Module)
