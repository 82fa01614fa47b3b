"""ClassTrainer over every kind of classifier, and what it gives to losses: features, second passes, states, weights."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from hf_xent import classes
from hf_xent.classes import ClassLoss
from hf_xent.trainers import ClassConfig, ClassTrainer
from hf_xent.trainers.class_state import ATTRIBUTE
from support.models import tiny_tokenizer
from support.ranks import run_ranks

K, N = 3, 8
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {"vocab_size": 40, **SIZES, "initializer_range": 0.3, "num_labels": K}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**TEXT, **NO_DROPOUT, "max_position_embeddings": 16}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, **NO_DROPOUT}
SEGFORMER = {
    "num_channels": 1, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1], "hidden_sizes": [4, 8],
    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1],
    "decoder_hidden_size": 8, "num_labels": K, "classifier_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}  # fmt: skip


def build(kind, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


def ids(length=5, count=N, pads=0):
    found = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(1))
    found[: count // 2, length - pads :] = 0
    return found


def labels_of(*shape):
    found = torch.randint(K, shape, generator=torch.Generator().manual_seed(2))
    found.view(-1)[1] = -100
    return found


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


KINDS = {
    "sequence": (
        lambda: build("BertForSequenceClassification", "BertConfig", **BERT),
        lambda: {"input_ids": ids(), "labels": labels_of(N)},
    ),
    "decoder": (
        lambda: build("LlamaForSequenceClassification", "LlamaConfig", **TEXT, pad_token_id=0),
        lambda: {"input_ids": ids(pads=2), "attention_mask": ids(pads=2).ne(0).long(), "labels": labels_of(N)},
    ),
    "token": (
        lambda: build("BertForTokenClassification", "BertConfig", **BERT),
        lambda: {"input_ids": ids(), "labels": labels_of(N, 5)},
    ),
    "image": (
        lambda: build("ViTForImageClassification", "ViTConfig", **SIZES, **IMAGE, num_labels=K),
        lambda: {"pixel_values": draw(N, 1, 8, 8), "labels": labels_of(N)},
    ),
    "convolutions": (
        lambda: build(
            "ResNetForImageClassification", "ResNetConfig", num_channels=1, embedding_size=4, hidden_sizes=[4, 8],
            depths=[1, 1], layer_type="basic", num_labels=K,
        ),
        lambda: {"pixel_values": draw(N, 1, 8, 8), "labels": labels_of(N).clamp(min=0)},
    ),
    "audio": (
        lambda: build(
            "ASTForAudioClassification", "ASTConfig", **SIZES, **NO_DROPOUT, max_length=16, num_mel_bins=8,
            patch_size=4, frequency_stride=4, time_stride=4, num_labels=K,
        ),
        lambda: {"input_values": draw(N, 16, 8), "labels": labels_of(N)},
    ),
    "choices": (
        lambda: build("BertForMultipleChoice", "BertConfig", **{**BERT, "num_labels": 2}),
        lambda: {"input_ids": ids(count=N * K).view(N, K, 5), "labels": labels_of(N)},
    ),
    "segmentation": (
        lambda: build("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER),
        lambda: {"pixel_values": draw(N, 1, 8, 8), "labels": labels_of(N, 8, 8).masked_fill_(draw(N, 8, 8) > 1, 255)},
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", KINDS)
OPTIONS = {"hl_gauss": ":low=0, high=1", "two_hot": ":low=0, high=1", "smooth_adversarial": ":radius=0.1, steps=2"}
LOSSES = [f"{name}{OPTIONS.get(name, '')}" for name in (*classes.LOSSES, *classes.OF_STATISTICS)]


def data_of(batch):
    return datasets.Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")


def collate(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def trainer_of(folder, model, batch, loss, teacher=None, **options):
    common = {
        "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1,
        "use_cpu": True, "report_to": [], "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    config = ClassConfig(output_dir=str(folder), **{**common, **options})
    data = data_of(batch)
    return ClassTrainer(
        model, config, loss=loss, second=teacher, train_dataset=data, eval_dataset=data, data_collator=collate
    )


def fit(folder, model, batch, loss, resume=None, **options):
    trainer = trainer_of(folder, model, batch, loss, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(ours, expected, **tolerance):
    expected = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        if ATTRIBUTE not in name:
            torch.testing.assert_close(parameter, expected[name], **(tolerance or {"rtol": 0, "atol": 0}))


def stock_loss(model, batch):
    """The model's own cross-entropy; of rows without a label it has to be told."""
    batch = dict(batch)
    if batch["labels"].ndim == 1:
        kept = batch["labels"] != -100
        batch = {name: value[kept] for name, value in batch.items()}
    if "pixel_values" in batch and batch["labels"].ndim == 3:
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 255)
    return model(**batch).loss


@EVERY
def test_cross_entropy_is_the_loss_of_every_kind_of_classifier(kind, tmp_path):
    """The evaluation's loss, every gradient in one step of gradient descent, and the form of predictions."""
    model, batch = KINDS[kind][0](), KINDS[kind][1]()
    reference = copy.deepcopy(model).train()
    options = {"per_device_train_batch_size": N, "per_device_eval_batch_size": N, "max_steps": 1}
    trainer = trainer_of(tmp_path, model, batch, "cross_entropy", **options)
    expected = stock_loss(copy.deepcopy(model).eval(), batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape == batch["labels"].shape and predictions.max() < K
    trainer.train()
    stock_loss(reference, batch).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
    assert_same(trainer.model, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", LOSSES)
def test_every_loss_trains(text, tmp_path):
    """On rows it is meant for: finite, and the loss of the same rows falls."""
    loss = classes.get(text)
    kind = "segmentation" if loss.labels == "masks" else "sequence"
    model, batch = KINDS[kind][0](), KINDS[kind][1]()
    if loss.labels != "masks":
        batch["labels"] = torch.rand(N) if loss.labels == "values" else torch.arange(N) % K
    columns = {"aspects": torch.rand(N, 50), "list_id": torch.arange(N) // 4}
    batch |= {name: columns[name] for name in loss.columns}
    options = {"max_steps": 8, "per_device_train_batch_size": N, "per_device_eval_batch_size": N, "momentum": 0.5}
    if "second" not in loss.needs:
        del options["momentum"]
    trainer = trainer_of(tmp_path, model, batch, loss, optim="adamw_torch", learning_rate=0.01, **options)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moves = {"second", "feature_map"} & {*loss.needs}  # a teacher, or weights of rows, which move with the model
    assert np.isfinite([*logged, trainer.evaluate()["eval_loss"]]).all() and (moves or logged[-1] < logged[0])


@pytest.mark.parametrize("kind", ["sequence", "token", "segmentation"])
def test_micro_batches_are_their_batch(kind, tmp_path):
    """1 x 8 is 4 x 2, also where batches have other numbers of labels, and with weights of classes."""
    batch = KINDS[kind][1]()
    batch["labels"].view(-1)[: batch["labels"].numel() // 8 - 1] = -100
    models = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": N // accumulation, "gradient_accumulation_steps": accumulation}
        model = KINDS[kind][0]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # normalizes each micro-batch by itself
                module.forward = nn.Identity().forward
        trainer = fit(tmp_path, model, batch, "focal", max_steps=1, class_weights=[0.5, 2.0, 1.0], **options)
        models.append(trainer.model)
    assert_same(*models, rtol=1e-4, atol=1e-6)


def test_questions_have_two_rows_of_positions(tmp_path):
    """The mean of both cross-entropies, as the model's own; positions outside of the sequence are ignored."""
    model = build("BertForQuestionAnswering", "BertConfig", **{**BERT, "num_labels": 2})
    starts, ends = torch.arange(N) % 4, torch.arange(N) % 4 + 1
    batch = {"input_ids": ids(), "start_positions": starts, "end_positions": ends}
    trainer = fit(tmp_path, copy.deepcopy(model), batch, "cross_entropy", max_steps=1, per_device_train_batch_size=N)
    loss = model(**batch).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (N, 2)
    batch["end_positions"] = torch.full((N,), 7)
    evaluated = trainer_of(tmp_path, copy.deepcopy(model), batch, "focal", per_device_eval_batch_size=N).evaluate()
    logits = model(input_ids=batch["input_ids"]).start_logits
    expected = classes.get("focal").reference(logits.detach(), starts).mean()
    assert evaluated["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@dataclass(frozen=True)
class Probe(ClassLoss):
    """Cross-entropy of a head of its own on the features, and a mean that it remembers; checks what it is given."""

    needs: ClassVar[tuple[str, ...]] = ("features", "head", "feature_map", "second", "state", "column:extra")
    per_row: ClassVar[bool] = False

    def state(self, features, classes):
        torch.manual_seed(5)
        module = nn.Linear(features, classes)
        module.register_buffer("calls", torch.zeros(()))
        return module

    def __call__(self, logits, labels, *, features, head, feature_map, mask, second, state, extra):
        torch.testing.assert_close(head(features), logits)
        assert mask.shape == feature_map.shape[:2] and len(feature_map) == len(extra) == len(labels)
        assert second.shape == logits.shape and not second.requires_grad
        torch.testing.assert_close(extra, labels.float() * 2)
        if state.training:
            state.calls += 1
        return F.cross_entropy(state(features) + logits, labels) + F.mse_loss(logits, second)


@pytest.mark.parametrize("kind", ["sequence", "decoder", "token", "image", "convolutions", "audio"])
def test_losses_are_given_what_they_need(kind, tmp_path):
    """The head's inputs row by row, the last hidden states, a column, a second pass, and a state that is trained."""
    batch = KINDS[kind][1]()
    batch["extra"] = batch["labels"].float() * 2
    trainer = fit(tmp_path, KINDS[kind][0](), batch, Probe(), gradient_accumulation_steps=2)
    state = getattr(trainer.model, ATTRIBUTE)
    assert state.calls == 4 and not torch.equal(state.weight, Probe().state(8, K).weight)
    trainer.evaluate()
    assert state.calls == 4, "evaluation remembers nothing"
    trainer.save_model(tmp_path / "saved")
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert not hasattr(loaded, ATTRIBUTE)
    assert_same(trainer.model, loaded)


def test_a_state_and_an_average_resume_bit_equal(tmp_path):
    batch = KINDS["sequence"][1]()
    batch["extra"] = batch["labels"].float() * 2
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "momentum": 0.5}
    make = lambda: build("BertForSequenceClassification", "BertConfig", **{**BERT, "hidden_dropout_prob": 0.2})  # noqa: E731
    straight = fit(tmp_path, make(), batch, Probe(), **options)
    resumed = fit(tmp_path, make(), batch, Probe(), resume=tmp_path / "checkpoint-2", **options)
    for part in (lambda t: t.model, lambda t: getattr(t.model, ATTRIBUTE), lambda t: t._average.model):
        found, expected = part(resumed).state_dict(), part(straight).state_dict()
        assert [*found] == [*expected] and all(torch.equal(found[name], expected[name]) for name in found)
    assert getattr(resumed.model, ATTRIBUTE).calls == 4
    (tmp_path / "checkpoint-2" / "loss_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no loss_state.safetensors: resume one that was trained under this loss"):
        fit(tmp_path, make(), batch, Probe(), resume=tmp_path / "checkpoint-2", **options)


def test_the_average_is_that_of_the_weights(tmp_path):
    """m <- .9 m + .1 w after every step, from the weights at the start; the loss is that with its logits."""
    batch, model = KINDS["sequence"][1](), KINDS["sequence"][0]()
    average, after = copy.deepcopy(model), []
    trainer = trainer_of(tmp_path, model, batch, "forward_kl:ce_weight=0.5", momentum=0.9, learning_rate=0.5)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after.append(copy.deepcopy(model))

    trainer.add_callback(Watch())
    trainer.train()
    with torch.no_grad():
        for step in after:
            for mean, weight in zip(average.parameters(), step.parameters(), strict=True):
                mean.mul_(0.9).add_(weight, alpha=0.1)
    assert_same(trainer._average.model, average, rtol=1e-5, atol=1e-7)
    kept = batch["labels"] != -100
    student, teacher = (m.eval()(batch["input_ids"][kept]).logits for m in (trainer.model, average))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    expected = 0.5 * kl + 0.5 * F.cross_entropy(student, batch["labels"][kept])
    assert trainer.evaluate(data_of({k: v[kept] for k, v in batch.items()}))["eval_loss"] == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_the_second_pass_is_a_teacher_or_the_model_itself(tmp_path):
    """A teacher that is the student has no divergence; nor has the model without dropout, but with dropout it has."""
    batch, model = KINDS["sequence"][1](), KINDS["sequence"][0]()
    teacher = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, batch, "forward_kl", teacher=teacher.train())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-6) and not teacher.training
    for rate in (0.0, 0.3):
        model = build("BertForSequenceClassification", "BertConfig", **{**BERT, "hidden_dropout_prob": rate})
        trainer = fit(tmp_path, model, batch, "forward_kl", max_steps=1, second="model")
        assert (trainer.state.log_history[0]["loss"] > 1e-3) == (rate > 0)


def test_class_weights_are_torchs_and_scikit_learns(tmp_path):
    from sklearn.utils.class_weight import compute_class_weight

    batch, model = KINDS["sequence"][1](), KINDS["sequence"][0]()
    kept = batch["labels"] != -100
    logits, labels = model(batch["input_ids"][kept]).logits, batch["labels"][kept]
    weights = compute_class_weight("balanced", classes=np.arange(K), y=labels.numpy())
    for given in ("balanced", weights.tolist()):
        trainer = trainer_of(tmp_path, copy.deepcopy(model), batch, "cross_entropy", class_weights=given)
        trainer.args.per_device_eval_batch_size = N
        expected = F.cross_entropy(logits, labels, torch.tensor(weights, dtype=torch.float32))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_lists_stay_whole_and_are_shuffled(tmp_path):
    @dataclass(frozen=True)
    class Listed(ClassLoss):
        needs: ClassVar[tuple[str, ...]] = ("column:list_id",)
        per_row: ClassVar[bool] = False
        together: ClassVar[str] = "list_id"

        def __call__(self, logits, labels, *, list_id):
            seen.append(list_id.tolist())
            return F.cross_entropy(logits, labels)

    seen = []
    batch = {**KINDS["sequence"][1](), "list_id": torch.arange(N) % 4}
    options = {"train_sampling_strategy": "random", "per_device_train_batch_size": 2, "max_steps": 8}
    fit(tmp_path, KINDS["sequence"][0](), {**batch, "labels": torch.arange(N) % K}, Listed(), **options)
    assert all(len(set(lists)) == 1 and len(lists) == 2 for lists in seen)
    epochs = [[lists[0] for lists in seen[i : i + 4]] for i in (0, 4)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3]] * 2 and epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1, but a list of column list_id has 2 rows"):
        fit(tmp_path, KINDS["sequence"][0](), batch, Listed(), **{**options, "per_device_train_batch_size": 1})


@dataclass(frozen=True)
class OfTheBatch(ClassLoss):
    """The variance of the labels' logits over rows: no sum over rows."""

    per_row: ClassVar[bool] = False

    def __call__(self, logits, labels):
        return logits.gather(1, labels[:, None]).var()


def padded():
    """The first half of the rows has two tokens of padding."""
    return {**KINDS["sequence"][1](), "input_ids": ids(pads=2), "attention_mask": ids(pads=2).ne(0).long()}


def on_a_rank(rank, folder, gather):
    batch = padded()
    cut = lambda rows: {n: x[:, :3] if rank == 0 and x.ndim > 1 else x for n, x in collate(rows).items()}  # noqa: E731
    runs = []
    for loss in (OfTheBatch(), "bias:mode=local", "supcon"):
        trainer = trainer_of(folder, KINDS["sequence"][0](), batch, loss, gather=gather)
        trainer.data_collator = cut
        trainer.train()
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        runs.append((weights, trainer.state.log_history[0]["loss"]))
    return runs


@pytest.mark.slow
def test_a_loss_of_the_batch_is_that_of_all_ranks_rows(tmp_path):
    """2 x 4 rows with `gather` are 1 x 8, of other lengths and with an ignored label; without, they are not."""
    losses, batch = (OfTheBatch(), "bias:mode=local", "supcon"), padded()
    ones = [fit(tmp_path, KINDS["sequence"][0](), batch, x, per_device_train_batch_size=N) for x in losses]
    for gather in (True, False):
        (folder := tmp_path / str(gather)).mkdir()
        for runs in run_ranks(2, on_a_rank, folder, str(tmp_path / "ranks"), gather):
            for one, (weights, loss) in zip(ones, runs, strict=True):
                assert (loss == pytest.approx(one.state.log_history[0]["loss"], rel=1e-4)) == gather
                gaps = [(weights[n] - p).abs().max() for n, p in one.model.named_parameters()]
                assert (max(gaps) < 1e-5) == gather


def test_adapters_train_the_head_with_features_and_state(tmp_path):
    model, batch = KINDS["sequence"][0](), KINDS["sequence"][1]()
    batch["extra"] = batch["labels"].float() * 2
    classes.resize(model, "cross_entropy")
    adapted = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query", "value"]))
    trainer = fit(tmp_path, adapted, batch, Probe())
    head = trainer.model.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert getattr(trainer.model, ATTRIBUTE).calls == 2 and trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "adapter")
    assert not [key for key in peft.load_peft_weights(str(tmp_path / "adapter")) if ATTRIBUTE in key]


@pytest.mark.parametrize("kind", ["sequence", "decoder", "image"])
def test_bfloat16_is_no_worse_than_the_stock_trainer(kind, tmp_path):
    model, batch = KINDS[kind][0](), KINDS[kind][1]()
    batch["labels"] = batch["labels"].clamp(min=0)
    truth = stock_loss(copy.deepcopy(model).train(), batch).item()
    options = {"max_steps": 1, "per_device_train_batch_size": N, "bf16": True}
    trainer = fit(tmp_path, copy.deepcopy(model), batch, "cross_entropy", **options)
    config = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=N, bf16=True, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    stock = transformers.Trainer(copy.deepcopy(model), config, train_dataset=data_of(batch), data_collator=collate)
    stock.train()
    ours, torchs = (abs(t.state.log_history[0]["loss"] - truth) for t in (trainer, stock))
    assert ours <= 2 * torchs + 1e-2 * truth


def test_a_trained_model_is_served_by_a_pipeline(tmp_path):
    """A loss of K outputs leaves a stock model; what the pipeline says is what the loss predicts."""
    tokenizer = tiny_tokenizer()
    model = build("BertForSequenceClassification", "BertConfig", **{**BERT, "vocab_size": len(tokenizer)})
    trainer = fit(tmp_path, model, KINDS["sequence"][1](), "focal")
    trainer.save_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    served = transformers.pipeline("text-classification", str(tmp_path), device="cpu")("the dog", top_k=None)
    logits = trainer.model.eval()(**tokenizer("the dog", return_tensors="pt")).logits[0]
    assert [row["label"] for row in served] == [f"LABEL_{i}" for i in logits.argsort(descending=True)]
    assert classes.predict(trainer.model, logits).item() == logits.argmax()


@pytest.mark.parametrize(
    ("kind", "auto", "task"),
    [
        ("image", "ImageClassification", "image-classification"),
        ("audio", "AudioClassification", "audio-classification"),
        ("segmentation", "SemanticSegmentation", "image-segmentation"),
        ("token", "TokenClassification", "token-classification"),
    ],
)
def test_cards_load_the_model_by_its_kind(kind, auto, task, tmp_path):
    trainer = trainer_of(tmp_path, KINDS[kind][0](), KINDS[kind][1](), "focal:gamma=3")
    trainer.create_model_card("seen")
    card = (tmp_path / "README.md").read_text()
    assert f"AutoModelFor{auto}.from_pretrained(" in card and f"pipeline_tag: {task}" in card
    assert "gamma" in card and "reads them" not in card


@pytest.mark.parametrize("loss", ["supcon", "hl_gauss:low=0, high=1"])
def test_the_seed_draws_new_heads_and_states(loss, tmp_path):
    """Whatever was drawn before; another seed draws others."""
    batch = KINDS["sequence"][1]()
    batch["labels"] = torch.rand(N) if "gauss" in loss else batch["labels"]
    drawn = []
    for seed, before in ((1, 5), (1, 6), (2, 5)):
        model = KINDS["sequence"][0]()
        torch.manual_seed(before)
        trainer = trainer_of(tmp_path, model, batch, loss, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_losses_that_need_whole_weights_are_refused_where_they_are_in_parts(tmp_path, monkeypatch):
    """The flag is set by hand: accelerate shards no model on a CPU."""
    prepare = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    for loss, why in (
        ("supcon", "trains layers beside the model"), ("core_tuning", "trains layers"), ("svm", "reads the weights"),
        ("symmetric_ce", "second is 'average', a copy of the whole model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{why}.*train.* without FSDP and DeepSpeed"):
            trainer_of(tmp_path, KINDS["sequence"][0](), KINDS["sequence"][1](), loss)
    trainer_of(tmp_path, KINDS["sequence"][0](), KINDS["sequence"][1](), "svm:norm_weight=0.0")


def test_refusals(tmp_path):
    sequence, batch = KINDS["sequence"][0], KINDS["sequence"][1]()

    def refused(message, model=None, batch=batch, loss="cross_entropy", train=False, **options):
        with pytest.raises(ValueError, match=message) as error:
            trainer = trainer_of(tmp_path, sequence() if model is None else model, batch, loss, **options)
            if train:
                trainer.train()
        assert "\n" not in str(error.value)

    one = build("BertForSequenceClassification", "BertConfig", **{**BERT, "num_labels": 1})
    refused("model has num_labels=1, for which transformers takes labels for numbers, but .* of classes", one)
    numbers = {**batch, "labels": torch.rand(N)}
    refused("train_dataset has float.* in column labels, but .* is of classes: give their ids, or", batch=numbers)
    for kind, why in (
        ("Wav2Vec2ForCTC", "scores sequences"), ("DetrForObjectDetection", "matches boxes"),
        ("Mask2FormerForUniversalSegmentation", "matches masks"), ("LlamaForCausalLM", "predicts the next token"),
        ("T5ForConditionalGeneration", "predicts the next token"), ("BertForMaskedLM", "predicts tokens"),
    ):  # fmt: skip
        assert hasattr(transformers, kind)
        refused(f"model is a {kind}, which {why}: pass a classifier", type(kind, (nn.Module,), {"config": None})())
    refused("second is given, but .* reads no second pass: leave it out", teacher=sequence())
    refused("second is given, but .* reads no second pass: leave it out", second="model")
    refused("momentum is given, but .* reads no second pass", momentum=0.5)
    refused("gather is True, but .* sum over rows, which needs none", gather=True)
    refused("class_weights is given, but .* no sum over rows of classes", loss=OfTheBatch(), class_weights="balanced")
    for weights in ([1.0, 2.0], [1.0, -1.0, 1.0], "even"):
        refused("class_weights is .*: give 3 numbers >= 0, or 'balanced'", class_weights=weights)
    absent = {**batch, "labels": torch.zeros(N, dtype=torch.long)}
    refused("'balanced', but no row of train_dataset has class 1", batch=absent, class_weights="balanced")
    refused("loss is 'emo'.*choose one of", loss="emo")
    refused("labels are 0 to ., but the model has 3 outputs: load it", batch={**batch, "labels": torch.arange(N) % 6},
            train=True)  # fmt: skip
    question = build("BertForQuestionAnswering", "BertConfig", **{**BERT, "num_labels": 2})
    refused("is a BertForQuestionAnswering, whose classes are positions, for which Aspects", question, loss="aspects")
    segmenter, images = KINDS["segmentation"][0](), KINDS["segmentation"][1]()
    refused("SegformerForSemanticSegmentation without a linear head of classes, but Probe", segmenter, images, Probe())


@pytest.mark.parametrize("best", [False, True])
def test_weights_that_files_name_otherwise_are_loaded(tmp_path, best):
    """Files of a ViT have the names of the Hub, which the stock trainer does not translate."""
    rows = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(8)]
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}

    def trainer_of(steps):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **shape)
        )
        config = ClassConfig(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, learning_rate=0.1, report_to="none", use_cpu=True,
            lr_scheduler_type="constant", per_device_train_batch_size=4, disable_tqdm=True,
        )  # fmt: skip
        return ClassTrainer(model, config, train_dataset=rows)

    whole = trainer_of(4)
    whole.train()
    first, last = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    found = trainer_of(4)
    if best:
        found.state.best_model_checkpoint = last
        found._load_best_model()
    else:
        found.train(resume_from_checkpoint=first)
    expected = whole.model.state_dict()
    for name, weight in found.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name])
