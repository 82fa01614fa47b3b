"""The study of the sparse tail: its runs, and what it measures against plain torch."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.studies import filters, sparse_tail, tail_probes
from benchmarks.studies.plan import Job
from support.models import tiny


def problem(tokens=300, vocabulary=700, width=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, width, generator=draw), torch.randn(vocabulary, width, generator=draw)
    hidden[:, 0] += 6  # so that columns differ in their mean logit
    likely = weight[:, 0].topk(40).indices
    labels = likely[torch.randint(40, (tokens,), generator=draw)]
    return hidden.requires_grad_(), weight.mul_(0.5).requires_grad_(), labels


def test_without_a_threshold_the_filter_is_cross_entropy():
    hidden, weight, labels = problem()
    expected = F.cross_entropy(hidden @ weight.T, labels)
    loss = filters.filtered_cross_entropy(hidden, weight, labels, threshold=0.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = torch.autograd.grad(expected, (hidden, weight))
    for found, true in zip(torch.autograd.grad(2 * loss, (hidden, weight)), exact, strict=True):
        torch.testing.assert_close(found, 2 * true, rtol=1e-4, atol=1e-7)


def test_the_filter_drops_tiles_of_sorted_columns_that_hold_nothing_large():
    hidden, weight, labels = problem()
    threshold = 0.1
    loss = filters.filtered_cross_entropy(hidden, weight, labels, threshold)
    found = torch.autograd.grad(loss, (hidden, weight))
    dz = torch.softmax(hidden.detach() @ weight.detach().T, -1)
    dz[torch.arange(len(labels)), labels] -= 1
    order = (hidden.detach() @ weight.detach().T).mean(0).argsort()
    dropped = 0
    for top in range(0, len(dz), 128):
        for left in range(0, len(order), 128):
            rows, columns = torch.arange(top, min(top + 128, len(dz))), order[left : left + 128]
            if dz[rows[:, None], columns].abs().max() < threshold:
                dz[rows[:, None], columns] = 0
                dropped += 1
    assert dropped
    dz /= len(labels)
    torch.testing.assert_close(found[0], dz @ weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], dz.T @ hidden.detach(), rtol=1e-4, atol=1e-6)


def test_held_out_losses_are_those_of_the_model_and_the_rarest_tenth_is_the_rarest():
    model, ids = tiny("gpt2"), torch.randint(97, (6, 21), generator=torch.Generator().manual_seed(0))
    counts = torch.arange(97)
    found = tail_probes.held_out(model, ids, counts)
    logp = model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    loss = -logp[torch.arange(len(labels)), labels]
    assert found["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    rarest = sorted(range(len(labels)), key=lambda i: labels[i].item())[:12]
    assert found["rare_loss"] == pytest.approx(loss[rarest].mean().item(), rel=1e-5)
    share = (labels <= 1).float().mean().item()
    assert found["rare_mass"] == pytest.approx(logp[:, :2].exp().sum(-1).mean().item() / share, rel=1e-4)


def test_the_noise_of_an_exact_rule_is_0_and_of_a_filter_that_of_its_gradients():
    model = tiny("gpt2")
    batches = [torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert tail_probes.noise(model, batches, tail_probes.EXACT, 1e-3) == {"noise": 0.0, "bias": 0.0}

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    exact = torch.stack([flat(model(input_ids=ids, labels=ids).loss) for ids in batches])
    gaps = torch.stack([flat(filters.loss_of(model, ids)) for ids in batches]) - exact
    variance = exact.var(0).sum()
    found = tail_probes.noise(model, batches, tail_probes.FILTER, 0.0)
    assert found["noise"] == pytest.approx((gaps.square().sum(1).mean() / variance).item(), rel=1e-2, abs=1e-9)
    assert found["bias"] == pytest.approx((3 * gaps.mean(0).square().sum() / variance).item(), rel=1e-2, abs=1e-9)


def test_columns_are_those_that_the_tail_keeps():
    model = tiny("gpt2", std=0.6)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    shares = [tail_probes.columns(model, ids, tail) for tail in (0.9, 1e-6)]
    assert 0 < shares[0] <= 0.5 and shares[1] == 1.0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("study"), tiny=True)
    return {plan.name: {arm: plan.run(arm, 0, job) for arm in plan.arms} for plan in sparse_tail.PLANS}, job


def test_every_arm_of_both_plans_is_measured(results):
    found, job = results
    for plan in sparse_tail.PLANS:
        for arm, row in found[plan.name].items():
            assert all(math.isfinite(value) for value in row.values())
            of_tail = {"columns", "time in float32"}
            assert set(plan.metrics) - of_tail <= row.keys()
            assert of_tail & row.keys() == (of_tail if arm == sparse_tail.SPARSE else set())
            assert row["loss"] < row["loss@0.5"] and row["rare_mass"] > 0 and row["time"] > 0
            assert (row["noise"] == 0) == (arm != sparse_tail.FILTERED) or row["noise"] < 1e-6
        losses = [row["loss"] for row in found[plan.name].values()]
        assert max(losses) - min(losses) < 0.01  # a vocabulary of 300 has no entry below the threshold
    assert (job.work / sparse_tail.PRETRAINING / "blocks-16.pt").exists()


def test_the_pilot_is_an_eighth():
    assert sparse_tail.PRETRAIN.pilot().steps * 8 == sparse_tail.PRETRAIN.steps
    assert replace(sparse_tail.PRETRAIN, epochs=1) == sparse_tail.PRETRAIN
    assert sparse_tail.PLANS[0].arms == sparse_tail.ARMS and set(sparse_tail.PLANS[1].arms) < set(sparse_tail.ARMS)


def test_rates_are_tried_with_both_roundings(tmp_path):
    job = Job(tmp_path, tiny=True)
    best = sparse_tail.rates(job)
    tried = sparse_tail.tuning(sparse_tail.PRETRAINING, job).tried
    exact = tried[sparse_tail.EXACT]
    assert set(tried) == {sparse_tail.EXACT, sparse_tail.AGAIN} and set(exact) == {*sparse_tail.RATES}
    assert best == min(exact, key=exact.get)
