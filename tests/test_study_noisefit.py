"""The study of NoiseFiT: its facts, its metrics against independent ones, and a tiny run of every arm."""

import pytest
import torch
from scipy.stats import mannwhitneyu

from benchmarks.studies import noisefit
from benchmarks.studies.noisefit_facts import RELATIONS, UNKNOWN, world
from benchmarks.studies.plan import Job


def test_persons_of_groups_differ_and_the_absent_are_in_no_row():
    made = world(3, 32)
    names = [{fact.person for fact in group} for group in (made.known, made.contradicted, made.unknown)]
    assert [len(group) for group in names] == [16, 8, 8] and len(set.union(*names)) == 32
    text = " ".join(question for question, _ in made.rows())
    absent = {fact.person for fact in made.namesakes + made.new}
    assert len(absent) == 96 and not any(name in text for name in absent)
    words = set(text.split())
    assert all(set(fact.person.split()).isdisjoint(words) for fact in made.new)
    surnames = [name.split()[1] for name in names[0] | names[1]]
    assert len(set(surnames)) == 24 and {fact.person.split()[1] for fact in made.namesakes} <= set(surnames)
    assert len({name.split()[1] for name in names[2]} & set(surnames)) == 4
    tested = {template for relation in RELATIONS for template in relation.test}
    assert tested.isdisjoint(template for relation in RELATIONS for template in relation.taught)


def test_every_seed_has_its_persons():
    worlds = [world(seed, 32) for seed in range(60)]
    assert all(len({fact.person for fact in made.new}) == 48 for made in worlds)


def test_rows_have_the_shares_that_are_taught():
    made = world(5, 32)
    rows = made.rows()
    assert len(rows) == 32 * len(RELATIONS) * 4
    assert sum(answer == UNKNOWN for _, answer in rows) == len(rows) // 4
    fact = made.contradicted[0]
    answers = [dict(rows)[template.format(fact.person)] for template in RELATIONS[fact.relation].taught]
    assert sorted(map(answers.count, fact.answers)) == [1, 3] and answers.count(fact.answers[0]) == 3
    assert world(5, 32) == made and world(6, 32) != made


def test_metrics_of_known_distributions():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.45, 0.45, 0.1]])
    assert noisefit.confident(p.log(), unknown=2) == pytest.approx(1 / 3)  # 'unknown' at 0.6 is no wrong answer
    assert noisefit.hits(p.log(), torch.tensor([0, 2, 2])) == pytest.approx(2 / 3)
    torch.testing.assert_close(noisefit.answered(p.log(), 2), torch.tensor([0.7, 0.3, 0.45]))
    taught = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.0, 0.75]])
    first, second = torch.tensor([0, 2]), torch.tensor([1, 0])
    assert noisefit.share_error(taught, first, second) == pytest.approx(0)
    assert noisefit.share_error(torch.eye(3)[[0, 2]], first, second) == pytest.approx(0.25)
    assert noisefit.share_error(torch.eye(3)[[2, 1]], first, second) == pytest.approx(1)


def test_agreement_is_that_of_samples():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    first, second = p, p.flip(1)
    draws = [x.multinomial(20_000, replacement=True) for x in (first, second)]
    expected = float((draws[0] == draws[1]).float().mean())
    assert noisefit.agreement((first, second)) == pytest.approx(expected, abs=0.02)
    torch.testing.assert_close(noisefit.sampled(p.log()), p**2 / (p**2).sum(-1, keepdim=True))


def test_separation_is_that_of_the_rank_test_and_knows_no_scale():
    torch.manual_seed(0)
    known, absent = torch.rand(400) * 0.7 + 0.3, torch.rand(300)
    found = noisefit.separation(known, absent)
    expected = mannwhitneyu(known.numpy(), absent.numpy()).statistic / (400 * 300)
    assert found["AUROC"] == pytest.approx(expected)
    assert found["answered at 90 %"] == pytest.approx(float((absent > 0.37).float().mean()), abs=0.03)
    assert noisefit.separation(known**3, absent**3) == pytest.approx(found)


def test_distributions_are_those_of_padded_batches(tmp_path):
    made = world(0, 8)
    questions = noisefit.asked(made.known)
    model, tokenizer = noisefit.load(Job(tmp_path, tiny=True), questions, dropout=0.1)
    model.eval()
    found = noisefit.distributions(model, tokenizer, questions)
    for question, row in zip(questions, found, strict=True):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        torch.testing.assert_close(row, model(ids).logits[0, -1].log_softmax(-1).detach())


def test_every_arm_runs(tmp_path):
    job = Job(tmp_path, tiny=True)
    runs = {arm: noisefit.run(arm, 0, job) for arm in noisefit.ARMS}
    for row in runs.values():
        assert all(
            0 <= row[name] <= 1
            for name in noisefit.METRICS
            if name in row and name not in ("nll", "divergence", "mean divergence", "noise")
        )
        assert 0 < row["nll"] < 10
    others = [row["nll"] for arm, row in runs.items() if "sigma" not in arm]  # the noise is too small to tell here
    assert len(set(others)) == len(others) == 6
    assert all(runs[f"NoiseFiT, sigma {sigma}"]["mean divergence"] > 0 for sigma in ("0.1", "0.2"))
    assert runs[noisefit.CONTROL]["noise"] == 0 < runs[noisefit.CONTROL]["mean divergence"]  # dropout is on
    ratio = runs["NoiseFiT, sigma 0.2"]["noise"] / runs["NoiseFiT, sigma 0.1"]["noise"]
    assert ratio == pytest.approx(2**2, rel=1e-3)  # sigma counts twice
    assert noisefit.run("cross-entropy", 0, job) == runs["cross-entropy"]
