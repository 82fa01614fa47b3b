"""The analyses of a model before fine-tuning, after plain fine-tuning, and without norms: table, card section, plots.

report = Report({"original": analyze(a, blocks), "vanilla": analyze(b, blocks), "LN-free": analyze(c, blocks)})
report.save(Path("out"))                     # report.md (a section of a model card), report.json, report.png
draw_curves({"LN-free": losses}, schedule.events, Path("out/curves.png"))

Compare with the vanilla model, which has seen the same data: fine-tuning alone moves all of these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.figures import panels, save
from .analysis import Analysis

ROWS: dict[str, Callable[[Analysis], str]] = {
    "loss, mean (nats per token)": lambda a: f"{a.loss:.4f}",
    "loss, median": lambda a: f"{a.median:.4f}",
    "loss, 95th percentile": lambda a: f"{a.p95:.3f}",
    "loss, 99th percentile": lambda a: f"{a.p99:.3f}",
    "accuracy": lambda a: f"{a.accuracy:.4f}",
    "entropy (nats)": lambda a: f"{a.entropy:.4f}",
    "calibration error (ECE)": lambda a: f"{a.ece:.4f}",
    "attribution error (NMAE), mean over heads": lambda a: f"{100 * a.mean_nmae:.2g} %",
    "attribution error, least to largest head": lambda a: f"{_over_heads(a, min):.2g} to {_over_heads(a, max):.2g} %",
    "attention-sink rate": lambda a: f"{100 * a.sink_rate:.1f} %",
    "norm of the first token, relative": lambda a: f"{a.first_norm:.3g}",
    "sequences that overflow, left out": lambda a: f"{100 * a.exploded:.1f} %",
    "confidence neurons": lambda a: ", ".join(map(str, a.neurons)),
    "loss without them": lambda a: f"{100 * a.neuron_loss:+.2f} %",
    "entropy without them": lambda a: f"{100 * a.neuron_entropy:+.2f} %",
}
"""Row of the table -> its text for an analysis."""
NOTE = (
    "Attribution error: direct logit attribution of attention heads against their direct effect on the logit of the"
    " next token. Sink rate: heads that give the first token more than 0.3 of their attention. Confidence neurons: of"
    " the last MLP, held at their means together."
)
COLORS = ("#8a8f98", "#1f77b4", "#d1495b", "#f08a4b", "#2ca02c", "#9467bd")


def _over_heads(analysis: Analysis, reduce: Callable[[Iterable[float]], float]) -> float:
    """The least or largest attribution error of a head, in percent."""
    return reduce(100 * value for layer in analysis.nmae for value in layer)


@dataclass(frozen=True)
class Report:
    """Analyses by model name, on the same tokens."""

    analyses: Mapping[str, Analysis]

    def rows(self) -> list[list[str]]:
        """The rows of the table: name of a measure, and its value for every model."""
        return [[name, *(cell(analysis) for analysis in self.analyses.values())] for name, cell in ROWS.items()]

    def markdown(self) -> str:
        """A section of a model card."""
        lines = ["| | " + " | ".join(self.analyses) + " |", "|---" * (len(self.analyses) + 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join(["## Without normalization", "", *lines, "", NOTE]) + "\n"

    def save(self, folder: Path) -> Path:
        """Writes report.md, report.json and report.png into a folder, which is made if need be; returns the first."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: analysis.as_dict() for name, analysis in self.analyses.items()}
        (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n")
        self.draw(folder / "report.png")
        page = folder / "report.md"
        page.write_text(self.markdown() + "\n![attribution error and loss](report.png)\n")
        return page

    def draw(self, path: Path) -> Path:
        """Plots the attribution error of every head (left) and the losses of tokens (right), as PNG; returns `path`."""
        figure, (left, right) = panels(2, 10, 3.8)
        width = 0.8 / len(self.analyses)
        for index, (name, analysis) in enumerate(self.analyses.items()):
            color, shift = COLORS[index % len(COLORS)], (index + 0.5) * width - 0.4
            points = [(layer + shift, 100 * e) for layer, heads in enumerate(analysis.nmae) for e in heads]
            left.plot(*zip(*points, strict=True), "o", ms=4, alpha=0.7, color=color, label=name)
            losses = [analysis.median, analysis.loss, analysis.p95, analysis.p99]
            right.bar([x + shift for x in range(4)], losses, width, color=color, label=name)
        left.set(yscale="log", xlabel="layer", ylabel="NMAE of a head (%)", title="attribution against direct effect")
        left.set_xticks(range(len(analysis.nmae)))
        right.set_xticks(range(4), ["median", "mean", "95 %", "99 %"])
        right.set(ylabel="loss (nats per token)", title="loss of tokens")
        right.legend(frameon=False)
        return save(figure, path, dpi=110)


def draw_curves(
    losses: Mapping[str, Sequence[tuple[int, float]]], events: Iterable[tuple[int, str]], path: Path, title: str = ""
) -> Path:
    """Plots the loss of every arm against steps, with the removals of a schedule marked, as PNG.

    Args:
        losses: Arm (a way of training) -> its (step, nats per token).
        events: (step, site) as in `Schedule.events`.
        path: The file to write.
        title: The figure's title.

    Returns:
        The file.
    """
    figure, [axis] = panels(1, 9, 4)
    for (arm, points), color in zip(losses.items(), COLORS, strict=False):
        axis.plot(*zip(*points, strict=True), label=arm, color=color, lw=1.4)
    steps_by_kind: dict[str, list[int]] = {}  # kind of site -> steps of its removals
    for step, site in events:
        steps_by_kind.setdefault(site.partition(".")[0], []).append(step)
    for height, (kind, steps) in enumerate(steps_by_kind.items()):
        for step in steps:
            axis.axvline(step, color="#30343b", lw=0.6, alpha=0.35)
        axis.annotate(
            kind, (steps[0], 0.98 - 0.06 * (height % 2)), xycoords=("data", "axes fraction"), fontsize=8, va="top"
        )
    axis.set(xlabel="step", ylabel="training loss (nats per token)", title=title)
    axis.legend(frameon=False, loc="upper right")
    return save(figure, path, dpi=110)
