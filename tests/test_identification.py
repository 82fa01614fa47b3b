"""Verification, closed-set and open-set identification: embeddings worked by hand, and loops over thresholds."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_xent.metrics import ranking
from hf_xent.metrics.identification import (
    closed_set,
    equal_error_rate,
    open_set,
    pairs,
    similarities,
    verification,
)


def at(*degrees):
    """Embeddings in the plane, of lengths that do not matter."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, len(degrees) + 1)[:, None]


def test_cosines_and_pairs_in_the_plane():
    np.testing.assert_allclose(similarities(at(0, 90), at(0, 60, 180)), [[1, 0.5, -1], [0, 0.75**0.5, 0]], atol=1e-12)
    labels, scores = pairs(at(0, 60, 90), ["a", "b", "a"])
    assert labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(scores, [0.5, 0, 0.75**0.5], atol=1e-12)


def test_verification_by_hand():
    """Pairs of one identity are 10, 50, 40 and 5 degrees apart, those of two 30, 35, 20, 25, 20 and 15."""
    embeddings, names = at(0, 10, 50, 30, 35), np.array(["a", "a", "a", "b", "b"])
    found = verification(embeddings, names, rates=(0.0, 0.4, 1.0))
    assert list(found) == ["auroc", "eer", "tar@0%far", "tar@40%far", "tar@100%far"]
    assert found["auroc"] == 0.5, "two of the four are before all others, two behind"
    assert (found["tar@0%far"], found["tar@40%far"], found["tar@100%far"]) == (0.5, 0.5, 1)
    assert found["eer"] == pytest.approx(0.5), "half are accepted before 3 of the 6 others are"
    perfect = verification(at(0, 1, 90, 91), [3, 3, 7, 7])
    assert perfect == {"auroc": 1, "eer": 0, "tar@1%far": 1, "tar@10%far": 1}


def test_equal_error_rate_is_where_the_curves_cross():
    assert equal_error_rate([1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1]) == pytest.approx(0.5)
    assert equal_error_rate([1, 1, 0, 0], [0.5] * 4) == pytest.approx(0.5), "chance: one step from corner to corner"
    assert equal_error_rate([1, 0], [0, 1]) == 1
    # FAR 1/3 at TAR 1/2, then TAR 1: the curve rises at FAR 1/3 through 1 - TAR = 1/3
    assert equal_error_rate([1, 1, 0, 0, 0], [5, 3, 4, 2, 1]) == pytest.approx(1 / 3)
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 2000), rng.normal(size=2000)
    scores += 2 * labels
    gaps = [abs((scores[labels == 0] >= t).mean() - (scores[labels == 1] < t).mean()) for t in np.sort(scores)]
    threshold = np.sort(scores)[int(np.argmin(gaps))]
    assert equal_error_rate(labels, scores) == pytest.approx((scores[labels == 0] >= threshold).mean(), abs=1e-3)


GALLERY = at(0, 20, 90, 180), np.array(["a", "a", "b", "c"])


def test_closed_set_by_hand():
    """The best entry of an identity counts: 40 is nearer to a's 20 than to b's 90, although farther from a's 0."""
    probes, names = at(40, 80, 30, 140, 170), np.array(["a", "b", "b", "b", "c"])
    assert closed_set(*GALLERY, probes, names, ranks=(1, 2, 3)) == {"rank-1": 0.6, "rank-2": 1.0, "rank-3": 1.0}
    assert closed_set(*GALLERY, at(250), ["a"], ranks=(1, 2, 3)) == {"rank-1": 0, "rank-2": 1, "rank-3": 1}
    tied = closed_set([[1, 0], [0, 1]], ["a", "b"], [[1, 1]], ["a"], ranks=(1, 2))
    assert tied == {"rank-1": 0, "rank-2": 1}, "a tie counts against the probe"


def test_open_set_by_hand():
    """The unknown are 35 and 5 degrees from their best identity, so FAR 50 % accepts what is nearer than 35."""
    probes = at(40, 84, 60, 178, 125, 185)
    names = np.array(["a", "b", "a", "c", "x", "y"])  # 20 and right, 6 and right, 30 and b, 2 and right
    found = open_set(*GALLERY, probes, names, rates=(0, 0.5, 1))
    assert found == {"auroc": 5 / 8, "dir@0%far": 0.25, "dir@50%far": 0.75, "dir@100%far": 0.75}


def test_open_set_against_a_loop_over_thresholds():
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(6, 5))
    draw = lambda names: centers[names] + 0.9 * rng.normal(size=(len(names), 5))  # noqa: E731
    gallery_names, names = np.repeat(np.arange(4), 3), np.repeat(np.arange(6), 20)
    gallery, probes = draw(gallery_names), draw(names)
    similar = similarities(probes, gallery)
    known = names < 4
    found = open_set(gallery, gallery_names, probes, names, (0.05, 0.1, 0.3))
    for rate in (0.05, 0.1, 0.3):
        best = 0.0
        for threshold in similar.max(1):
            if (similar[~known].max(1) >= threshold).mean() <= rate:
                nearest = gallery_names[similar[known].argmax(1)]
                right = (nearest == names[known]) & (similar[known].max(1) >= threshold)
                best = max(best, right.mean())
        assert found[f"dir@{100 * rate:g}%far"] == pytest.approx(best)
    assert found["auroc"] == ranking.auroc(known, similar.max(1))
    closed = closed_set(gallery, gallery_names, probes[known], names[known], ranks=(1, 4))
    assert (
        closed["rank-1"] == (gallery_names[similar[known].argmax(1)] == names[known]).mean() and closed["rank-4"] == 1
    )


def test_refusals():
    rows = at(0, 10, 20)
    for call, message in (
        (lambda: verification(rows, [1, 2]), r"identities has shape \(2,\), for 3 embeddings"),
        (lambda: verification(rows, [1, 1, 1]), "no two rows of one identity and two of others"),
        (lambda: verification(rows, [1, 2, 3]), "no two rows of one identity and two of others"),
        (lambda: verification(rows, [1, 1, 3], rates=(2,)), "choose a share from 0 to 1"),
        (lambda: verification(rows * 0, [1, 1, 2]), "3 embeddings that are 0 or not finite"),
        (lambda: verification(rows[0], [1, 1]), r"a has shape \(2,\): pass embeddings"),
        (lambda: similarities(rows, [[1.0]]), "b has 1 dimensions, a 2"),
        (lambda: closed_set(rows, [1, 2, 3], rows, [1, 2, 4]), "has 4, which the gallery has not: use open_set"),
        (lambda: closed_set(rows, [1, 2, 3], rows, [1, 2, 3], ranks=(0,)), "ranks has 0: choose whole numbers"),
        (lambda: open_set(rows, [1, 2, 3], rows, [1, 2, 3]), "no unknown probe"),
        (lambda: open_set(rows, [1, 2, 3], rows, [4, 5, 6]), "no known probe"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_example_measures_every_protocol(tmp_path, monkeypatch):
    """On images that are a brightness of their label and noise."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = import_module("identities")

    def images(name, split, seed):
        classes, count = {"mnist": (10, 900), "faces": (2, 200)}[name]
        labels = np.random.default_rng(seed).integers(0, classes, count)
        noise = torch.Generator().manual_seed(seed)
        draw = lambda label: label / 5 - 1 + 0.1 * torch.randn(1, 28, 28, generator=noise)  # noqa: E731
        return [{"pixel_values": draw(int(label)), "labels": int(label)} for label in labels]

    monkeypatch.setattr(example.tiny_vit, "images", images)
    monkeypatch.setattr(example, "RATES", (2e-3,))
    found = example.main(epochs=2, seeds=1, output=tmp_path)
    assert list(found) == list(example.ARMS)
    assert all(set(rows[0]) == set(example.METRICS) for rows in found.values())
    assert found["cross-entropy"][0]["AUROC"] > 0.7
