"""Selection of texts: scores against their formulas, the same texts for any number of processes, nothing lost."""

import json
import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from typer.testing import CliRunner

from hf_xent import cli
from hf_xent.data import chunks, select, selectors
from hf_xent.data.selectors.compression import WINDOW, ncd
from hf_xent.data.selectors.lengths import LEAST, SPAN, residual
from hf_xent.data.selectors.ngrams import WORD, hashed
from hf_xent.experiments import selecting
from hf_xent.experiments.selecting import losses_of, run_selection
from hf_xent.experiments.selection import Selecting
from support.models import tiny, tiny_tokenizer

FOX, STEPS = "the quick brown fox jumps over a lazy dog", "gradient descent of loss functions needs many large steps"
WORDS, OTHERS = FOX.split(), STEPS.split()


def texts_of(words, count, seed=0, low=4, high=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(low, high))) for _ in range(count)]


POOL = [text for pair in zip(texts_of(WORDS, 40), texts_of(OTHERS, 40, 1), strict=True) for text in pair]
TARGET = texts_of(OTHERS, 5, 2)
noise = np.random.default_rng(0).bytes


def latin(data):
    """Bytes as text that has them as its UTF-8 bytes, seven bits each: it does not compress by much."""
    return bytes(byte & 127 for byte in data).decode()


def aligned(x, targets, level=6):
    """The formula, term by term."""
    c = lambda text: len(zlib.compress(text.encode(), level))  # noqa: E731  as the paper writes it
    return 1 - sum((c(x + y) - min(c(x), c(y))) / max(c(x), c(y)) for y in targets) / len(targets)


def test_distance_of_sizes():
    assert ncd(10, 10, 12) == pytest.approx(0.2) and ncd(10, 20, 20) == 0.5 and ncd(10, 10, 20) == 1


@pytest.mark.parametrize("size", [20_000, 40_000])
def test_identical_texts_are_near_within_the_window_and_far_beyond(size):
    text = latin(noise(size))
    beyond = size > WINDOW
    with pytest.warns(UserWarning, match=r"1 of 1 texts .* beyond which DEFLATE does not compare: split .* cut=16384"):
        [score] = select([text], [text], 1, normalise=None).scores
    assert score == pytest.approx(0 if beyond else 1, abs=0.02)
    [score] = select([text], [text], 1, normalise=None, cut=16_384).scores
    assert score == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("level", [1, 6, 9])
def test_alignment_is_the_formula(level):
    found = select(POOL, TARGET, 10, normalise=None, level=level)
    expected = [aligned(text, TARGET, level) for text in POOL]
    assert found.scores == pytest.approx(expected, abs=1e-12)
    assert list(found.indices) == sorted(range(80), key=lambda i: (-expected[i], i))[:10]


def test_stored_texts_would_be_scored_by_length_only():
    """Why level 0 is refused: the order is that of Length, whatever the words are."""
    pool = texts_of(WORDS, 30, low=70, high=300)
    stored = np.array([aligned(text, TARGET, 0) for text in pool])
    sizes = np.array([len(text) for text in pool])
    assert np.array_equal(np.argsort(stored), np.argsort(-sizes))
    with pytest.raises(ValueError, match="level is 0, at which texts are stored: length only; choose a whole number"):
        select(POOL, TARGET, 1, level=0)


def test_residual_is_that_of_local_lines():
    """Against numpy's weighted fit at every text."""
    rng = np.random.default_rng(0)
    sizes, scores = rng.integers(50, 2000, 60), rng.normal(size=60)
    x = np.log(sizes)
    expected = []
    for i in range(60):
        distance = abs(x - x[i])
        h = np.sort(distance)[math.ceil(SPAN * 60) - 1]
        weights = np.where(distance < h, (1 - (distance / h) ** 3) ** 3, 0)
        expected.append(scores[i] - np.polyval(np.polyfit(x, scores, 1, w=weights**0.5), x[i]))
    assert residual(scores, sizes) == pytest.approx(np.array(expected), abs=1e-9)


def test_residual_of_what_length_explains_is_nothing():
    sizes = np.random.default_rng(0).integers(1, 5000, 1000)  # more lengths than lines are fitted at
    assert residual(3 - 0.2 * np.log(sizes), sizes) == pytest.approx(0, abs=1e-9)
    same = np.full(40, 100)
    assert residual(np.arange(40.0), same) == pytest.approx(np.arange(40) - 19.5)
    two = np.repeat([10, 1000], 20)
    assert residual(np.log(two), two) == pytest.approx(0, abs=1e-9)
    curved = np.log(sizes) ** 2
    assert np.std(residual(curved, sizes)) < 0.1 * np.std(curved)


def test_normalised_alignment_finds_the_target_at_every_length():
    """Published alignment follows length; what remains after the regression does not, and still tells the words."""
    sizes = [len(text) for text in POOL]
    raw, found = (select(POOL, TARGET, 40, normalise=how) for how in (None, "length"))
    assert abs(np.corrcoef(found.scores, sizes)[0, 1]) < 0.25 < abs(np.corrcoef(raw.scores, sizes)[0, 1])
    assert np.mean(found.indices % 2) > 0.9
    assert found.scores == pytest.approx(residual(raw.scores, np.array(sizes)))


@pytest.mark.parametrize("options", [{}, {"n": 1, "buckets": 7}, {"smoothing": 0.5, "mean": True, "n": 3}])
def test_ngrams_are_the_dense_formula(options):
    n, buckets, s = options.get("n", 2), options.get("buckets", 10_000), options.get("smoothing", 1.0)

    def counts(text):
        """[buckets], from the words."""
        words = text.lower().split()
        grams = [" ".join(words[i : i + m]) for m in range(1, n + 1) for i in range(len(words) - m + 1)]
        found = Counter(zlib.crc32(gram.encode()) % buckets for gram in grams)
        return np.array([found[j] for j in range(buckets)])

    def shares(texts):
        total = sum(map(counts, texts))
        return (total + s) / (total.sum() + s * buckets)

    features = np.stack([counts(text) for text in POOL])
    expected = features @ (np.log(shares(TARGET)) - np.log(shares(POOL)))
    if options.get("mean"):
        expected = expected / features.sum(1)
    found = select(POOL, TARGET, 40, "ngrams", **options)
    assert found.scores == pytest.approx(expected, rel=1e-9)
    if options.get("mean"):
        assert np.mean(found.indices % 2) > 0.9


def test_ngrams_read_words_and_punctuation_in_lower_case():
    assert WORD.findall("don't stop -- Now!") == ["don", "'", "t", "stop", "--", "Now", "!"]
    assert list(hashed("A b", 2, 97)) == [zlib.crc32(gram) % 97 for gram in (b"a", b"b", b"a b")]
    scores = select(["", *POOL], TARGET, 81, "ngrams")
    assert np.isnan(scores.scores[0]) and scores.indices[-1] == 0, "a text without a word comes last"


def test_ngrams_draw_by_weight():
    """Gumbel noise makes the first text each with its softmax probability; every other pool is drawn alike."""
    weights = select(POOL, TARGET, 1, "ngrams", mean=True).scores
    draws = [select(POOL, TARGET, 1, "ngrams", mean=True, seed=seed).indices[0] % 2 for seed in range(60)]
    share = np.exp(weights)[1::2].sum() / np.exp(weights).sum()
    assert np.mean(draws) == pytest.approx(share, abs=4 * (share * (1 - share) / 60) ** 0.5)
    assert list(select(POOL, TARGET, 5, "ngrams:seed=3").indices) == list(select(POOL, TARGET, 5, "ngrams", seed=3)[0])


def test_length_and_random_are_controls():
    sizes = [len(text) for text in POOL]
    assert list(select(POOL, None, 80, "length").indices) == sorted(range(80), key=lambda i: (sizes[i], i))
    longest = select(POOL, TARGET, 3, "length:longest=True").indices
    assert list(longest) == sorted(range(80), key=lambda i: (-sizes[i], i))[:3]
    first, again, other = (select(POOL, None, 80, "random", seed=seed).indices for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other) and sorted(first) == list(range(80))


def test_ties_are_taken_in_order():
    found = select(["bb", "a", "cc", "d"], None, 3, "length")
    assert list(found.indices) == [1, 3, 0] and found.scores.tolist() == [-2, -1, -2, -1]


def test_a_selector_of_ones_own():
    class Vowels(selectors.Selector):
        def scores(self, texts, target, each):
            return each(lambda text: sum(map(text.count, "aeiou")), "vowels")

    assert list(select(["sky", "queue", "day"], None, 2, Vowels()).indices) == [1, 2]
    with pytest.raises(ValueError, match="is an object"):
        select(["sky"], None, 1, Vowels(), level=1)


@pytest.fixture(scope="module")
def models():
    """A tuned model, a base model and their tokenizer."""
    tokenizer = tiny_tokenizer(" ".join([*WORDS, *OTHERS]) * 4)
    return tiny(std=0.3), tiny(std=0.2), tokenizer


def test_losses_are_those_of_dense_logits(models):
    tuned, base, tokenizer = models
    texts = ["the fox", "gradient descent of loss", "", "a quick dog jumps over the lazy fox"]
    found = select(texts, None, 4, "loss", losses=losses_of(texts, tuned, base, tokenizer, batch_size=3))

    @torch.no_grad()
    def loss(model, text):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logp = model(ids).logits.double().log_softmax(-1)[0, :-1]
        return -logp.gather(-1, ids[0, 1:, None]).mean().item()

    expected = np.array([loss(base, text) - loss(tuned, text) if text else np.nan for text in texts])
    assert found.scores == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert list(found.indices) == list(np.argsort(-expected)) and found.indices[-1] == 2


def test_losses_resume(models, tmp_path, monkeypatch):
    tuned, base, tokenizer = models
    whole = losses_of(POOL, tuned, base, tokenizer, batch_size=4, draft=tmp_path / "whole")
    scored = []

    class Stopping(selecting.TextScorer):
        def __call__(self, texts):
            if len(scored) == 2:
                raise KeyboardInterrupt
            scored.append(len(texts))
            return super().__call__(texts)

    monkeypatch.setattr(selecting, "TextScorer", Stopping)
    with pytest.raises(KeyboardInterrupt):
        losses_of(POOL, tuned, base, tokenizer, batch_size=4, draft=tmp_path / "draft")
    monkeypatch.undo()
    resumed = losses_of(POOL, tuned, base, tokenizer, batch_size=4, draft=tmp_path / "draft")
    assert np.array_equal(resumed, whole) and len((tmp_path / "draft").read_text().splitlines()) == 6


def test_jobs_change_nothing(monkeypatch, tmp_path):
    """Two processes and one, with a draft and without: the same bits."""
    pool, told = POOL * 4, []
    alone = select(pool, TARGET, 50, draft=tmp_path / "one")
    report = lambda done, total: told.append((done, total))  # noqa: E731  one line
    both = select(pool, TARGET, 50, jobs=2, draft=tmp_path / "two", report=report)
    assert np.array_equal(alone.scores, both.scores) and np.array_equal(alone.indices, both.indices)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    assert told == [(64, 320), (128, 320), (192, 320), (256, 320), (320, 320)]


class Stops:
    """A function that is interrupted at its nth text."""

    def __init__(self, at):
        self.left = at

    def __call__(self, text):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return len(text)


def test_a_stopped_run_resumes_after_its_last_chunk(tmp_path):
    pool, draft = POOL * 4, tmp_path / "folder" / "draft"
    each = chunks.Chunks(pool, draft=draft)
    with pytest.raises(KeyboardInterrupt):
        each(Stops(150), "length")
    lines = draft.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[1]) == [len(text) for text in pool[:64]]
    draft.write_text(draft.read_text() + "[1.0, 2")  # cut off while it was written
    rest = Stops(320 - 128)
    assert list(each(rest, "length")) == [len(text) for text in pool] and rest.left == 0
    assert list(each(Stops(0), "length")) == [len(text) for text in pool], "all of it is there"


@pytest.mark.parametrize("other", ["identity", "texts"])
def test_chunks_of_something_else_are_not_resumed(other, tmp_path):
    chunks.Chunks(POOL, draft=tmp_path / "draft")(len, "length")
    pool, identity = (POOL, "other") if other == "identity" else ([*POOL[:-1], "x"], "length")
    with pytest.raises(KeyboardInterrupt):
        chunks.Chunks(pool, draft=tmp_path / "draft")(Stops(5), identity)


def test_normalising_reuses_the_published_scores(tmp_path):
    """What the draft keeps is the alignment, so that a second choice of `normalise` compresses nothing."""
    select(POOL, TARGET, 5, normalise=None, draft=tmp_path / "draft")
    before = (tmp_path / "draft").read_text()
    select(POOL, TARGET, 5, draft=tmp_path / "draft")
    assert (tmp_path / "draft").read_text() == before
    select(POOL, TARGET, 5, level=1, draft=tmp_path / "draft")
    assert (tmp_path / "draft").read_text() != before


LOSSES = ([1.0] * 80, [2.0] * 80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0: choose a whole number of at least 1"),
        ({"k": 2.5}, "k is 2.5: choose a whole number"),
        ({"k": 81}, "k is 81, but there are 80 texts: choose at most that many"),
        ({"texts": []}, "k is 1, but there are 0 texts"),
        ({"texts": "one"}, "texts is the string 'one'...: pass a list"),
        ({"texts": ["a", None]}, "texts has None at 1, which is NoneType, not text"),
        ({"target": []}, r"target is \[\]: pass at least one text"),
        ({"target": [], "by": "random"}, r"target is \[\]: pass at least one text"),
        ({"target": None}, "target is None: pass at least one text"),
        ({"target": ["", " "]}, "target has only empty texts, 2 of them"),
        ({"target": "one"}, "target is the string 'one'"),
        ({"target": [3]}, "target has 3 at 0, which is int"),
        ({"jobs": 0}, "jobs is 0: choose a whole number of at least 1"),
        ({"by": "gzip"}, "selector is 'gzip': choose one of compression, length, loss, ngrams, random"),
        ({"by": "compression:levels=1"}, "selector 'compression' does not take levels: its options are level"),
        ({"level": -1}, "level is -1: choose a whole number of at least 1"),
        ({"level": 10}, "level is 10: choose a whole number from 1 to 9"),
        ({"level": True}, "level is True: choose"),
        ({"normalise": "size"}, "normalise is 'size': choose 'length' or None"),
        ({"cut": 0}, "cut is 0: choose a whole number of at least 1"),
        ({"texts": POOL[: LEAST - 1]}, "normalise is 'length', but there are 19 texts, too few .* normalise=None"),
        ({"by": "length", "longest": 1}, "longest is 1: choose True or False"),
        ({"by": "random", "seed": -1}, "seed is -1: choose"),
        ({"by": "ngrams", "n": 0}, "n is 0: choose"),
        ({"by": "ngrams", "buckets": 1}, "buckets is 1: choose"),
        ({"by": "ngrams", "smoothing": 0}, "smoothing is 0: choose"),
        ({"by": "ngrams", "mean": 1}, "mean is 1: choose True or False"),
        ({"by": "ngrams", "seed": 0.5}, "seed is 0.5: choose"),
        ({"by": "loss"}, r"losses is None: pass losses=\(tuned, base\)"),
        ({"by": "loss", "losses": LOSSES[0]}, "losses has 80 parts: pass two arrays"),
        ({"by": "loss", "losses": (LOSSES[0], LOSSES[1][1:])}, r"losses has the shapes \(80,\) and \(79,\)"),
        ({"by": "loss", "losses": LOSSES, "texts": POOL[1:]}, "losses has 80 values, but there are 79 texts"),
    ],
)
def test_unusable_input_is_refused(change, message):
    by, k, texts, target = (
        change.pop(n, d) for n, d in (("by", "compression"), ("k", 1), ("texts", POOL), ("target", TARGET))
    )
    with pytest.raises(ValueError, match=message) as error:
        select(texts, target, k, by, **change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, ["data", "select", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pool and a target on disk."""
    folder = tmp_path_factory.mktemp("pool")
    rows = [json.dumps({"text": text, "topic": i % 2}) for i, text in enumerate(POOL)]
    (folder / "pool.jsonl").write_text("\n".join(rows))
    (folder / "target.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TARGET))
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_command_writes_the_chosen_rows(suffix, files, tmp_path, without_progress_bars):
    pool, target, output = files / "pool.jsonl", files / "target.jsonl", tmp_path / f"chosen.{suffix}"
    by = "compression:level=1, normalise=None"
    found = invoke(
        pool, "--target", target, "--target-column", "body", "--k", 7, "--by", by, "--output", output, "--json"
    )
    expected = select(POOL, TARGET, 7, level=1, normalise=None)
    rows = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=str(output), split="train")
    assert list(rows["row"]) == list(expected.indices) and list(rows["text"]) == [POOL[i] for i in expected.indices]
    assert rows["score"] == pytest.approx(expected.scores[expected.indices]) and set(rows["topic"]) == {1}
    summary = json.loads(found.stdout)
    assert summary["chosen"] == 7 and summary["texts"] == 80 and summary["by"] == by
    assert summary["mean_bytes"]["all"] == pytest.approx(np.mean([len(text) for text in POOL]))
    assert list(tmp_path.iterdir()) == [output], "the draft is gone"


def test_the_command_resumes(files, tmp_path, monkeypatch, without_progress_bars):
    run = Selecting(
        str(files / "pool.jsonl"),
        5,
        str(files / "target.jsonl"),
        target_column="body",
        output=str(tmp_path / "a.jsonl"),
    )
    with monkeypatch.context() as patched:
        patched.setattr(selecting, "write_rows", Stops(0))
        with pytest.raises(TypeError):  # stopped after the scores, before the rows
            run_selection(run)
    assert [path.name for path in tmp_path.iterdir()] == [".a.jsonl.partial"]
    monkeypatch.setattr("hf_xent.data.selectors.compression.Alignment.__call__", Stops(0))
    assert run_selection(run)["chosen"] == 5 and (tmp_path / "a.jsonl").exists()


def test_the_command_compares_models(files, models, tmp_path, without_progress_bars):
    tuned, base, tokenizer = models
    for name, model in (("tuned", tuned), ("base", base)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = ("--tuned", tmp_path / "tuned", "--base", tmp_path / "base", "--max-tokens", 8)
    invoke(files / "pool.jsonl", "--by", "loss", "--k", 9, *options, "--output", tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    expected = select(POOL, None, 9, "loss", losses=losses_of(POOL, tuned, base, tokenizer, max_tokens=8))
    assert [row["row"] for row in rows] == list(expected.indices)
    assert [row["score"] for row in rows] == pytest.approx(expected.scores[expected.indices], rel=1e-4)
    tiny_tokenizer("other words").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="whose tokenizers differ"):
        invoke(files / "pool.jsonl", "--by", "loss", "--k", 9, *options, "--output", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "gzip"), "selector is 'gzip': choose one of"),
        (("--by", "compression"), "target is None, but by is 'compression'"),
        (("--by", "length", "--target", "x"), "target is 'x', but 'length' does not read it"),
        (("--by", "random", "--base", "x"), "base is 'x', but 'random' does not read it"),
        (("--target", "x", "--batch-size", 3), "batch_size is 3, but 'compression' does not read it"),
        (("--by", "loss", "--tuned", "x"), "base is None, but by is 'loss'"),
        (("--by", "loss", "--tuned", "x", "--base", "x", "--jobs", 2), "jobs is 2, but models score in one process"),
        (("--by", "loss:losses=3", "--tuned", "x", "--base", "x"), "write 'loss' alone"),
        (("--by", "length", "--k", 81), "k is 81, but there are 80 texts"),
        (("--by", "length", "--k", 1, "--output", "a.txt"), "output is a.txt: give it one of the suffixes"),
    ],
)
def test_the_command_refuses_what_has_no_effect(options, message, files):
    with pytest.raises(ValueError, match=message):
        invoke(files / "pool.jsonl", *options)


def test_it_writes_over_nothing(files, tmp_path):
    (tmp_path / "pool.jsonl").write_text(json.dumps({"text": "a b", "score": 1}))
    with pytest.raises(ValueError, match="already has a column 'score'"):
        invoke(tmp_path / "pool.jsonl", "--by", "length", "--k", 1, "--output", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"which is \(in\) the source"):
        invoke(files / "pool.jsonl", "--by", "length", "--k", 1, "--output", files / "pool.jsonl")


def test_every_selector_says_where_it_is_from():
    for row in selectors.SELECTORS.table():
        assert row["summary"] and row["formula"] and all(row["help"].values()), row["name"]
        assert row["name"] in ("length", "random") or row["source"]
