"""XentTrainer: what transformers' Trainer computes, under accumulation, resume and evaluation, without logits."""

import datasets
import pytest
import torch
from models import V, gradients, tiny
from transformers import Trainer, TrainingArguments

from hf_xent.losses import CrossEntropy, Focal
from hf_xent.patching import seam_of
from hf_xent.trainers import XentConfig, XentTrainer

STEPS = 4


@pytest.fixture(scope="module")
def rows():
    """Sequences of unequal lengths, some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(32):
        length = int(torch.randint(3, 20, (1,), generator=generator))
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return datasets.Dataset.from_list(found)


def collate(examples):
    length = max(len(x["input_ids"]) for x in examples)
    padded = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([x[k] + [fill] * (length - len(x[k])) for x in examples]) for k, fill in padded.items()}


def arguments(folder, kind=XentConfig, **options):
    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**{**common, **options})


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fit(folder, rows, kind=XentTrainer, resume=None, **options):
    extra = {k: options.pop(k) for k in ("loss", "compute_metrics", "preprocess_logits_for_metrics") if k in options}
    config = arguments(folder, XentConfig if kind is XentTrainer else TrainingArguments, **options)
    trainer = kind(tiny(std=0.05), config, train_dataset=rows, eval_dataset=rows, data_collator=collate, **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_equals_the_stock_trainer_step_by_step(tmp_path, rows):
    ours, stock = fit(tmp_path, rows), fit(tmp_path, rows, kind=Trainer)
    torch.testing.assert_close(losses_of(ours), losses_of(stock), rtol=1e-5, atol=0)
    for (name, mine), theirs in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert seam_of(ours.model).materialized == 0


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "focal", "emo", CrossEntropy(z_loss=1e-2, label_smoothing=0.1)], ids=str
)
def test_accumulation_does_not_change_gradients(tmp_path, rows, loss):
    """1 x 8, 2 x 4 and 8 x 1 sequences of unequal lengths are the same step."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = fit(tmp_path, rows, loss=loss, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], entry["perplexity"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "emo"])
def test_resumed_losses_are_bit_equal(tmp_path, rows, loss):
    straight = fit(tmp_path, rows, loss=loss, save_strategy="steps", save_steps=2)
    resumed = fit(tmp_path, rows, loss=loss, save_strategy="steps", save_steps=2, resume=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(straight)


def test_logs_what_the_softmax_knew(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=1, learning_rate=0.0)
    entry = trainer.state.log_history[0]
    assert entry["perplexity"] == pytest.approx(torch.tensor(entry["loss"]).exp().item(), rel=1e-5)
    metrics = trainer.evaluate()
    logits, labels, model = [], [], trainer.model
    for example in rows:
        batch = collate([example])
        logits.append(model(batch["input_ids"]).logits[0, :-1])
        labels.append(batch["labels"][0, 1:])
    logits, labels = torch.cat(logits).detach(), torch.cat(labels)
    logits, labels = logits[labels != -100], labels[labels != -100]
    logp = logits.log_softmax(-1)
    assert metrics["eval_entropy"] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    nll = -logp.gather(-1, labels[:, None]).mean()
    assert metrics["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert seam_of(model).materialized == 0


def test_training_and_evaluation_sums_do_not_mix(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    [train] = [entry for entry in trainer.state.log_history if "loss" in entry]
    alone = fit(tmp_path, rows, max_steps=2, logging_steps=2)
    assert train["perplexity"] == next(entry for entry in alone.state.log_history if "loss" in entry)["perplexity"]


def test_compute_metrics_still_sees_logits(tmp_path, rows):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"vocabulary": prediction.predictions.shape[-1]}

    trainer = fit(tmp_path, rows, max_steps=1, compute_metrics=metrics)
    assert trainer.evaluate()["eval_vocabulary"] == V and seen["shape"][0] == len(rows)
    assert seam_of(trainer.model).materialized > 0
    top = fit(
        tmp_path,
        rows,
        max_steps=1,
        compute_metrics=lambda p: {"columns": p.predictions.ndim},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert top.evaluate()["eval_columns"] == 2
    assert seam_of(top.model).materialized == 0, "an arg max is streamed"


def test_label_smoothing_factor_is_streamed(tmp_path, rows):
    ours = fit(tmp_path, rows, label_smoothing_factor=0.1)
    stock = fit(tmp_path, rows, kind=Trainer, label_smoothing_factor=0.1)
    torch.testing.assert_close(losses_of(ours), losses_of(stock), rtol=1e-4, atol=0)
    assert ours.objective == CrossEntropy(label_smoothing=0.1) and seam_of(ours.model).materialized == 0


def test_loss_by_name_options_and_object(tmp_path, rows):
    named = fit(tmp_path, rows, loss="focal:gamma=1.0")
    configured = XentTrainer(tiny(), arguments(tmp_path, loss="focal:gamma=1.0"), train_dataset=rows)
    given = fit(tmp_path, rows, loss=Focal(gamma=1.0))
    assert named.objective == configured.objective == given.objective == Focal(gamma=1.0)
    assert losses_of(named) == losses_of(given)
    with pytest.raises(ValueError, match="smooths cross-entropy only"):
        fit(tmp_path, rows, loss="focal", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss is 'nonesuch'"):
        fit(tmp_path, rows, loss="nonesuch")


def test_a_batch_without_labels_does_not_stop_training(tmp_path, rows):
    silent = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    mixed = datasets.concatenate_datasets([silent.select(range(8)), rows.select(range(8))])
    trainer = XentTrainer(
        tiny(std=0.05),
        arguments(tmp_path, train_sampling_strategy="sequential", max_steps=2),
        train_dataset=mixed,
        data_collator=collate,
    )
    trainer.train()
    assert losses_of(trainer)[0] == 0.0 and losses_of(trainer)[1] > 0
    assert not gradients(trainer.model)


def test_bfloat16_and_saved_model(tmp_path, rows):
    config = arguments(tmp_path, max_steps=2)
    trainer = XentTrainer(tiny(std=0.05, dtype=torch.bfloat16), config, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    reloaded = type(trainer.model).from_pretrained(tmp_path / "model")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_tail_reaches_the_model(tmp_path, rows):
    trainer = fit(tmp_path / "tail", rows, tail=0.2)
    assert seam_of(trainer.model).tail == 0.2
    assert losses_of(trainer) == pytest.approx(losses_of(fit(tmp_path / "exact", rows)), rel=0.05)
