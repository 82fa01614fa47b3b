"""The studies of models without norms: their arms on tiny models, and their measures against brute force."""

import math

import pytest
import torch

from benchmarks.studies import (
    ln_free_gpt2,
    ln_free_neurons,
    ln_free_overflow,
    ln_free_patching,
    ln_free_sizes,
    ln_free_smollm2,
)
from benchmarks.studies.ln_free import PLANS
from benchmarks.studies.plan import Job
from hf_xent import ln_free
from hf_xent.ln_free.neurons import held_at_means
from support.models import V, tiny, tiny_tokenizer


def ids(rows=6, length=12, seed=3):
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def without_norms(name, std=0.08):
    model = ln_free.wrap(tiny(name, std=std))
    ln_free.calibrate(model, [{"input_ids": ids()}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    return model


def test_every_arm_of_gpt2_runs_and_removal_makes_attribution_exact(tmp_path):
    job = Job(tmp_path, tiny=True)
    rows = {arm: ln_free_gpt2.run(arm, 0, job) for arm in ln_free_gpt2.PLAN.arms}
    assert {claim.metric for claim in PLANS[0].claims} <= rows["LN-free"].keys()
    assert all(math.isfinite(x) for row in rows.values() for x in row.values())
    assert rows["LN-free"]["DLA error (%)"] < 0.1 < rows["vanilla"]["DLA error (%)"]
    assert len({row["loss"] for row in rows.values()}) == 4 and rows["vanilla"]["loss"] < rows["original"]["loss"]
    assert rows["LN-free"]["entropy moved (%)"] == pytest.approx(rows["LN-free"]["entropy moved directly (%)"])
    assert "worst 5 steps" not in rows["original"]


def test_arms_of_smollm2_share_their_first_phase(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(ln_free_smollm2.loading, "tokenizer_of", lambda name: tokenizer)
    job, rows = Job(tmp_path, tiny=True), {}
    for arm in ln_free_smollm2.PLAN.arms:
        rows[arm] = ln_free_smollm2.run(arm, 0, job)
        written = (tmp_path / "faded-0" / "model.safetensors").stat().st_mtime if arm != "vanilla" else None
        first = rows.setdefault("time", written) if written else None
        assert first == written
    rows.pop("time")
    assert {claim.metric for claim in PLANS[1].claims} <= rows["LN-free"].keys()
    assert rows["LN-free"]["loss"] != rows["LN-free, faded only"]["loss"] != rows["vanilla"]["loss"]
    assert all(0 <= row["overflow (%)"] <= 100 and 0 < row["loss"] <= math.log(len(tokenizer)) for row in rows.values())
    assert "clip kept: loss" in rows["LN-free"] and "clip kept: loss" not in rows["vanilla"]


@torch.no_grad()
def test_overflow_is_found_at_its_token_and_counts_as_log_v():
    model, tokenizer, blocks = without_norms("llama"), tiny_tokenizer(), ids()
    blocks[blocks == 7] = 8
    clean = ln_free_overflow.measured(model, blocks, tokenizer)
    assert clean.share == 0 and not clean.triggers
    model.model.embed_tokens.weight[7] *= 1e25
    blocks[2, 5] = 7
    found = ln_free_overflow.measured(model, blocks, tokenizer)
    assert found.share == pytest.approx(1 / 6)
    assert [(row["position"], row["site"], row["index"]) for row in found.triggers] == [(5, "qk.0", 0)]
    losses, before = torch.cat(found.losses), torch.cat(clean.losses)
    assert torch.allclose(losses[2], torch.full((11,), math.log(V)))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(losses[others], before[others])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(blocks[others]).logits[:, :-1].float()
    nll = -logits.log_softmax(-1).gather(-1, blocks[others, 1:, None])[..., 0]
    assert torch.allclose(losses[others], nll.clamp(max=math.log(V)), atol=2e-2)


def pairs_of(blocks):
    position = torch.full((len(blocks),), blocks.shape[1] - 3)
    corrupted = blocks.clone()
    corrupted[torch.arange(len(blocks)), position] = 3 + (blocks[:, -3] - 2) % (V - 3)
    answers = torch.stack([torch.arange(len(blocks)) + 5, torch.arange(len(blocks)) + 20], 1)
    return ln_free_patching.Pairs(blocks, corrupted, position, answers)


def test_patching_against_brute_force():
    model, pairs = tiny("gpt2"), pairs_of(ids())
    found = ln_free_patching.patched(model, pairs, batch_size=4)
    rows = torch.arange(6)

    def metric(tokens):
        logits = model(tokens).logits[:, -1]
        return (logits[rows, pairs.answers[:, 0]] - logits[rows, pairs.answers[:, 1]]).detach()

    whole = metric(pairs.clean) - metric(pairs.corrupted)  # all that differs enters at one position of layer 0
    at_first = found.activation[found.layer == 0]
    assert len(found.activation) == 6 * 2 * 3
    assert torch.allclose(torch.cat([at_first[:4], at_first[12:14]]), whole, atol=1e-4)
    assert found.error > 0.05 and -1 <= found.correlation < 1


def test_a_small_change_is_estimated_to_first_order():
    model, pairs = tiny("gpt2").double(), pairs_of(ids())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.transformer.wte.weight[:] = model.transformer.wte.weight[:1] + 1e-4 * model.transformer.wte.weight
    found = ln_free_patching.patched(model, pairs)
    assert found.error < 1e-2 and found.correlation > 0.999


@torch.no_grad()
def test_ablated_neurons_against_a_whole_pass():
    model, blocks = tiny("gpt2", std=0.5), ids(8)
    chosen = ln_free_neurons.Neurons([3, 40, 77], [0, 1, 2], {})
    effects = chosen.effects(model, blocks)
    projection, seen = model.transformer.h[-1].mlp.c_proj, []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def entropy():
        logp = model(blocks).logits[:, :-1].log_softmax(-1)
        return float(-(logp.exp() * logp).sum(-1).mean())

    before = entropy()
    handle.remove()
    with held_at_means(projection, torch.tensor(chosen.indices), seen[0][:, :-1].flatten(0, 1).mean(0)):
        after = entropy()
    assert effects["entropy moved (%)"] == pytest.approx(100 * abs(after / before - 1), rel=0.15)
    assert effects["entropy"] == pytest.approx(before, rel=0.02)


@torch.no_grad()
def test_without_norms_all_of_an_ablation_is_direct():
    chosen = ln_free_neurons.Neurons([3, 40, 77], [0, 1, 2], {})
    free, plain = chosen.effects(without_norms("gpt2"), ids()), chosen.effects(tiny("gpt2", std=0.08), ids())
    assert free["entropy moved (%)"] == free["entropy moved directly (%)"]
    assert plain["entropy moved (%)"] != plain["entropy moved directly (%)"]


def test_sizes_are_those_of_the_published_models():
    counts = [124.439808, 354.823168, 774.03008, 1557.6112]  # million parameters
    for size, count in zip(ln_free_sizes.SHAPES, counts, strict=True):
        layers, width, _ = ln_free_sizes.SHAPES[size]
        assert (12 * layers * width**2 + 13 * layers * width + (50257 + 1024 + 2) * width) / 1e6 == pytest.approx(count)
