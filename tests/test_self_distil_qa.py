"""Self-distillation for question answering: formula, weights, teachers, steps against a readable loop, resumption."""

import copy
from itertools import groupby
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Trainer,
    XLNetConfig,
    XLNetForQuestionAnswering,
)
from transformers import TrainingArguments as Arguments

from hf_xent import hub
from hf_xent.classes.spans import span_divergence
from hf_xent.metrics.answers import map_at_k
from hf_xent.trainers import SelfDistilQAConfig, SelfDistilQATrainer
from hf_xent.trainers.epoch_teacher import EpochTeacher

ROWS, LENGTH = 12, 9


def encoder(dropout=0.2, kind=BertForQuestionAnswering):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"intermediate_size": 32, "max_position_embeddings": 16, "initializer_range": 0.5}
    probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return kind(BertConfig(**sizes, **rest, **probabilities))


def rows(count=ROWS):
    draw = np.random.default_rng(0)
    ids, starts = draw.integers(3, 60, (count, LENGTH)), draw.integers(0, 5, count)
    columns = {"input_ids": ids.tolist(), "attention_mask": [[1] * LENGTH] * count}
    return datasets.Dataset.from_dict(columns | {"start_positions": starts, "end_positions": starts + 2})


def trainer_of(folder, model=None, data=None, **options):
    common = {
        "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": [],
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = SelfDistilQAConfig(output_dir=str(folder), **{**common, **options})
    data = rows() if data is None else data
    return SelfDistilQATrainer(encoder() if model is None else model, config, train_dataset=data, eval_dataset=rows())


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def softmax(x):
    """In float64, of the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_weight_is_that_of_the_sheet():
    """Gold 20: starts 40, 24 (a hit), 20; ends 25 (outside of the half-open window), 15 (a hit)."""

    def ordered(*positions):
        logits = torch.zeros(1, 50)
        logits[0, list(positions)] = torch.arange(len(positions), 0, -1.0)
        return logits

    gold = torch.tensor([20])
    start, end = ordered(40, 24, 20), ordered(25, 15)
    assert map_at_k(start, gold) == map_at_k(end, gold) == 0.5
    assert map_at_k(start, gold, k=1) == 0 and map_at_k(start, gold, tolerance=4) == pytest.approx(1 / 3)
    both = torch.cat([start, ordered(20)])
    assert map_at_k(both, torch.tensor([20, 20]), k=99) == 0.75, "k may be more than there are positions"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergence_is_the_formula_s(dtype):
    """Values and gradients in float64 by numpy; 16-bit logits are the exact ones of the formula."""
    draw, temperature = np.random.default_rng(1), 2.0
    student, teacher = ([torch.tensor(draw.normal(0, 3, (5, 7))).to(dtype) for _ in range(2)] for _ in range(2))
    student = [x.requires_grad_() for x in student]
    loss = span_divergence(tuple(student), tuple(teacher), temperature)
    loss.backward()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (softmax(x.detach().double().numpy() / temperature) for x in (t, s))
        expected += temperature**2 * (p * np.log(p / q)).sum() / (2 * 5)
        gradient = torch.tensor(temperature * (q - p) / (2 * 5))
        torch.testing.assert_close(
            s.grad, gradient.to(dtype), rtol=1e-5 if dtype != torch.bfloat16 else 8e-3, atol=1e-7
        )
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


def precision(logits, gold, k=10, tolerance=5):
    """1 / rank of the first hit of one row, by a walk over its positions."""
    for rank, position in enumerate(np.argsort(-logits, kind="stable")[:k], start=1):
        if position in range(gold - tolerance, gold + tolerance):
            return 1 / rank
    return 0.0


def recorded(trainer):
    """The batches of a training, each with the state of the generator before its passes."""
    calls, compute = [], trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        calls.append((torch.get_rng_state(), {name: x.clone() for name, x in inputs.items()}))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    return calls


@pytest.mark.parametrize("options", [{}, {"weight": 0.7}, {"teacher": "epoch"}, {"weight": 0}], ids=str)
def test_steps_equal_a_readable_loop(tmp_path, options):
    """Plain descent over two epochs of two batches: the current teacher differs from the student by dropout alone."""
    model = encoder()
    common = {"optim": "sgd", "max_grad_norm": 0.0, "top_k": 3, "tolerance": 1} | options
    if "weight" in options:
        del common["top_k"], common["tolerance"]
    trainer = trainer_of(tmp_path, copy.deepcopy(model), rows(8), **common)
    optimizer, totals = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for step, (state, batch) in enumerate(recorded(trainer)):
        if step % 2 == 0:
            snapshot = copy.deepcopy(model).eval()
        positions = [batch.pop(name) for name in ("start_positions", "end_positions")]
        torch.set_rng_state(state)
        loss = 0.0
        if options.get("weight") != 0:
            teacher = snapshot if options.get("teacher") else model.train()
            with torch.no_grad():
                teacher = list(teacher(**batch).values())
        student = list(model.train()(**batch).values())
        for side, gold in enumerate(positions):
            loss = loss + torch.nn.functional.cross_entropy(student[side], gold) / 2
        if options.get("weight") != 0:
            weights = [[precision(x, y, 3, 1) for x, y in zip(t.numpy(), gold.tolist(), strict=True)]
                       for t, gold in zip(teacher, positions, strict=True)]  # fmt: skip
            weight = options.get("weight", np.mean(weights))
            for s, t in zip(student, teacher, strict=True):
                p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
                loss = loss + weight * 4 * (p * (p / q).log()).sum(-1).mean() / 2
            assert logged(trainer, "weight")[step] == pytest.approx(weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert logged(trainer) == pytest.approx(totals, rel=1e-4) and len(totals) == 4
    assert len(logged(trainer, "kl")) == (0 if options.get("weight") == 0 else 4)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_weight_0_is_the_stock_trainer(tmp_path):
    """To the bit, with accumulation, whose mean is over batches; evaluation is plain cross-entropy under any weight."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ours = trainer_of(tmp_path, weight=0, **options)
    ours.train()
    args = {name: getattr(ours.args, name) for name in ("max_steps", "learning_rate", "lr_scheduler_type", *options)}
    args |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    stock = Trainer(encoder(), Arguments(str(tmp_path), **args), train_dataset=rows(), eval_dataset=rows())
    stock.model_accepts_loss_kwargs = False  # a mean over batches
    stock.train()
    assert logged(ours) == logged(stock)
    for a, b in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(a, b)
    distilled = trainer_of(tmp_path, copy.deepcopy(stock.model))
    assert distilled.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]


def test_accumulated_rows_weigh_their_own_divergence(tmp_path):
    """One batch of 8 has one weight, 8 batches of a row one each: the losses differ by the covariance of a and KL."""
    teacher = copy.deepcopy(encoder(0.0)).eval()  # of other weights than the students', which have no dropout
    for parameter in teacher.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    found = {}
    for size in (1, 8):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = trainer_of(tmp_path, encoder(0.0), rows(8), teacher="epoch", top_k=4, tolerance=1, **options)
        trainer._teacher.renew = lambda model: None
        trainer._teacher.model = teacher
        trainer.train()
        found[size] = {name: logged(trainer, name)[0] for name in ("loss", "ce", "kl", "weight")}
    for name in ("ce", "kl", "weight"):  # means over the rows either way
        assert found[1][name] == pytest.approx(found[8][name], rel=1e-4)
    batch = {name: torch.tensor(rows(8)[name]) for name in rows(8).column_names}
    positions = [batch.pop(name) for name in ("start_positions", "end_positions")]
    student, teacher = encoder(0.0).eval()(**batch), teacher(**batch)
    sides = list(zip(student.values(), teacher.values(), positions, strict=True))
    a = sum(np.array([precision(x, y, 4, 1) for x, y in zip(t.detach().numpy(), g.tolist(), strict=True)])
            for _, t, g in sides) / 2  # fmt: skip
    kl = [span_divergence((s[i : i + 1],), (t[i : i + 1],), 2.0).item() for s, t, _ in sides for i in range(8)]
    kl = np.array(kl).reshape(2, 8).mean(0)
    covariance = (a * kl).mean() - a.mean() * kl.mean()
    assert abs(covariance) > 1e-3
    assert found[1]["loss"] - found[8]["loss"] == pytest.approx(covariance, rel=1e-2)


@pytest.mark.parametrize("teacher", ["current", "epoch"])
def test_a_resumed_run_is_the_same(tmp_path, teacher):
    """To the bit, from within the second epoch; its teacher is that of the epoch, not of the checkpoint."""
    options = {"teacher": teacher, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}  # epochs of 3 steps
    whole = trainer_of(tmp_path, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / EpochTeacher.file).exists() == (teacher == "epoch")
    other = encoder()
    other.qa_outputs.reset_parameters()
    resumed = trainer_of(tmp_path, other, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed) == logged(whole) and len(logged(whole)) == 6
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if teacher == "epoch":
        (checkpoint / EpochTeacher.file).unlink()
        with pytest.raises(ValueError, match=r"^the checkpoint has no teacher of its epoch: resume one"):
            trainer_of(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("teacher", ["current", "epoch"])
def test_bfloat16_is_autocast_for_the_teacher_too(tmp_path, teacher):
    """Losses stay near those of float32, and the divergence is that of dropout, not of precision."""
    found = {}
    for bf16 in (False, True):
        found[bf16] = trainer_of(tmp_path, bf16=bf16, teacher=teacher, max_steps=3)
        found[bf16].train()
    assert logged(found[True]) == pytest.approx(logged(found[False]), rel=0.05)
    assert logged(found[True], "kl") == pytest.approx(logged(found[False], "kl"), rel=0.2)


def test_every_epoch_begins_with_its_number(tmp_path):
    """A data set that draws its rows by epoch, and stays at those of an epoch that is resumed."""

    class Drawn(torch.utils.data.Dataset):
        epochs: ClassVar[list[int]] = []
        set_epoch = staticmethod(epochs.append)
        __len__, __getitem__ = rows().__len__, rows().__getitem__

    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, data=Drawn(), **options).train()
    assert [epoch for epoch, _ in groupby(Drawn.epochs)] == [0, 1, 2], "accelerate may say it again"
    trainer_of(tmp_path, data=Drawn(), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [epoch for epoch, _ in groupby(Drawn.epochs)] == [0, 1, 2, 1, 2]


def test_a_stream_trains(tmp_path):
    """Its length is unknown, so transformers takes all steps for one epoch, which has one teacher."""
    trainer = trainer_of(tmp_path, data=rows().to_iterable_dataset(), teacher="epoch", max_steps=5)
    renewed, renew = [], trainer._teacher.renew
    trainer._teacher.renew = lambda model: renewed.append(trainer.state.global_step) or renew(model)
    trainer.train()
    assert len(logged(trainer, "kl")) == 5 and renewed == [0]


def test_what_does_not_fit_is_refused(tmp_path):
    """By one line, before the training; a dropout without effect at its first step."""
    with pytest.raises(ValueError, match=r"^the model has no dropout, so that"):
        trainer_of(tmp_path, encoder(0.0))
    for options in ({"weight": 0}, {"teacher": "epoch"}):
        trainer_of(tmp_path, encoder(0.0), max_steps=1, **options).train()
    idle = encoder(0.0)
    idle.unused = torch.nn.Dropout(0.5)
    with pytest.raises(ValueError, match=r"^the model has no dropout, so that"):
        trainer_of(tmp_path, idle).train()
    with pytest.raises(ValueError, match=r"^model is a BertForSequenceClassification, which does not take start_pos"):
        trainer_of(tmp_path, encoder(kind=BertForSequenceClassification))
    with pytest.raises(ValueError, match=r"^a batch has no end_positions: make it by"):
        trainer_of(tmp_path, data=rows().remove_columns("end_positions")).train()
    xlnet = XLNetForQuestionAnswering(XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=32))
    with pytest.raises(ValueError, match=r"^the model's outputs are .*, without start_logits: choose"):
        trainer_of(tmp_path, xlnet).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "mrr"}, r"weight is 'mrr': choose 'map' or a number in \[0, inf\)"),
        ({"weight": -1}, r"weight is '-1': choose 'map' or a number in \[0, inf\)"),
        ({"weight": 1.0, "top_k": 5}, "top_k is 5, but weight is 1.0, which does not read it: .*"),
        ({"weight": 0, "temperature": 1.0}, "temperature is 1.0, but weight is 0, so there is no teacher: .*"),
        ({"teacher": "ema"}, "teacher is 'ema': choose 'current' or 'epoch'"),
        ({"tolerance": 0}, r"tolerance is 0: choose a whole number in \[1, inf\)"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but the cross-entropy is the model's .*"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        trainer_of(tmp_path, **options)


def test_the_card_tells_task_and_results(tmp_path):
    trainer = trainer_of(tmp_path / "me-fox", max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(license="mit", dataset_name="xquad")
    card = hub.validate(tmp_path / "me-fox")
    assert card.data.pipeline_tag == "question-answering" and "self-distil-qa" in card.data.tags
    assert "AutoModelForQuestionAnswering" in card.text and "| `weight` | map |" in card.text
    assert "arXiv:2309.17134" in card.text
