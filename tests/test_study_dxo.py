"""The study of DXO runs end to end on toy texts; its generators and metrics agree with independent computations."""

import collections
import json
import math
import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.studies import dxo, machine_scores, machine_texts, machine_words
from benchmarks.studies.plan import Job


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, tiny=True)


def test_every_arm_runs_on_toy_texts(job):
    """Metrics are finite and in range, and arms differ; detectors score a text once."""
    rows = {arm: dxo.run(arm, 0, job) for arm in dxo.ARMS}
    for arm, row in rows.items():
        assert set(dxo.PLAN.metrics) <= row.keys(), arm
        assert all(0 <= value <= 1 for value in row.values()), arm
    assert rows[dxo.WORDS]["AUROC"] > 0.8  # generators use a few of people's words
    assert len({json.dumps(row) for row in rows.values()}) > len(rows) // 2
    kept = (job.work / "detector-scores.jsonl").read_text()
    before = rows["loss"]
    assert dxo.run("loss", 0, job) == before
    assert (job.work / "detector-scores.jsonl").read_text() == kept


def test_arms_of_a_seed_share_texts_and_seeds_do_not():
    texts = dxo.toy_texts()
    assert dxo.drawn(texts, 1) == dxo.drawn(texts, 1) != dxo.drawn(texts, 2)
    assert len(dxo.drawn(texts, 1)["train"]["people"]) == round(0.8 * len(texts["train"]["people"]))


def test_the_metrics_are_those_of_counting():
    """AUROC of known generators by scikit-learn, the threshold and what it finds by sorting."""
    rng = np.random.default_rng(0)
    sets = {split: {"people": rng.normal(0, 1, 400)} for split in ("validation", "test", "genre")}
    for split, own in sets.items():
        for name, counts in machine_texts.MACHINES.items():
            if split in counts:
                own[name] = rng.normal(1.5, 1, 60)
    row = dxo.measured(sets)
    known = np.concatenate([sets["test"][name] for name in dxo.KNOWN])
    labels = [0] * 400 + [1] * len(known)
    assert row["AUROC"] == pytest.approx(roc_auc_score(labels, np.concatenate([sets["test"]["people"], known])))
    highest = np.sort(sets["test"]["people"])[::-1]
    assert row["TPR@0.5%"] == pytest.approx(np.mean(known > highest[2]))  # 2 of 400 are false alarms
    threshold = np.sort(sets["validation"]["people"])[::-1][4]  # more than 4 of 400 would be above 1 %
    people = sets["genre"]["people"]
    machine = np.concatenate([values for name, values in sets["genre"].items() if name != "people"])
    hits, alarms = np.sum(machine > threshold), np.sum(people > threshold)
    f1 = 2 * hits / (hits + alarms + len(machine))
    rest = 2 * (len(people) - alarms) / (2 * len(people) - alarms + len(machine) - hits)
    assert row["F1 OOD"] == pytest.approx((f1 + rest) / 2, abs=0.01)
    assert row["FPR OOD"] == pytest.approx(alarms / len(people), abs=0.005)


def test_the_ngram_model_samples_kneser_ney():
    """Frequencies of samples against the formula, on a text with repeated pairs."""
    text = "a b c a b d a b c b b c a a b c d a"
    model, words = machine_words.KneserNey([text]), text.split()
    threes = collections.Counter(zip(words, words[1:], words[2:], strict=False))
    twos = collections.Counter(pair[1:] for pair in threes)
    ones = collections.Counter(pair[1] for pair in {three[1:] for three in threes})

    def probability(context, word, counts=(ones, twos, threes)):
        if not context:
            return ones[(word)] / sum(ones.values())
        table = {key[-1]: count for key, count in counts[len(context)].items() if key[:-1] == context}
        total = sum(table.values())
        kept = max(table.get(word, 0) - machine_words.DISCOUNT, 0) / total
        return kept + machine_words.DISCOUNT * len(table) / total * probability(context[1:], word)

    expected = {word: probability(("a", "b"), word) for word in "abcd"}
    assert math.isclose(sum(expected.values()), 1)
    rng, count = random.Random(0), 20000
    found = collections.Counter(model.next(("a", "b"), rng) for _ in range(count))
    for word, share in expected.items():
        assert found[word] / count == pytest.approx(share, abs=0.015)
    assert model.sample("x a b", 6, 3) == model.sample("x a b", 6, 3)
    assert len(model.sample("x a b", 6, 3).split()) == 6


def test_passages_are_windows_of_prose():
    line = " ".join(f"word{'abcdefghij'[i % 10]}" for i in range(60))
    [(start, text)] = machine_texts.passages(f"= 1 2 3 4 =\n{line}\n{{x: 1}}")
    assert len(start.split()) == machine_texts.PROMPT and len(text.split()) == machine_texts.WORDS
    assert f"{start} {text}" == " ".join(line.split()[:54])
    assert machine_texts.window(text) == text and machine_texts.window(text, 1) is None
    assert machine_texts.words_of("\u201cA\u201d \u2014 b") == ['"A"', "-", "b"]


def test_files_are_continued_and_read(tmp_path, monkeypatch):
    """An interrupted generator goes on where it was; `read` leaves out what ended early and says what is missing."""
    monkeypatch.setattr(machine_texts, "BATCH", 2)
    by_word = lambda _: lambda texts: {"input_ids": [text.split() for text in texts]}  # noqa: E731
    monkeypatch.setattr(machine_texts.loading, "tokenizer_of", by_word)
    monkeypatch.setattr(machine_texts, "LONGEST", 2)
    monkeypatch.setattr(machine_texts, "MACHINES", {"toy T=1": {"test": 6}})
    written = [*(f"t{i}" for i in range(5)), "three words long"]
    prompts = [{"source": "wiki", "split": "test", "prompt": "p", "text": text} for text in written]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    file, starts = machine_texts.file_of(tmp_path, "toy T=1", "test"), []

    def make(rows, start):
        starts.append(start)
        return [None if start == 2 else row["text"] for row in rows]

    machine_texts.extend(file, prompts[:3], make)
    with pytest.raises(ValueError, match="3 of 6"):
        machine_texts.read(tmp_path)
    machine_texts.extend(file, prompts, make)
    assert starts == [0, 2, 3, 5]
    texts = machine_texts.read(tmp_path)["test"]
    assert texts == {"people": [f"t{i}" for i in range(5)], "toy T=1": ["t0", "t1", "t3", "t4"]}


def test_synonyms_are_words_of_one_synset(tmp_path):
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text("  1 licence\n")
    (tmp_path / "data.noun").write_text("0001 03 n 03 quick_one 0 fast 0 rapid 0 001 @ 0002 n 0000 | gloss\n")
    table = machine_words.synonyms(tmp_path)
    assert table == {"fast": ["rapid"], "rapid": ["fast"]}
    assert machine_words.reworded("a fast dog", table, 0, share=1.0) == "a rapid dog"


def test_detectors_are_oriented(job):
    """The text that the model finds likelier has the larger score."""
    texts = dxo.toy_texts()
    asked = texts["test"]["people"]
    score = machine_scores.detector_scores("loss", job, texts)(asked)
    raw = dict(map(json.loads, (job.work / "detector-scores.jsonl").read_text().splitlines()))
    assert np.allclose(score, [-raw[text][0] for text in asked])


def test_rates_are_tried_once_for_each_objective(job, monkeypatch):
    tried = []
    monkeypatch.setattr(dxo, "validated", lambda arm, *_, learning_rate: tried.append(arm) or learning_rate)
    best = dxo.rates(job)
    shuffled = {dxo.LONGER, "BCE, weighted"}
    assert best == {arm: max(dxo.SHUFFLED_RATES if arm in shuffled else dxo.RATES) for arm in dxo.TRAINED}
    assert dxo.rates(job) == best and len(tried) == 3 * len(dxo.TRAINED)


def test_validation_sees_no_test_text(job):
    assert 0 <= dxo.validated(dxo.WORDS, 0, job) <= 1
