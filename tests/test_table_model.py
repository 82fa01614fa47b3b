"""The classifier of rows of numbers: its formula, what is saved and loaded, training, and what is refused."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_xent import classes
from hf_xent.models.table import ENCODERS, TableConfig, TableForSequenceClassification
from hf_xent.trainers import ClassConfig, ClassTrainer

MEAN, STD = [1.0, -2.0, 300.0], [2.0, 0.5, 100.0]


def tiny(encoder, **options):
    torch.manual_seed(0)
    config = TableConfig(**{"features": 3, "encoder": encoder, "hidden_size": 6, "num_labels": 4, **options})
    return TableForSequenceClassification(config).eval()


def rows(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator) * torch.tensor(STD) + torch.tensor(MEAN)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(model, values):
    """The logits in numpy, float64: the cell's equations, or the perceptron's."""
    weight = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    x = (values.double().numpy() - np.array(MEAN)) / np.array(STD)
    if model.config.encoder == "mlp":
        for i in range(2):
            x = np.maximum(0, x @ weight[f"encoder.{i}.weight"].T + weight[f"encoder.{i}.bias"])
        return x @ weight["classifier.weight"].T + weight["classifier.bias"]
    sequence = [x[:, t : t + 1] for t in range(3)]
    for layer in range(2):
        of_input, of_state, b_input, b_state = (
            weight[f"encoder.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, states = np.zeros((len(x), 6)), []
        for value in sequence:
            a, b = value @ of_input.T + b_input, h @ of_state.T + b_state
            reset, update = sigmoid(a[:, :6] + b[:, :6]), sigmoid(a[:, 6:12] + b[:, 6:12])
            h = (1 - update) * np.tanh(a[:, 12:] + reset * b[:, 12:]) + update * h
            states.append(h)
        sequence = states
    return h @ weight["classifier.weight"].T + weight["classifier.bias"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_loss_and_states(encoder):
    model, values = tiny(encoder, num_hidden_layers=2, mean=MEAN, std=STD), rows()
    labels = torch.tensor([0, 3, 2, 1, 0])
    found = model(values, labels=labels, output_hidden_states=True)
    np.testing.assert_allclose(found.logits.detach(), by_hand(model, values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, labels))
    last = found.hidden_states[-1]
    torch.testing.assert_close(model.classifier(last[:, -1]), found.logits)
    assert [tuple(state.shape) for state in found.hidden_states] == (
        [(5, 3, 6)] if encoder == "gru" else [(5, 1, 6)] * 2
    )
    assert model(values).hidden_states is None and model(values).loss is None
    number = tiny(encoder, num_labels=1)
    target = torch.rand(5)
    torch.testing.assert_close(
        number(values, labels=target).loss, (number(values).logits[:, 0] - target).square().mean()
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_saved_loads_under_the_auto_classes(encoder, tmp_path):
    model = tiny(encoder, mean=MEAN, std=STD, dropout=0.5)
    with torch.no_grad():
        model.std[0] = 5.0  # buffers are weights: they are what was saved, not what the configuration says
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is TableForSequenceClassification and type(AutoConfig.from_pretrained(tmp_path)) is TableConfig
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again.eval()(rows()).logits, model(rows()).logits)
    assert (again.config.dropout, again.config.mean) == (0.5, MEAN)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_initial_weights_are_torch_s_but_for_the_head(encoder):
    model = tiny(encoder, hidden_size=400, initializer_range=0.01)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1) and not model.classifier.bias.any()
    encoder_weights = dict(model.encoder.named_parameters())
    bound = 400**-0.5 if encoder == "gru" else 3**-0.5
    assert all(0.9 * bound < tensor.abs().max() <= bound for tensor in encoder_weights.values())


def test_resized_and_trained_under_a_loss_of_classes(tmp_path):
    """A trainer reads `values` by the name of the argument; the wider head is saved and loaded."""
    values = rows(64)
    data = {"values": values.tolist(), "label": (values[:, 0] > 1).long().tolist()}
    data = Dataset.from_dict({**data, "aspects": torch.rand(64, 2).tolist()})
    model = tiny("mlp", num_labels=2, mean=MEAN, std=STD, hidden_size=32)
    options = {
        "num_train_epochs": 12,
        "learning_rate": 2e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    config = ClassConfig(output_dir=str(tmp_path), loss="aspects:questions=2, alpha=0.1", logging_steps=8, **options)
    trainer = ClassTrainer(model, config, train_dataset=data)
    assert model.classifier.out_features == 4
    trainer.train()
    found = trainer.predict(data)
    assert (found.predictions == found.label_ids).mean() > 0.9
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert classes.predict(again, again(values).logits).tolist() == found.predictions.tolist()


def test_a_stock_trainer_s_steps_lower_the_loss(tmp_path):
    values = rows(32)
    data = Dataset.from_dict({"values": values.tolist(), "label": (values[:, 2] > 300).long().tolist()})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, learning_rate=3e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(tiny("gru", mean=MEAN, std=STD, hidden_size=32), arguments, train_dataset=data)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < before - 0.3


def test_low_precision_standardises_in_float32():
    model = tiny("mlp", mean=MEAN, std=STD)
    values = torch.tensor([[1.0, -2.0, 301.0], [1.0, -2.0, 300.0]])  # equal in bfloat16, but for the standardisation
    low = model.to(torch.bfloat16)(values).logits
    assert low.dtype == torch.bfloat16 and not torch.equal(low[0], low[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lstm"}, "encoder is 'lstm': choose one of gru, mlp"),
        ({"dropout": 1.0}, "dropout is 1.0: choose 0 <= dropout < 1"),
        ({"features": 3, "mean": [1.0]}, "mean has 1 numbers for 3 features"),
        ({"features": 2, "std": [1.0, 0.0]}, "std has the number 0.0: give 1"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(**options)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"values has shape \(5, 2\): give rows of 3 numbers, \[B, T\]"):
        tiny("gru")(rows()[:, :2])


@pytest.mark.slow
def test_the_example_compares_both_heads_and_a_control(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = import_module("gru_svm")
    monkeypatch.setattr(example, "RATES", (3e-3,))
    found = example.main("breast_cancer", epochs=2, seeds=1, output=tmp_path)
    assert list(found) == ["GRU, softmax", "GRU, SVM", "logistic regression"]
    assert all(rows[0]["accuracy"] > 0.8 for rows in found.values())
    assert "GRU-SVM on breast_cancer" in (tmp_path / "breast_cancer" / "README.md").read_text()


def test_its_card_loads_it_in_a_process_that_knows_transformers_alone():
    from hf_xent.hub.usage import usage_of

    usage = usage_of(TableForSequenceClassification(TableConfig(3, num_labels=2)))
    assert 'AutoModelForSequenceClassification.from_pretrained("PLACE", trust_remote_code=True)' in usage.code
    assert usage.library == "transformers" and usage.task == "text-classification"
