"""Every loss of classes, driven by the registry: its reference, gradients, extreme logits, order of rows, text form."""

import copy
import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_xent import classes
from hf_xent.classes import heads
from support.class_losses import NAMES, K, N, evaluated, example, is_random, referenced

EVERY = pytest.mark.parametrize("text", NAMES)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_are_those_of_the_formula(text, dtype):
    loss, logits, labels, given = example(text, dtype)
    found, expected = evaluated(loss, logits, labels, given), referenced(loss, logits, labels, given)
    assert found.shape == ((N,) if loss.per_row else ())
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.detach().double(), expected.reshape(found.shape), rtol=tolerance, atol=tolerance)


@EVERY
def test_gradients_are_those_of_the_formula(text):
    """Against central differences of the reference, by logits and by features; weights of rows that are not equal."""
    loss, logits, labels, given = example(text)
    if isinstance(loss, classes.OfStatistics):  # weights without a gradient, as in TaiLr, are no matter of differences
        expected = loss.loss.reference(logits, labels, teacher=given.get("second"))
        ours, theirs = (
            torch.autograd.grad(x.sum(), logits) for x in (evaluated(loss, logits, labels, given), expected)
        )
        return torch.testing.assert_close(ours, theirs)
    by = [logits, *([given["features"]] if "features" in given else [])]
    found = evaluated(loss, logits, labels, given)
    weights = torch.rand_like(found) + 0.5
    gradients = torch.autograd.grad((found * weights).sum(), by, allow_unused=True)
    for leaf, gradient in zip(by, gradients, strict=True):
        flat, expected, step = leaf.detach().view(-1), torch.zeros_like(leaf).view(-1), 1e-5
        for i in range(0, len(flat), max(1, len(flat) // 60)):
            before, values = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = before + sign * step
                values.append((referenced(loss, logits, labels, given).reshape(found.shape) * weights).sum())
            flat[i] = before
            expected[i] = (values[0] - values[1]) / (2 * step)
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        chosen = torch.arange(0, len(flat), max(1, len(flat) // 60))
        torch.testing.assert_close(gradient.view(-1)[chosen], expected[chosen], rtol=1e-5, atol=1e-7)
    return None


@EVERY
def test_extreme_logits_are_finite(text):
    loss, logits, labels, given = example(text, torch.float32, scale=1e4)
    value = evaluated(loss, logits, labels, given)
    [gradient] = torch.autograd.grad(value.sum(), logits, allow_unused=True)
    assert bool(value.isfinite().all()) and (gradient is None or bool(gradient.isfinite().all()))


@EVERY
def test_the_order_of_rows_is_that_of_the_losses(text):
    """A number a row goes with its row; a number of the batch stays."""
    loss, logits, labels, given = example(text)
    if is_random(loss) and not loss.per_row:
        return
    order = torch.randperm(len(logits))
    moved = {k: v.detach()[order] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    found = evaluated(loss, logits, labels, copy.deepcopy(given))
    again = evaluated(loss, logits[order], labels[order], copy.deepcopy(moved))
    torch.testing.assert_close(again, found[order] if loss.per_row else found)


@EVERY
def test_scores_predictions_and_text_form(text):
    loss, logits, *_ = example(text)
    flat = logits.flatten(2).transpose(1, 2) if loss.labels == "masks" else logits
    predicted = loss.predict(flat)
    assert predicted.shape == flat.shape[:-1]
    if loss.labels != "values":
        assert loss.scores(flat).shape == (*flat.shape[:-1], K)
        assert predicted.min() >= 0 and predicted.max() < K
    stored = json.loads(json.dumps(loss.describe()))
    assert classes.get(stored.pop("loss"), **stored) == loss


@EVERY
def test_heads_of_every_width_are_saved_and_read(text, tmp_path):
    loss = classes.get(text)
    if loss.labels == "masks":
        return
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, num_labels=K)).eval()
    classes.resize(model, loss)
    logits = model(torch.randint(3, 40, (N, 5))).logits
    assert logits.shape == (N, loss.outputs(K)) and heads.head_of(model).out_features == loss.outputs(K)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert heads.loss_of(loaded) == loss
    torch.testing.assert_close(classes.predict(loaded, logits), loss.predict(logits))
    if loss.outputs(K) == K and loss.labels == "classes":
        stock = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, num_labels=K))
        assert [*model.state_dict()] == [*stock.state_dict()], "a stock model, which a pipeline serves"
