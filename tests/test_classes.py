"""Losses of classes: worked examples, their references, heads of other widths, and the trainer that carries them."""

import copy

import datasets
import numpy as np
import peft
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_xent import classes
from hf_xent.classes import Aspects
from hf_xent.trainers import ClassConfig, ClassTrainer
from support.models import tiny
from support.ranks import run_ranks

K, Q, ROWS = 3, 2, 12
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def encoder(kind=BertForSequenceClassification, dropout=0.0, **options):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**SIZES, **rates, max_position_embeddings=16, initializer_range=0.3, num_labels=K, **options)
    return kind(config)


def rows(**columns):
    """Labels in turn, the fifth of them ignored."""
    draw = np.random.default_rng(0)
    table = {
        "input_ids": draw.integers(3, 40, (ROWS, 7)).tolist(), "attention_mask": [[1] * 7] * ROWS,
        "labels": [-100 if i == 4 else i % K for i in range(ROWS)], "aspects": draw.random((ROWS, Q)).tolist(),
    }  # fmt: skip
    return datasets.Dataset.from_dict({k: v for k, v in {**table, **columns}.items() if v is not None})


def trainer_of(folder, model=None, dataset=None, loss=None, evaluated=None, **options):
    more = {k: options.pop(k) for k in ("compute_metrics", "preprocess_logits_for_metrics") if k in options}
    common = {
        "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": [],
        "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    config = ClassConfig(output_dir=str(folder), **{**common, **options})
    model = encoder() if model is None else model
    dataset = rows() if dataset is None else dataset
    loss = loss or Aspects(Q)
    return ClassTrainer(model, config, loss=loss, train_dataset=dataset, eval_dataset=evaluated or rows(), **more)


def fit(folder, resume=None, **options):
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_weights(ours, expected, tolerance=0.0):
    expected = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_worked_example():
    """z = [2, 0 | 1, -1], y = 0, P = [.8, .1]: CE .126928, and 4 times the mean BCE of the answers."""
    z, y, p = torch.tensor([[2.0, 0, 1, -1]]), torch.tensor([0]), torch.tensor([[0.8, 0.1]])
    loss = classes.get("aspects:questions=2")
    assert loss == Aspects(2, 4.0) and loss.outputs(2) == 4 and loss.columns == ("aspects",)
    assert loss(z, y, aspects=p).item() == pytest.approx(1.979975, abs=1e-6)
    assert loss.reference(z, y, aspects=p).item() == pytest.approx(1.979975, abs=1e-6)
    assert loss(z, y).item() == pytest.approx(0.126928, abs=1e-6), "cross-entropy alone"
    assert loss.predict(torch.tensor([[0.0, 1, 9, 9], [1, 0, 9, 9]])).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("questions", "alpha"), [(1, 4.0), (5, 0.5), (7, 0.0)])
def test_aspects_are_their_reference(dtype, questions, alpha):
    """Values, and gradients in closed form: softmax - onehot, and alpha / Q (sigmoid - P); certain answers, too."""
    torch.manual_seed(0)
    loss, tolerance = Aspects(questions, alpha), 1e-12 if dtype == torch.float64 else 1e-5
    z = torch.randn(6, K + questions, dtype=dtype).mul_(3).requires_grad_()
    y, p = torch.randint(K, (6,)), torch.rand(6, questions, dtype=dtype)
    p[0], p[1] = 0, 1
    found, weights = loss(z, y, aspects=p), torch.randn(6, dtype=dtype)
    expected = loss.reference(z.detach(), y, aspects=p)
    np.testing.assert_allclose(found.detach().double(), expected, rtol=0, atol=10 * tolerance)
    (found * weights).sum().backward()
    onehot = torch.nn.functional.one_hot(y, K)
    gradient = torch.cat([z[:, :K].softmax(-1) - onehot, alpha / questions * (z[:, K:].sigmoid() - p)], -1)
    torch.testing.assert_close(z.grad, gradient.detach() * weights[:, None], rtol=0, atol=tolerance)
    if alpha == 0:
        assert torch.equal(found, torch.nn.functional.cross_entropy(z[:, :K], y, reduction="none"))


def test_extreme_logits_are_finite():
    z = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    loss = Aspects(2)(z, torch.tensor([1]), aspects=torch.tensor([[0.0, 1.0]])).sum()
    loss.backward()
    assert loss.item() == 2e4 + 4 * 1e4 and bool(z.grad.isfinite().all())


def test_resize_keeps_the_rows_of_the_classes(tmp_path):
    """A head with bias (BERT) and one without (Llama); saved, loaded, and resized again to no effect."""
    llama = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=K, pad_token_id=0))
    for model, name in ((encoder(id2label={0: "a", 1: "b", 2: "c"}), "classifier"), (llama, "score")):
        before, ids = copy.deepcopy(model).eval(), torch.randint(3, 40, (4, 5))
        assert torch.equal(classes.predict(model, torch.eye(K)), torch.arange(K))
        classes.resize(model, Aspects(Q, 2.0))
        logits = model.eval()(ids).logits
        torch.testing.assert_close(logits[:, :K], before(ids).logits)
        assert logits.shape == (4, K + Q) and model.config.num_labels == K + Q == len(model.config.label2id)
        assert [*model.config.label2id.values()] == [*range(K + Q)] and model.config.id2label[K] == "OUTPUT_3"
        assert model.config.id2label[0] == before.config.id2label[0]
        assert model.config.hf_xent_loss == {"loss": "aspects", "questions": Q, "alpha": 2.0, "classes": K}
        assert model.get_submodule(name).weight[K:].std() > 0
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids).logits, logits)
        assert torch.equal(classes.predict(loaded, logits), logits[:, :K].argmax(-1))
        head = loaded.get_submodule(name)
        classes.resize(loaded, "aspects:questions=2, alpha=3")
        assert loaded.get_submodule(name) is head and loaded.config.hf_xent_loss["alpha"] == 3
        with pytest.raises(ValueError, match=r"has 5 outputs, but Aspects\(questions=4, alpha=4.0\) needs 7: load"):
            classes.resize(loaded, Aspects(4))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM without a linear layer of 2 outputs"):
        classes.resize(tiny(), Aspects(Q))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_steps_are_those_of_a_readable_loop(tmp_path, accumulation):
    """1 x 4 rows are 2 x 2 and 4 x 1, also with an ignored label in one of them; every row is in one step."""
    model = encoder()
    classes.resize(model, Aspects(Q))
    trainer = fit(
        tmp_path, model=copy.deepcopy(model), per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    data, logged = rows().with_format("torch"), []
    for start in range(0, ROWS, 4):
        kept = [i for i in range(start, start + 4) if data["labels"][i] != -100]
        batch = data[kept]
        z = model.train()(input_ids=batch["input_ids"]).logits
        bce = torch.nn.functional.binary_cross_entropy_with_logits(z[:, K:], batch["aspects"])
        loss = torch.nn.functional.cross_entropy(z[:, :K], batch["labels"]) + 4 * bce
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        logged.append(loss.item())
    assert_same_weights(trainer.model, model, 2e-6)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(logged, rel=1e-5)


def test_alpha_0_is_the_stock_trainer(tmp_path):
    """Every weight but the new rows of the head, which stay as they were drawn."""
    dataset, model = rows(labels=[i % K for i in range(ROWS)]), encoder()
    trainer = fit(tmp_path, model=copy.deepcopy(model), dataset=dataset, loss=Aspects(Q, 0.0))
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd"}
    options |= {"max_grad_norm": 0.0, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    stock = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=dataset)
    stock.train()
    head = trainer.model.classifier
    head.weight, head.bias = (torch.nn.Parameter(x[:K]) for x in (head.weight, head.bias))
    assert_same_weights(trainer.model, stock.model, 1e-6)


def test_resume_is_bit_equal(tmp_path):
    """With dropout, from the middle of an epoch, into a fresh model of K labels."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    straight = fit(tmp_path, model=encoder(dropout=0.2), **options)
    resumed = fit(tmp_path, tmp_path / "checkpoint-2", model=encoder(dropout=0.2), **options)
    assert_same_weights(resumed.model, straight.model)


def on_a_rank(rank, folder):
    trainer = fit(folder, per_device_train_batch_size=2, train_sampling_strategy="sequential")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach() for name, p in trainer.model.named_parameters()}, losses


@pytest.mark.slow
def test_two_ranks_are_one_process_with_all_rows(tmp_path):
    """2 x 2 rows are 1 x 4, also where one of the ranks has an ignored label."""
    ranks = run_ranks(2, on_a_rank, tmp_path, str(tmp_path / "ranks"))
    alone = fit(tmp_path / "alone", train_sampling_strategy="sequential")
    for weights, losses in ranks:
        for name, expected in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], expected.detach(), rtol=1e-4, atol=1e-5)
        assert losses == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], rel=1e-4)


def test_evaluation_predicts_classes(tmp_path):
    """Loss with and without the column, of which the latter is cross-entropy; classes for metrics and `predict`."""
    measure = lambda found: {"accuracy": float((found.predictions == found.label_ids).mean())}  # noqa: E731
    every = rows(labels=[i % K for i in range(ROWS)])
    trainer = trainer_of(tmp_path, evaluated=every, compute_metrics=measure, per_device_eval_batch_size=4)
    logits = trainer.model.eval()(torch.tensor(every["input_ids"])).logits.detach()
    labels, expected = torch.tensor(every["labels"]), logits[:, :K].argmax(-1)
    found = trainer.evaluate()
    reference = Aspects(Q).reference(logits, labels, aspects=every["aspects"])
    assert found["eval_loss"] == pytest.approx(reference.mean(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((expected == labels).double().mean().item())
    plain = trainer.evaluate(every.remove_columns("aspects"))
    assert plain["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits[:, :K], labels).item(), rel=1e-5
    )
    unlabeled = trainer.predict(every.remove_columns("labels"))
    assert unlabeled.predictions.tolist() == expected.tolist() and unlabeled.label_ids is None
    raw = trainer_of(tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits).predict(every)
    assert raw.predictions.shape == (ROWS, K + Q)


def test_token_classifiers_have_aspects_of_tokens(tmp_path):
    labels = [[-100, *[(i + t) % K for t in range(6)]] for i in range(ROWS)]
    answers = np.random.default_rng(1).random((ROWS, 7, Q)).tolist()
    dataset = rows(labels=labels, aspects=answers)
    trainer = trainer_of(tmp_path, encoder(BertForTokenClassification), dataset, evaluated=dataset)
    logits = trainer.model.eval()(torch.tensor(dataset["input_ids"])).logits.detach()[:, 1:].flatten(0, 1)
    flat, p = torch.tensor(labels)[:, 1:].flatten(), torch.tensor(answers)[:, 1:].flatten(0, 1)
    expected = Aspects(Q).reference(logits, flat, aspects=p).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()


def test_adapters_and_cards(tmp_path):
    """A head that was resized before the adapter is trained in full; the card says what the loss is."""
    config = peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query", "value"])
    with pytest.raises(ValueError, match=r"whose head was not resized: call hf_xent.classes.resize"):
        trainer_of(tmp_path, peft.get_peft_model(encoder(), config))
    model = encoder()
    classes.resize(model, Aspects(Q))
    before = model.classifier.weight.clone()
    trainer = fit(tmp_path, model=peft.get_peft_model(model, config))
    [after] = [p for n, p in trainer.model.named_parameters() if "classifier.modules_to_save" in n and "weight" in n]
    assert after.shape == before.shape and not torch.equal(after, before)
    trainer.create_model_card("taught")
    card = (tmp_path / "README.md").read_text()
    assert "- `questions`: 2" in card and "CE(softmax(z_1..z_K), y) + alpha mean_q" in card
    assert "`hf_xent.classes.predict(model, logits)` reads them" in card, "its outputs are not classes"


def test_refusals(tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message) as error:
            fit(tmp_path, **options)
        assert "\n" not in str(error.value)

    refused("label_smoothing_factor is 0.1, but the loss of classes decides", label_smoothing_factor=0.1)
    refused("train_dataset has the columns .*, but Aspects.* needs aspects: add the column", dataset=rows(aspects=None))
    refused("a batch has input_ids, attention_mask, aspects: give labels$", dataset=rows(labels=None))
    refused("shape .4, 2. for 4 rows, .* give each row 4 probabilities, or set questions", loss=Aspects(4))
    refused("with values from .* to 1.5: give each row 2", dataset=rows(aspects=[[0.5, 1.5]] * ROWS))
    refused(r"has logits of shape \(4, 5\) for labels of shape \(4, 7\)", dataset=rows(labels=[[1] * 7] * ROWS))
    with pytest.raises(ValueError, match="loss is 'overlap': choose one of aspects"):
        classes.get("overlap")
    with pytest.raises(ValueError, match="set alpha on the object, not beside it"):
        classes.get(Aspects(), alpha=1)
    for options, message in (({"questions": 0}, "questions is 0"), ({"alpha": -1}, r"alpha is -1: choose a number")):
        with pytest.raises(ValueError, match=message):
            Aspects(**options)
