"""Representation geometry: closed forms, invariances, streaming, the bootstrap's coverage, features and curves."""

import math
import warnings

import numpy as np
import peft
import pytest
import torch

from hf_xent.callbacks.geometry import write_rows
from hf_xent.experiments.geometry import change, draw_curves, read_curve, table
from hf_xent.metrics.geometry import (
    MEASURES,
    alpha_req,
    by_layer,
    measures,
    rankme,
    singular_rankme,
    spectrum,
    usable_ranks,
    warn_if_few,
)  # fmt: skip
from hf_xent.metrics.moments import Moments
from hf_xent.metrics.resampling import bootstrap_sd
from hf_xent.models.features import Documents
from support.models import tiny, tiny_tokenizer


def drawn(rows=90, width=40, decay=0.7, seed=0, mean=1.0):
    """Normal features whose covariance has the eigenvalues i^-2 decay."""
    scale = np.arange(1, width + 1) ** -decay
    return np.random.default_rng(seed).normal(size=(rows, width)) * scale + mean


def with_spectrum(eigenvalues, rows, seed=0):
    """Centred features whose covariance has exactly these eigenvalues."""
    rng = np.random.default_rng(seed)
    width = len(eigenvalues)
    left = np.linalg.qr(np.column_stack([np.ones(rows), rng.normal(size=(rows, width))]))[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return left * np.sqrt(np.asarray(eigenvalues) * (rows - 1)) @ right


def test_isotropic_features_have_all_directions():
    exact = with_spectrum(np.ones(30), rows=64)
    assert rankme(spectrum(exact)) == pytest.approx(30, rel=1e-4)  # 30 terms of 1e-7
    ratios = [rankme(spectrum(np.random.default_rng(0).normal(size=(m, 30)))) / 30 for m in (60, 300, 3000)]
    assert ratios == sorted(ratios) and ratios[-1] > 0.99


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_features_of_a_rank_have_at_most_that(rank):
    rng = np.random.default_rng(rank)
    values = spectrum(rng.normal(size=(50, rank)) @ rng.normal(size=(rank, 24)))
    noise = math.exp(-24 * 1e-7 * math.log(1e-7))  # what the 24 terms of 1e-7 can add
    assert usable_ranks(values) == rank and rankme(values) <= rank * noise
    assert rankme(np.ones(rank)) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize(("first", "last"), [(12, 100), (1, 20), (30, 60)])
def test_a_power_law_is_found_whatever_the_window(first, last):
    values = np.arange(1, 121) ** -1.5
    before = values.copy()
    for _ in range(2):  # the published function shifts its window at every call
        found = alpha_req(values, first, last)
        assert found.alpha == pytest.approx(1.5, rel=1e-12) and found.r2 == pytest.approx(1, abs=1e-12)
    assert (values == before).all()
    assert measures(with_spectrum(values, rows=200))["alpha"] == pytest.approx(1.5, rel=1e-8)


def test_alpha_is_a_weighted_line():
    """Against numpy's polynomial fit, whose weights multiply the residuals; the window is of ranks 12 to 100."""
    values = np.sort(np.random.default_rng(0).lognormal(size=130))[::-1]
    ranks = np.arange(12, 101)
    slope, _ = np.polyfit(np.log(ranks), np.log(values[11:100]), 1, w=ranks**-0.5)
    assert alpha_req(values).alpha == pytest.approx(-slope, rel=1e-10)
    fitted = np.polyval(np.polyfit(np.log(ranks), np.log(values[11:100]), 1, w=ranks**-0.5), np.log(ranks))
    y = np.log(values[11:100])
    total = ((y - np.average(y, weights=1 / ranks)) ** 2 / ranks).sum()
    assert alpha_req(values).r2 == pytest.approx(1 - ((y - fitted) ** 2 / ranks).sum() / total, rel=1e-10)


@pytest.mark.parametrize("rows", [25, 90])
def test_both_variants_equal_their_papers_formulas(rows):
    """RankMe of scikit-learn's explained variance, as the paper's code; of torch's singular values, as the original."""
    from sklearn.decomposition import PCA

    features = drawn(rows)
    p = PCA(svd_solver="full").fit(features).explained_variance_ratio_ + 1e-7
    assert rankme(spectrum(features)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-8)
    s = torch.linalg.svdvals(torch.tensor(features))
    q = s / s.sum() + 1e-7
    found = singular_rankme(spectrum(features, centred=False))
    assert found == pytest.approx((-(q * q.log()).sum()).exp().item(), rel=1e-8)
    np.testing.assert_allclose(spectrum(features, centred=False), s.numpy() ** 2, rtol=1e-9)


def test_rotations_and_scales_change_nothing():
    features = drawn()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    expected = measures(features)
    for other in (features @ rotation, 1e3 * features, features[::-1]):
        assert measures(other) == pytest.approx(expected, rel=1e-8)
    moved = measures(features + 5)
    assert moved["rankme"] == pytest.approx(expected["rankme"]) and moved["alpha"] == pytest.approx(expected["alpha"])
    assert moved["singular_rankme"] < expected["singular_rankme"], "the original does not centre"


def test_moments_stream():
    features = drawn(91, mean=1e4)  # a mean that would cost a difference of sums 8 digits
    sums = Moments()
    for part in np.split(features, [0, 1, 30, 77]):
        sums.add(part)
    np.testing.assert_allclose(sums.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.covariance(), np.cov(features.T), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(sums.products(), features.T @ features, rtol=1e-12)
    assert measures(sums)["alpha"] == pytest.approx(measures(features)["alpha"], rel=1e-6)
    streamed = by_layer([{0: features[:50], -1: features[:50]}, {0: features[50:], -1: features[50:]}])
    kept = by_layer([{0: features[:50]}, {0: features[50:]}], resamples=3)
    assert streamed[0] == streamed[-1] == pytest.approx({name: kept[0][name] for name in streamed[0]}, rel=1e-6)
    assert all(kept[0][f"{name}_sd"] > 0 for name in MEASURES)


def test_collapsed_features_have_no_alpha():
    rng = np.random.default_rng(0)
    found = measures(rng.normal(size=(60, 5)) @ rng.normal(size=(5, 40)))
    assert math.isnan(found["alpha"]) and math.isnan(found["alpha_r2"]) and found["rankme"] < 5.01


def test_what_is_no_measure_is_refused():
    for features, message in (
        (drawn(1), "1 rows: a spectrum needs at least 2"),
        (Moments(), "0 rows: a spectrum needs at least 2"),
        (np.full((4, 3), np.nan), "4 rows with numbers that are not finite"),
        (np.ones(5), r"shape \(5,\): pass a matrix"),
        (np.ones((5, 4)), "the same for all documents"),
    ):
        with pytest.raises(ValueError, match=message):
            rankme(spectrum(features))
    with pytest.raises(ValueError, match=r"the spectrum has 20 ranks above rounding errors, so 12 to 20 are fewer"):
        alpha_req(np.arange(1, 21) ** -1.0)
    with pytest.raises(ValueError, match="first is 0"):
        alpha_req(np.ones(40), first=0)
    with pytest.raises(ValueError, match="rows have 3 columns, the rows before 40"):
        Moments().add(drawn()).add(np.ones((2, 3)))
    with pytest.raises(ValueError, match="resamples is 1"):
        bootstrap_sd(np.mean, drawn(), resamples=1)
    with pytest.raises(ValueError, match=r"rows number \[90, 5\]: pass arrays of the same documents"):
        bootstrap_sd(np.mean, drawn(), drawn(5))


def test_limits_are_told():
    with pytest.warns(UserWarning, match="features have 40 columns: alpha-ReQ's window ends there, not at 100"):
        warn_if_few(100, 40)
    with pytest.warns(UserWarning, match="documents number 200, less than twice the width 128"):
        warn_if_few(200, 128)
    with pytest.raises(ValueError, match="so 19 ranks"):
        warn_if_few(20, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few(256, 128)


def test_standard_deviations_cover_and_percentiles_do_not():
    """95 % intervals for the RankMe that is expected of as many documents, in 40 draws."""
    truth = np.mean([rankme(spectrum(drawn(60, 24, 0.3, seed=1000 + i))) for i in range(300)])
    covered = {"sd": 0, "percentiles": 0}
    for seed in range(40):
        features, resampled = drawn(60, 24, 0.3, seed=seed), []
        value = rankme(spectrum(features))
        sd = bootstrap_sd(lambda rows: resampled.append(rankme(spectrum(rows))) or resampled[-1], features)  # noqa: B023  called at once
        low, high = np.quantile(resampled, [0.025, 0.975])
        covered["sd"] += abs(value - truth) <= 1.96 * sd
        covered["percentiles"] += low <= truth <= high
    assert covered["sd"] >= 36 and covered["percentiles"] <= 4


def test_bootstrap_of_a_mean_is_its_standard_error_and_pairs_rows():
    x = np.random.default_rng(0).normal(size=(400, 1))
    assert bootstrap_sd(np.mean, x, resamples=400) == pytest.approx(x.std() / 20, rel=0.1)
    assert bootstrap_sd(lambda a, b: np.mean(a - b), x, x + 2, resamples=10) == pytest.approx(0, abs=1e-12)


TEXTS = ["the quick brown fox", "the lazy dog jumps over the fox", "over", "brown dog </s>"] * 3


def one_by_one(model, rows, layer):
    with torch.no_grad():
        states = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0, -1] for row in rows]
    return torch.stack(states).double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_features_are_those_of_the_last_token(name, side):
    """Against single documents without padding; the tokenizer pads on either side, with EOS, which is in a document."""
    model, tokenizer = tiny(name), tiny_tokenizer()
    tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token = side, side, tokenizer.eos_token
    documents = Documents(TEXTS, tokenizer, batch_size=5, max_length=6)
    assert any(row[-1] == tokenizer.eos_token_id for row in documents.rows) and max(map(len, documents.rows)) == 6
    batches = list(documents.features(model, layers=(-1, 0, 1)))
    assert [len(batch[0]) for batch in batches] == [5, 5, 2]
    for layer in (-1, 0, 1):
        found = torch.cat([batch[layer] for batch in batches])
        torch.testing.assert_close(found, one_by_one(model, documents.rows, layer), rtol=1e-4, atol=1e-5)
    last = torch.cat([batch[-1] for batch in batches])
    decoder = model.get_decoder()(torch.tensor([documents.rows[1]])).last_hidden_state[0, -1]
    torch.testing.assert_close(last[1], decoder.double(), rtol=1e-4, atol=1e-5)


def test_features_leave_the_mode_and_read_adapters():
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    documents = Documents([[5, 6, 7], [8, 9]])
    model.train()
    first, second = (next(documents.features(model))[-1] for _ in range(2))
    assert model.training and torch.equal(first, second), "no dropout"
    with model.disable_adapter():
        assert (next(documents.features(model))[-1] - first).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"layers is \(3,\): choose from -3 to 2"):
        next(documents.features(model, layers=(3,)))


def test_documents_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        Documents(TEXTS)
    with pytest.raises(ValueError, match=r"without tokens are \[1\]"):
        Documents([[1], []])
    with pytest.raises(ValueError, match="texts number 0"):
        Documents([])
    with pytest.raises(ValueError, match="max_length is 0"):
        Documents(TEXTS, tiny_tokenizer(), max_length=0)
    with pytest.raises(ValueError, match="max_length is 65, but the model has 64 positions"):
        next(Documents([[1] * 65]).features(tiny("gpt2")))


def test_changes_are_paired():
    features = drawn()
    same = change(features, features, resamples=5)
    assert all(same[name][1:] == (0, 0) for name in MEASURES)
    wider = change(features, drawn(decay=0.4), resamples=20)
    before, moved, spread = wider["rankme"]
    assert before == measures(features)["rankme"] and moved > 3 * spread > 0 > wider["alpha"][1]


def test_curves_and_tables(tmp_path):
    values = {"documents": 9, "singular_rankme": 2.0, "alpha": 1.0, "alpha_r2": 1.0}
    rows = [
        {"step": s, "tokens": 10 * s, "layer": -1, "rankme": r, **values} for s, r in ((0, 5.0), (1, 3.0), (2, 8.0))
    ]
    bands = [row | {"rankme_sd": 0.5, "alpha_sd": 0.1} for row in rows]
    write_rows(tmp_path / "a.csv", rows)
    write_rows(tmp_path / "b.csv", bands)
    assert read_curve(tmp_path / "a.csv")["tokens"].tolist() == [0, 10, 20]
    arms = {"text": [tmp_path / "a.csv", tmp_path / "b.csv"]}
    assert draw_curves(arms, tmp_path / "c.png").stat().st_size > 5000
    assert "| text | 1 | 5 ± 0.98 | 3 ± 0.98 (10) | 8 ± 0.98 (20) | 8 ± 0.98 |" in table(arms)
    collapsed = [row | {"alpha": math.nan, "alpha_sd": math.nan} for row in bands]
    write_rows(tmp_path / "a.csv", collapsed)
    draw_curves({"text": [tmp_path / "a.csv"]}, tmp_path / "c.png")
    assert "| text | 0 | nan ± nan | nan ± nan (0) |" in table({"text": [tmp_path / "a.csv"]}, "alpha")
    with pytest.raises(ValueError, match="layer is 3, of which"):
        read_curve(tmp_path / "a.csv", layer=3)
