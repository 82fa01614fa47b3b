"""Losses of numbers and of ordered classes, the support vector machine, and models that return values to TRL."""

import copy
import io
import math

import datasets
import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from hf_xent import classes
from hf_xent.classes import SVM, HLGauss, Ordinal, SquaredError, TwoHot
from hf_xent.trainers import ClassConfig, ClassTrainer
from support.models import tiny_tokenizer

SIZES = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
COMMON = {
    "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "report_to": [],
    "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True,
    "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
}  # fmt: skip


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


def bert(labels, seed=0):
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **rates, num_labels=labels, initializer_range=0.3))


def llama(labels):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, num_labels=labels, initializer_range=0.3)
    return LlamaForSequenceClassification(config)


# Numbers in bins


def test_the_worked_examples_of_bins():
    y = torch.tensor([1.7])
    gauss = HLGauss(0, 4, bins=4, padded=False)
    p = gauss.targets(y)
    close(p, [[0.165738, 0.486317, 0.306986, 0.040960]])
    close(gauss.value(p.log()), [1.723167])
    close(gauss(torch.zeros(1, 4), y), [math.log(4)])
    hot = TwoHot(0.5, 3.5, bins=4)
    close(hot.targets(y), [[0, 0.8, 0.2, 0]])
    atoms = torch.tensor([0.5, 1.5, 2.5, 3.5])  # C51's projection of a single number is the same
    close(hot.targets(y), (1 - (y - atoms).abs() / 1.0).clamp(0, 1)[None])
    assert classes.get("hl_gauss:low=0, high=4, bins=4, padded=False") == gauss and gauss.outputs(1) == 4


def test_bins_mean_their_labels():
    """Two-hot exactly, HL-Gauss within 1e-3 of the range; without padding its mean moves inwards at the ends."""
    y = torch.linspace(-2, 3, 201, dtype=torch.float64)
    gauss, hot, bare = HLGauss(-2, 3), TwoHot(-2, 3, bins=7), HLGauss(-2, 3, padded=False)
    close(hot.value(hot.targets(y).log()), y, 1e-12)
    close(gauss.value(gauss.targets(y).log()), y, 1e-3)
    assert (bare.value(bare.targets(y).log()) - y).abs().max() > 0.02
    for loss in (gauss, hot, bare):
        close(loss.targets(y).sum(-1), torch.ones(201), 1e-12)
        assert torch.equal(loss.targets(torch.tensor([-9.0, 7.0])), loss.targets(torch.tensor([-2.0, 3.0])))
        assert torch.equal(loss.targets(torch.tensor([1])), loss.targets(torch.tensor([1.0]))), "labels that are whole"
        assert loss(torch.zeros(0, loss.bins), torch.zeros(0)).shape == (0,)


def test_a_narrow_normal_distribution_is_one_bin():
    z, y = torch.randn(40, 8, dtype=torch.float64), torch.rand(40, dtype=torch.float64) * 4
    expected = F.cross_entropy(z, (y / 0.5).long(), reduction="none")
    for padded in (True, False):
        close(HLGauss(0, 4, bins=8, sigma_ratio=1e-7, padded=padded)(z, y), expected, 1e-5)


def test_the_padding_is_three_sigma():
    loss = HLGauss(-1, 2, bins=12, sigma_ratio=0.5)
    first, width = loss.grid
    edges = first - width / 2, first + (12 - 0.5) * width
    assert edges == pytest.approx((-1 - 3 * 0.5 * width, 2 + 3 * 0.5 * width)) and width == pytest.approx(3 / 9)


def test_squared_error_is_that_of_transformers():
    model, ids, y = bert(1), torch.randint(3, 90, (4, 6)), torch.randn(4)
    out = model(ids, labels=y)
    torch.testing.assert_close(SquaredError()(out.logits, y).mean(), out.loss)
    assert torch.equal(SquaredError().predict(out.logits), out.logits[:, 0]) and SquaredError().outputs(4) == 1


def test_options_of_bins_are_refused():
    for options, message in (
        ({"low": 2, "high": 2}, "high is 2: choose a number above low, which is 2"),
        ({"low": "a"}, "low is 'a': choose a finite number"),
        ({"high": math.inf}, "high is inf: choose a finite number"),
        ({"bins": 1}, "bins is 1: choose a whole number of at least 2"),
        ({"bins": 4}, r"bins is 4: the padding alone takes 6 sigma_ratio, 4.5: choose more, or padded=False"),
        ({"sigma_ratio": 0}, "sigma_ratio is 0: choose a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            HLGauss(**options)
    model = bert(1)
    for loss, message in (("hl_gauss", "low is None: set low and high"), ("two_hot:low=0", "high is None: set low")):
        with pytest.raises(ValueError, match=message):
            classes.resize(model, loss)
    assert model.classifier.out_features == 1


# Ordered classes


def test_the_worked_examples_of_ordinal():
    levels, coral, corn = torch.tensor([[2.0, 0, -1]]), Ordinal(), Ordinal("corn")
    close(coral.scores(levels), [[0.119203, 0.380797, 0.231059, 0.268941]])
    close(coral(levels, torch.tensor([2])), [1.133337])
    assert coral.predict(levels).tolist() == [1], "sigmoid(0) is not above one half"
    close(coral.value(levels), [0.880797 + 0.5 + 0.268941])
    close(corn.beyond(levels), [[0.880797, 0.440399, 0.118441]])
    assert corn.predict(levels).tolist() == [1]
    z, y = torch.tensor([[2.0, 0, -1], [1, -1, 0]]), torch.tensor([2, 0])
    close(corn(z, y).sum(), 2.446599)
    close(Ordinal("corn", "pairs")(z, y), 0.611650)
    close(Ordinal("corn", "K")(z, y).mean(), 0.305825)
    free = torch.tensor([[2.0, math.log(math.expm1(2)), math.log(math.expm1(1))]])  # softplus of them: 2 and 1
    softmax = Ordinal("softmax")
    close(softmax.levels(free), levels)
    close(softmax.scores(free), coral.scores(levels))
    close(softmax(free, torch.tensor([1])), [0.965489])


@pytest.mark.parametrize("kind", ["coral", "corn", "softmax"])
def test_two_classes_are_binary_cross_entropy(kind):
    z, y = torch.randn(20, 1), torch.randint(2, (20,))
    loss = Ordinal(kind)
    torch.testing.assert_close(loss(z, y), F.binary_cross_entropy_with_logits(z[:, 0], y.float(), reduction="none"))
    close(loss.scores(z)[:, 1], z[:, 0].sigmoid())
    assert torch.equal(loss.predict(z), (z[:, 0] > 0).long())
    assert loss.outputs(2) == 1 and loss(z[:0], y[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["coral", "corn", "softmax"])
def test_scores_are_probabilities_and_values_their_mean(kind):
    z = torch.randn(50, 4, dtype=torch.float64) * 3
    z = z.sort(-1, descending=True).values if kind == "coral" else z
    loss = Ordinal(kind)
    p = loss.scores(z)
    close(p.sum(-1), torch.ones(50), 1e-12)
    assert p.min() >= 0
    close(loss.value(z), p @ torch.arange(5.0, dtype=torch.float64), 1e-12)
    y = torch.randint(5, (50,))
    if kind == "softmax":
        close(loss(z, y), -p.gather(-1, y[:, None])[:, 0].log(), 1e-9)
        levels = F.logsigmoid(loss.levels(z))  # the stable form by differences, for the classes between the ends
        between = levels[:, :-1] + torch.log1p(-(levels[:, 1:] - levels[:, :-1]).exp())
        close(loss(z, torch.full((50,), 2)), -between[:, 1], 1e-9)
    assert Ordinal().scores(torch.randn(50, 4)).min() >= 0, "also of levels out of order"


def test_conditional_tasks_are_learned_by_the_rows_that_reach_them():
    """CORN as one binary cross-entropy for each logit, over the rows with y > k - 1."""
    z, y = torch.randn(30, 3), torch.randint(4, (30,))
    parts = [
        F.binary_cross_entropy_with_logits(z[y >= k, k], (y[y >= k] > k).float(), reduction="sum") for k in range(3)
    ]
    count = sum(int((y >= k).sum()) for k in range(3))
    close(Ordinal("corn")(z, y).sum(), sum(parts), 1e-4)
    pairs = Ordinal("corn", "pairs")
    close(pairs(z, y), sum(parts) / count)
    assert not pairs.per_row and Ordinal("corn", "K").per_row and Ordinal().per_row
    assert pairs(z[:0], y[:0]).item() == 0


def test_options_and_labels_of_ordinal_are_refused():
    for options, message in (
        ({"kind": "probit"}, "kind is 'probit': choose one of coral, corn, softmax"),
        ({"kind": "corn", "normalize": "N"}, "normalize is 'N': choose 'K' or 'pairs'"),
        ({"normalize": "K"}, "normalize is 'K', but only kind='corn' is divided: leave it None"),
    ):
        with pytest.raises(ValueError, match=message):
            Ordinal(**options)
    for labels in ([1, 4], [-1, 2]):
        with pytest.raises(ValueError, match=rf"labels go from {labels[0]} to {labels[1]} with 4 classes: number"):
            Ordinal()(torch.zeros(2, 3), torch.tensor(labels))


def test_thresholds_of_a_new_head():
    model = bert(4)
    classes.resize(model, "ordinal")
    close(model.classifier.bias.detach(), [1, 2 / 3, 1 / 3])
    model, loss = bert(4), Ordinal("softmax")
    classes.resize(model, loss)
    close(loss.scores(model.classifier.bias.detach()), [0.25] * 4)


class OneDirection(nn.Module):
    """CORAL's layer as its authors write it: one weight and K - 1 biases."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.bias = nn.Parameter(head.weight[:1].clone()), nn.Parameter(head.bias.clone())

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


def steps(head, other, optimizer, rows=20):
    """Both layers after three steps of ordinal cross-entropy on the same rows."""
    x, y = torch.randn(rows, 7), torch.randint(5, (rows,))
    optimizers = [optimizer(layer.parameters()) for layer in (head, other)]
    for _ in range(3):
        for layer, steps in zip((head, other), optimizers, strict=True):
            steps.zero_grad()
            Ordinal()(layer(x), y).mean().backward()
            steps.step()


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.3), lambda p: torch.optim.AdamW(p, 0.1)])
@pytest.mark.parametrize("copied", [False, True])
def test_coral_has_one_direction(optimizer, copied):
    """In a linear layer, also in a copy of it; it is prepared again to no effect, and not hooked twice."""
    torch.manual_seed(0)
    head = nn.Linear(7, 4)
    Ordinal().prepare(head, new=True)
    Ordinal().prepare(head, new=False)
    assert len(head._forward_hooks) == 1
    head = copy.deepcopy(head) if copied else head
    other = OneDirection(head)
    steps(head, other, optimizer)
    torch.testing.assert_close(head.weight, other.weight.expand(4, 7), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.bias, other.bias, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(head.state_dict())
    Ordinal().prepare(head, new=False)
    assert all(torch.equal(head.state_dict()[name], before[name]) for name in before)


def test_another_loss_of_the_same_width_is_free_again():
    model = bert(4)
    classes.resize(model, "ordinal")
    x, y = torch.randn(6, 16), torch.tensor([0, 1, 2, 3, 1, 2])
    for loss, shared in (("ordinal:kind=corn", False), ("ordinal", True), ("two_hot:low=0, high=1, bins=3", False)):
        classes.resize(model, loss)
        model.zero_grad()
        Ordinal()(model.classifier(x), y).sum().backward()
        gradient = model.classifier.weight.grad
        assert torch.equal(gradient[0], gradient[1]) == shared, loss


def test_a_head_without_bias_is_refused_before_the_model_is_changed():
    model = llama(4)
    with pytest.raises(ValueError, match=r"kind is 'coral', whose thresholds are the biases .* has none"):
        classes.resize(model, "ordinal")
    assert model.config.num_labels == 4 == model.score.out_features
    classes.resize(model, "ordinal:kind=softmax")
    assert model.score.out_features == 3


# The support vector machine


def test_the_worked_example_of_the_svm():
    """f = [[.5, -2], [.2, .3]] with classes 0 and 1, |W|^2 = 5: the hinges are 2.18, the loss 3.59."""
    f, y = torch.tensor([[0.5, -2], [0.2, 0.3]]), torch.tensor([0, 1])
    head = nn.Linear(2, 2)
    head.weight = nn.Parameter(torch.tensor([[2.0, 1], [0, 0]]))
    loss = SVM(norm_weight=1)
    close(loss(f, y).sum() / 0.5, 2.18)
    close(loss(f, y).sum() + loss.penalty(head), 3.59)
    assert loss.predict(torch.tensor([[0.2, 0.9, -1]])).tolist() == [1], "not the first positive one"
    assert SVM(norm_weight=0.0).penalty(head) is None
    n = 256  # the authors' objective of a batch, divided by its rows
    f, y = torch.randn(n, 2), torch.randint(2, (n,))
    close(SVM()(f, y).mean() + SVM().penalty(head), (loss(f, y).sum() + loss.penalty(head)) / n)


def test_margins_of_one_have_no_gradient():
    f = torch.tensor([[1.0, -1, -3], [-1.5, 2, -1]], requires_grad=True)
    SVM()(f, torch.tensor([0, 1])).sum().backward()
    assert not f.grad.any()


# Models that return values

LOSSES = {"hl_gauss:low=-2, high=2, bins=9": 1, "two_hot:low=-2, high=2, bins=6": 1, "ordinal:kind=softmax": 5}


def read(text, z):
    """The numbers that logits stand for, written out."""
    if text.startswith("ordinal"):
        levels = torch.cat([z[:, :1], z[:, :1] - torch.log1p(z[:, 1:].exp()).cumsum(-1)], -1)
        return torch.sigmoid(levels).sum(-1)
    beyond = 3 * 0.75 * 4 / (9 - 6 * 0.75) if text.startswith("hl_gauss") else 0.0
    width = (4 + 2 * beyond) / 9
    ends = (-2 - beyond + width / 2, 2 + beyond - width / 2) if beyond else (-2, 2)
    return (z.softmax(-1) * torch.linspace(*ends, z.shape[-1])).sum(-1)


def pairs():
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    table = {"chosen": [" ".join(words[i : i + 3]) for i in range(6)], "rejected": [words[8 - i] for i in range(6)]}
    return datasets.Dataset.from_dict(table)


def reward_trainer(model, folder, **options):
    more = {"peft_config": options.pop("peft_config", None)}
    config = RewardConfig(str(folder), **{**COMMON, "bf16": False, **options})
    return RewardTrainer(model, config, train_dataset=pairs(), processing_class=tiny_tokenizer(), **more)


@pytest.mark.parametrize("text", LOSSES)
def test_values_are_read_from_the_head(text, tmp_path):
    """Also in copies and pickles; saved and loaded it is the wider classifier, until it returns values again."""
    model, ids = llama(LOSSES[text]).eval(), torch.randint(3, 90, (3, 5))
    assert classes.return_values(model, text) is model
    width, wide = model.score.out_features, []
    with classes.heads.inputs_of(model.score) as seen:
        values = model(ids).logits
    expected = read(text, F.linear(seen[0][:, -1], model.score.weight))
    torch.testing.assert_close(values, expected[:, None])
    y = torch.randn(3)
    torch.testing.assert_close(model(ids, labels=y).loss, F.mse_loss(expected, y))
    assert classes.return_values(model) is classes.return_values(model, text) is model and model.config.num_labels == 1
    torch.save(model, stream := io.BytesIO())
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(ids).logits, values) and other.config.num_labels == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    wide = loaded(ids).logits
    assert wide.shape == (3, width)
    torch.testing.assert_close(classes.get(text).value(wide)[:, None], values)
    torch.testing.assert_close(classes.return_values(loaded)(ids).logits, values)
    half = copy.deepcopy(model).bfloat16()(ids).logits
    assert half.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default sets it
@pytest.mark.parametrize("text", LOSSES)
def test_rewards_are_trained_as_in_a_readable_loop(text, tmp_path):
    """TRL's trainer on values: weights and losses of three steps; then from its checkpoint to the end, bit for bit."""
    start = classes.return_values(llama(LOSSES[text]), text)
    trainer = reward_trainer(copy.deepcopy(start), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    model = llama(LOSSES[text])
    classes.resize(model, text)
    model.load_state_dict(start.state_dict())
    data, logged = trainer.train_dataset, []
    better, worse = (next(c for c in data.column_names if c.startswith(k) and "ids" in c) for k in ("chosen", "reject"))
    for step in range(3):
        rows = data[2 * step : 2 * step + 2]
        values = [read(text, model(torch.tensor([ids])).logits) for ids in rows[better] + rows[worse]]
        chosen, rejected = torch.cat(values).chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        logged.append(loss.item())
    for (name, ours), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(logged, rel=1e-4)
    again = classes.return_values(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2"))
    resumed = reward_trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, expected in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default sets it
def test_rewards_after_labels_and_under_an_adapter(tmp_path):
    """ClassTrainer learns numbers, RewardTrainer goes on; an adapter trains the head of bins in full."""
    draw = np.random.default_rng(0)
    table = {"input_ids": draw.integers(3, 90, (6, 5)).tolist(), "labels": draw.normal(size=6).tolist()}
    rows = datasets.Dataset.from_dict(table)
    taught = ClassTrainer(
        llama(1), ClassConfig(str(tmp_path), **COMMON), loss="hl_gauss:low=-2, high=2", train_dataset=rows
    )
    taught.train()
    model = classes.return_values(taught.model)
    config = peft.LoraConfig("SEQ_CLS", r=2, target_modules=["q_proj"])
    before = model.score.weight.clone()
    trainer = reward_trainer(model, tmp_path, peft_config=config)
    trainer.train()
    head = trainer.model.base_model.model.score.modules_to_save["default"]
    assert head.weight.shape == (51, 16) and not torch.equal(head.weight, before)
    trainer.save_model(tmp_path / "adapter")
    base = classes.return_values(copy.deepcopy(llama(1)), "hl_gauss:low=-2, high=2")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert loaded(torch.randint(3, 90, (3, 5))).logits.shape == (3, 1)


def test_one_direction_under_an_adapter(tmp_path):
    """PEFT trains a copy of the head, whose rows stay equal under a trainer that knows nothing of them."""
    model = bert(5)
    classes.return_values(model, "ordinal")
    model = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query"]))
    rows = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5]] * 6, "labels": [0.0, 1, 2, 3, 4, 2]})
    Trainer(model, TrainingArguments(str(tmp_path), **COMMON), train_dataset=rows).train()
    head = model.base_model.model.classifier
    weight = head.modules_to_save["default"].weight
    assert torch.equal(weight, weight[:1].expand(4, 16)) and not torch.equal(weight, head.original_module.weight)


def test_refusals_of_values():
    with pytest.raises(ValueError, match="was not resized for a loss: pass one, such as 'hl_gauss"):
        classes.return_values(llama(1))
    with pytest.raises(ValueError, match=r"loss is SVM.*, whose classes are no numbers: choose hl_gauss"):
        classes.return_values(bert(3), "svm")
    model = classes.return_values(llama(1), "two_hot:low=0, high=1")
    with pytest.raises(ValueError, match=r"but model returns the values of TwoHot.*: save the model and load it"):
        classes.return_values(model, "two_hot:low=0, high=2")
    with pytest.raises(ValueError, match="model returns values in place of its 51 logits: save it and load it"):
        classes.resize(model, "two_hot:low=0, high=1")
