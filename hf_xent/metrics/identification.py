"""Whose picture (voice, text) is this? Verification, closed-set and open-set identification from embeddings.

Similarity s is the cosine of two embeddings. A gallery has entries of known identities; a probe is compared with it. An
identity's similarity to a probe is that of its best entry, and its rank is 1 + the number of other identities that are
at least as similar, so that ties count against it.

    verification    is a pair of one identity? With pairs of equal identity positive: AUROC; TAR@FAR f, the share of
                    them accepted at the least threshold that at most a share f of the other pairs reaches; and the
                    equal error rate, where FAR = 1 - TAR on the ROC curve, whose points are joined by straight lines
    closed set      every probe has its identity in the gallery: rank-k, the share of probes of rank k or better
    open set        some probes, the unknown, have not: DIR@FAR f, the share of the known probes of rank 1 and of
                    similarity s >= t, for the least threshold t that at most a share f of the unknown reaches, with
                    their most similar identity

Source: Phillips, Grother, Micheals, Evaluation Methods in Face Recognition, in Li, Jain (eds.), Handbook of Face
Recognition, for the three tasks. What an identity of several entries is and how ties count is this library's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..options.ranges import is_integer
from . import ranking

RATES = (0.01, 0.1)
"""The false accept rates that are reported."""


def similarities(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Cosines of embeddings.

    Args:
        a: Embeddings [N, D].
        b: Embeddings [M, D].

    Returns:
        Cosines [N, M], float64.

    Raises:
        ValueError: Embeddings of other shapes, that are not finite, or that are 0.
    """
    left, right = _directions("a", a), _directions("b", b)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"b has {right.shape[1]} dimensions, a {left.shape[1]}: pass embeddings of one model")
    return left @ right.T


def pairs(embeddings: ArrayLike, identities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of rows, as labels and scores for `hf_xent.metrics.ranking`.

    Args:
        embeddings: [N, D].
        identities: Whose they are [N].

    Returns:
        Labels [N (N - 1) / 2], 1 for a pair of one identity, and the cosines of the pairs, likewise.

    Raises:
        ValueError: Shapes that do not fit, or embeddings that are not finite or are 0.
    """
    names = _identities("identities", identities, embeddings)
    first, second = np.triu_indices(len(names), 1)
    return (names[first] == names[second]).astype(int), similarities(embeddings, embeddings)[first, second]


def verification(embeddings: ArrayLike, identities: ArrayLike, rates: Sequence[float] = RATES) -> dict[str, float]:
    """Are two rows of one identity? Over all pairs; see the module's docstring.

    Args:
        embeddings: [N, D].
        identities: Whose they are [N]; some pair has to be of one identity, and some of two.
        rates: The false accept rates, in [0, 1].

    Returns:
        auroc, eer, and tar@f%far for every rate.

    Raises:
        ValueError: As `pairs`, pairs of one kind alone, or a rate out of range.
    """
    labels, scores = pairs(embeddings, identities)
    if labels.min(initial=1) == labels.max(initial=0):
        raise ValueError("identities has no two rows of one identity and two of others: pass some of both kinds")
    accepted = {f"tar@{_percent(rate)}far": ranking.tpr_at_fpr(labels, scores, rate) for rate in rates}
    return {"auroc": ranking.auroc(labels, scores), "eer": equal_error_rate(labels, scores), **accepted}


def equal_error_rate(labels: ArrayLike, scores: ArrayLike) -> float:
    """The rate of false accepts where it is that of false rejects, FPR = 1 - TPR on the ROC curve.

    Args:
        labels: The label of each pair [N], 1 (accept) or 0.
        scores: The score of each pair [N]; a larger one indicates label 1.

    Returns:
        The rate in [0, 1], interpolated between points of the curve.

    Raises:
        ValueError: As `hf_xent.metrics.ranking.roc`.
    """
    false, true = ranking.roc(labels, scores)
    return float(np.interp(1.0, false + true, false))  # the sum increases strictly along the curve


def closed_set(
    gallery: ArrayLike,
    gallery_identities: ArrayLike,
    probes: ArrayLike,
    probe_identities: ArrayLike,
    ranks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Which identity of the gallery is it? For probes that all have theirs there; see the module's docstring.

    Args:
        gallery: Embeddings of the gallery [G, D].
        gallery_identities: Whose they are [G].
        probes: Embeddings of the probes [P, D], none of them in the gallery.
        probe_identities: Whose they are [P].
        ranks: The ranks k >= 1.

    Returns:
        rank-k for every rank, in [0, 1].

    Raises:
        ValueError: Shapes that do not fit, embeddings that are not finite or are 0, no probe or one that has no entry
            in the gallery, or a rank out of range.
    """
    if bad := [rank for rank in ranks if not is_integer(rank) or rank < 1]:
        raise ValueError(f"ranks has {bad[0]!r}: choose whole numbers from 1 on")
    names, best = _best(gallery, gallery_identities, probes)
    known = _identities("probe_identities", probe_identities, probes)
    if strangers := sorted(set(known.tolist()) - set(names.tolist())):
        raise ValueError(f"probe_identities has {strangers[0]!r}, which the gallery has not: use open_set")
    found, _ = _ranked(names, best, known)
    return {f"rank-{rank}": float((found <= rank).mean()) for rank in ranks}


def open_set(
    gallery: ArrayLike,
    gallery_identities: ArrayLike,
    probes: ArrayLike,
    probe_identities: ArrayLike,
    rates: Sequence[float] = RATES,
) -> dict[str, float]:
    """Is it an identity of the gallery, and which? For probes of which some are unknown; see the module's docstring.

    Args:
        gallery: Embeddings of the gallery [G, D].
        gallery_identities: Whose they are [G].
        probes: Embeddings of the probes [P, D], none of them in the gallery.
        probe_identities: Whose they are [P]; unknown are those whose identity the gallery has not.
        rates: The shares of unknown probes that may be taken for known, in [0, 1].

    Returns:
        dir@f%far for every rate, in [0, 1], and `auroc` of the largest similarity as a score of being known.

    Raises:
        ValueError: Shapes that do not fit, embeddings that are not finite or are 0, no known or no unknown probe, or a
            rate out of range.
    """
    names, best = _best(gallery, gallery_identities, probes)
    identities = _identities("probe_identities", probe_identities, probes)
    known = np.isin(identities, names)
    if known.all() or not known.any():
        missing = "unknown" if known.all() else "known"
        raise ValueError(f"probe_identities has no {missing} probe: pass some whose identity the gallery has, and not")
    largest = best.max(1)
    found, own = _ranked(names, best[known], identities[known])
    right = {}
    for rate in rates:
        threshold = ranking.threshold_at_fpr(largest[~known], rate)
        right[f"dir@{_percent(rate)}far"] = float(((found == 1) & (own >= threshold)).mean())
    return {"auroc": ranking.auroc(known, largest), **right}


def _best(gallery: ArrayLike, gallery_identities: ArrayLike, probes: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The identities of a gallery [I], and the similarity of the best entry of each to each probe [P, I]."""
    entries = _identities("gallery_identities", gallery_identities, gallery)
    names, similar = np.unique(entries), similarities(probes, gallery)
    return names, np.stack([similar[:, entries == name].max(1) for name in names], 1)


def _ranked(names: np.ndarray, best: np.ndarray, identities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each probe's own identity, and its similarity, [P] each."""
    own = best[np.arange(len(best)), np.searchsorted(names, identities)]
    return (best >= own[:, None]).sum(1), own  # its own identity is counted, too


def _percent(rate: float) -> str:
    return f"{100 * rate:g}%"


def _directions(name: str, embeddings: ArrayLike) -> np.ndarray:
    """Embeddings of length 1, float64."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} has shape {rows.shape}: pass embeddings [N, D]")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if bad := int((~np.isfinite(lengths) | (lengths == 0)).sum()):
        raise ValueError(f"{name} has {bad} embeddings that are 0 or not finite: leave those rows out")
    return rows / lengths


def _identities(name: str, identities: ArrayLike, embeddings: Any) -> np.ndarray:
    names = np.asarray(identities)
    if names.ndim != 1 or len(names) != len(embeddings):
        raise ValueError(f"{name} has shape {names.shape}, for {len(embeddings)} embeddings: pass one of each")
    return names
