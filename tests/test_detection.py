"""Detection scores: worked examples, dense formulas, padding and batches, the frequency cache, the CLI, evaluate."""

import datetime
import inspect
import json
import math
import subprocess
import sys
import threading
import zlib as compression
from pathlib import Path

import evaluate
import numpy as np
import pandas
import pytest
import torch
import transformers
from datasets import Dataset
from sklearn.metrics import auc

import hf_xent
from hf_xent import detection
from hf_xent.data.brown import Brown
from hf_xent.detection import scores as registry
from hf_xent.detection.counts import CountedText, count, frequencies, smoothed
from hf_xent.detection.scorer import TextScorer
from hf_xent.detection.scores import base as score_files
from hf_xent.experiments.labels import binary_labels
from hf_xent.experiments.scoring import score_in_chunks
from hf_xent.lazy import next_token_labels
from hf_xent.metrics import modules
from hf_xent.metrics import ranking as metrics
from hf_xent.models.anatomy import positions
from hf_xent.models.fingerprints import fingerprint_tokenizer
from hf_xent.ops import Stats
from hf_xent.patching import lazily, patch, patch_state, unpatch
from support.models import CONFIGS, V, tiny, tiny_tokenizer
from test_cli import invoke

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice(WORDS, n)) for n in (1, 9, 3, 14, 2, 6, 11, 4, 8, 1, 5, 12, 7, 3, 10, 2, 13, 6)]
FREQUENCIES = smoothed(np.arange(V) % 7 * 100)
COMPARED = ("reference", "reference_gap")
ALL = (*detection.SCORES, "min_k:k=1.0", "dc_pdd:a=10")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Counts of one test are not there for the next."""
    monkeypatch.setenv("HF_XENT_CACHE", str(tmp_path / "cache"))


def scored(texts=TEXTS, model=None, tokenizer=None, scores=ALL, **options):
    options = {"reference": tiny("qwen3"), "frequencies": FREQUENCIES, "progress": False, **options}
    return TextScorer(model or tiny(), tokenizer or tiny_tokenizer(), scores, **options)(texts)


def stats_of(**values):
    """One text's statistics [1, T] from numbers; logp is the target of a head whose lse is 0."""
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    labels = values.pop("labels", torch.arange(len(values["logp"][0]))[None]).long()
    values["target"], mask = values.pop("logp"), torch.ones_like(labels, dtype=torch.bool)
    return Stats({"lse": torch.zeros_like(values["target"]), **values}, labels, mask)


def assert_alike(found, expected, losses, err_msg=""):
    """Equal up to float32 rounding, which is of the size of the log-probabilities: many scores are differences of them.

    The gap of two losses, or a standardized log-probability, may be near 0 where the losses are not.
    """
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(losses)), err_msg=err_msg)


# the method sheet's worked examples


def test_dc_pdd_by_hand():
    q = smoothed(np.array([9000, 900, 90, 9, 0, 1]))
    torch.testing.assert_close(q[:4], torch.tensor([0.89956, 0.090046, 0.009095, 0.000999]).double(), atol=1e-6, rtol=0)
    stats = stats_of(
        labels=[0, 1, 0, 2, 3, 4, 1], logp=[math.log(p) for p in (0.6, 0.3, 0.9, 0.05, 0.002, 0.0004, 0.5)]
    )
    for a, value in ((0.001, 0.001), (0.01, 0.008737), (0.1, 0.056202), (1, 0.207649), (10, 0.207649)):
        assert registry.dc_pdd(stats, q, a).item() == pytest.approx(value, abs=1e-6)


def test_min_k_by_hand():
    stats = stats_of(logp=[-0.1, -2.0, -3.0, -0.5, -1.0])
    assert registry.min_k(stats, 0.4).item() == -2.5
    assert registry.min_k(stats, 0.1).item() == -3.0  # int(0.5) is 0: one token counts all the same
    assert registry.min_k(stats, 1.0).item() == pytest.approx(-registry.loss(stats).item())


def test_min_k_pp_by_hand():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    entropy = -(p * p.log()).sum().item()
    variance = (p * p.log() ** 2).sum().item() - entropy**2
    assert (entropy, variance) == (pytest.approx(1.029653, abs=1e-6), pytest.approx(0.132964, abs=1e-6))
    for logp, z in zip(p.log().tolist(), (0.922837, -0.478056, -1.590008), strict=True):
        stats = stats_of(logp=[logp], entropy=[entropy], variance=[variance])
        assert registry.min_k_pp(stats).item() == pytest.approx(z, abs=1e-6)


def test_a_certain_model_has_finite_scores():
    stats = stats_of(logp=[0.0, 0.0], entropy=[0.0, 0.0], variance=[-1e-12, 0.0])
    assert registry.min_k_pp(stats).item() == 0 and registry.fast_detect(stats).item() == 0


# whole texts against the formulas on dense logits


def dense(text, tokenizer, model, reference):
    """Every score from full distributions, one token at a time."""
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    logp, other = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (model, reference))
    y = ids[1:]
    n = len(y)
    ll = logp[range(n), y]
    mean = (logp.exp() * logp).sum(-1)
    variance = (logp.exp() * logp**2).sum(-1) - mean**2
    crossed = (other.exp() * logp).sum(-1)
    crossed_variance = (other.exp() * logp**2).sum(-1) - crossed**2
    lowest = max(1, int(0.2 * n))
    first = [i for i in range(n) if y[i] not in y[:i]]
    terms = [(-ll[i].exp() * FREQUENCIES[y[i]].log()).item() for i in first]
    return {
        "loss": -ll.mean(),
        "perplexity": (-ll.mean()).exp(),
        "zlib": -ll.mean() / len(compression.compress(text.encode())),
        "reference": ll.mean() / other[range(n), y].mean(),
        "reference_gap": ll.mean() - other[range(n), y].mean(),
        "min_k": ll.sort().values[:lowest].mean(),
        "min_k_pp": ((ll - mean) / variance.sqrt()).sort().values[:lowest].mean(),
        "dc_pdd": np.mean([min(term, 0.01) for term in terms]),
        "dc_pdd:a=10": np.mean([min(term, 10) for term in terms]),
        "fast_detect": (ll - mean).sum() / variance.sum().sqrt(),
        "fast_detect_pair": (ll - crossed).sum() / crossed_variance.sum().sqrt(),
        "binoculars": ll.mean() / crossed.mean(),
        "min_k:k=1.0": ll.mean(),
    }


@torch.no_grad()
def test_scores_equal_the_dense_formulas():
    tokenizer, model, reference = tiny_tokenizer(), tiny("gemma2 softcap"), tiny("qwen3")
    found = scored(TEXTS[:6], model, tokenizer, reference=reference)
    for i, text in enumerate(TEXTS[:6]):
        for name, value in dense(text, tokenizer, model, reference).items():
            assert_alike(found[name][i], float(value), found["loss"], f"{name}, {text}")


def test_lowercase_is_the_ratio_of_two_losses():
    texts = ["The quick", "THE QUICK BROWN", "the"]
    tokenizer = tiny_tokenizer("The quick THE BROWN the QUICK dog " * 8)
    found = scored(texts, None, tokenizer, ("loss", "lowercase"))
    lower = scored([text.lower() for text in texts], None, tokenizer, ("loss",))["loss"]
    np.testing.assert_allclose(found["lowercase"], lower / found["loss"], rtol=1e-5)
    assert found["lowercase"][2] == pytest.approx(1, rel=1e-5) and abs(found["lowercase"][1] - 1) > 1e-3


# invariances


def test_batches_and_padding_change_nothing():
    left, right = tiny_tokenizer(), tiny_tokenizer()
    left.padding_side, right.padding_side = "left", "right"
    alone = scored(tokenizer=right, batch_size=1)
    for tokenizer in (left, right):
        together = scored(tokenizer=tokenizer, batch_size=16)
        for name in ALL:
            assert_alike(together[name], alone[name], alone["loss"], name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # rotary and learned positions
def test_scores_of_stats_that_were_padded_elsewhere(name):
    """A batch a user padded on either side: the functions read the mask, not the place."""
    model, tokenizer = patch(tiny(name)), tiny_tokenizer()
    found = {}
    for side in ("left", "right"):
        batch = tokenizer(TEXTS[:5], return_tensors="pt", padding=True, padding_side=side)
        mask = batch["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), lazily(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=places).logits
        labels = torch.where(mask.bool() & (places > 0), batch["input_ids"], -100)  # a first token has no context
        stats = logits.stats(next_token_labels(labels), outputs=("lse", "target", "entropy", "variance"))
        scores = ("loss", "min_k", "min_k_pp", "fast_detect")
        found[side] = torch.stack([detection.get(score)(stats) for score in scores])
        found[side] = torch.cat([found[side], registry.dc_pdd(stats, FREQUENCIES)[None]])
    for left, right in zip(found["left"], found["right"], strict=True):
        assert_alike(left.detach().numpy(), right.detach().numpy(), found["right"][0].detach().numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_model(name):
    """Patched or not; left as it was; without logits; one forward for all scores of one model."""
    scores = ("loss", "min_k_pp", "dc_pdd", "fast_detect")
    model, calls = tiny(name).train(), []
    stock = scored(model=model, scores=scores)
    assert model.training
    with pytest.raises(ValueError, match="not patched"):
        patch_state(model)
    patch(model)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = scored(model=model, scores=scores)
    assert len(calls) == 2 and patch_state(model).materialized == 0  # 18 texts in batches of 16
    unpatch(model)
    for score in scores:
        assert_alike(stock[score], again[score], stock["loss"], score)


def test_bfloat16_is_no_worse_than_torch():
    """Weights of eight bits: the loss is off by the rounding of the logits, not by that of the statistics."""
    single, half = (
        scored(model=tiny(std=0.1, dtype=d), scores=("loss",))["loss"] for d in (torch.float32, torch.bfloat16)
    )
    model = tiny(std=0.1, dtype=torch.bfloat16)
    stock = [float(dense(text, tiny_tokenizer(), model, tiny("qwen3"))["loss"].detach()) for text in TEXTS]
    allowed = 2 * np.abs(np.array(stock) - single).max()
    assert half.dtype == np.float64 and np.abs(half - single).max() < allowed < 0.1 * single.max()


def test_options_share_one_forward_and_order_the_caps():
    found = scored(scores=detection.sweep("dc_pdd", a=(0.001, 0.01, 0.1, 1.0, 100.0)))
    table = np.stack(list(found.values()))
    assert list(found)[1] == "dc_pdd:a=0.01" and (np.diff(table, axis=0) >= 0).all()
    found = scored(scores=("min_k:k=1", "loss"))
    np.testing.assert_allclose(found["min_k:k=1"], -found["loss"])  # float64 sums of the same numbers


def test_repeated_tokens_do_not_change_dc_pdd():
    logp = [-1.0, -2.0, -0.1, -3.0]
    once = registry.dc_pdd(stats_of(labels=[4, 5], logp=logp[:2]), FREQUENCIES, 10)
    assert registry.dc_pdd(stats_of(labels=[4, 5, 4, 5], logp=logp), FREQUENCIES, 10) == once


def test_edges():
    """Empty texts, one token, no start token, texts that are cut."""
    found = scored(["", "a", TEXTS[3]])
    assert all(np.isnan(values[0]) and np.isfinite(values[1:]).all() for values in found.values())
    assert len(tiny_tokenizer()("the")["input_ids"]) == 1
    bare = scored(["the", TEXTS[3]], start=False)
    assert np.isnan(bare["loss"][0]) and np.isfinite(bare["loss"][1])
    cut = scored([TEXTS[3]], max_tokens=5)
    tokenizer = tiny_tokenizer()
    start = tokenizer.decode(tokenizer(TEXTS[3])["input_ids"][:5])
    assert cut["zlib"] == pytest.approx(scored([start])["zlib"])
    assert scored([]).keys() == found.keys() and not scored([])["loss"].size


def test_unknown_scores_and_missing_models_are_refused():
    for name, message in (
        ("nonesuch", "score is 'nonesuch': choose one of loss, "),
        ("dc_pdd:k=1", r"'dc_pdd' does not take k: its options are a"),
        ("loss:k=1", "its options are none"),
        ("binoculars", "'binoculars' compares with a second model: pass reference"),
    ):
        with pytest.raises(ValueError, match=message):
            TextScorer(tiny(), tiny_tokenizer(), (name,))
    with pytest.raises(ValueError, match="model has 97 tokens but reference 120: choose two models"):
        scored(scores=("fast_detect_pair",), reference=tiny(vocab_size=120))


def test_directions_and_sources_are_declared():
    for name, score in detection.SCORES.items():
        assert score.higher_is in ("positive", "negative") and "Source: " in score.of.__doc__, name
    assert list(detection.get("loss").oriented([1, 2])) == [-1, -2]
    assert list(detection.get("min_k:k=0.3").oriented([1, 2])) == [1, 2]


def test_the_registry_reads_what_every_file_says():
    rows = {row["name"]: row for row in detection.SCORES.table()}
    for name, row in rows.items():
        score = detection.get(name)
        assert row["options"] == score.defaults and row["formula"] and "arXiv:" in row["source"], name
        assert getattr(registry, name) is score.of and row["summary"] == score.__doc__.split("\n")[0]
        assert {"stats", *score.needs, *score.defaults} == set(inspect.signature(score.of).parameters)
        assert score.ranges.keys() == score.defaults.keys(), name  # every option is checked before a forward
    files = {entry.partition(":")[0] for entry in detection.SCORES.entries.values()}
    assert not files & rows.keys(), "a module would hide the function of its name"
    assert (rows["min_k"]["options"], rows["dc_pdd"]["options"], rows["loss"]["options"]) == (
        {"k": 0.2},
        {"a": 0.01},
        {},
    )


def test_a_score_is_added_by_one_line(monkeypatch):
    @score_files.score(higher_is="positive", k=score_files.Range("(0, 1]", "a share"))
    def highest(stats, k=0.5):
        """Mean of the highest share k of log-probabilities."""
        return stats.logp.sort(-1, descending=True).values[:, : int(k * stats.logp.shape[-1])].mean(-1)

    monkeypatch.setitem(detection.SCORES.entries, "highest", highest)
    assert detection.get("highest:k=0.75")(stats_of(logp=[-1.0, -2.0, -3.0, -4.0])).item() == -2
    assert detection.SCORES.row("highest")["object"] == "highest" and "highest" in detection.SCORES.names()
    for text, message in (
        ("highest:k=2", "^k is 2: choose a share"),
        ("highest:a=1", "does not take a: its options are k"),
    ):
        with pytest.raises(ValueError, match=message):
            detection.get(text)


def test_names_of_scores_need_no_torch():
    code = (
        "import sys, hf_xent.detection as d; names = d.SCORES.names(), d.SCORES.table(), d.sweep('min_k', k=(0.1,));"
        "print('torch' in sys.modules, d.Score.__name__, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "Score", "True"]


def test_directions_hold_on_a_model_that_knows_its_texts():
    """Train on half of the texts: every score of one model speaks for them."""
    tokenizer, model = tiny_tokenizer(), tiny(std=0.05).train()
    members = [" ".join(rng.permutation(WORDS)) for _ in range(12)]
    others = [" ".join(rng.permutation(WORDS)) for _ in range(12)]
    ids = tokenizer([f"<s>{text}" for text in members], return_tensors="pt", padding=True)["input_ids"]
    labels, optimizer = ids.masked_fill(ids == tokenizer.pad_token_id, -100), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    names = [name for name in detection.SCORES if name != "lowercase"]  # these texts are lower-case
    found = scored(members + others, model, tokenizer, names, reference=tiny(std=0.05))
    rows = detection.evaluate(found, [1] * 12 + [0] * 12, members + others, resamples=20)
    assert list(rows) == [*names, "blind"]
    for name in names:
        assert rows[name]["auroc"] > 0.65, name  # the weakest is dc_pdd, 0.71; most are above 0.9
        assert rows[name]["auroc_low"] <= rows[name]["auroc"] <= rows[name]["auroc_high"]


def test_the_door_of_the_package():
    texts = TEXTS[:3]
    found = hf_xent.detection.score("dc_pdd", tiny(), tiny_tokenizer(), texts, progress=False)
    q = frequencies(tiny_tokenizer(), vocabulary=V, progress=False)
    np.testing.assert_allclose(found, scored(texts, scores=("dc_pdd",), frequencies=q)["dc_pdd"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_k:k", ("20", "1.01", "0", "-1", "0.0", "nan", "inf", "'0.2'", "True", "None", "[0.2]", "1e400")),
        ("min_k_pp:k", ("20", "0", "-0.2", "nan")),
        ("dc_pdd:a", ("0", "-0.01", "nan", "None", "'x'", "False")),
    ],
)
def test_options_outside_of_their_range_are_refused(name, values):
    option = name[-1]
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} is .*: choose a"):
            TextScorer(tiny(), tiny_tokenizer(), ("loss", f"{name}={value}"))
    stats = stats_of(logp=[-1.0, -2.0], entropy=[1.0, 1.0], variance=[1.0, 1.0])
    for k in (20, 0, float("nan")):
        with pytest.raises(ValueError, match=r"k is .*: choose a share"):
            registry.min_k(stats, k)
        with pytest.raises(ValueError, match="a is "):
            registry.dc_pdd(stats, FREQUENCIES, -k if k else 0)
    assert detection.get("min_k:k=1").options == {"k": 1} and detection.get("dc_pdd:a=5").options == {"a": 5}


@pytest.mark.parametrize(
    ("name", "changes", "room"),
    [
        ("gpt2", {}, 64),
        ("opt", {"max_position_embeddings": 40}, 40),  # its table has two rows more
        ("bert bias", {"max_position_embeddings": 50}, 50),
        ("llama", {"max_position_embeddings": 16}, None),  # rotary: computed, for any length
    ],
)
def test_texts_are_cut_where_positions_end(name, changes, room):
    model, tokenizer, text = tiny(name, **changes), tiny_tokenizer(), " ".join(TEXTS)
    ids = tokenizer(text)["input_ids"][:100]
    assert len(ids) == 100 and positions(model) == room
    kept = len(ids) if room is None else room - 1  # after the start token
    found = scored([text], model, tokenizer, ("loss",), max_tokens=100)["loss"]
    read = torch.tensor([[tokenizer.bos_token_id, *ids[:kept]]])
    logits = model(read).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, read[0, 1:]).item()
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    other = tiny(vocab_size=model.config.vocab_size)
    pair = scored([text], other, tokenizer, ("loss",), reference=model, max_tokens=100)["loss"]  # both read as much
    np.testing.assert_allclose(pair, scored([text], other, tokenizer, ("loss",), max_tokens=kept)["loss"], rtol=1e-5)


def test_positions_that_begin_after_the_padding():
    config = transformers.RobertaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=34, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    model = transformers.RobertaForCausalLM(config).eval()
    assert positions(model) == 32
    assert np.isfinite(scored([" ".join(TEXTS)], model, scores=("loss",), reference=None, max_tokens=64)["loss"]).all()


def test_what_is_no_list_of_texts_is_refused():
    for texts, message in (
        ("the quick", r"texts is the string 'the quick'\.\.\.: pass a list"),
        (["the", 5], "texts has 5 at 1, which is int, not text"),
        ([False, "the"], "texts has False at 0, which is bool"),
        (["the", ["quick", "fox"]], "which is list, not text"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(texts, scores=("loss",))
    with pytest.raises(ValueError, match="texts has <NA> at 0"):
        scored([pandas.NA], scores=("loss",))
    missing = scored(["the", None, float("nan"), ""], scores=("loss",))["loss"]
    assert np.isfinite(missing[0]) and np.isnan(missing[1:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"frequencies": "pydoc", "max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"scores": ()}, r"scores is \(\): pass a tuple of names"),
        ({"scores": "loss"}, "scores is 'loss': pass a tuple of names"),
        ({"frequencies": FREQUENCIES[:5]}, r"frequencies has shape \(5,\): pass one number for each of 97 tokens"),
        ({"frequencies": FREQUENCIES * torch.nan}, r"not in \(0, 1\]"),
        ({"frequencies": torch.zeros(V)}, r"not in \(0, 1\]"),
    ],
)
def test_options_of_a_scorer_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        scored(TEXTS[:1], **{"scores": ("dc_pdd",), **options})


def test_a_tokenizer_of_another_model_is_told():
    with pytest.raises(ValueError, match=r"cannot read .* tokens with ids up to .* or the model's own tokenizer"):
        scored(TEXTS[:4], tiny(vocab_size=10), scores=("loss",), reference=None)


def test_scorers_are_told_apart_by_what_they_hold():
    def of(model=None, tokenizer=None, scores=("loss",), **options):
        options = {"frequencies": FREQUENCIES, "reference": tiny("qwen3"), **options}
        return TextScorer(model or tiny(), tokenizer or tiny_tokenizer(), scores, **options).fingerprint()

    changed, buffered = tiny(), tiny()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    buffered.register_buffer("other", torch.ones(()))
    others = (
        of(changed), of(buffered), of(tiny(dtype=torch.bfloat16)), of(tiny(rms_norm_eps=1e-3)), of(start=False),
        of(tokenizer=tiny_tokenizer("dog " * 9)), of(scores=("min_k",)), of(max_tokens=5), of(reference=None),
        of(reference=changed), of(scores=("dc_pdd",)), of(scores=("dc_pdd",), frequencies=smoothed(np.ones(V))),
    )  # fmt: skip
    assert of() == of() == of(patch(tiny())) == of(batch_size=3) and len({of(), *others}) == 1 + len(others)


# the blind baseline


def test_blind_sees_a_shift():
    old, new = ([" ".join(rng.choice([*WORDS, year], 12)) for _ in range(40)] for year in ("1999", "2024"))
    labels = [1] * 40 + [0] * 40
    assert metrics.auroc(labels, detection.blind(old + new, labels)) > 0.9
    with pytest.raises(ValueError, match="one class has 1 texts"):
        detection.blind(["a", "b", "c"], [1, 0, 0])


def test_blind_reads_characters_where_words_are_not_apart():
    draw = np.random.default_rng(0)
    letters = list("天地玄黄宇宙洪荒日月盈昃辰宿列张")

    def text(mark):  # ten characters around a mark, without a space: as one word, no two texts share it
        start = "".join(draw.choice(letters, 5))
        return start + mark + "".join(draw.choice(letters, 5))

    labels = [1] * 40 + [0] * 40
    for marks in (("新", "旧"), ("さ", "カ")):
        texts = [text(mark) for mark in marks for _ in range(40)]
        assert metrics.auroc(labels, detection.blind(texts, labels)) > 0.9


def test_missing_texts_and_labels_are_left_out():
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(30)]
    labels, scores = [1, 0, 1] * 10, rng.normal(size=30)
    more = [*texts, None, "", "the fox", "the dog"]
    found = detection.evaluate(
        {"min_k": [*scores, np.nan, np.nan, 9, -9]}, [*labels, 1, 0, None, float("nan")], more, resamples=5
    )
    assert found == detection.evaluate({"min_k": scores}, labels, texts, resamples=5)
    assert found["min_k"]["texts"] == found[detection.BLIND]["texts"] == 30
    assert np.isnan(detection.blind(more, [*labels, 1, 0, None, float("nan")])[30:]).all()


def test_what_is_evaluated_is_checked():
    values, labels = [1.0, 2.0, 3.0, 4.0], [1, 0, 1, 0]
    for call, message in (
        (lambda: detection.evaluate({"loss": values}, ["yes", "no"] * 2), "labels are not numbers .*: pass 1"),
        (lambda: detection.evaluate({"loss": values[:3]}, labels), "loss has 3 entries, labels 4"),
        (lambda: detection.evaluate({"loss": values}, labels, ["a"]), "texts has 1 entries, labels 4"),
        (lambda: detection.evaluate({"loss": values}, labels, resamples=1.5), "resamples is 1.5"),
        (lambda: detection.blind(["a", "b"] * 2, labels, folds=1), "folds is 1: choose"),
        (lambda: CountedText(documents=1.5), "documents is 1.5"),
        (lambda: CountedText(max_tokens=float("nan")), "max_tokens is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_blind_is_fair_where_there_is_nothing_to_see():
    """Mean AUROC over 40 sets, half of whose texts come twice: nobody sees the label of the text it judges."""
    labels, found = [1] * 20 + [0] * 20, []
    for _ in range(40):
        kinds = [" ".join(rng.choice(WORDS, 3)) for _ in range(20)]
        texts = list(rng.permutation(kinds + kinds))
        found.append(metrics.auroc(labels, detection.blind(texts, labels)))
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / 40**0.5


# token frequencies


class Letters:
    """A tokenizer of single letters."""

    is_fast = False

    def __call__(self, texts, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [[ord(letter) - 97 for letter in text] for text in texts]}

    def get_vocab(self):
        return {chr(97 + i): i for i in range(3)}


def test_counts_are_of_tokens():
    assert count(iter(["bbb", "bc", ""]), Letters(), 4).tolist() == [0, 4, 1, 0]  # not once a document
    assert count(["bbb"] * 700, Letters(), 3, max_tokens=2).tolist() == [0, 1400, 0]  # over batches, documents cut
    q = smoothed(np.array([0, 4, 1, 0]))
    assert q.sum() == pytest.approx(1) and q[0] == 1 / 9 and q.dtype == torch.float64
    with pytest.raises(ValueError, match="vocabulary is 2 but the tokenizer returned id 2"):
        count(["abc"], Letters(), 2)


def test_counts_are_cached_by_what_they_depend_on(tmp_path, monkeypatch):
    from hf_xent.detection import counts as module

    counted = []
    monkeypatch.setattr(module, "count", lambda *a: counted.append(1) or count(*a))
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "other": "fox"}) for text in TEXTS))
    tokenizer = tiny_tokenizer()

    def ask(tokenizer=tokenizer, vocabulary=V, **changes):
        return frequencies(tokenizer, CountedText(str(file), **changes), vocabulary=vocabulary, progress=False)

    first = ask()
    tokenizer("the dog", truncation=True, max_length=1, padding="max_length")  # changes the tokenizer's state
    assert torch.equal(ask(), first) and len(counted) == 1
    assert first.argmax() == count(TEXTS, tokenizer, V).argmax() and first.shape == (V,)
    for i, changed in enumerate(
        (
            {"tokenizer": tiny_tokenizer("a lazy dog " * 9)},
            {"vocabulary": V + 1},
            {"documents": 3},
            {"max_tokens": 2},
            {"column": "other"},
            {"split": "train[:2]"},
            {"revision": "abc"},
        )
    ):
        ask(**changed)
        ask(**changed)
        assert len(counted) == i + 2, changed
    file.write_text(json.dumps({"text": "dog"}))
    ask()
    assert len(counted) == 9


def test_counts_in_the_cache_are_found_before_rows_are_looked_at(tmp_path, monkeypatch):
    (tmp_path / "ca01").write_text("The/at fox/nn jumps/vbz ./.")
    looked, real = [], Brown.unify
    monkeypatch.setattr(Brown, "unify", lambda *args: looked.append(1) or real(*args))
    first, again = (frequencies(tiny_tokenizer(), f"brown:{tmp_path}", vocabulary=V, progress=False) for _ in range(2))
    assert torch.equal(first, again) and looked == [1]
    assert torch.equal(first, smoothed(count(["The fox jumps ."], tiny_tokenizer(), V)))


def test_a_corpus_that_holds_no_text_is_refused(tmp_path, monkeypatch):
    import datasets

    rows = iter([{"body": 5}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    ask = lambda **options: frequencies(tiny_tokenizer(), CountedText(**options), vocabulary=V, progress=False)  # noqa: E731
    with pytest.raises(ValueError, match="some/corpus has no column 'text': choose one of body"):
        ask(source="some/corpus")
    rows = iter([{"body": 5}])
    with pytest.raises(ValueError, match="some/corpus holds int, not text, in its column 'body'"):
        ask(source="some/corpus", column="body")
    for options, message in (({"documents": 0}, "documents is 0"), ({"max_tokens": 0}, "max_tokens is 0")):
        with pytest.raises(ValueError, match=message):
            ask(**options)
    with pytest.raises(ValueError, match=r"no file absent\.txt"):
        ask(source="absent.txt")


def test_callback_evaluates_before_and_between(tmp_path):
    """Once the members alone are trained on, they are told from the others; before, the model is its own reference."""
    from hf_xent.callbacks.membership import MembershipCallback

    model, tokenizer, labels = tiny(), tiny_tokenizer(), [1, 0] * 9
    scorer = TextScorer(model, tokenizer, ("loss", "zlib"), progress=False)
    watch = MembershipCallback(scorer, TEXTS, labels, epochs=(1, 3), resamples=2)
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for _, ids in scorer.tokenize(TEXTS[::2])])
    config = hf_xent.XentConfig(
        str(tmp_path), num_train_epochs=4, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        per_device_train_batch_size=1,
    )  # fmt: skip
    hf_xent.XentTrainer(model, config, train_dataset=rows, callbacks=[watch]).train()
    assert list(watch.results) == [0, 1, 3] and list(watch.results[3]) == ["loss", "zlib", *COMPARED, detection.BLIND]
    assert all(watch.results[0][name]["auroc"] == 0.5 for name in COMPARED)
    assert (
        watch.results[3]["reference"]["auroc"] > 0.6
        and watch.results[3][detection.BLIND] == watch.results[0][detection.BLIND]
    )
    with pytest.warns(DeprecationWarning, match="found is now results"):
        assert watch.found is watch.results
    alone = MembershipCallback(TextScorer(model, tokenizer, ("zlib",), progress=False), TEXTS, labels, (), resamples=2)
    assert list(alone.results[0]) == ["zlib", detection.BLIND]


def test_a_registered_corpus_may_have_a_configuration(tmp_path):
    (tmp_path / "ca01").write_text("The/at fox/nn jumps/vbz ./.")
    assert CountedText(f"brown:{tmp_path}").open().rows()["text"][:] == ["The fox jumps ."]


def test_the_old_name_of_counted_text_still_works():
    from hf_xent.detection import counts

    for module, path in ((detection, "detection"), (counts, "detection.counts")):
        with pytest.warns(
            DeprecationWarning, match=rf"hf_xent.{path}.Corpus is now hf_xent.detection.counts.CountedText"
        ):
            assert module.Corpus is CountedText


def test_a_hub_corpus_is_streamed(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(*args, **kwargs):
        asked.update(kwargs, args=args)
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    q = frequencies(
        tiny_tokenizer(), CountedText("allenai/c4:en", revision="abc", documents=2), vocabulary=V, progress=False
    )
    assert asked == {"args": ("allenai/c4", "en"), "split": "train", "revision": "abc", "streaming": True}
    assert torch.equal(q, smoothed(count(TEXTS[:2], tiny_tokenizer(), V)))


def test_fingerprints_tell_tokenizers_apart():
    assert (
        fingerprint_tokenizer(tiny_tokenizer())
        == fingerprint_tokenizer(tiny_tokenizer())
        != fingerprint_tokenizer(tiny_tokenizer("dog " * 9))
    )
    assert fingerprint_tokenizer(Letters()) == fingerprint_tokenizer(Letters())


# evaluate


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auroc", {}),
        ("tpr_at_fpr", {"fpr": 0.2}),
        ("fpr_at_tpr", {"tpr": 0.5}),
        ("pauc", {}),
        ("tpauc", {"min_tpr": 0.2}),
    ],
)
def test_evaluate_modules(name, options, tmp_path):
    scores, labels = [0.9, 1 - 1e-9, 1.0, 0.2], [0, 0, 1, 1]
    module = evaluate.load(str(modules.path(name)), cache_dir=str(tmp_path))
    assert module.name == name and "label" in module.inputs_description
    found = module.compute(predictions=scores, references=labels, **options)
    assert found == {name: getattr(metrics, name)(labels, scores, **options)}
    with pytest.raises(ValueError, match="name is 'nonesuch': choose one of auroc, "):
        modules.path("nonesuch")


# the command line


@pytest.fixture
def folder(tmp_path):
    """A tiny model, and labeled texts of which one is empty."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny(std=0.05).save_pretrained(tmp_path / "model")
    rows = [{"text": text, "kind": "human" if i % 2 else "machine"} for i, text in enumerate([*TEXTS, ""])]
    Dataset.from_list(rows).to_json(tmp_path / "texts.jsonl")
    return tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_cli_scores_members(folder, suffix):
    output = folder / f"scores{suffix}"
    result = invoke(
        *("detect", "members", folder / "texts.jsonl", "--model", folder / "model", "--output", output, "--json"),
        *("--scores", "loss; min_k:k=0.3", "--label", "kind", "--positive", "machine", "--resamples", 20),
    )
    summary = json.loads(result.stdout)
    assert list(summary["metrics"]) == ["loss", "min_k:k=0.3", "blind"] and summary["unscored"] == 1
    assert summary["higher_is"] == {"loss": "non-member", "min_k:k=0.3": "member"} and summary["texts"] == 19
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    stored = json.loads(Path(summary["report"]).read_text())
    assert stored["run"]["label"] == "kind" and stored["summary"]["metrics"] == summary["metrics"]
    areas = {name: auc(curve["fpr"], curve["tpr"]) for name, curve in stored["roc"].items()}
    assert areas == pytest.approx({name: summary["metrics"][name]["auroc"] for name in areas}) and len(areas) == 2
    readers = {".csv": pandas.read_csv, ".parquet": pandas.read_parquet}
    table = readers.get(suffix, lambda f: pandas.read_json(f, lines=suffix == ".jsonl"))(output)
    assert list(table.columns) == ["text", "kind", "loss", "min_k:k=0.3"] and table["loss"].isna().sum() == 1
    expected = scored(model=tiny(std=0.05), scores=("loss",))["loss"]
    np.testing.assert_allclose(table["loss"][:18], expected, rtol=1e-5)


def test_cli_writes_other_columns_as_they_are(folder):
    number, day = 0.12345678901234, datetime.date(2024, 1, 31)
    Dataset.from_list([{"text": text, "number": number * 1e-3, "day": day} for text in TEXTS]).to_parquet(
        folder / "texts.parquet"
    )
    for suffix in (".jsonl", ".json"):
        output = folder / f"scores{suffix}"
        invoke(
            *("detect", "members", folder / "texts.parquet", "--model", folder / "model", "--scores", "loss"),
            *("--output", output),
        )
        text = output.read_text()
        written = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        assert [row["text"] for row in written] == TEXTS
        np.testing.assert_allclose([row["number"] for row in written], number * 1e-3, rtol=1e-11)
        assert {row["day"][:10] for row in written} == {"2024-01-31"}


def test_cli_scores_generated_with_two_models(folder):
    result = invoke(
        *("detect", "generated", folder / "texts.jsonl", "--model", folder / "model", "--reference", folder / "model"),
        *("--output", folder / "s.csv", "--label", "kind", "--positive", "machine", "--resamples", 20),
    )
    assert "binoculars" in result.stdout and "generated" in result.stdout and "1 texts without a token" in result.stdout
    assert "blind" not in result.stdout and (folder / "s.png").exists()


def interrupted_at_the_third(monkeypatch):
    """Has the third call of any scorer interrupted; returns how many texts each call had, as they come."""
    calls, whole = [], TextScorer.__call__

    def interrupted(self, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, texts)

    monkeypatch.setattr(TextScorer, "__call__", interrupted)
    return calls


def test_cli_goes_on_where_it_stopped(folder, monkeypatch):
    command = ("detect", "members", folder / "texts.jsonl", "--model", folder / "model", "--output", folder / "s.csv")
    command = (*command, "--batch-size", 1, "--scores", "loss")
    calls, others = interrupted_at_the_third(monkeypatch), threading.enumerate()
    assert invoke(*command).exit_code != 0 and not (folder / "s.csv").exists()
    ours = [thread for thread in threading.enumerate() if thread not in others]
    # the thread that follows the loop is waited for; the one that draws ends by itself
    assert not [thread for thread in ours if type(thread).__name__ == "_TrackThread"]
    invoke(*command)
    # 19 texts: the first chunk came again to be compared, and the third to be done
    assert calls == [4, 4, 4, 4, 4, 4, 3] and not list(folder.glob(".s.csv*"))
    first = pandas.read_csv(folder / "s.csv")
    invoke(*command)
    pandas.testing.assert_frame_equal(pandas.read_csv(folder / "s.csv"), first, rtol=1e-5)
    assert len(calls) == 12


@pytest.mark.parametrize("changed", ["model", "tokenizer", "texts"])
def test_cli_begins_anew_where_what_lies_at_a_path_is_another(changed, folder, monkeypatch):
    command = ("detect", "members", folder / "texts.jsonl", "--model", folder / "model", "--output", folder / "s.csv")
    calls, model, tokenizer, texts = (
        interrupted_at_the_third(monkeypatch),
        tiny(std=0.05),
        tiny_tokenizer(),
        [*TEXTS, ""],
    )
    assert invoke(*command, "--batch-size", 1, "--scores", "loss").exit_code != 0
    if changed == "model":
        model = tiny(std=0.06)
        model.save_pretrained(folder / "model")
    elif changed == "tokenizer":
        tokenizer = tiny_tokenizer("a lazy dog over the fox " * 9)
        tokenizer.save_pretrained(folder / "model")
    else:
        texts = [*texts[:17], "the fox", "a"]
        Dataset.from_dict({"text": texts}).to_json(folder / "texts.jsonl")
    calls[:] = [0] * 5
    invoke(*command, "--batch-size", 1, "--scores", "loss")
    assert calls[5:] == [4, 4, 4, 4, 3]
    found, expected = pandas.read_csv(folder / "s.csv")["loss"], scored(texts, model, tokenizer, ("loss",))["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_settings_do_not_tell_begins_anew_too(tmp_path):
    """A device, a library: the first chunk comes out otherwise."""
    scorer, texts = TextScorer(tiny(), tiny_tokenizer(), ("loss",), batch_size=1, progress=False), TEXTS[:9]
    draft, expected = tmp_path / "draft", scorer(TEXTS[:9])["loss"]
    for before, chunks in ((expected, 2), (expected + 1e-2, 0)):
        lines = [json.dumps({"loss": before[i : i + 4].tolist()}) for i in (0, 4)]
        draft.write_text("\n".join(["settings", *lines, ""]))
        calls = []

        class Counted:
            scores, batch_size = scorer.scores, scorer.batch_size

            def __call__(self, texts, calls=calls):
                calls.append(len(texts))
                return scorer(texts)

        np.testing.assert_allclose(score_in_chunks(Counted(), texts, "settings", draft)["loss"], expected, rtol=1e-5)
        assert calls == ([4, 1] if chunks else [4, 4, 4, 1])


def test_cli_leaves_texts_without_words_or_label_out_of_the_metrics(folder):
    table = pandas.DataFrame({"text": TEXTS, "id": [f"{i:03}" for i in range(18)], "member": ["1", "0"] * 9})
    table.to_csv(folder / "full.csv", index=False)
    table.loc[4, "text"], table.loc[[5, 6], "member"] = "", ""
    table.to_csv(folder / "some.csv", index=False)
    options = ("--model", folder / "model", "--label", "member", "--scores", "loss", "--resamples", 5, "--json")
    found = json.loads(invoke("detect", "members", folder / "some.csv", *options, "--output", folder / "s.CSV").stdout)
    assert found["unscored"] == 1 and found["unlabeled"] == 2
    assert found["metrics"]["loss"]["texts"] == found["metrics"]["blind"]["texts"] == 15
    written = pandas.read_csv(folder / "s.CSV", dtype=str, keep_default_na=False)
    assert written["id"].tolist() == table["id"].tolist() and written["text"].tolist() == table["text"].tolist()
    kept = [i for i in range(18) if i not in (4, 5, 6)]
    expected = metrics.auroc([1 - i % 2 for i in kept], -written["loss"][kept].astype(float))
    assert found["metrics"]["loss"]["auroc"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        ([1, 0], None), ([1.0, 0.0], "1"), ([True, False], "true"), (["True", "false"], None), (["1.0", "0"], "1"),
        (["yes", "no"], "yes"), ([2, 10], "2.0"), ([1, None], None), (["Yes", "NO"], "yes"), (["1", " "], None),
        (["1", "nan"], None),
    ],
)  # fmt: skip
def test_labels_are_compared_by_what_they_say(values, positive):
    missing = values[1] in (None, " ", "nan")
    labels = [*values, *values, values[0], type(values[0])(0)] if missing else values * 3
    rows = Dataset.from_dict({"text": ["the fox", "a dog"] * 3, "label": labels})
    found = binary_labels(rows, "text", "label", positive or "1")
    expected = [1, np.nan, 1, np.nan, 1, 0] if missing else [1, 0] * 3
    np.testing.assert_array_equal(found, expected)


def test_cli_refuses_early(folder):
    texts = folder / "texts.jsonl"
    (folder / "taken.csv").write_text("text,loss,min_k:k=0.1\nthe quick,1,2\nlazy dog,2,3\n")
    (folder / "in").mkdir()
    (folder / "in" / "a.csv").write_text("text\nthe quick\n")
    (folder / "few.csv").write_text("text,label\nthe quick,1\nlazy dog,0\n,1\n,0\na fox,0\n")
    for arguments, message in (
        (("--output", "scores.xls"), "output is scores.xls: give it one of the suffixes .csv"),
        (("--label", "nonesuch"), "label is 'nonesuch': choose one of text, kind"),
        (("--label", "kind"), "positive is '1', but column 'kind' has human, machine"),
        (("--column", "nonesuch"), "has no column 'nonesuch'"),
        (("--scores", "nonesuch"), "score is 'nonesuch'"),
        (("--scores", " ; "), "scores is ' ; ': name at least one"),
        (("--scores", "min_k:k=20"), "k is 20: choose a share"),
        (("--dtype", "int8"), "dtype is 'int8': choose auto, float32"),
        (("--output", folder), "give it one of the suffixes"),
        (("--output", texts), r"texts.jsonl, which is \(in\) the source"),
        (("--positive", "machine"), "positive is 'machine', without --label: leave it out"),
        (("--resamples", 5), "resamples is 5, without --label"),
        (("--scores", "loss", "--documents", 3), "documents is 3, but no score counts tokens"),
        (("--scores", "loss", "--corpus", "pydoc"), "corpus is 'pydoc', but no score counts tokens"),
        (("--scores", "loss", "--reference", "nothing/here"), "reference is 'nothing/here', but no score compares"),
    ):
        with pytest.raises(ValueError, match=message):
            invoke("detect", "members", texts, "--model", "nothing/here", "--output", folder / "s.csv", *arguments)
    for name, arguments, message in (
        ("taken.csv", ("--scores", "perplexity; loss"), "already has a column 'loss'"),
        ("taken.csv", ("--scores", "min_k:k=0.1"), "already has a column 'min_k:k=0.1'"),
        ("in", ("--output", folder / "in" / "s.csv"), r"s.csv, which is \(in\) the source"),
        (
            "few.csv",
            ("--label", "label"),
            "label 'label' has 1 positive and 2 negative texts: 2 of each class are needed",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            invoke(
                "detect", "members", folder / name, "--model", "nothing/here", "--output", folder / "s.csv", *arguments
            )
    assert not (folder / "s.csv").exists()
