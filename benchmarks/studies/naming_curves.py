"""Calibration curves of the study of preferences, as a figure: what a policy says of a pair, and what is known of it.

python -m benchmarks.studies.naming_curves           # after `run preferences`
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.naming_models import CONFIDENCES
from benchmarks.studies.plan import RESULTS
from benchmarks.studies.preferences import PLANS
from hf_xent.experiments.study import Study
from hf_xent.system.figures import panels, save

ARMS = ("DPO, majority of 3", "SPCE, share of 3", "PSO, share of 3", "cDPO")


def curve(study: Study, arm: str, prefix: str) -> list[tuple[float, float]]:
    """(said, known) of every bin of confidence, the mean over all pairs of all seeds in the bin."""
    points = []
    for name in CONFIDENCES:
        share, said, known = (study.values(arm, f"{prefix}{name}: {what}") for what in ("share", "said", "known"))
        if total := sum(share.values()):
            points.append(tuple(sum(share[seed] * of[seed] for seed in share) / total for of in (said, known)))
    return points


def draw(study: Study, path: Path) -> Path:
    """Two panels: after the last epoch, and after the one that validation chooses."""
    figure, axes = panels(2, 9, 4)
    for axis, prefix, title in zip(axes, ("", "stopped "), ("after 8 epochs", "stopped by validation"), strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle=":")
        for arm in ARMS:
            axis.plot(*zip(*curve(study, arm, prefix), strict=True), marker="o", markersize=4, label=arm)
        axis.set(title=title, xlabel="said: sigmoid(beta Delta), of the preferred answer", ylabel="known probability")
    axes[0].legend(frameon=False)
    return save(figure, path)


if __name__ == "__main__":
    print(draw(PLANS[0].study(), RESULTS / "preferences" / "calibration.png"))
