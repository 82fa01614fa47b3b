"""NoiseFiT: against a dense, readable step; its controls; noise where it belongs and nowhere else."""

import re
from functools import partial

import datasets
import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

from hf_xent.models.anatomy import layers_of
from hf_xent.ops import Head
from hf_xent.ops.divergences import stream_divergence
from hf_xent.ops.request import Request
from hf_xent.patching import patch_state
from hf_xent.trainers import NoiseFiTConfig, NoiseFiTTrainer
from hf_xent.trainers.divergence import noisefit, rdrop
from hf_xent.trainers.noise import noise_scale, strengths
from hf_xent.trainers.noisefit import lora_config, repeated
from support.models import V, assert_same_gradients, batch, checkpointing, gradients, tiny
from support.oracle import Allocations, Largest


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(24):
        ids = torch.randint(3, V, (int(torch.randint(4, 14, (1,), generator=generator)),), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * len(ids)})
    return datasets.Dataset.from_list(found)


def collate(examples):
    length = max(len(x["input_ids"]) for x in examples)
    padded = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: torch.tensor([x[k] + [fill] * (length - len(x[k])) for x in examples]) for k, fill in padded.items()}


def trainer_of(folder, rows, model=None, **options):
    common = {
        "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": [],
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "num_noise_layers": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    config = NoiseFiTConfig(output_dir=str(folder), **{**common, **options})
    model = tiny(std=0.05) if model is None else model
    return NoiseFiTTrainer(model, config, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def fit(folder, rows, model=None, resume=None, **options):
    trainer = trainer_of(folder, rows, model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_noise_scale_by_hand():
    """The method sheet's worked example: lower medians, a factor cut at 5, features far from the median spared."""
    h = torch.tensor([[[1.0, 2, 3, 10], [0, 0.5, 1, 1.5]]])
    expected = [[1.454742, 1.607738, 1.454742, 0.722404], [0.152746, 0.168811, 0.152746, 0.138211]]
    torch.testing.assert_close(noise_scale(h, 0.1), torch.tensor([expected]), rtol=1e-5, atol=1e-6)
    padded = torch.cat([h, 100 * torch.randn(1, 3, 4)], 1)
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    torch.testing.assert_close(noise_scale(padded, 0.1, mask)[:, :2], torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_noise_grows_with_the_square_of_the_activations():
    h = torch.randn(2, 9, 32)
    torch.testing.assert_close(noise_scale(2 * h, 0.1), 4 * noise_scale(h, 0.1), rtol=1e-3, atol=0)
    h[0, 0] *= 1e3  # a massive activation
    assert noise_scale(h, 0.1).isfinite().all()


@pytest.mark.parametrize(("std", "share"), [(0.1, 0.00165), (1.0, 0.0165), (10.0, 0.164)])
def test_share_of_the_noise_in_gaussian_activations(std, share):
    """The method sheet's table: sigma 0.1 twice, so a tenth of the share under s = sigma std(h)."""
    layer, h = torch.nn.Identity(), std * torch.randn(8, 64, 256)
    [found] = strengths([layer], lambda: layer(h), 0.1, None)
    assert 0.1 * found.share == pytest.approx(share, rel=0.03)
    assert found.ratio == pytest.approx(6.1 / std, rel=0.03)
    assert not layer._forward_hooks


def dense_step(model, inputs, options, chosen):
    """One step's loss from full logits, three passes of a model whose layers are disturbed by hand."""
    ids, mask = (torch.cat([inputs[k]] * 3) for k in ("input_ids", "attention_mask"))
    rows = len(inputs["input_ids"])

    def disturb(layer, _, h):
        parts = [h[:rows]]
        keep, scales = inputs["attention_mask"].bool(), []
        for part in (h[rows : 2 * rows], h[2 * rows :]):
            part = part.detach()
            median = part.median(-1, keepdim=True).values
            mad = (part - median).abs().median(-1, keepdim=True).values
            variance = part.var(-1, keepdim=True)
            factor = (variance / variance[keep].mean()).exp().clamp(max=5)
            base = options.get("noise_std", 0.1) ** options.get("sigma_power", 2) * part[keep].std()
            scales.append(base * mad * (-0.1 * (part - median).abs() / mad).exp() * factor)
        for part, scale in zip((h[rows : 2 * rows], h[2 * rows :]), scales, strict=True):
            parts.append(part + torch.randn_like(scale) * scale)
        return torch.cat(parts)

    handles = [layers_of(model)[i].register_forward_hook(disturb) for i in chosen]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    for handle in handles:
        handle.remove()
    z, first, second = logits.chunk(3)
    targets = inputs["labels"][:, 1:]
    keep = targets != -100

    def kl(p, q):
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)[keep].mean()

    heat, ce = options.get("temperature", 1.0), F.cross_entropy(z[keep], targets[keep])
    if options.get("version") == "v2":
        teacher, students, factor = z.detach() / heat, [first / heat, second / heat], heat**2
        other = second.detach() / heat
    else:
        teacher, students, other, factor = z / heat, [first, second], second, 1.0
    soft = factor * sum(kl(teacher, student) for student in students) / 2
    return 0.5 * ce + 0.5 * soft + options.get("consistency_weight", 0.1) * factor * kl(other, students[0])


def dense_losses(z, labels, function):
    """The losses per token of dense logits, one [n, V] a pass, from the options that a partial function has."""
    options = function.keywords

    def kl(p, q):
        return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)

    def ce(x):
        return F.cross_entropy(x, labels, reduction="none")

    if function.func is rdrop:
        return (ce(z[0]) + ce(z[1])) / 2 + options["weight"] * (kl(*z) + kl(z[1], z[0])) / 2
    heat, alpha, decay = (options[name] for name in ("temperature", "ce_weight", "consistency_weight"))
    if options["version"] == "v2":
        p, q1, q2 = (x / heat for x in z)
        p, other, factor = p.detach(), q2.detach(), heat**2
    else:
        p, q1, q2, other, factor = z[0] / heat, z[1], z[2], z[2], 1.0
    soft = factor * (kl(p, q1) + kl(p, q2)) / 2
    return alpha * ce(z[0]) + (1 - alpha) * soft + decay * factor * kl(other, q1)


PASSES = [
    partial(noisefit, temperature=1.0, ce_weight=0.5, consistency_weight=0.1, version="v1"),
    partial(noisefit, temperature=2.0, ce_weight=0.3, consistency_weight=0.7, version="v1"),
    partial(noisefit, temperature=1.5, ce_weight=0.2, consistency_weight=0.4, version="v2"),
    partial(rdrop, weight=0.7),
]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("function", PASSES, ids=["v1", "tempered", "v2", "rdrop"])
@pytest.mark.parametrize("rows", [1, 1000], ids=["many chunks", "one chunk"])
def test_losses_of_passes_are_those_of_dense_logits(function, softcap, rows):
    """Values, gradients of every order, per-token losses and statistics of the first pass; some labels are ignored."""
    passes = 2 if function.func is rdrop else 3
    hidden = [torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True) for _ in range(passes)]
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((V, 32), (V,)))
    head, leaves = Head(weight, bias, scale=0.5, softcap=softcap), [*hidden, weight, bias]
    labels, weights = torch.randint(V, (3, 5)), torch.rand(3, 5, dtype=torch.float64)
    labels[0, :2] = -100
    keep = labels != -100
    request = Request(("top",), memory_budget=rows * V * 8)
    total, stats = stream_divergence(function(), hidden, head, labels, request, weights)
    z = [head.logits(h) for h in hidden]
    losses = torch.zeros(3, 5, dtype=torch.float64).masked_scatter(
        keep, dense_losses([x[keep] for x in z], labels[keep], function)
    )
    dense = (losses * weights).sum()
    torch.testing.assert_close(total, dense)
    torch.testing.assert_close(stats.loss, losses.detach())
    torch.testing.assert_close(stats.lse, torch.where(keep, z[0].logsumexp(-1), 0).detach())
    assert torch.equal(stats.top[keep], z[0].argmax(-1)[keep])
    found, expected = (torch.autograd.grad(x, leaves, create_graph=True) for x in (total, dense))
    again, twice = (torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in (found, expected))
    for ours, theirs in zip((*found, *again), (*expected, *twice), strict=True):
        torch.testing.assert_close(ours, theirs)
    unreduced, _ = stream_divergence(function(), hidden, head, labels, Request(unreduced=True), weights)
    torch.testing.assert_close(unreduced, losses * weights)


@pytest.mark.parametrize("function", PASSES, ids=["v1", "tempered", "v2", "rdrop"])
def test_losses_of_passes_far_apart(function):
    """Labels and noisy passes tens of thousands of nats away from the clean one: no term is cut off."""
    passes = 2 if function.func is rdrop else 3
    hidden = [1e4 * torch.randn(7, 32, dtype=torch.float64, requires_grad=True) for _ in range(passes)]
    head = Head(torch.randn(V, 32, dtype=torch.float64, requires_grad=True))
    labels, leaves = torch.randint(V, (7,)), [*hidden, head.weight]
    total, _ = stream_divergence(function(), hidden, head, labels, Request())
    dense = dense_losses([head.logits(h) for h in hidden], labels, function).sum()
    assert dense > 1e5
    for ours, theirs in zip(
        (total, *torch.autograd.grad(total, leaves)), (dense, *torch.autograd.grad(dense, leaves)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", PASSES, ids=["v1", "tempered", "v2", "rdrop"])
def test_a_banned_token_adds_nothing_to_a_divergence(function):
    """A bias of -inf for some token: as if the vocabulary did not have it."""
    passes = 2 if function.func is rdrop else 3
    hidden, weight = [torch.randn(7, 32) for _ in range(passes)], torch.randn(V, 32)
    bias, labels = torch.zeros(V), torch.randint(V - 1, (7,))
    bias[-1] = -torch.inf
    answers = []
    for head in (Head(weight.clone().requires_grad_(), bias), Head(weight[:-1].clone().requires_grad_())):
        total, _ = stream_divergence(function(), hidden, head, labels, Request())
        total.backward()
        answers.append((total.detach(), head.weight.grad[: V - 1]))
    torch.testing.assert_close(*answers)


def test_passes_have_one_weight_gradient_and_few_rows_of_logits():
    hidden = [torch.randn(200, 30, requires_grad=True) for _ in range(3)]
    head, labels = Head(torch.randn(V, 30, requires_grad=True)), torch.randint(V, (200,))
    with Allocations() as made, Largest() as largest:
        stream_divergence(PASSES[0](), hidden, head, labels, Request(memory_budget=30 * V * 4))[0].backward()
    assert made.shapes[V, 30] == 1
    assert largest.numel <= 3 * 200 * 30


@pytest.mark.parametrize(
    "options",
    [{"noise_std": 1.0}, {"noise_std": 0.7, "sigma_power": 1, "temperature": 2.0}, {"noise_std": 1.0, "version": "v2"},
     {"noise_std": 1.0, "version": "v2", "temperature": 1.5, "consistency_weight": 0.05}],
)  # fmt: skip
def test_three_steps_equal_a_dense_reference(tmp_path, rows, options):
    trainer = trainer_of(tmp_path, rows, model=tiny(std=0.3), noise_layers="0,1", **options)
    dense = tiny(std=0.3).train()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.05)
    trainer.noise_layers = [0, 1]
    trainer.model.train()
    for step in range(3):
        inputs = collate([rows[i] for i in range(4 * step, 4 * step + 4)])
        torch.manual_seed(step)
        expected = dense_step(dense, inputs, options, [0, 1])
        expected.backward()
        torch.manual_seed(step)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(trainer.model, dict(inputs), tokens)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
        stock = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
        ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert_same_gradients(ours, stock, rtol=1e-4)
        for each in (optimizer, trainer.optimizer):
            each.step()
            each.zero_grad()
    assert patch_state(trainer.model).materialized == 0


def test_without_noise_only_weighted_cross_entropy_is_left(tmp_path, rows):
    """The control: no dropout in the model, sigma 0, so that all passes are one."""
    trainer = fit(tmp_path, rows, noise_std=0.0, learning_rate=0.0)
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(0.5 * torch.tensor(entry["perplexity"]).log().item(), rel=1e-5)
    plain = fit(tmp_path, rows, ce_weight=1.0, consistency_weight=0.0, learning_rate=0.0)
    first = next(e for e in plain.state.log_history if "loss" in e)
    assert first["loss"] == pytest.approx(torch.tensor(first["perplexity"]).log().item(), rel=1e-5)


def test_rdrop_is_two_passes_and_their_symmetric_divergence(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, model=tiny(std=0.3), method="rdrop", rdrop_weight=0.7)
    trainer.model.train()
    trainer.model.config.attention_dropout = 0.3  # the tiny model has no dropout of its own
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    inputs = collate([rows[i] for i in range(4)])
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.manual_seed(0)
    doubled = {k: torch.cat([inputs[k]] * 2) for k in ("input_ids", "attention_mask")}
    first, second = trainer.model(**doubled).logits[:, :-1].chunk(2)
    targets = inputs["labels"][:, 1:]
    keep = targets != -100
    p, q = first[keep].log_softmax(-1), second[keep].log_softmax(-1)
    symmetric = (
        F.kl_div(q, p, log_target=True, reduction="batchmean") + F.kl_div(p, q, log_target=True, reduction="batchmean")
    ) / 2
    expected = (F.nll_loss(p, targets[keep]) + F.nll_loss(q, targets[keep])) / 2 + 0.7 * symmetric
    assert symmetric > 1e-5
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_noise_is_only_in_training_steps(tmp_path, rows):
    trainer = fit(tmp_path, rows, noise_std=2.0, sigma_power=1, per_device_eval_batch_size=len(rows))
    model, (ids, labels) = trainer.model, batch()
    assert len(trainer.noise_layers) == 1
    assert all(not layer._forward_hooks for layer in layers_of(model))
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    clean = model(input_ids=ids, labels=labels).loss
    assert torch.equal(clean, model(input_ids=ids, labels=labels).loss)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == again["eval_loss"]
    assert again["eval_loss"] == pytest.approx(torch.tensor(again["eval_perplexity"]).log().item(), rel=1e-5)
    model.train()

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    trainer.compute_loss = broken
    with pytest.raises(RuntimeError, match="broken"):
        trainer.training_step(model, collate([rows[0]]))
    assert all(not layer._forward_hooks for layer in layers_of(model)), "hooks go with an exception too"


def test_accumulation_does_not_change_gradients(tmp_path, rows):
    """With noise every micro-batch draws its own, so without it; the sums over tokens are what is tested."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = fit(tmp_path, rows, noise_std=0.0, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        found.append((entry["loss"], entry["grad_norm"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_noise_again(tmp_path, rows, reentrant):
    inputs, found = collate([rows[i] for i in range(4)]), []
    for checkpointed in (False, True):
        trainer = trainer_of(tmp_path, rows, model=tiny(std=0.3), noise_std=1.0, noise_layers="0,1")
        model = trainer.model.train()
        if checkpointed:
            checkpointing(model, reentrant)
        torch.manual_seed(5)
        trainer.noise_layers = [0, 1]
        loss = trainer.training_step(model, dict(inputs), torch.tensor(30))
        found.append((loss, gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("layers", ["1", "lowest"])
def test_resumed_losses_are_those_of_a_straight_run(tmp_path, rows, layers):
    options = {"noise_std": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "noise_layers": layers}
    straight = fit(tmp_path, rows, **options)
    resumed = fit(tmp_path, rows, resume=str(tmp_path / "checkpoint-2"), **options)
    assert losses_of(resumed) == losses_of(straight)


def test_a_resumed_run_keeps_its_layers(tmp_path, rows):
    """They were chosen on a batch of the past; weights have changed so that a new choice would be another."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "noise_layers": "largest"}
    first = fit(tmp_path, rows, **options)
    model = tiny(std=0.05)
    model.model.embed_tokens.weight.data.mul_(100)  # then the first layer's output is the larger one
    model.save_pretrained(tmp_path / "checkpoint-1")
    resumed = fit(tmp_path, rows, resume=str(tmp_path / "checkpoint-1"), **{**options, "max_steps": 2})
    assert resumed.noise_layers == first.noise_layers


def test_the_authors_recipe_is_the_default(tmp_path, rows):
    config = NoiseFiTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.lr_scheduler_type, config.num_train_epochs) == (5e-5, "cosine", 5.0)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    trainer = fit(tmp_path, rows, model=peft.get_peft_model(tiny(std=0.05), lora_config()), max_steps=1)
    trained = {name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    adapter = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert (adapter.r["default"], adapter.scaling["default"]) == (8, 2.0)


def test_divergence_is_logged_and_needs_noise(tmp_path, rows):
    """The tiny model has no dropout, so that sigma 0 leaves none."""
    for sigma in (0.0, 1.0):
        trainer = fit(tmp_path, rows, noise_std=sigma, noise_layers="0", model=tiny(std=0.3))
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all((entry["divergence"] > 1e-4) == (sigma > 0) for entry in logged)
        assert all(abs(entry["divergence"]) < 1e-5 for entry in logged) == (sigma == 0)


@pytest.mark.parametrize("kind", ["peft", "bfloat16", "gpt2"])
def test_adapters_low_precision_and_tuples_of_outputs(tmp_path, rows, kind):
    if kind == "peft":
        model = peft.get_peft_model(tiny(std=0.05), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    else:
        model = tiny(std=0.05, dtype=torch.bfloat16) if kind == "bfloat16" else tiny("gpt2", std=0.05)
    trainer = fit(tmp_path, rows, model=model, noise_std=1.0, num_noise_layers=1)
    assert all(0 < loss < 10 for loss in losses_of(trainer)) and len(losses_of(trainer)) == 3
    assert patch_state(trainer.model).materialized == 0


def test_layers_are_chosen_by_their_signal_to_noise_ratio(tmp_path, rows):
    """Noise grows with the square of the activations, so the ratio falls with their size."""
    model = tiny(std=0.3, num_hidden_layers=4)
    for i, layer in enumerate(layers_of(model)):  # residuals grow from layer to layer
        layer.mlp.down_proj.weight.data.mul_(100.0**i)
    inputs, chosen = collate([rows[i] for i in range(4)]), {}
    for which in ("largest", "lowest", "2,0"):
        trainer = trainer_of(tmp_path, rows, model=model, noise_layers=which, num_noise_layers=2)
        trainer.model.train()
        trainer.training_step(trainer.model, dict(inputs), torch.tensor(30))
        chosen[which] = trainer.noise_layers
    assert chosen == {"largest": [0, 1], "lowest": [2, 3], "2,0": [0, 2]}


def test_refusals(tmp_path, rows):
    for options, match in (
        ({"method": "other"}, r"method is 'other': choose 'noisefit' or 'rdrop'"),
        ({"sigma_power": 3}, r"sigma_power is 3"),
        ({"ce_weight": 1.5}, r"ce_weight is 1.5"),
        ({"loss": "focal"}, r"built on plain cross-entropy"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_of(tmp_path, rows, **options)
    for options, match in (({"noise_layers": "7"}, r"numbers below 2"), ({"num_noise_layers": 3}, r"has 2 layers")):
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, rows, **options)


def test_a_packed_batch_is_its_sequences(tmp_path, rows):
    """Clean passes of flattened sequences, with and without the arguments of flash attention, are those of the rows."""
    lengths = [len(row["input_ids"]) for row in rows.select(range(4))]
    expected = fit(tmp_path, rows.select(range(4)), noise_std=0.0, max_steps=1)
    for flash in (False, True):
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
        trainer = trainer_of(tmp_path, None, noise_std=0.0, max_steps=1, remove_unused_columns=False)
        trainer.train_dataset, trainer.data_collator = [dict(row) for row in rows.select(range(4))], collator
        for row in trainer.train_dataset:
            del row["attention_mask"]
        trainer.train()
        assert losses_of(trainer) == pytest.approx(losses_of(expected), rel=1e-5)
        assert trainer.state.log_history[1]["divergence"] == pytest.approx(0, abs=1e-5), "all passes see the same"
    packed = collator([{"input_ids": [5] * n} for n in lengths])
    found, total = repeated(packed, 3), sum(lengths)
    assert found["input_ids"].shape == (1, 3 * total) and found["max_length_q"] == max(lengths)
    assert found["cu_seq_lens_q"].diff().tolist() == lengths * 3 and found["cu_seq_lens_q"].dtype == torch.int32
    assert found["position_ids"].tolist() == [[*packed["position_ids"][0].tolist()] * 3]


def test_rows_are_repeated_and_what_has_none_is_not():
    inputs = {
        "input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3), "use_cache": False,
        "logits_to_keep": torch.tensor(2), "position_ids": torch.arange(18).view(3, 2, 3),
    }  # fmt: skip
    found = repeated(inputs, 2)
    assert found["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] * 2 and found["attention_mask"].shape == (4, 3)
    assert found["position_ids"].shape == (3, 4, 3) and found["position_ids"][1, 2].tolist() == [6, 7, 8]
    assert found["use_cache"] is False and found["logits_to_keep"] == 2
    numbered = {
        "input_ids": torch.zeros(1, 3),
        "position_ids": torch.tensor([[0, 1, 0]]),
        "seq_idx": torch.tensor([[0, 0, 1]]),
    }
    assert repeated(numbered, 2)["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 3]]


@pytest.mark.parametrize("method", ["noisefit", "rdrop"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_without_labels_are_zeros(tmp_path, rows, method, accumulation):
    silent = rows.select(range(8)).map(lambda row: {"labels": [-100] * len(row["labels"])})
    mixed = datasets.concatenate_datasets([silent, rows.select(range(8))])
    # with the default noise the divergence is of the size of rounding here
    noise = {"noise_std": 5.0} if method == "noisefit" else {}
    trainer = fit(
        tmp_path, mixed, method=method, max_steps=4 // accumulation, gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential", logging_steps=4 // accumulation, **noise,
    )  # fmt: skip
    assert all(p.isfinite().all() for p in trainer.model.parameters()) and losses_of(trainer)[0] > 0
    assert method == "rdrop" or trainer.state.log_history[1]["divergence"] >= 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracer reads it
@pytest.mark.parametrize(("method", "backend", "depth"), [("noisefit", "aot_eager", 2), ("rdrop", "eager", 1)])
def test_a_compiled_model_trains_as_it_does_without(tmp_path, rows, method, backend, depth):
    """The same noise, which the program that is compiled in the first step draws anew in every step.

    Texts of one length are compiled once, which takes seconds; those of several lengths are left to the smaller model.
    """
    if depth > 1:
        rows = rows.filter(lambda row: len(row["labels"]) >= 8).map(lambda row: {k: x[:8] for k, x in row.items()})
        rows = rows.select(range(12))
    found = []
    for options in ({"torch_compile": True, "torch_compile_backend": backend}, {}):
        noise = {} if method == "rdrop" else {"noise_std": 2.0, "sigma_power": 1}
        model = tiny(std=0.05, num_hidden_layers=depth)
        sizes = {"max_steps": 3, "per_device_eval_batch_size": 4}
        trainer = fit(tmp_path, rows, model, method=method, **sizes, **noise, **options)
        found.append((losses_of(trainer), trainer.noise_layers, trainer.evaluate()["eval_perplexity"]))
        state = patch_state(trainer.model)
        assert state.streamed > 0 and state.materialized == state.bypassed == 0
        assert all(not layer._forward_hooks for layer in layers_of(trainer.model))
        torch.compiler.reset()
    (losses, layers, perplexity), (expected, expected_layers, expected_perplexity) = found
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert layers == expected_layers and perplexity == pytest.approx(expected_perplexity, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": 1e-3}, "tail is 0.001, but the divergences"),
        ({"method": "rdrop", "noise_std": 0.3}, "noise_std is 0.3, but method is 'rdrop'"),
        ({"rdrop_weight": 2.0}, "rdrop_weight is 2.0, but method is 'noisefit'"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, rows, **options)


def test_a_loss_of_the_users_and_missing_labels_are_refused(tmp_path, rows):
    config = NoiseFiTConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="compute_loss_func is given, but the trainer computes its own loss"):
        NoiseFiTTrainer(tiny(), config, train_dataset=rows, compute_loss_func=lambda *args: 0)
    trainer = trainer_of(tmp_path, rows.remove_columns("labels"))
    trainer.data_collator = lambda examples: {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match="a batch has input_ids but no labels"):
        trainer.train()


def test_virtual_tokens_are_left_out(tmp_path, rows):
    """Prompt tuning puts them before the batch's: they predict nothing, and are no padding."""
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(std=0.05), prompts)
    found = fit(tmp_path, rows, model, noise_std=0.0, max_steps=1).state.log_history
    [entry] = [entry for entry in found if "loss" in entry]
    assert entry["loss"] == pytest.approx(torch.tensor(entry["perplexity"]).log().item() / 2, rel=1e-5)
    assert fit(tmp_path, rows, model, noise_std=1.0).noise_layers is not None
    h, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(noise_scale(h, 1.0, mask), noise_scale(h, 1.0, F.pad(mask, (2, 0), value=1)))
