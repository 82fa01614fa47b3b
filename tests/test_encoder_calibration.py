"""EncoderCalibrationTrainer: its objectives as written down in numpy, and that it trains the head and nothing else."""

import copy
import math
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig

from hf_xent import hub
from hf_xent.models.projection import ProjectionConfig, ProjectionHead
from hf_xent.models.zero_shot import ZeroShot
from hf_xent.robust import Ball, attack
from hf_xent.trainers import EncoderCalibrationConfig, EncoderCalibrationTrainer
from support.encoders import PROCESSOR, TOWERS, D, K, N, built, clip, draw, images, texts, vit
from support.ranks import run_ranks

OBJECTIVES = ("ce", "l2", "infonce")
EPSILON, SCALE = 0.1, 5.0


def head_of(std=0.3):
    head = ProjectionHead(ProjectionConfig(D, 5))
    with torch.no_grad():
        for i, weight in enumerate(head.parameters()):
            weight.copy_(std * draw(*weight.shape, seed=i))
    return head


def zero_shot(encoder=None, head=None):
    return ZeroShot(encoder or vit(), draw(K, D), head, SCALE)


def labelled(batch, classes=K):
    count = len(next(iter(batch.values())))
    return {**batch, "labels": torch.arange(count) % classes}


def data_of(batch):
    return datasets.Dataset.from_dict({name: value.tolist() for name, value in batch.items()}).with_format("torch")


def trainer_of(folder, model=None, batch=None, **options):
    common = {
        "max_steps": 2, "per_device_train_batch_size": N, "per_device_eval_batch_size": N, "logging_steps": 1,
        "use_cpu": True, "report_to": [], "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "steps": 3,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "epsilon": EPSILON,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args = EncoderCalibrationConfig(output_dir=str(folder), **{**common, **options})
    data = data_of(labelled(images()) if batch is None else batch)
    return EncoderCalibrationTrainer(
        model or zero_shot(), args, train_dataset=data, eval_dataset=data, processing_class=PROCESSOR
    )


def fit(folder, resume=None, **options):
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def log_softmax(rows):
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def features_of(encoder, pixels):
    """What the head of the classifier sees, of unit length, in float64."""
    with torch.no_grad():
        states = copy.deepcopy(encoder).double().eval().vit(pixels.double()).last_hidden_state[:, 0]
    return unit(states.numpy())


def projected(head, e):
    """h of the docstring, in float64."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in head.parameters())
    inner = e @ w1.T + b1
    gelu = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    return unit(e + gelu @ w2.T + b2)


FORMULAS = {
    "ce": lambda moved, clean, centers, y: -log_softmax(SCALE * moved @ centers.T)[np.arange(N), y],
    "l2": lambda moved, clean, centers, y: ((moved - clean) ** 2).sum(-1),
    "infonce": lambda moved, clean, centers, y: -np.diag(log_softmax(SCALE * moved @ clean.T)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_formula(objective, tmp_path, monkeypatch):
    model, batch = zero_shot(head=head_of()), labelled(images())
    trainer = trainer_of(tmp_path, model, objective=objective, drift_weight=0.7)
    found = []
    search = trainer._search
    monkeypatch.setattr(trainer, "_search", lambda *args: found.append(search(*args)) or found[-1])
    loss = trainer.compute_loss(trainer.model, batch).item()
    clean, attacked = (features_of(model.encoder, x) for x in (batch["pixel_values"], found[0]))
    centers = unit(draw(K, D).double().numpy())
    rows = FORMULAS[objective](projected(model.head, attacked), clean, centers, batch["labels"].numpy())
    drift = ((projected(model.head, clean) - clean) ** 2).sum(-1)
    assert loss == pytest.approx((rows + 0.7 * drift).mean(), rel=1e-5)
    assert np.abs(attacked - clean).max() > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_head_is_trained_and_nothing_else(objective, tmp_path):
    """Not even the statistics of batches, by an encoder that is in training mode."""
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, D], depths=[1, 1], layer_type="basic", num_labels=K
    )
    model = zero_shot(built("ResNetForImageClassification", config).train())
    before = copy.deepcopy(model.encoder.state_dict())
    trainer = fit(tmp_path, model=model, objective=objective)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters()) and model.encoder.training
    assert trainer.model is model.head and model.head.outer.weight.abs().max() > 0
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.head.parameters()}


def test_before_the_first_step_nothing_has_changed(tmp_path):
    model, plain = zero_shot(), zero_shot()
    trainer = trainer_of(tmp_path, model)
    metrics = trainer.evaluate()
    torch.testing.assert_close(model(**images()).logits, plain(**images()).logits)
    right = plain(**images()).logits.argmax(-1) == labelled(images())["labels"]
    assert metrics["eval_accuracy"] == pytest.approx(right.double().mean().item())
    assert metrics["eval_drift"] == pytest.approx(0, abs=1e-10)
    assert metrics["eval_adversarial_accuracy"] <= metrics["eval_accuracy"]


def test_the_attack_knows_the_head_and_keeps_to_its_ball(tmp_path):
    model, batch = zero_shot(head=head_of()), labelled(images())
    trainer = trainer_of(tmp_path, model, steps=10)
    found = []
    for head in (model.head, head_of(-2.0)):
        model.head = head
        with eval_step(trainer), torch.no_grad():
            target, given = trainer._target(batch)
            ball = Ball(EPSILON, unit=2.0, low=-1.0, high=1.0)  # pixels from 0 to 1 are from -1 to 1
            found.append(trainer._search(target, ball))
            assert given and ball.distance(found[-1], batch["pixel_values"]).max() <= 1 + 1e-5
            losses = [
                torch.nn.functional.cross_entropy(model(pixel_values=x).logits, batch["labels"])
                for x in (batch["pixel_values"], found[-1])
            ]
            assert losses[1] > losses[0]
    assert (found[0] - found[1]).abs().max() > 0.01


def eval_step(trainer):
    return trainer._step(training=False)


def test_without_labels_the_attack_leaves_the_predicted_class(tmp_path):
    model = zero_shot(head=head_of())
    plain = ZeroShot(model.encoder, model.centers, None, SCALE)
    predicted = plain(**images()).logits.argmax(-1)
    found = [
        trainer_of(tmp_path, model, batch, objective="l2").evaluate()
        for batch in (images(), {**images(), "labels": predicted})
    ]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)
    assert "eval_accuracy" not in found[0] and "eval_accuracy" in found[1]


@pytest.mark.parametrize(("objective", "norm"), [("ce", "2"), ("l2", "inf")])
def test_accumulation_does_not_change_a_step(objective, norm, tmp_path):
    found = []
    for size, accumulation in ((N, 1), (4, 2), (2, 3)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = fit(tmp_path, model=zero_shot(head=head_of()), objective=objective, norm=norm, **sizes)
        [loss], [drift] = entries(trainer, "loss"), entries(trainer, "drift")
        found.append((loss, drift, [p.detach().clone() for p in trainer.model.parameters()]))
    for loss, drift, weights in found[1:]:
        assert (loss, drift) == pytest.approx(found[0][:2], rel=1e-4)
        torch.testing.assert_close(weights, found[0][2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_same_run(objective, tmp_path):
    options = {"objective": objective, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    options |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "random"}
    whole = fit(tmp_path, **options)
    resumed = fit(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert entries(resumed, "loss") == entries(whole, "loss")
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_evaluations_are_repeated_exactly(tmp_path):
    trainer = fit(tmp_path, attack="pgd")
    again = [trainer.evaluate(), trainer.evaluate()]
    assert all(again[0][name] == again[1][name] for name in ("eval_loss", "eval_adversarial_accuracy", "eval_drift"))
    clean = trainer.predict(trainer.eval_dataset)
    torch.testing.assert_close(torch.tensor(clean.predictions), trainer.zero_shot(**images()).logits.detach())


def test_training_makes_a_classifier_robust(tmp_path):
    """Of rows near to one another, by the attack of another library function than that of the training."""
    model, batch = zero_shot(), labelled(images())
    trainer = trainer_of(tmp_path, model, max_steps=60, learning_rate=0.03, optim="adamw_torch", drift_weight=0.0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    found = attack(model, images(), batch["labels"], EPSILON, 20, processor=PROCESSOR)
    plain = attack(zero_shot(), images(), batch["labels"], EPSILON, 20, processor=PROCESSOR)
    assert (~found.flipped).sum() > (~plain.flipped).sum()


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_has_a_head_of_its_own(name, tmp_path):
    model = ZeroShot(TOWERS[name][0](), draw(K, D), scale=SCALE)
    trainer = fit(tmp_path, model=model, batch=labelled(TOWERS[name][1]()), epsilon=0.3)
    assert all(map(math.isfinite, entries(trainer, "loss"))) and model.head.outer.weight.abs().max() > 0
    assert entries(trainer, "drift")[0] == pytest.approx(0, abs=1e-10) and entries(trainer, "drift")[1] > 0
    assert all(p.grad is None for p in model.encoder.parameters())


def test_what_was_trained_is_saved_with_its_classes_and_a_card(tmp_path):
    model = zero_shot()
    model.config.name_or_path = "me/encoder"
    trainer = fit(tmp_path / "head", model=model)
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(license="mit")
    card = hub.validate(tmp_path / "head")
    assert card.data.base_model == "me/encoder" and card.data.pipeline_tag == "feature-extraction"
    assert card.data.library_name == "hf_xent"
    for part in ("-log softmax_c", "Frozen encoder: ViTForImageClassification", "3 centers, cosines times 5", "| `ep"):
        assert part in card.text
    assert "robust accuracy" not in card.text.lower() and "+47" not in card.text
    assert "model.safetensors" in hub.files(tmp_path / "head") and "centers.safetensors" in hub.files(tmp_path / "head")
    back = ZeroShot.from_pretrained(tmp_path / "head", vit())
    assert torch.equal(back(**images()).logits, model(**images()).logits)
    code = card.text.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "head")))
    exec(code, names := {})
    assert torch.equal(names["model"].outer.weight, model.head.outer.weight)


def refused(folder, message, **options):
    with pytest.raises(ValueError, match=message):
        fit(folder, **options)


def test_refusals(tmp_path):
    outside = {**images(), "labels": torch.arange(N)}
    refused(tmp_path, "labels are 0 to 5, but there are 3 centers", batch=outside)
    refused(tmp_path, "labels are -100 to -100", batch={**outside, "labels": torch.full((N,), -100)})
    refused(tmp_path, r"labels are torch.float32 of the shape \(6,\)", batch={**images(), "labels": torch.rand(N)})
    refused(tmp_path, "train_dataset has the columns pixel_values, but 'ce' needs labels", batch=images())
    refused(tmp_path, "per_device_train_batch_size is 1, but", objective="infonce", per_device_train_batch_size=1)
    refused(tmp_path, "head_size is 4, but model has a head already", model=zero_shot(head=head_of()), head_size=4)
    refused(tmp_path, "model has a Linear as its head", model=zero_shot(head=torch.nn.Linear(D, D)))
    refused(tmp_path, "model is a ViTForImageClassification: pass a hf_xent.models.zero_shot.ZeroShot", model=vit())
    both = {**labelled(images()), **texts()}
    refused(tmp_path, "a batch has pixel_values and input_ids: one run", model=zero_shot(clip()), batch=both)
    refused(tmp_path, "attack is 'nonesuch': choose", attack="nonesuch")
    for name, value in {"epsilon": 0.0, "steps": 0, "drift_weight": -1.0, "norm": "1", "objective": "mse"}.items():
        refused(tmp_path, f"{name} is {value!r}: choose", **{name: value})
    for data in (data_of(labelled(images())), [{"pixel_values": draw(1, 8, 8), "labels": 0}]):
        with pytest.raises(ValueError, match=r"^processing_class is NoneType without image_mean and image_std"):
            EncoderCalibrationTrainer(zero_shot(), EncoderCalibrationConfig(str(tmp_path)), train_dataset=data)


def on_a_rank(rank, folder, objective):
    trainer = fit(folder, objective=objective, per_device_train_batch_size=N // 2)
    return [p.detach().clone() for p in trainer.model.parameters()], entries(trainer, "loss")


@pytest.mark.slow  # two processes import the libraries
def test_two_processes_are_one(tmp_path):
    for objective in ("ce", "infonce"):
        one = fit(tmp_path, objective=objective)
        (folder := tmp_path / objective).mkdir()
        for weights, losses in run_ranks(2, on_a_rank, folder, str(tmp_path / "out"), objective):
            gap = max((a - b).abs().max() for a, b in zip(weights, one.model.parameters(), strict=True))
            assert (gap < 1e-5) == (objective == "ce"), "the negatives of a process are its own rows"
            assert (losses == pytest.approx(entries(one, "loss"), rel=1e-4)) == (objective == "ce")


@pytest.mark.slow  # five arms are trained
def test_the_example_compares_all_arms(tmp_path, monkeypatch):
    """On made-up digits; a second call runs nothing."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.chdir(tmp_path)
    import calibrated_digits
    import digits

    made = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(map(Image.fromarray, made)), "label": [i % 10 for i in range(60)]})
    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: rows)
    digits.images.cache_clear()
    for module, sizes in ((digits, {"TRAIN": 20, "VALIDATION": 40}), (calibrated_digits, {"STEPS": 2, "EPOCHS": 1})):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    # centers are of the digits that occur: of 20 rows, not all ten
    monkeypatch.setattr(calibrated_digits, "prototypes", lambda found, labels: draw(10, found.shape[1]))
    example = runpy.run_path(str(examples / "encoder_calibration.py"))
    for name, value in {"HEADS": (1e-3,), "REST": (1e-3,), "TEST": 10, "CHOICE": 6}.items():
        example["main"].__globals__[name] = value
    example["RATES"].update({arm: rates[:1] for arm, rates in example["RATES"].items()})
    found = example["main"](seeds=1, output=tmp_path / "out")
    digits.images.cache_clear()
    calibrated_digits.frozen.cache_clear()
    assert set(found) == set(example["RATES"]) == {*OBJECTIVES, "frozen", "all weights"}
    assert found["frozen"][0]["transfer"] == found["frozen"][0]["PGD"] and found["frozen"][0]["drift"] == 0
    shares = {arm: rows[0]["share"] for arm, rows in found.items()}
    assert all((shares[arm] > 0) == (arm in OBJECTIVES) for arm in shares)
    assert all(f"| {arm} |" in (tmp_path / "out" / "README.md").read_text() for arm in found)
    monkeypatch.setitem(example["main"].__globals__, "model_of", None)
    assert example["main"](seeds=1, output=tmp_path / "out") == found
