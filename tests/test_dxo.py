"""DXOTrainer: against a readable loop; stages; state through checkpoints, evaluation and ranks; selection by tpAUC."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import BertConfig, BertForSequenceClassification, pipeline

from hf_xent import ranking as auc
from hf_xent.metrics import ranking as metrics
from hf_xent.trainers import DXOConfig, DXOTrainer
from hf_xent.trainers.dxo import STATE, scores_of
from support.models import tiny, tiny_tokenizer
from support.ranks import run_ranks

ROWS = 60


def encoder(labels=1, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"intermediate_size": 32, "max_position_embeddings": 16, "initializer_range": 0.2, "num_labels": labels}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **rest, **dropout, **options))


def rows(column="labels"):
    """One in five is positive and has more of the higher tokens."""
    generator = torch.Generator().manual_seed(0)
    labels = [int(i % 5 == 0) for i in range(ROWS)]
    ids = [torch.randint(3 + 9 * y, 31 + 9 * y, (9,), generator=generator).tolist() for y in labels]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 9] * ROWS, column: labels})


def trainer_of(folder, dataset=None, model=None, **options):
    more = {k: options.pop(k) for k in ("loss", "compute_metrics") if k in options}
    common = {
        "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True, "report_to": [],
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = DXOConfig(output_dir=str(folder), **{**common, **options})
    dataset = rows() if dataset is None else dataset
    model = encoder() if model is None else model
    return DXOTrainer(model, config, train_dataset=dataset, eval_dataset=rows(), **more)


def fit(folder, resume=None, **options):
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_a_readable_loop(tmp_path, accumulation):
    """tpAUC-KL without logarithms, state in a dictionary, plain descent; over an epoch's end."""
    model, dataset = encoder(), rows()
    trainer = trainer_of(
        tmp_path, dataset, copy.deepcopy(model), optim="sgd", gradient_accumulation_steps=accumulation,
        max_steps=14 // accumulation, max_grad_norm=0.0, logging_strategy="epoch", loss="tpauc_kl:lam=0.5",
    )  # fmt: skip
    trainer.train()
    labels, u, w, updates = torch.tensor(dataset["labels"]), dict.fromkeys(range(ROWS), 0.0), 0.0, 0
    sampler = auc.DualSampler(labels, 8, seed=42)
    assert sampler.batches == 12 == -(-48 // 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in torch.tensor(list(sampler)).view(-1, 8)[: 12 if epoch == 0 else 2]:
            h = model(torch.tensor(dataset[batch.tolist()]["input_ids"])).logits.squeeze(-1).sigmoid()
            pos, neg, at = h[labels[batch] == 1], h[labels[batch] == 0], batch[labels[batch] == 1].tolist()
            ell = (1 - (pos[:, None] - neg[None])).square()
            e = (ell.detach() / 0.5).exp()
            for i, row in enumerate(at):
                u[row] = 0.1 * u[row] + 0.9 * e[i].mean().item()
            power = torch.tensor([u[row] for row in at])
            w = 0.1 * w + 0.9 * power.sqrt().mean().item()
            (((power**-0.5)[:, None] * e / w * ell).mean() / accumulation).backward()
            updates += 1
            if updates % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    for (name, mine), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    found = trainer.objective.log_u.exp()
    torch.testing.assert_close(found, torch.tensor([u[row] for row in range(ROWS)]), rtol=1e-4, atol=1e-6)
    assert trainer.objective.log_w.exp().item() == pytest.approx(w, rel=1e-4)


@pytest.mark.parametrize("loss", ["tpauc_kl", "pauc_cvar", "pauc_dro", "ap", "aucm", "bce"])
def test_resume_in_the_middle_is_bit_exact(tmp_path, loss):
    """In the middle of the second epoch, with dropout; losses, state, and weights."""
    options = {"loss": loss, "save_strategy": "steps", "save_steps": 14, "max_steps": 18, "warm_start": 2}
    model = lambda: encoder(classifier_dropout=0.3)  # noqa: E731
    straight = fit(tmp_path, model=model(), **options)
    resumed = fit(tmp_path, model=model(), resume=str(tmp_path / "checkpoint-14"), **options)
    assert losses_of(resumed) == losses_of(straight) and len(losses_of(resumed)) == 18
    state = straight.objective.state_dict()
    assert set(load_file(tmp_path / "checkpoint-14" / STATE)) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in resumed.objective.state_dict().items())
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_state_matters_when_resuming(tmp_path):
    """Without it, as in libauc's own trainer, the next loss is another one."""
    straight = fit(tmp_path, save_strategy="steps", save_steps=3)
    resumed = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    resumed.objective.load_state_dict = lambda state: None
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed)[:3] == losses_of(straight)[:3] and losses_of(resumed)[3] != losses_of(straight)[3]


def test_evaluation_leaves_the_state_and_reports_bce_and_metrics(tmp_path):
    trainer = fit(tmp_path, max_steps=2, compute_metrics=lambda p: {"mine": float(p.predictions.size)})
    before = {name: x.clone() for name, x in trainer.objective.state_dict().items()}
    found = trainer.evaluate()
    assert all(torch.equal(x, before[name]) for name, x in trainer.objective.state_dict().items())
    data = rows()
    with torch.no_grad():
        logits = trainer.model(torch.tensor(data["input_ids"])).logits.squeeze(-1)
    labels = torch.tensor(data["labels"])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert found["eval_loss"] == pytest.approx(bce.item(), rel=1e-5)
    truth, scores = labels.numpy(), logits.double().numpy()
    expected = {
        "auroc": roc_auc_score(truth, scores), "ap": average_precision_score(truth, scores),
        "pauc": roc_auc_score(truth, scores, max_fpr=0.05), "tpauc": metrics.tpauc(truth, scores, 0.05, 0.8),
        "tpr_5": metrics.tpr_at_fpr(truth, scores, 0.05), "tpr_1": metrics.tpr_at_fpr(truth, scores, 0.01),
        "mine": ROWS,
    }  # fmt: skip
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    with pytest.warns(UserWarning, match="one class only"):
        alone = trainer.predict(data.select([1, 2, 3]))
    assert alone.metrics["test_mine"] == 3 and "test_auroc" not in alone.metrics


def test_evaluation_between_steps_does_not_change_training(tmp_path):
    quiet, watched = fit(tmp_path), fit(tmp_path, eval_strategy="steps", eval_steps=1)
    assert losses_of(watched) == losses_of(quiet)


def test_stages(tmp_path):
    """Two updates of BCE that leave the state alone, then the loss at its own learning rate."""
    options = {"lr_scheduler_type": "linear", "max_steps": 6, "learning_rate": 1e-2}
    staged = trainer_of(tmp_path, warm_start=0.3, dxo_learning_rate=1e-3, **options)
    assert staged.warm_steps(6) == 2
    untouched = []
    training_step = staged.training_step

    def watch(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        untouched.append(bool(staged.objective.log_u.isinf().all()))
        return loss

    staged.training_step = watch
    staged.train()
    bce = fit(tmp_path, loss="bce", **options)
    assert untouched == [True, True, False, False, False, False]
    assert losses_of(staged)[:2] == losses_of(bce)[:2] and losses_of(staged)[2] != losses_of(bce)[2]
    rates = [entry["learning_rate"] for entry in staged.state.log_history if "loss" in entry]
    plain = [entry["learning_rate"] for entry in bce.state.log_history if "loss" in entry]
    assert rates == pytest.approx([rate * (1 if step < 2 else 0.1) for step, rate in enumerate(plain)])


def test_rows_are_remembered_after_shuffle_and_filter(tmp_path):
    """Numbers are those of the data set as it is given; `label` works as `labels` does."""
    data = rows("label").shuffle(seed=1).filter(lambda row: row["input_ids"][0] % 3 > 0)
    trainer = fit(tmp_path, dataset=data, max_steps=12)
    seen = trainer.objective.log_u.isfinite().nonzero().flatten().tolist()
    assert seen == [i for i, label in enumerate(data["label"]) if label == 1] and len(seen) > 3


def test_shuffled_batches_of_one_class_cost_nothing(tmp_path):
    """sampling_rate=None is transformers' own order: some batches of two have no positive."""
    with pytest.warns(UserWarning, match="use a DualSampler"):
        trainer = fit(tmp_path, sampling_rate=None, per_device_train_batch_size=2, max_steps=10)
    losses = losses_of(trainer)
    assert 0.0 in losses and all(map(math.isfinite, losses)) and max(losses) > 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_checkpoints_are_selected_by_tpauc(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    trainer = fit(tmp_path, load_best_model_at_end=True, max_fpr=0.5, min_tpr=0.4, **options)
    evaluated = [(e["step"], e["eval_tpauc"]) for e in trainer.state.log_history if "eval_tpauc" in e]
    step, best = max(evaluated, key=lambda pair: pair[1])
    assert trainer.state.best_metric == best > 0
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert trainer.evaluate()["eval_tpauc"] == pytest.approx(best)


def test_it_learns(tmp_path):
    start = trainer_of(tmp_path).evaluate()["eval_auroc"]
    for loss in ("tpauc_kl", "pauc_cvar", "ap", "aucm"):
        assert fit(tmp_path, loss=loss, max_steps=40).evaluate()["eval_auroc"] > max(0.9, start), loss


def test_one_logit_or_two(tmp_path):
    """Two logits count by their difference; the pipeline of one label gives probabilities."""
    logits = torch.randn(5, 2)
    torch.testing.assert_close(scores_of(logits).sigmoid(), logits.softmax(-1)[:, 1])
    trainer = fit(tmp_path, model=encoder(labels=2), max_steps=2)
    assert trainer.evaluate()["eval_loss"] > 0
    model = fit(tmp_path, max_steps=1, loss="bce", learning_rate=0.0).model
    assert model.config.problem_type == "multi_label_classification"
    tokenizer = tiny_tokenizer("the quick brown fox jumps")
    [found] = pipeline("text-classification", model=model, tokenizer=tokenizer)("the fox")
    with torch.no_grad():
        expected = model(**tokenizer("the fox", return_tensors="pt")).logits.sigmoid()
    assert found["score"] == pytest.approx(expected.item(), rel=1e-5)


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="load it with num_labels=1"):
        trainer_of(tmp_path, model=encoder(labels=3))
    with pytest.raises(ValueError, match="warm_start is 99, and training has 2 updates: the loss after it would"):
        fit(tmp_path, max_steps=2, warm_start=99)
    with pytest.raises(ValueError, match=r"model is a Llama.*, and DXO trains classifiers.*ForSequenceClassification"):
        fit(tmp_path, model=tiny())
    with pytest.raises(ValueError, match="warm_start is 0"):
        DXOConfig(output_dir=str(tmp_path), dxo_learning_rate=1e-5)
    with pytest.raises(ValueError, match="loss is 'nonesuch'"):
        trainer_of(tmp_path, loss="nonesuch")
    with pytest.raises(ValueError, match="function of the step"):
        fit(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", warm_start=1, dxo_learning_rate=1e-3,
            eval_strategy="steps", eval_steps=2)  # fmt: skip
    fit(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    for other in ({"loss": "ap"}, {"dataset": rows().select(range(50))}):
        with pytest.raises(ValueError, match="same loss and training set"):
            fit(tmp_path, resume=str(tmp_path / "checkpoint-1"), **other)


DESCENT = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 16}  # Adam makes a step of a zero gradient's rounding


def on_a_rank(rank, folder):
    """Losses, weights and state of a straight run and of one resumed in the middle of its second epoch."""
    options = {**DESCENT, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 14}
    found = []
    for resume in (None, f"{folder}/checkpoint-14"):
        trainer = fit(folder, resume=resume, **options)
        weights = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
        found.append((losses_of(trainer), weights, dict(trainer.objective.state_dict())))
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return found


@pytest.mark.slow
def test_two_ranks_are_one_process_with_all_rows(tmp_path):
    """Scores of both ranks make the pairs: the losses, the weights and, to the bit on both, the state are the same."""
    first, second = run_ranks(2, on_a_rank, tmp_path, str(tmp_path / "ranks"))
    alone = fit(tmp_path, **DESCENT)
    for (losses, weights, state), (_, _, other) in zip(first, second, strict=True):
        np.testing.assert_allclose(losses, losses_of(alone), rtol=1e-4)
        for name, expected in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], expected.detach(), rtol=1e-3, atol=1e-4)
        for name, expected in alone.objective.state_dict().items():
            assert torch.equal(state[name], other[name])
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)
    assert first[0][0] == first[1][0], "resumed losses are those of the straight run"
    assert all(torch.equal(first[0][2][name], x) for name, x in first[1][2].items())


def test_a_label_column_that_does_not_do_is_refused_by_name(tmp_path):
    words = rows().map(lambda row: {"labels": "ai" if row["labels"] else "human"})
    wrong = {
        "train_dataset has the columns input_ids, attention_mask, generated: exactly one": rows("generated"),
        "train_dataset has the columns input_ids, attention_mask, labels, label: exactly one": rows().add_column(
            "label", [0] * ROWS
        ),
        "train_dataset has 'ai' in column labels": words,
        "train_dataset has 2 in column labels": rows().map(lambda row: {"labels": 2 * row["labels"]}),
        "train_dataset has None in column labels": rows().map(lambda row: {"labels": row["labels"] or None}),
        "train_dataset is a IterableDataset": rows().to_iterable_dataset(),
        "train_dataset is a list": rows().to_list(),
        "train_dataset is a TensorDataset": torch.utils.data.TensorDataset(torch.zeros(4, 9)),
    }
    for message, dataset in wrong.items():
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, dataset)
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="eval_dataset has the columns"):
        trainer.evaluate(rows("generated"))
    with pytest.raises(ValueError, match="eval_dataset has 'ai' in column labels"):
        trainer.evaluate({"a": words})
    with pytest.raises(ValueError, match="b has 'ai' in column labels"):
        DXOTrainer(encoder(), trainer.args, train_dataset=rows(), eval_dataset={"a": rows(), "b": words})
    with pytest.raises(ValueError, match="test_dataset has 'ai' in column labels"):
        trainer.predict(words)


@pytest.mark.parametrize(
    ("column", "as_"), [("labels", float), ("label", bool), ("labels", lambda y: [y])], ids=["float", "bool", "list"]
)
def test_labels_of_any_name_and_kind_train_alike(tmp_path, column, as_):
    dataset = rows().map(lambda row: {column: as_(row["labels"])})
    dataset = dataset if column == "labels" else dataset.remove_columns("labels")
    assert losses_of(fit(tmp_path, dataset=dataset, max_steps=2)) == losses_of(fit(tmp_path, max_steps=2))


def test_its_own_data_set_serves_a_second_time(tmp_path):
    first = fit(tmp_path, max_steps=2)
    assert losses_of(fit(tmp_path, dataset=first.train_dataset, max_steps=2)) == losses_of(first)


def test_rows_without_labels_are_predicted(tmp_path):
    trainer = trainer_of(tmp_path)
    expected = trainer.predict(rows()).predictions
    for unknown in (rows().remove_columns("labels"), rows().map(lambda row: {"labels": -1})):
        found = trainer.predict(unknown)
        np.testing.assert_array_equal(found.predictions, expected)
        assert "test_loss" not in found.metrics and "test_auroc" not in found.metrics


def test_options_without_effect_are_refused(tmp_path):
    for options, message in (
        ({"batch_eval_metrics": True}, "batch_eval_metrics is True, but ranking metrics are"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential', but sampling_rate"),
        ({"warm_start": -1.0}, r"warm_start is -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, **options)
    with pytest.raises(ValueError, match="compute_loss_func is given, but the trainer computes its own loss"):
        DXOTrainer(encoder(), DXOConfig(str(tmp_path), use_cpu=True), compute_loss_func=lambda *args: 0)
    whole, parts = (trainer_of(tmp_path, eval_do_concat_batches=x).evaluate() for x in (True, False))
    assert parts["eval_tpauc"] == whole["eval_tpauc"]
