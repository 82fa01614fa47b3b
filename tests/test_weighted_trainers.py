"""Columns that weigh labels, in trainers: one step equals transformers' Trainer with a dense, weighted loss."""

import math

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

import test_sft
from hf_xent import trainers
from hf_xent.patching import patch_state
from hf_xent.trainers import NoiseFiTConfig, NoiseFiTTrainer, XentConfig, XentTrainer
from hf_xent.trainers.weights import WithWeights
from support.models import V, tiny, tiny_tokenizer
from support.ranks import run_ranks

ALIKE = {"rtol": 1e-4, "atol": 1e-6}


def rows_of(count=8, start=0, **without):
    """Sequences of unequal lengths with weights of labels and of rows."""
    generator = torch.Generator().manual_seed(start)
    found = []
    for i in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        weights = (2 * torch.rand(length, generator=generator)).tolist()
        weights[1] = 0.0
        found.append(
            {"input_ids": ids, "labels": [-100, *ids[1:]], "token_weights": weights, "loss_weight": 0.1 + i % 3}
        )
    return datasets.Dataset.from_list(found)


def collate(examples):
    length = max(len(x["input_ids"]) for x in examples)
    fills = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([x[k] + [fill] * (length - len(x[k])) for x in examples]) for k, fill in fills.items()}


def arguments(folder, kind=XentConfig, **options):
    common = {
        "max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "logging_steps": 1,
        "use_cpu": True, "report_to": [], "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**common, **options})


def fit(folder, rows, collator=collate, **options):
    more = {name: options.pop(name) for name in ("loss", "compute_loss_func") if name in options}
    trainer = XentTrainer(
        tiny(std=0.05), arguments(folder, **options), train_dataset=rows, data_collator=collator, **more
    )
    trainer.train()
    return trainer


def padded_weights(rows):
    """The weights of all rows in a batch that is padded on the right."""
    lists = [[w * row["loss_weight"] for w in row["token_weights"]] for row in rows]
    length = max(map(len, lists))
    return torch.tensor([x + [0.0] * (length - len(x)) for x in lists])


def weighted_mean(model, batch, weights):
    """The weighted mean of cross-entropies over dense logits."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, V), batch["labels"][:, 1:]
    losses = F.cross_entropy(logits, labels.reshape(-1), reduction="none")
    mass = (weights[:, 1:] * (labels != -100)).reshape(-1)
    return (losses * mass).sum() / mass.sum()


def step_of_stock(folder, rows):
    """Parameters after a step of transformers' Trainer that weighs dense losses, and its loss."""

    class Dense(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return weighted_mean(model, inputs, inputs["weights"])

    rows = [{k: row[k] for k in ("input_ids", "labels", "token_weights", "loss_weight")} for row in rows]
    config = arguments(folder, TrainingArguments, remove_unused_columns=False)
    trainer = Dense(
        tiny(std=0.05), config, train_dataset=rows, data_collator=lambda x: {**collate(x), "weights": padded_weights(x)}
    )
    trainer.train()
    return list(trainer.model.parameters()), trainer.state.log_history[0]["loss"]


def test_a_step_equals_the_stock_trainers_and_does_not_depend_on_its_batches(tmp_path):
    rows = rows_of()
    expected, loss = step_of_stock(tmp_path, rows)
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = fit(tmp_path, rows, **sizes)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
        for mine, theirs in zip(trainer.model.parameters(), expected, strict=True):
            torch.testing.assert_close(mine, theirs, **ALIKE)
        assert patch_state(trainer.model).materialized == 0


@pytest.mark.parametrize("loss", ["focal", "emo", "eisl"])
def test_any_loss_is_weighted_and_its_batches_are_one_step(tmp_path, loss):
    rows, found = rows_of(), []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        entry = fit(tmp_path, rows, loss=loss, **sizes).state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], entry["perplexity"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    plain = fit(tmp_path, rows.remove_columns(["token_weights", "loss_weight"]), loss=loss).state.log_history[0]
    assert abs(plain["grad_norm"] - found[0][1]) > 1e-2, "the weights have an effect"


def test_the_scale_of_weights_has_no_effect_and_zero_is_a_mask(tmp_path):
    rows = rows_of().remove_columns(["token_weights"])
    scaled = rows.map(lambda row: {"loss_weight": 1e-3 * row["loss_weight"]})
    one, other = (fit(tmp_path, x).state.log_history[0] for x in (rows, scaled))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    zero = rows.map(lambda row, i: {"loss_weight": float(i % 2)}, with_indices=True)
    masked = rows.remove_columns("loss_weight").map(
        lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True
    )
    one, other = (fit(tmp_path, x).state.log_history[0] for x in (zero, masked))
    for name in ("loss", "grad_norm", "perplexity", "mean_token_accuracy", "entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-6), name


NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob"), 0.0)
NO_DROPOUT["attention_probs_dropout_prob"] = 0.0


@pytest.mark.parametrize("name", ["gpt2", "bert bias"])
def test_models_whose_loss_has_no_name_are_divided_alike(tmp_path, name):
    """transformers' trainer counts labels that these models do not predict; weights are those of what they predict."""
    rows, model = rows_of(), tiny(name, std=0.05, **NO_DROPOUT)
    expected = weighted_mean(tiny(name, std=0.05, **NO_DROPOUT), collate(list(rows)), padded_weights(rows))
    trainer = XentTrainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_a_step_without_weight_changes_nothing(tmp_path):
    rows = rows_of().map(lambda row: {"loss_weight": 0.0})
    before = [p.detach().clone() for p in tiny(std=0.05).parameters()]
    trainer = fit(tmp_path, rows)
    assert trainer.state.log_history[0]["loss"] == 0
    for found, expected in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(found, expected)


def test_evaluation_is_weighted_too(tmp_path):
    rows = rows_of()
    trainer = XentTrainer(tiny(std=0.05), arguments(tmp_path), eval_dataset=rows, data_collator=collate)
    found = trainer.evaluate()
    parts = [rows.select(range(i, i + 4)) for i in (0, 4)]
    with torch.no_grad():
        losses = [weighted_mean(tiny(std=0.05), collate(list(x)), padded_weights(x)) for x in parts]
    assert found["eval_loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    with pytest.warns(UserWarning, match="no token has a label in this evaluation"):
        none = trainer.evaluate(rows.map(lambda row: {"loss_weight": 0.0}))
    assert math.isnan(none["eval_loss"]), "as without labels"


def rank_of(rank, folder, single):
    rows = rows_of()
    if not single:
        rows = rows.map(lambda row, i: {"loss_weight": 0.0 if i % 2 else row["loss_weight"]}, with_indices=True)
    entry = fit(folder, rows, per_device_train_batch_size=4).state.log_history[0]
    return entry["loss"], entry["grad_norm"]


def fine_tuned(folder, size):
    """Loss and gradient norm of a step of StreamedSFTTrainer over eight texts."""
    rows = test_sft.texts(loss_weight=[0.1, 2.0, 1.0, 0.5] * 2)
    return test_sft.logged(test_sft.fit(folder, rows, loss="emo", per_device_train_batch_size=size))


def ranks_of(rank, folder):
    return [
        *(rank_of(rank, folder, single) for single in (True, False)),
        *([fine_tuned(folder, 4)] if test_sft.FUSED else []),
    ]


def test_two_processes_are_one(tmp_path):
    """Launched: two gloo ranks with four rows each; in the second step one of them has no weight at all."""
    found = run_ranks(2, ranks_of, tmp_path, str(tmp_path))
    for i, rows in enumerate((rows_of(), rows_of().map(
        lambda row, i: {"loss_weight": 0.0 if i % 2 else row["loss_weight"]}, with_indices=True
    ))):  # fmt: skip
        entry = fit(tmp_path, rows).state.log_history[0]
        assert found[0][i][0] == pytest.approx(entry["loss"], rel=1e-5)
        assert found[0][i][1] == found[1][i][1] == pytest.approx(entry["grad_norm"], rel=1e-4)
    if test_sft.FUSED:
        assert found[0][2] == found[1][2] == pytest.approx(fine_tuned(tmp_path, 8), rel=1e-4)


def test_collators_that_pad_flatten_and_pad_on_the_left():
    rows = list(rows_of(3))
    expected = [[w * row["loss_weight"] for w in row["token_weights"]] for row in rows]
    flat = WithWeights(DataCollatorWithFlattening())(rows)
    torch.testing.assert_close(flat["token_weights"], torch.tensor([[w for row in expected for w in row]]))
    tokenizer = tiny_tokenizer()
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = WithWeights(DataCollatorForSeq2Seq(tokenizer))(rows)
        assert batch["token_weights"].shape == batch["labels"].shape
        for i, weights in enumerate(expected):
            mask = batch["attention_mask"][i].bool()
            torch.testing.assert_close(batch["token_weights"][i][mask], torch.tensor(weights))
            assert not batch["token_weights"][i][~mask].any()


def changed(**columns):
    return lambda row, i: {name: value if i == 2 else row[name] for name, value in columns.items()}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"token_weights": [1.0, 1.0]}, "train_dataset, row 2: token_weights has 2 numbers, but the row has "),
        ({"loss_weight": -1.0}, "train_dataset, row 2: loss_weight has -1.0: give finite numbers >= 0"),
        ({"loss_weight": math.nan}, "train_dataset, row 2: loss_weight has nan"),
        ({"loss_weight": math.inf}, "train_dataset, row 2: loss_weight has inf"),
        ({"loss_weight": None}, "train_dataset, row 2: loss_weight is None"),
        ({"token_weights": None}, "train_dataset, row 2: token_weights is None"),
    ],
)
def test_wrong_weights_are_refused_before_training(tmp_path, columns, message):
    rows = rows_of().map(changed(**columns), with_indices=True)
    with pytest.raises(ValueError, match=f"^{message}"):
        XentTrainer(tiny(), arguments(tmp_path), train_dataset=rows, data_collator=collate)
    with pytest.raises(ValueError, match=f"^{message.removeprefix('train_dataset, row 2: ')}"):
        WithWeights(collate)([rows[i] for i in range(4)])
    trainer = XentTrainer(tiny(), arguments(tmp_path), train_dataset=rows_of(), data_collator=collate)
    with pytest.raises(ValueError, match=r"^eval_dataset, row 2"):
        trainer.evaluate(rows)


def test_weights_without_an_effect_are_refused(tmp_path):
    rows = rows_of()
    with pytest.raises(ValueError, match=r"^train_dataset has a column token_weights, which has no effect in NoiseFiT"):
        NoiseFiTTrainer(tiny(), arguments(tmp_path, NoiseFiTConfig), train_dataset=rows)
    with pytest.raises(ValueError, match=r"^compute_loss_func is given, but a batch has token_weights"):
        fit(tmp_path, rows, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum())

    def shortened(examples):
        return {name: x[:, :3] for name, x in collate(examples).items()}

    with pytest.raises(
        ValueError, match=r"^token_weights are of rows with .* labels, but the data collator made labels of"
    ):
        fit(tmp_path, rows, collator=shortened)

    def shuffled(examples):
        return {name: x.flip(1) for name, x in collate(examples).items()}

    with pytest.raises(ValueError, match=r"^token_weights cannot be placed"):
        fit(tmp_path, rows, collator=shuffled)


def test_every_trainer_reads_weights_or_refuses_them():
    reading = {name for name in trainers.__all__ if getattr(getattr(trainers, name), "weighs_labels", False)}
    assert {"XentTrainer", "EMOTrainer", "LNRemovalTrainer"} <= reading
    assert not {"NoiseFiTTrainer", "DXOTrainer", "F2CTrainer", "SPCETrainer", "SPOTrainer", "OSPTrainer"} & reading
