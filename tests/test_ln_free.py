"""Removable norms and their training: found by structure, exact while real, affine when removed, resumable midway."""

import copy
import dataclasses
import re

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_xent import ln_free
from hf_xent.ln_free import Schedule
from hf_xent.ln_free.norms import fake_norms
from hf_xent.patching import patch_state
from hf_xent.trainers import LNRemovalCallback, LNRemovalConfig, LNRemovalTrainer, XentTrainer
from hf_xent.trainers.ln_recipes import RECIPES
from hf_xent.trainers.ln_removal import sigma_term, spread_term
from support.models import V, batch, checkpointing, gradients, tiny, tiny_tokenizer
from test_trainers import arguments, collate, losses_of

FAMILIES = ("gpt2", "llama", "neox", "opt")


def seen(name="gpt2", std=0.2, **changes):
    """A wrapped model that has seen a batch."""
    model = ln_free.wrap(tiny(name, std, **changes))
    ln_free.calibrate(model, [{"input_ids": batch()[0]}])
    return model


def kinds(model, kind):
    return [site.name for site in ln_free.sites(model) if site.kind == kind]


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        return model(input_ids=batch()[0] if ids is None else ids, **inputs).logits


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


# The paper's table: start/gap of MLP, of qk, of v, and the final norm's step.
PAPER = {
    "gpt2": (12, (20, 2), (44, 2), (68, 3), 104),
    "gpt2-medium": (24, (20, 2), (68, 2), (116, 3), 188),
    "gpt2-large": (36, (30, 4), (174, 4), (318, 6), 534),
    "gpt2-xl": (48, (50, 4), (242, 4), (434, 6), 722),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_schedules_of_the_four_sizes_are_the_papers(name):
    layers, *starts, final = PAPER[name]
    expected = [
        (start + layer * gap, f"{kind}.{layer}")
        for kind, (start, gap) in zip(("mlp", "qk", "v"), starts, strict=True)
        for layer in range(layers)
    ]
    assert Schedule.named(name).events == (*expected, (final, "final"))


def test_scaled_schedules():
    """The smallest size's own at its depth and steps; any other in order, inside its shares of the steps."""
    deep = ln_free.wrap(tiny("gpt2", n_layer=12))
    assert Schedule.scaled(deep, 300) == Schedule.named("gpt2")
    model = ln_free.wrap(tiny("llama"))
    names = [site.name for site in ln_free.sites(model)]
    for steps in (2, 40, 10_000):
        events = Schedule.scaled(model, steps, start=0.1, end=0.5).events
        assert [name for _, name in events] == names
        assert [step for step, _ in events] == sorted(step for step, _ in events)
        assert (events[0][0], events[-1][0]) == (max(1, int(0.1 * steps)), int(0.5 * steps))
    assert Schedule.at_once(model, 7).events == tuple((7, name) for name in names)
    assert Schedule.of(["mlp.0", "v.0", "final"], 5, (2, 9, 4)).events == ((5, "mlp.0"), (7, "v.0"), (11, "final"))
    slow = Schedule.at_once(model, 7, taper=3)
    assert [set(slow.due(step).values()) for step in range(6, 12)] == [set(), {0.25}, {0.5}, {0.75}, {1.0}, {1.0}]
    with pytest.raises(ValueError, match="schedule is 'gpt3'"):
        Schedule.named("gpt3")
    with pytest.raises(ValueError, match=r"start is 0.5 and end 0.2"):
        Schedule.scaled(model, 9, start=0.5, end=0.2)
    with pytest.raises(ValueError, match=r"'mlp.2', but LlamaForCausalLM has"):
        Schedule.named("gpt2").check(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrapping_changes_nothing(name):
    stock, model = tiny(name), ln_free.wrap(tiny(name))
    ids, labels = batch()
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-6)
    for each in (stock, model):
        each(input_ids=ids, labels=labels).loss.backward()
    ours, theirs = gradients(model), gradients(stock)
    assert ours.keys() == theirs.keys()
    for key, g in theirs.items():
        torch.testing.assert_close(ours[key], g, rtol=1e-5, atol=1e-7)
    extra = model.state_dict().keys() - stock.state_dict().keys()
    assert {key.rpartition(".")[2] for key in extra} == {"sigma", "removed_share"}
    assert [site.name for site in ln_free.sites(model)] == ["mlp.0", "mlp.1", "qk.0", "qk.1", "v.0", "v.1", "final"]
    assert not any(site.removed for site in ln_free.sites(model)) and not ln_free.is_ln_free(model)
    assert ln_free.wrap(model) is model


def test_the_values_of_a_projection_are_told_by_derivatives():
    """GPT-2 has them last, GPT-NeoX in every head's last third; separate projections are all or nothing."""
    from hf_xent.ln_free.structure import trace

    def values(name):
        return next(n.values for n in trace(tiny(name)).norms if n.layer == 1)

    assert values("gpt2")["transformer.h.1.attn.c_attn"].tolist() == [False] * 64 + [True] * 32
    neox = values("neox")["gpt_neox.layers.1.attention.query_key_value"]
    assert neox.tolist() == ([False] * 16 + [True] * 8) * 4
    for name, reader in (
        ("llama", "model.layers.1.self_attn.v_proj"),
        ("opt", "model.decoder.layers.1.self_attn.v_proj"),
    ):
        assert list(values(name)) == [reader] and values(name)[reader].all()


def by_hand(model, sigma, qk, v):
    """Logits of a 2-layer GPT-2 whose layer 1 is removed to the given shares for q/k and for v."""
    attention, ln = model.transformer.h[1].attn, model.transformer.h[1].ln_1
    raw = {}

    def norm(x, share):
        centered = x - x.mean(-1, keepdim=True)
        own = (centered.square().mean(-1, keepdim=True) + 1e-5).log() / 2
        return centered / ((1 - share) * own + share * sigma.log()).exp() * ln.weight + ln.bias

    def project(module, args, output):
        parts = [norm(raw["x"], share) @ module.weight + module.bias for share in (qk, v)]
        return torch.cat([parts[0][..., :64], parts[1][..., 64:]], -1)

    handles = [
        ln.register_forward_pre_hook(lambda _, args: raw.update(x=args[0])),
        attention.c_attn.register_forward_hook(project),
    ]
    found = model(input_ids=batch()[0]).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("shares", [(1, 0), (0, 1), (1, 1), (0.4, 0), (0.4, 0.4), (0.4, 0.9), (1, 0.3)])
def test_paths_are_removed_apart(shares):
    """Values and every gradient against a dense reference that projects twice."""
    stock, model = tiny("gpt2"), seen("gpt2")
    sigma = torch.tensor(next(s.sigma for s in ln_free.sites(model) if s.name == "qk.1"))
    for site, share in zip(("qk.1", "v.1"), shares, strict=True):
        ln_free.remove(model, site, share)
    expected = by_hand(stock, sigma, *shares)
    found = model(input_ids=batch()[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(found)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    ours, theirs = gradients(model), gradients(stock)
    for key, g in theirs.items():
        torch.testing.assert_close(ours[key], g, rtol=1e-3, atol=1e-4 * float(g.abs().max()) + 1e-5, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_norms_are_affine(name):
    model = seen(name)
    for kind in ("mlp", "qk", "v", "final"):
        for site in kinds(model, kind):
            before = logits(model)
            ln_free.remove(model, site)
            assert not torch.equal(before, logits(model))
            ln_free.remove(model, site)  # twice is once
    assert ln_free.is_ln_free(model)
    for norm in (m for m in model.modules() if isinstance(m, ln_free.FakeNorm)):
        x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        torch.testing.assert_close(norm((x + y) / 2), (norm(x) + norm(y)) / 2, rtol=1e-4, atol=1e-5)
    ln_free.restore(model, "final")
    assert not ln_free.is_ln_free(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_share_of_a_norm_divides_by_a_geometric_mean(name):
    """Of the token's own and sigma; 0 and 1 are the norm and none."""
    model = seen(name)
    norms = fake_norms(model)
    site = next(site for site in ln_free.sites(model) if site.kind == "mlp")
    norm = norms[site.norm]
    x = torch.randn(2, 5, 32) * torch.tensor([0.1, 1.0, 3.0, 9.0, 30.0])[:, None]
    center = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    own = (center.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    for share in (0.0, 0.3, 1.0):
        ln_free.remove(model, site.name, share)
        expected = center / (own ** (1 - share) * site.sigma**share) * norm.weight
        expected = expected if norm.bias is None else expected + norm.bias
        torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
        assert ln_free.sites(model)[0].share == pytest.approx(share)
    ln_free.remove(model, "qk.1", 0.2)
    ln_free.remove(model, "v.1", 0.7)
    found = ln_free.verify(model)
    assert max(found.cache, found.padding) < 1e-4 and not found.ln_free
    with pytest.raises(ValueError, match=r"share is 1.5"):
        ln_free.remove(model, "v.1", 1.5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_clip_bounds_far_tokens_and_leaves_the_others(name):
    model = seen(name)
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    norm = next(iter(fake_norms(model).values()))
    norm.sigma.fill_(1.0)
    x = torch.randn(1, 5, len(norm.weight), generator=torch.Generator().manual_seed(0))
    x[0, 2] *= 1000
    x.requires_grad_()
    plain = norm(x)
    with ln_free.clipped(model, 3.0):
        with ln_free.clipped(model, 1.5):
            closer = norm(x)
        bounded = norm(x)
    real = (F.layer_norm if name == "gpt2" else F.rms_norm)(x, x.shape[-1:], eps=norm.eps) * norm.weight
    bias = torch.zeros(()) if norm.bias is None else norm.bias
    near, far = [0, 1, 3, 4], 2
    assert torch.equal(bounded[0, near], plain[0, near]) and float(plain.detach().abs().max()) > 100
    assert torch.allclose(bounded[0, far], (3.0 * real + bias)[0, far], rtol=1e-5, atol=1e-5)
    assert torch.allclose(closer[0, far], (1.5 * real + bias)[0, far], rtol=1e-5, atol=1e-5)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for token, expected in ((far, 3.0 * real), (near[0], plain)):
        slopes = [
            torch.autograd.grad((y * weights)[0, token].sum(), x, retain_graph=True)[0] for y in (bounded, expected)
        ]
        assert torch.allclose(*slopes, rtol=1e-4, atol=1e-5 * float(slopes[1].abs().max()))
    assert torch.equal(norm(x), plain)


@torch.no_grad()
def test_a_clip_of_one_path_leaves_the_values_of_the_real_norm():
    model = seen("llama")
    ln_free.remove(model, "qk.0")
    norm = next(norm for norm in fake_norms(model).values() if "qk.0" in norm.sites)
    norm.sigma.fill_(1.0)
    x = 50 * torch.randn(1, 5, len(norm.weight), generator=torch.Generator().manual_seed(0))
    real = F.rms_norm(x, x.shape[-1:], eps=norm.eps) * norm.weight
    with ln_free.clipped(model, 3.0):
        queries = norm(x)
        values = queries * norm.ratio
    assert torch.allclose(queries, 3.0 * real, rtol=1e-5, atol=1e-5)
    assert torch.allclose(values, real, rtol=1e-5, atol=1e-5)


def test_a_clip_keeps_a_model_from_overflow_and_refuses_what_it_cannot_do():
    model = seen("llama")
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    ids = batch()[0]
    before = logits(model, ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[0, 2]] *= 1e12
    assert not logits(model, ids).isfinite().all()
    with ln_free.clipped(model):
        assert logits(model, ids).isfinite().all()
    assert before.isfinite().all() and not logits(model, ids).isfinite().all()
    for limit in (0.5, float("nan")):
        with pytest.raises(ValueError, match=r"limit is .*: choose 1 or more"), ln_free.clipped(model, limit):
            pass
    with pytest.raises(ValueError, match="wrap"), ln_free.clipped(tiny("llama")):
        pass


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("median", [False, True])
def test_sigma_follows_tokens_that_are_no_padding(name, median):
    """A moving average of the divisors of real tokens, in training alone."""
    model = ln_free.wrap(tiny(name), momentum=0.75, median=median)
    inputs = {}

    def keep(module_name):
        return lambda _, args: inputs.setdefault(module_name, []).append(args[0].detach().reshape(3, 11, 32))

    for site in ln_free.sites(model):
        if site.kind != "v":
            model.get_submodule(site.norm).register_forward_pre_hook(keep(site.norm))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :6], mask[2, :2] = 0, 0
    without_dropout(model).train()
    logits(model, attention_mask=mask)
    logits(model, attention_mask=mask[:, :0].new_ones(3, 11))
    model.eval()
    logits(model)
    for site in ln_free.sites(model):
        means = []
        for x, keep_tokens in zip(inputs[site.norm], (mask.bool(), torch.ones_like(mask).bool()), strict=False):
            x = x - x.mean(-1, keepdim=True) if name != "llama" else x
            own = (x.square().mean(-1) + model.get_submodule(site.norm).eps).sqrt()[keep_tokens]
            means.append(own.median() if median else own.mean())
        assert site.sigma == pytest.approx(float(0.75 * means[0] + 0.25 * means[1]), rel=1e-5)


@pytest.mark.parametrize("median", [False, True])
def test_one_exploding_token_moves_the_mean_and_not_the_median(median):
    norm = fake_norms(ln_free.wrap(tiny("llama"), median=median))["model.norm"]
    norm.watch.live, x = True, torch.randn(4, 64, 32)
    norm(x)
    before = float(norm.sigma)
    x[1, 0] *= 1e30
    norm(x)
    assert (float(norm.sigma) == pytest.approx(before, rel=1e-2)) is median
    norm.watch.keep = torch.zeros(4, 64)
    before = float(norm.sigma)
    norm(x)
    assert float(norm.sigma) == before, "nothing but padding"


def test_sigma_is_frozen_at_removal_and_float32():
    model = seen("gpt2").train()
    for site in ("mlp.0", "qk.0", "qk.1", "v.1"):
        ln_free.remove(model, site)
    before = {site.name: site.sigma for site in ln_free.sites(model)}
    logits(model, ids=torch.randint(V, (2, 30)))
    moved = {site.name for site in ln_free.sites(model) if site.sigma != before[site.name]}
    assert moved == {"mlp.1", "qk.0", "v.0", "final"}, "qk.0 shares the sigma of v.0, which is still real"
    model.to(torch.bfloat16)
    assert all(m.sigma.dtype == torch.float32 for m in model.modules() if isinstance(m, ln_free.FakeNorm))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_sigma(reentrant):
    found = []
    for checkpointed in (False, True):
        model = seen("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).train()
        for site in ("mlp.1", "qk.0", "qk.1", "v.1"):
            ln_free.remove(model, site)
        if checkpointed:
            checkpointing(model, reentrant)
        ids, labels = batch()
        model(input_ids=ids, labels=labels).loss.backward()
        found.append((gradients(model), ln_free.sites(model)))
    (plain, sites), (checkpointed, same) = found
    assert sites == same
    for key, g in plain.items():
        torch.testing.assert_close(checkpointed[key], g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_midway(name):
    """Cached as uncached, padded as alone, while layers are in every state."""
    model = seen(name)
    for site in ("mlp.0", "mlp.1", "qk.0", "qk.1", "v.0"):
        ln_free.remove(model, site)
    found = ln_free.verify(model)
    assert max(found.cache, found.padding) < 1e-4 and not found.ln_free


def test_copies_and_state_travel(tmp_path):
    model = seen("gpt2")
    for site in ("mlp.0", "qk.1"):
        ln_free.remove(model, site)
    twin = copy.deepcopy(model)
    ln_free.remove(twin, "final")
    assert [s.removed for s in ln_free.sites(model)].count(True) == 2
    fresh = ln_free.wrap(tiny("gpt2", std=0.5))
    fresh.load_state_dict(model.state_dict())
    assert ln_free.sites(fresh) == ln_free.sites(model)
    assert torch.equal(logits(fresh), logits(model))


def test_calibration_is_the_mean_over_batches():
    model, batches = ln_free.wrap(tiny("gpt2")), [{"input_ids": torch.randint(V, (2, 9))} for _ in range(3)]
    singles = []
    for one in batches:
        ln_free.calibrate(model, [one])
        singles.append([site.sigma for site in ln_free.sites(model)])
    ln_free.calibrate(model, batches)
    expected = torch.tensor(singles).mean(0).tolist()
    assert [site.sigma for site in ln_free.sites(model)] == pytest.approx(expected, rel=1e-5)


def test_calibration_leaves_out_batches_of_padding():
    ids, mask = torch.randint(V, (2, 2, 9)), torch.ones(2, 9, dtype=torch.long)
    batches = [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1], "attention_mask": mask}]
    padding = {"input_ids": ids[0], "attention_mask": 0 * mask}
    found = []
    for given in (batches, [padding, batches[0], padding, batches[1]]):
        model = ln_free.wrap(tiny("gpt2"))
        ln_free.calibrate(model, given)
        found.append([site.sigma for site in ln_free.sites(model)])
    assert found[0] == found[1]
    for nothing in ([], [padding]):
        with pytest.raises(ValueError, match="batches has no batch with a token"):
            ln_free.calibrate(model, nothing)


def test_options_of_a_wrapped_model_are_the_last_given():
    model = ln_free.wrap(tiny("gpt2"), momentum=0.5)
    norms = fake_norms(model).values()
    ln_free.wrap(model, median=True)
    assert all((norm.momentum, norm.watch.median) == (0.5, True) for norm in norms)
    ln_free.wrap(model, momentum=0.0)
    assert all((norm.momentum, norm.watch.median) == (0.0, True) for norm in norms)
    with pytest.raises(ValueError, match=r"momentum is 1.5"):
        ln_free.wrap(model, momentum=1.5)


def test_refusals():
    for name, match in (
        ("qwen3", "no linear layer reads model.layers.0.self_attn.q_norm"),
        ("gemma2 softcap", "model.layers.0.input_layernorm normalizes in a way of its own"),
    ):
        with pytest.raises(ValueError, match=match):
            ln_free.wrap(tiny(name))
    with pytest.raises(ValueError, match="merge the adapters first"):
        ln_free.wrap(peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="no removable norms"):
        ln_free.sites(tiny("gpt2"))
    model = ln_free.wrap(tiny("gpt2"))
    with pytest.raises(ValueError, match=r"mlp.0 has no finite sigma"):
        ln_free.remove(model, "mlp.0")
    with pytest.raises(ValueError, match=r"site is 'mlp.9'"):
        ln_free.remove(model, "mlp.9")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(32):
        ids = torch.randint(3, V, (int(torch.randint(4, 14, (1,), generator=generator)),), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    return datasets.Dataset.from_list(found)


def padded(examples):
    out = collate([{k: x[k] for k in ("input_ids", "labels")} for x in examples])
    return {**out, "attention_mask": (out["labels"] != -100).long()}


def trainer_of(folder, rows, name="gpt2", schedule=None, **options):
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **options}
    config = arguments(folder, LNRemovalConfig, **options)
    return LNRemovalTrainer(
        tiny(name, std=0.1), config, schedule=schedule, train_dataset=rows, eval_dataset=rows, data_collator=padded
    )


def fit(*args, resume=None, **options):
    trainer = trainer_of(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", FAMILIES)
def test_training_removes_all_norms_on_schedule(tmp_path, rows, name):
    trainer = fit(tmp_path, rows, name, removal_start=0.1, removal_end=0.7)
    left = [entry["norms"] for entry in trainer.state.log_history if "loss" in entry]
    due = Schedule.scaled(trainer.model, 12, start=0.1, end=0.7)
    assert left == [7 - len(due.due(step)) for step in range(12)] and left[-1] == 0
    assert all(entry["loss_sigma"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert all(0 < loss < 10 for loss in losses_of(trainer))
    assert patch_state(trainer.model).materialized == 0
    model = trainer.model.eval()
    assert ln_free.is_ln_free(model)
    error, _ = ln_free.parity(model, ln_free.to_true(model))
    assert error < 1e-4


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("taper", [0.0, 0.3])
def test_resumed_in_the_middle_of_the_schedule(tmp_path, rows, step, taper):
    """Dropout, sigmas, removals and shares of them: losses are bit-equal."""
    options = {"save_strategy": "steps", "save_steps": step, "removal_start": 0.1, "removal_end": 0.6}
    options["removal_taper"] = taper
    straight = fit(tmp_path, rows, **options)
    assert ln_free.is_ln_free(straight.model)
    resumed = fit(tmp_path, rows, resume=str(tmp_path / f"checkpoint-{step}"), **options)
    assert losses_of(resumed) == losses_of(straight)
    assert ln_free.sites(resumed.model) == ln_free.sites(straight.model)
    midway = ln_free.load(str(tmp_path / f"checkpoint-{step}"))[0]
    shares = [site.share for site in ln_free.sites(midway)]
    assert shares == pytest.approx(
        [
            Schedule.scaled(midway, 12, start=0.1, end=0.6, taper=int(taper * 12)).due(step - 1).get(site.name, 0.0)
            for site in ln_free.sites(midway)
        ]
    )
    assert 0 < sum(shares) < 7


def with_former_keys(state):
    """As checkpoints had it before the buffer was called `removed_share`."""
    return {re.sub("removed_share$", "gone", key): x for key, x in state.items()}


def test_checkpoints_with_former_keys_load(tmp_path, rows):
    """As a state dict, by `ln_free.load`, and where training goes on."""
    options = {"save_strategy": "steps", "save_steps": 6, "removal_start": 0.1, "removal_end": 0.6}
    straight = fit(tmp_path, rows, **options)
    folder, step = tmp_path / "checkpoint-6", Schedule.scaled(straight.model, 12, start=0.1, end=0.6).due(5)
    state = {key: x.clone() for key, x in load_file(folder / "model.safetensors").items()}  # the file is written anew
    former = with_former_keys(state)
    assert sum(key.endswith(".gone") for key in former) == 5 and former.keys() != state.keys()
    save_file(former, folder / "model.safetensors", {"format": "pt"})
    for model in (ln_free.load(str(folder))[0], ln_free.wrap(tiny("gpt2"))):
        model.load_state_dict(former | {"lm_head.weight": former["transformer.wte.weight"]})
        assert {site.name: site.share for site in ln_free.sites(model) if site.share} == step
        sigmas = {f"{site.norm}.sigma": site.sigma for site in ln_free.sites(model)}
        assert sigmas == pytest.approx({key: float(x) for key, x in state.items() if key.endswith(".sigma")})
    midway = ln_free.load(str(folder))[0]
    assert {site.name: site.share for site in ln_free.sites(midway) if site.share} == step
    resumed = fit(tmp_path, rows, resume=str(folder), **options)
    assert losses_of(resumed) == losses_of(straight) and ln_free.is_ln_free(resumed.model)


def dense_term(model, inputs, weight):
    """Cross-entropy and the auxiliary term, from the stock model's logits and the input of its final norm."""
    captured = []
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    handle.remove()
    keep = inputs["attention_mask"].bool()
    sigma = (captured[0].var(-1, unbiased=False) + 1e-5).sqrt()
    usual = keep & (inputs["input_ids"] != model.config.eos_token_id)
    usual[:, 0] = False
    term = ((sigma - sigma[usual].mean().detach()) ** 2)[keep].mean()
    return F.cross_entropy(z[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()) + weight * term


def test_a_step_equals_a_dense_one(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, sigma_weight=3.0)
    inputs = padded([rows[i] for i in range(5)])
    inputs["input_ids"][1, 3] = trainer.model.config.eos_token_id
    stock = tiny("gpt2", std=0.1)
    for model in (stock, trainer.model):
        without_dropout(model)
    expected = dense_term(stock, inputs, 3.0)
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum())
    loss.backward()
    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(trainer.model), gradients(stock)
    for key, g in theirs.items():
        torch.testing.assert_close(ours[key], g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spread_term_is_the_variance_of_the_logarithms_of_every_divisor(tmp_path, rows, name):
    """Against the stock model's inputs of its norms; half of the sites removed, with and without checkpointing."""
    inputs, weight = padded([rows[i] for i in range(5)]), 3.0
    keep = inputs["attention_mask"].bool()
    found = []
    for checkpointed in (True, False):
        trainer = trainer_of(tmp_path, rows, name, sigma_weight=0.0, spread_weight=weight)
        model = without_dropout(trainer.model).train()
        ln_free.calibrate(model, [{k: inputs[k] for k in ("input_ids", "attention_mask")}])
        for site in ln_free.sites(model)[::2]:
            ln_free.remove(model, site.name)
        if checkpointed:
            checkpointing(model)
        trainer.compute_loss(model, dict(inputs), num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum()).backward()
        found.append(gradients(model))
    captured, variances = [], []
    for norm in fake_norms(model).values():
        norm.record_sigma = False
        norm.register_forward_pre_hook(lambda norm, args: captured.append((norm, args[0])))
    model.zero_grad()
    z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    for norm, x in captured:
        x = x.reshape(*keep.shape, -1)[keep]  # OPT flattens tokens
        x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        logs = 0.5 * (x.pow(2).mean(-1) + norm.eps).log()
        variances.append((logs**2).mean() - logs.mean() ** 2)
    assert len(variances) == 5
    expected = F.cross_entropy(z[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    (expected + weight * sum(variances) / 5).backward()
    for ours in found:
        for key, g in gradients(model).items():
            torch.testing.assert_close(ours[key], g, rtol=1e-3, atol=1e-5)


def test_the_spread_term_brings_divisors_together_and_needs_inner_gradients(tmp_path, rows):
    options = {"schedule": Schedule(()), "max_steps": 20, "learning_rate": 5e-3}
    apart, alike = (fit(tmp_path, rows, "llama", spread_weight=weight, **options) for weight in (1e-9, 30.0))
    ends = [trainer.state.log_history[19]["loss_spread"] for trainer in (apart, alike)]
    assert ends[1] < alike.state.log_history[0]["loss_spread"] / 2 and ends[1] < ends[0] / 2
    assert "loss_spread" not in fit(tmp_path, rows, max_steps=1).state.log_history[0]
    trainer = trainer_of(tmp_path, rows, "llama", spread_weight=1.0)
    checkpointing(trainer.model, reentrant=True)
    with pytest.raises(ValueError, match="no norm within a layer has a gradient"):
        trainer.compute_loss(trainer.model, padded([rows[0]]), num_items_in_batch=torch.tensor(5))


def test_passes_over_the_limit_are_left_out_once_removal_has_begun(tmp_path, rows):
    options = {"schedule": Schedule(((3, "mlp.0"),)), "spread_limit": 1e-9, "spread_weight": 1.0}
    log = [entry for entry in fit(tmp_path, rows, "llama", max_steps=5, **options).state.log_history if "loss" in entry]
    assert [entry["exploded"] for entry in log] == [0, 0, 0, 1, 1]
    assert [entry["grad_norm"] > 0 for entry in log] == [True, True, True, False, False]
    with pytest.raises(ValueError, match=r"spread_limit is 0.1 but spread_weight is 0"):
        trainer_of(tmp_path, rows, spread_limit=0.1)


def test_accumulation_does_not_change_the_step(tmp_path, rows):
    """The same batch twice, in one pass, in two, and padded: sigma* is a mean over a pass, so passes must be alike."""
    twice = datasets.Dataset.from_list([rows[i] for i in (0, 1, 2, 3) * 2])
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        still = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "sigma_weight": 5.0}
        trainer = trainer_of(
            tmp_path,
            twice,
            train_sampling_strategy="sequential",
            removal_start=0.5,
            removal_end=0.6,
            **options,
            **still,
        )
        without_dropout(trainer.model)
        trainer.train()
        found.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm", "loss_sigma")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_unequal_passes_count_by_their_labels(tmp_path, rows):
    """The loss of a step is the sum over its passes of CE sums and sigma terms by their share of labels."""
    trainer = trainer_of(tmp_path, rows, sigma_weight=2.0)
    trainer.model.train()
    without_dropout(trainer.model)
    passes = [padded([rows[i] for i in part]) for part in ((0, 1, 2), (3,))]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in passes]
    total = sum(counts)
    found = sum(trainer.compute_loss(trainer.model, dict(p), num_items_in_batch=total) for p in passes)
    alone = [
        trainer.compute_loss(trainer.model, dict(p), num_items_in_batch=n) for p, n in zip(passes, counts, strict=True)
    ]
    expected = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / total
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pass_without_labels_or_tokens_counts_for_nothing(tmp_path, rows, name):
    """Alone its gradients are zeros; beside another pass it changes nothing."""
    trainer = trainer_of(tmp_path, rows, name, sigma_weight=2.0, spread_weight=3.0)
    model = without_dropout(trainer.model).train()
    full = padded([rows[i] for i in range(3)])
    masked = {**full, "labels": torch.full_like(full["labels"], -100)}
    total = (full["labels"][:, 1:] != -100).sum()
    alone = trainer.compute_loss(model, dict(full), num_items_in_batch=total)
    alone.backward()
    expected = gradients(model)
    for empty in (masked, {**masked, "attention_mask": torch.zeros_like(full["attention_mask"])}):
        for count in (0, torch.tensor(0), torch.tensor(0.0)):
            nothing = trainer.compute_loss(model, dict(empty), num_items_in_batch=count)
            nothing.backward()
            assert nothing.item() == 0 and not any(g.any() for g in gradients(model).values())
        both = [trainer.compute_loss(model, dict(part), num_items_in_batch=total) for part in (full, empty)]
        sum(both).backward()
        assert sum(both).item() == alone.item()
        for key, g in gradients(model).items():
            torch.testing.assert_close(g, expected[key], rtol=1e-5, atol=1e-8)


def test_the_terms_of_no_tokens_are_zero():
    spread, ids = torch.rand(2, 5, requires_grad=True), torch.ones(2, 5, dtype=torch.long)
    for term in (sigma_term(spread, ids, 0 * ids, 1), spread_term([spread, spread], 0 * ids)):
        assert term.item() == 0
        assert not torch.autograd.grad(term, spread)[0].any()
    alone = torch.zeros(2, 5, dtype=torch.long)
    alone[1, 3] = 1  # one token, a first one and an end of text at once: it is as far from the mean as it can be
    assert sigma_term(spread, ids, alone, 1).item() == 0 and spread_term([spread], alone).item() == 0


def test_batches_without_labels_do_not_stop_a_training(tmp_path, rows):
    some = [rows[i] for i in range(4)]
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in some]
    mixed = datasets.Dataset.from_list([*some[:2], *masked[:2], *some[2:], *masked[2:]])
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    trainer = fit(tmp_path, mixed, "llama", spread_weight=0.1, max_steps=8, **options)
    assert all(p.isfinite().all() for p in trainer.model.parameters()) and ln_free.is_ln_free(trainer.model)
    assert [loss == 0 for loss in losses_of(trainer)] == [False, True] * 4


def evaluating_every_step(**options):
    return {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **options}


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_only_models_without_norms_compete(tmp_path, rows, strategy):
    """Nothing is learned, so that losses are equal from the last removal on, and lower before."""
    options = evaluating_every_step(save_strategy=strategy, metric_for_best_model="loss", load_best_model_at_end=True)
    trainer = fit(tmp_path, rows, max_steps=6, learning_rate=0.0, removal_end=0.5, **options)
    last = Schedule.scaled(trainer.model, 6, end=0.5).events[-1][0]
    assert trainer.state.best_global_step == last + 1 < 6
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{last + 1}")
    assert ln_free.is_ln_free(trainer.model)
    assert (tmp_path / "checkpoint-1").exists() == (strategy == "steps")


def test_stopping_early_waits_for_the_last_removal(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, learning_rate=0.0, **evaluating_every_step(metric_for_best_model="loss"))
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    last = Schedule.scaled(trainer.model, 12).events[-1][0]
    assert trainer.state.global_step == last + 3 < 12 and ln_free.is_ln_free(trainer.model)


class OutOfMemoryOnce(TrainerCallback):
    """At the end of a step, as accelerate recognizes it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


def test_a_training_that_begins_again_has_its_norms_again(tmp_path, rows):
    """With half the batch, an epoch is twice as many steps: the schedule is that of the second try."""
    sizes = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 3}
    trainer = trainer_of(tmp_path, rows, removal_start=0.3, removal_end=0.6, **sizes)
    trainer.add_callback(OutOfMemoryOnce(8))
    trainer.train()
    left = [entry["norms"] for entry in trainer.state.log_history if "loss" in entry][-trainer.state.max_steps :]
    due = Schedule.scaled(trainer.model, trainer.state.max_steps, start=0.3, end=0.6)
    assert trainer.state.max_steps > 12 and ln_free.is_ln_free(trainer.model)
    assert left == [7 - len(due.due(step)) for step in range(trainer.state.max_steps)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "at_once", "removal_end": 0.5}, r"removal_end is 0.5, but the schedule is 'at_once'"),
        ({"schedule": "gpt2", "removal_start": 0.2}, r"removal_start is 0.2, but the schedule is 'gpt2'"),
        ({"schedule": "gpt2", "removal_taper": 0.2}, r"removal_taper is 0.2, but the schedule is 'gpt2'"),
        ({"sigma_weight": -0.1}, r"sigma_weight is -0.1: choose a number in \[0, inf\)"),
        ({"spread_weight": float("nan")}, r"spread_weight is nan: choose a number in \[0, inf\)"),
        ({"spread_weight": 1.0, "spread_limit": 0.0}, r"spread_limit is 0.0: choose a number in \(0, inf\]"),
        ({"sigma_momentum": 1.5}, r"momentum is 1.5"),
        ({"use_liger_kernel": True}, r"use_liger_kernel is True"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha is 5.0"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, rows, options, match):
    with pytest.raises(ValueError, match=match):
        LNRemovalTrainer(tiny("gpt2"), arguments(tmp_path, LNRemovalConfig, **options), train_dataset=rows)


def test_schedules_without_effect_are_refused(tmp_path, rows):
    given = Schedule(((3, "mlp.0"),), taper=2)
    with pytest.raises(ValueError, match=r"removal_end is 0.5, but a Schedule was passed"):
        LNRemovalTrainer(tiny("gpt2"), arguments(tmp_path, LNRemovalConfig, removal_end=0.5), schedule=given)
    with pytest.raises(ValueError, match=r"schedule is 'gpt2': pass a Schedule"):
        trainer_of(tmp_path, rows, schedule="gpt2")
    with pytest.raises(ValueError, match=r"removes 'mlp.0' by step 5, counted from 0, but there are 5 steps"):
        trainer_of(tmp_path, rows, schedule=given, max_steps=5).train()
    with pytest.raises(ValueError, match="which names no schedule: pass one to the callback"):
        model, config = ln_free.wrap(tiny("gpt2")), arguments(tmp_path, TrainingArguments)
        Trainer(model, config, train_dataset=rows, callbacks=[LNRemovalCallback()]).train()
    after = tiny("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match=r"sigma_weight is 0.1.*OPTForCausalLM does not have: set it to 0"):
        LNRemovalTrainer(after, arguments(tmp_path, LNRemovalConfig))


def test_without_removal_or_term_it_is_the_vanilla_control(tmp_path, rows):
    """Weight decay included: removable LayerNorms are spared as stock ones are."""
    options = {"max_steps": 3, "weight_decay": 0.5}
    ours = fit(tmp_path, rows, schedule=Schedule(()), sigma_weight=0.0, **options)
    config = arguments(tmp_path, per_device_train_batch_size=4, **{**options, "learning_rate": 1e-3})
    stock = XentTrainer(tiny("gpt2", std=0.1), config, train_dataset=rows, data_collator=padded)
    stock.train()
    assert losses_of(ours) == losses_of(stock)
    for name, p in stock.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), p), name


def test_the_callback_under_a_stock_trainer(tmp_path, rows):
    model = ln_free.wrap(tiny("llama", std=0.1))
    config = arguments(tmp_path, TrainingArguments, max_steps=4)
    schedule = Schedule.at_once(model, 2)
    callbacks = [LNRemovalCallback(schedule)]
    Trainer(model, config, train_dataset=rows, data_collator=padded, callbacks=callbacks).train()
    assert ln_free.is_ln_free(model)
    with pytest.raises(ValueError, match=r"removal_taper is 0.5 and the last removal begins at 0.6"):
        fit(tmp_path, rows, removal_end=0.6, removal_taper=0.5)
    with pytest.raises(ValueError, match=r"schedule removes 'mlp.2'"):
        fit(tmp_path, rows, schedule=Schedule.named("gpt2"))


def test_evaluation_is_the_loss_alone_and_leaves_sigma(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=2, sigma_weight=50.0)
    before = ln_free.sites(trainer.model)
    found = trainer.evaluate()["eval_loss"]
    trainer.args.sigma_weight = 0.0
    assert found == trainer.evaluate()["eval_loss"]
    assert ln_free.sites(trainer.model) == before


@pytest.mark.parametrize("name", PAPER)
def test_recipes(tmp_path, name):
    """Tokens of a step as in the paper's table; every number reaches the trainer's arguments."""
    recipe = RECIPES[name]
    tokens = {"gpt2": 524_288, "gpt2-medium": 518_144, "gpt2-large": 516_096, "gpt2-xl": 516_096}
    assert recipe.batch_size * recipe.accumulation * 1024 == tokens[name]
    config = recipe.config(str(tmp_path), use_cpu=True, report_to=[])
    assert (config.schedule, config.max_steps, config.sigma_weight) == (name, recipe.max_steps, recipe.sigma_weight)
    assert config.lr_scheduler_kwargs == {"min_lr": recipe.min_learning_rate} and config.weight_decay == 0.01
    tiny("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = dataclasses.replace(recipe, model=str(tmp_path)).load()
    assert model.dtype == torch.bfloat16 and model.transformer.h[0].attn.attn_dropout.p == 0.0
    assert recipe.released % config.save_steps == 0 and recipe.released > Schedule.named(name).events[-1][0]
