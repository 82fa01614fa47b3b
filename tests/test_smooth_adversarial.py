"""The smooth adversarial loss: worked examples, the bound, and the search for moved inputs in ClassTrainer."""

import copy
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F

from hf_xent import classes
from hf_xent.classes import SmoothAdversarial
from hf_xent.robust.inputs import target_of
from hf_xent.trainers import ClassConfig, ClassTrainer
from hf_xent.trainers.class_rows import RowReader
from hf_xent.trainers.perturbation import Perturbation
from support.ranks import run_ranks
from test_class_trainer import KINDS, assert_same, build, data_of
from test_class_trainer import collate as stacked
from test_classify import classify, pictures

PROCESSOR = transformers.ImageProcessingMixin(image_mean=[0.5], image_std=[0.25])
K, N = 3, 8
Z, MOVED, LABEL = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.5, 1.2, 0.4]]), torch.tensor([0])


def batch_of(kind):
    """Images are those a processor makes of pixels from 0 to 1; one text in two has padding."""
    batch = KINDS[kind][1]()
    if "pixel_values" in batch:
        batch["pixel_values"] = (batch["pixel_values"].sigmoid() - 0.5) / 0.25
    if kind == "sequence":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][::2, 3:] = 0
    return batch


def trainer_of(folder, model, batch, loss, processor=PROCESSOR, collate=stacked, **options):
    common = {
        "max_steps": 2, "per_device_train_batch_size": N, "per_device_eval_batch_size": N, "logging_steps": 1,
        "use_cpu": True, "report_to": [], "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    data = data_of(batch)
    return ClassTrainer(
        model, ClassConfig(output_dir=str(folder), **{**common, **options}), loss=loss, train_dataset=data,
        eval_dataset=data, data_collator=collate, processing_class=processor,
    )  # fmt: skip


def fit(*args, resume=None, **options):
    trainer = trainer_of(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def search_of(model, loss, processor=PROCESSOR):
    loss = classes.get(loss)
    return Perturbation.of(loss, RowReader(model, loss), model, processor)


# The loss.


@pytest.mark.parametrize(
    ("tau", "first"), [(0.0, 0.503215), (0.5, 0.452113), (1.0, 0.407606), (1.5, 0.368754), (2.0, 0.334759)]
)
def test_a_worked_example(tau, first):
    """Margins [1, 2] move to [.3, 1.1], a change of length 1.140175."""
    loss = SmoothAdversarial(tau=tau)
    assert loss.gap(MOVED, Z, LABEL).item() == pytest.approx(1.140175, abs=1e-6)
    assert loss(Z, LABEL, perturbed=MOVED).item() == pytest.approx(first + 1.140175, abs=2e-6)
    assert SmoothAdversarial(tau=tau, nu=0.0)(Z, LABEL, perturbed=MOVED).item() == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_rows_that_do_not_move_have_the_comp_sum_of_divided_logits(tau):
    z, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    expected = classes.get("comp_sum", tau=tau)(z / 1.7, y)
    for loss, moved in ((SmoothAdversarial(tau, 1.7, 0.0), z + 1), (SmoothAdversarial(tau, 1.7, 2.0), z)):
        torch.testing.assert_close(loss(z, y, perturbed=moved), expected, rtol=0, atol=2.1e-6)


def test_with_kl_it_is_trades():
    z, moved, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    q, r = z.softmax(-1), moved.softmax(-1)
    expected = -q[torch.arange(6), y].log() + 6 * (q * (q / r).log()).sum(-1)
    torch.testing.assert_close(SmoothAdversarial(nu=6.0, distance="kl")(z, y, perturbed=moved), expected)


@pytest.mark.parametrize("text", ["rho=2, tau=1.5", "tau=0", "distance=kl, nu=3"])
def test_gradients_reach_both_passes(text):
    loss, y = classes.get(f"smooth_adversarial:{text}"), torch.arange(4) % 3
    z, moved = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z, moved: loss(z, y, perturbed=moved), (z, moved))


def margins_of(z, y):
    """Margins [..., n - 1] to the other classes of logits [..., n]."""
    return np.delete(z[..., y : y + 1] - z, y, -1)


def phi(tau, u):
    return np.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def sides(z, around, y, loss):
    """The adversarial margin loss, and what should bound it, over a set of moved logits [M, n] around z [n]."""
    tau, rho = loss.tau, loss.rho
    wanted = phi(tau, np.clip(1 - margins_of(around, y) / rho, 0, 1).sum(-1)).max()
    row, labels = torch.tensor(z)[None], torch.tensor([y])
    losses = [loss(row, labels, perturbed=torch.tensor(moved)[None]).item() for moved in around]
    return wanted, max(losses)


def test_it_bounds_the_adversarial_margin_loss():
    """Random logits around random logits, for nu from sqrt(n - 1) / rho on; with a tenth of that nu it does not."""
    draw, broken, closest = np.random.default_rng(0), 0, math.inf
    for _ in range(400):
        n, rho, tau = int(draw.integers(2, 7)), draw.uniform(0.2, 3), draw.choice([0.0, 0.5, 1.0, 1.5, 2.0])
        z, y = draw.normal(size=n) * 2, int(draw.integers(n))
        z[y] += 2
        around = z + draw.normal(size=(4, n)) * draw.uniform(0, 3)
        least = math.sqrt(n - 1) / rho
        wanted, bound = sides(z, around, y, SmoothAdversarial(tau, rho, least * draw.uniform(1, 2)))
        assert wanted <= bound + 1e-9
        closest = min(closest, bound - wanted)
        wanted, smaller = sides(z, around, y, SmoothAdversarial(tau, rho, least / 10))
        broken += wanted > smaller
    assert broken and closest < 0.5, "the cases are hard enough to tell"


class Net(nn.Module):
    """A classifier of two numbers, or a linear one of images of one channel."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.config = nn.Sequential(nn.Flatten(), *layers), SimpleNamespace(num_labels=K)

    def forward(self, input_values=None, pixel_values=None):
        return {"logits": self.layers(pixel_values if input_values is None else input_values)}


def test_it_bounds_the_worst_point_of_a_grid_and_the_search_finds_that():
    """A trained net on two numbers; the ball of each row is looked at on a grid of 41 x 41 points."""
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 0] > 1).long()
    net = Net(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, K))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x)["logits"], y).backward()
        optimizer.step()
    loss = SmoothAdversarial(rho=0.7, nu=math.sqrt(K - 1) / 0.7, radius=0.2, steps=20)
    target = target_of(net, {"input_values": x[:20]}, y[:20])
    line = torch.linspace(-1, 1, 41)
    grid = torch.cartesian_prod(line, line) * loss.radius
    with torch.no_grad():
        clean = net(x)["logits"]
        found = net(search_of(net, loss).found(target, (0, 0)))["logits"]
        ratios = []
        for i in range(20):
            around = net(x[i] + grid * x[i].std(correction=0))["logits"]
            wanted, bound = sides(clean[i].double().numpy(), around.double().numpy(), int(y[i]), loss)
            assert wanted <= bound + 1e-6
            largest = loss.gap(around, clean[i : i + 1].expand_as(around), y[i].expand(len(around))).max()
            ratios.append((loss.gap(found[i : i + 1], clean[i : i + 1], y[i : i + 1]) / largest).item())
    assert np.median(ratios) > 0.95 and max(ratios) < 1.05, "one start; some rows have several maxima"


@pytest.mark.parametrize(("norm", "n"), [("inf", 2), ("2", 5)])
def test_the_search_reaches_the_suprema_of_linear_models(norm, n):
    """radius |w_y - w_k|_1 of two classes, and radius times the largest singular value of the rows w_y - w_k."""
    torch.manual_seed(0)
    net, y = Net(nn.Linear(16, n)), torch.arange(6) % n
    images = torch.rand(6, 1, 4, 4) - 0.5  # far from black and white: nothing is cut
    loss = SmoothAdversarial(radius=0.1, norm=norm, steps=40 if norm == "2" else 10)
    found = search_of(net, loss).found(target_of(net, {"pixel_values": images}, y), (0, 0))
    gaps = loss.gap(net(found)["logits"], net(images)["logits"], y)
    weight = net.layers[1].weight.detach() / 0.25  # by pixels from 0 to 1
    rows = [torch.stack([weight[label] - weight[k] for k in range(n) if k != label]) for label in y.tolist()]
    largest = [a.abs().sum() if norm == "inf" else torch.linalg.matrix_norm(a, 2) for a in rows]
    ratios = gaps.detach() / (0.1 * torch.stack(largest))
    assert ratios.min() >= 0.99 and ratios.max() <= 1 + 1e-4


# The search and the trainer.


@pytest.mark.parametrize("distance", ["margin", "kl"])
def test_three_steps_are_those_of_a_loop_in_plain_torch(distance, tmp_path):
    """Only the random start is the trainer's own."""
    model, batch = KINDS["image"][0](), batch_of("image")
    batch["labels"] = torch.arange(N) % K
    text = f"smooth_adversarial:radius=0.1, steps=4, nu=0.5, distance={distance}"
    ours, search = copy.deepcopy(model).train(), search_of(model, text)
    trainer = fit(tmp_path, model, batch, text, max_steps=3)
    x, y = batch["pixel_values"], batch["labels"]

    def gap(moved, z):
        if distance == "kl":
            return F.kl_div(moved.log_softmax(-1), z.softmax(-1), reduction="none").sum(-1)
        change = moved - z
        return sum((change[range(N), y] - change[:, k]) ** 2 for k in range(K)).add(1e-12).sqrt()

    for step in range(3):
        ours.eval()
        z = ours(x).logits.detach()
        moved = search.placed(target_of(ours, {"pixel_values": x}, y), (42, step))[1]
        best, highest = moved, torch.full((N,), -math.inf)
        for i in range(5):
            moved = moved.detach().requires_grad_()
            values = gap(ours(moved).logits, z)
            best = torch.where((values > highest).view(-1, 1, 1, 1), moved.detach(), best)
            highest = values.detach().maximum(highest)
            if i < 4:
                [slope] = torch.autograd.grad(values.sum(), moved)
                moved = moved + 0.25 * 0.1 / 0.25 * slope.sign()
                moved = moved.minimum(x + 0.1 / 0.25).maximum(x - 0.1 / 0.25).clamp(-2, 2)
        ours.train().zero_grad()
        z = ours(x).logits
        (F.cross_entropy(z, y) + 0.5 * gap(ours(best).logits, z).mean()).backward()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
    assert_same(trainer.model, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_classifier_trains_and_evaluates(kind, tmp_path):
    """A radius that is almost none leaves cross-entropy; a larger one adds to it."""
    model, batch = KINDS[kind][0](), batch_of(kind)
    found = [
        trainer_of(tmp_path, copy.deepcopy(model), batch, text).evaluate()["eval_loss"]
        for text in ("cross_entropy", *(f"smooth_adversarial:radius={r}, steps=3" for r in (1e-7, 0.2)))
    ]
    assert found[1] == pytest.approx(found[0], abs=2e-5) and found[2] > found[0] + 1e-4
    trainer = fit(tmp_path, model, batch, "smooth_adversarial:radius=0.2, steps=2")
    assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()


def test_questions_are_moved_once_for_both_positions(tmp_path):
    model = build("BertForQuestionAnswering", "BertConfig", vocab_size=40, hidden_size=8, num_hidden_layers=1,
                  num_attention_heads=2, intermediate_size=8, initializer_range=0.3)  # fmt: skip
    positions = {"start_positions": torch.arange(N) % 4, "end_positions": torch.arange(N) % 4 + 1}
    batch = {"input_ids": KINDS["sequence"][1]()["input_ids"], **positions}
    plain, moved = (
        trainer_of(tmp_path, copy.deepcopy(model), batch, text).evaluate()["eval_loss"]
        for text in ("cross_entropy", "smooth_adversarial:radius=0.5, steps=3")
    )
    assert moved > plain + 1e-3


@pytest.mark.parametrize(("kind", "mode"), [("convolutions", "train"), ("sequence", "train"), ("image", "eval")])
def test_the_search_leaves_the_model_as_it_was(kind, mode):
    model, batch = KINDS[kind][0](), batch_of(kind)
    getattr(model, mode)()
    next(iter(model.children())).eval()  # parts may be in another mode
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    labels = batch.pop("labels")
    search_of(model, "smooth_adversarial:radius=0.1, steps=3").found(target_of(model, batch, labels), (0, 0))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_embeddings_of_tokens_are_moved_within_their_ball_and_padding_is_not(norm):
    model, batch = KINDS["sequence"][0](), batch_of("sequence")
    target = target_of(model, batch, batch["labels"])
    before = target.center()
    loss = SmoothAdversarial(radius=0.3, norm=norm, steps=4)
    move = search_of(model, loss).found(target, (0, 0)) - before
    lengths, kept = before.norm(dim=-1), batch["attention_mask"].bool()
    mean = (lengths * kept).sum(1) / kept.sum(1) / (1 if norm == "2" else 8**0.5)  # of each row
    size = move.abs().amax(-1) if norm == "inf" else move.norm(dim=-1)
    moved = batch["labels"] != -100  # a row without a label stays at its random start
    assert not move[~kept].any() and (size <= 0.3 * mean[:, None] * 1.0001).all()
    torch.testing.assert_close(size.amax(1)[moved], (0.3 * mean)[moved], rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["image", "sequence"])
def test_micro_batches_are_their_batch(kind, tmp_path):
    """1 x 8 is 8 x 1 and 2 x 4, also where texts have other padding; and so it is in evaluation."""
    batch, models, losses = batch_of(kind), [], []

    def collate(rows):
        found = stacked(rows)
        longest = int(found["attention_mask"].sum(1).max()) if kind == "sequence" else None
        return {name: x[:, :longest] if x.ndim == 2 else x for name, x in found.items()}

    for accumulation in (1, 8, 2):
        options = {"per_device_train_batch_size": N // accumulation, "gradient_accumulation_steps": accumulation}
        options |= {"per_device_eval_batch_size": N // accumulation}
        text = "smooth_adversarial:radius=0.2, steps=3, norm=2"  # signs of slopes of about 0 are those of rounding
        trainer = trainer_of(tmp_path, KINDS[kind][0](), batch, text, collate=collate, **options)
        trainer.train()
        models.append(trainer.model)
        losses.append(trainer.state.log_history[0]["loss"])
    for model, loss in zip(models[1:], losses[1:], strict=True):
        assert_same(model, models[0], rtol=1e-3, atol=1e-5)
        assert loss == pytest.approx(losses[0], rel=1e-4)


def test_a_run_that_is_resumed_is_the_same_run_and_another_seed_another(tmp_path):
    batch, loss = batch_of("sequence"), "smooth_adversarial:radius=0.2, steps=2"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(**more):
        model = build("BertForSequenceClassification", "BertConfig", vocab_size=40, num_labels=K, **sizes)
        return fit(tmp_path, model, batch, loss, **{**options, **more}).model

    straight = run()
    assert_same(run(resume=tmp_path / "checkpoint-2"), straight)
    other = run(seed=1, save_strategy="no")
    assert not torch.equal(other.classifier.weight, straight.classifier.weight)


def test_rows_without_a_label_and_half_precision(tmp_path):
    """The first changes nothing, as the random starts are those of rows; the second little."""
    batch, text = batch_of("image"), "smooth_adversarial:radius=0.2, steps=3, norm=2"
    batch["pixel_values"] = batch["pixel_values"].clone()
    kept = batch["labels"] != -100
    model = KINDS["image"][0]()
    evaluate = lambda rows, **o: trainer_of(tmp_path, copy.deepcopy(model), rows, text, **o).evaluate()["eval_loss"]  # noqa: E731
    found = evaluate(batch)
    assert not kept.all() and found == pytest.approx(evaluate({k: v[kept] for k, v in batch.items()}), rel=1e-5)
    assert fit(tmp_path, model, batch, text, bf16=True).state.log_history[0]["loss"] == pytest.approx(found, rel=0.05)


def test_adapters_train(tmp_path):
    model, batch = KINDS["sequence"][0](), batch_of("sequence")
    loss = "smooth_adversarial:radius=0.2, steps=2"
    classes.resize(model, loss)
    adapted = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query", "value"]))
    before = copy.deepcopy(adapted)
    trainer = fit(tmp_path, adapted, batch, loss)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed and all("lora" in name or "modules_to_save" in name for name in changed)


def on_a_rank(rank, folder):
    text = "smooth_adversarial:radius=0.2, steps=3, norm=2"
    options = {"per_device_train_batch_size": N // 2}
    trainer = fit(folder, KINDS["image"][0](), batch_of("image"), text, **options)
    evaluated = trainer.evaluate()["eval_loss"]
    return {name: p.detach() for name, p in trainer.model.named_parameters()}, trainer.state.log_history[0], evaluated


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    text = "smooth_adversarial:radius=0.2, steps=3, norm=2"
    one = fit(tmp_path, KINDS["image"][0](), batch_of("image"), text)
    for weights, logged, evaluated in run_ranks(2, on_a_rank, tmp_path, str(tmp_path / "ranks")):
        for name, parameter in one.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-5)
        assert logged["loss"] == pytest.approx(one.state.log_history[0]["loss"], rel=1e-4)
        assert np.isfinite(evaluated)


@pytest.mark.usefixtures("without_progress_bars")
def test_the_command_passes_the_image_processor_on(tmp_path):
    options = {"model": "tiny-vit:hidden=16, layers=1, heads=2", "dataset": pictures(tmp_path / "pictures")}
    plain, moved = (
        classify(text, **options, output=tmp_path / text[:6], steps=4, seed=3)
        for text in ("cross_entropy", "smooth_adversarial:radius=0.1, steps=3")
    )
    assert moved["loss"] == "smooth_adversarial:radius=0.1, steps=3"
    assert (
        moved["before"]["accuracy"] == plain["before"]["accuracy"] and moved["before"]["loss"] > plain["before"]["loss"]
    )


@pytest.mark.slow
def test_the_example_compares_all_arms(tmp_path, monkeypatch):
    """Made-up digits, one epoch; a second call runs nothing."""
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    import digits

    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(60)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(60)]})
    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: rows)
    digits.images.cache_clear()
    for name, value in {"TRAIN": 20, "VALIDATION": 40}.items():
        monkeypatch.setattr(digits, name, value)
    example = runpy.run_path(str(folder / "robust_training.py"))
    arms = {name: (loss, weights[:1], 1, passes) for name, (loss, weights, _, passes) in example["ARMS"].items()}
    monkeypatch.setitem(example["main"].__globals__, "ARMS", arms)
    found = example["main"](seeds=1, output=tmp_path)
    digits.images.cache_clear()
    assert set(found) == set(arms)
    for (run,) in (run.values() for run in found.values()):
        assert 0 <= max(run["under PGD"], run["under PMA"]) <= run["clean accuracy"] <= 1
    assert found["TRADES"][0]["passes of a row"] == 16 and found["cross-entropy"][0]["passes of a row"] == 2
    monkeypatch.setitem(example["main"].__globals__, "trained", None)
    assert example["main"](seeds=1, output=tmp_path) == found


def test_the_search_costs_what_is_said(tmp_path):
    """Forward passes of a step: one, steps + 2 of the search, and one at the point that is found."""
    model, calls = KINDS["image"][0](), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    fit(tmp_path, model, batch_of("image"), "smooth_adversarial:radius=0.1, steps=5", max_steps=1)
    assert len(calls) == 9 and sum(calls) == 7


def test_refusals(tmp_path, monkeypatch):
    for options, message in (
        ({"tau": -1.0}, "tau is -1.0"), ({"rho": 0.0}, "rho is 0.0"), ({"nu": -1.0}, "nu is -1.0"),
        ({"distance": "l2"}, "distance is 'l2': choose margin or kl"), ({"norm": "1"}, "norm is '1': choose inf or 2"),
        ({"radius": 0.0}, "radius is 0.0"), ({"steps": 0}, "steps is 0"), ({"step": 0.0}, "step is 0.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SmoothAdversarial(**options)
    with pytest.raises(ValueError, match="perturbed is None: give the logits"):
        SmoothAdversarial()(Z, LABEL)

    def refused(message, kind="image", text="smooth_adversarial:radius=0.1", train=False, **options):
        with pytest.raises(ValueError, match=message) as error:
            trainer = trainer_of(tmp_path, KINDS[kind][0](), batch_of(kind), text, **options)
            if train:
                trainer.train()
        assert "\n" not in str(error.value)

    refused("radius is None in .*: set how far inputs are moved, such as radius=0.03", text="smooth_adversarial")
    refused("processing_class is a NoneType without image_mean .*: pass the image processor", processor=None)
    prepare = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    refused("searches for inputs with whole weights: train it without FSDP and DeepSpeed", kind="sequence")
