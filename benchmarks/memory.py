"""Peak memory of loss and gradients against the number of tokens: the picture of the documentation's first page.

Each method runs in a process of its own, on the CPU, on random inputs of the size of a model's head: what it holds does
not depend on their values, and neither does it on other load of the machine. Times are in the pages of `hf-xent bench`.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_xent.bench.contestants import CONTESTANTS
from hf_xent.bench.rows import environment
from hf_xent.bench.worker import start

FILE = Path("benchmarks/results/memory/tokens.csv")
PICTURE = Path("docs/assets/memory.svg")
V, D, DTYPE = 49152, 576, torch.bfloat16  # the head of SmolLM2-135M
DRAWN = {
    "dense float32 logits": ("transformers' loss", "s"),
    "trl": ("TRL's chunked head", "v"),
    "dense": ("PyTorch, bfloat16", "D"),
    "dense compiled": ("torch.compile", "^"),
    "torch chunked tuned": ("PyTorch chunked, tuned", "P"),
    "hf_xent": ("hf_xent", "o"),
}
"""Contestant of the benchmark -> its name in the picture, and its marker."""
COLORS = {
    "light": ("#1b1f24", "#d5d9dd", "#c2263f", ("#30343b", "#8c6d31", "#1f77b4", "#2a9d8f", "#9467bd")),
    "dark": ("#e6e9ee", "#454b55", "#ff6b81", ("#c9ced6", "#d9b25f", "#6baed6", "#5fd0c0", "#c5a5e8")),
}
"""Scheme -> the colors of text, of the grid, of this package and of the others."""


def measure(tokens: int, threads: int = 1) -> list[dict[str, Any]]:
    """The peak of every method, MiB beyond inputs and gradients; of several settings, that of the smallest peak."""
    measured_on = environment("cpu", threads)
    common = {"N": tokens, "V": V, "D": D, "dtype": str(DTYPE).removeprefix("torch.")}
    common |= {name: measured_on[name] for name in ("device", "torch", "trl")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="hf_xent-memory-") as folder:
        torch.manual_seed(0)
        hidden, weight = torch.randn(tokens, D).to(DTYPE), torch.randn(V, D).mul(0.05).to(DTYPE)
        inputs = {"hidden": hidden, "weight": weight, "labels": torch.randint(V, (tokens,))}
        save_file(inputs, Path(folder) / "inputs.safetensors")
        for name in DRAWN:
            contestant = CONTESTANTS[name]
            remote = start(name, contestant, Path(folder), "cpu", threads)
            peaks = {}
            for label, setting in contestant.settings("cpu", DTYPE, tokens).items():
                remote.ask("use", setting)
                remote.ask("warm", 1)  # what is compiled or allocated once is not counted
                peaks[label] = remote.ask("memory")
            remote.close()
            best = min(peaks, key=lambda label: peaks[label])
            rows.append({"contestant": name, "peak_mib": f"{peaks[best] / 2**20:.1f}", "setting": best, **common})
    return [{**row, "date": datetime.now(UTC).date().isoformat()} for row in rows]


def add(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Write rows into the file, in the place of those of the same method and number of tokens."""
    kept = {(row["contestant"], int(row["N"])): row for row in (read(file) if file.exists() else [])}
    kept |= {(row["contestant"], int(row["N"])): row for row in rows}
    ordered = sorted(kept.values(), key=lambda row: (list(DRAWN).index(row["contestant"]), int(row["N"])))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(ordered[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of the file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def draw(file: Path, picture: Path) -> list[Path]:
    """The picture on a light and on a dark page, `<picture>-light.svg` and `-dark.svg`; returns their paths."""
    import matplotlib

    rows, paths = read(file), []
    with matplotlib.rc_context({"svg.hashsalt": "hf_xent", "font.size": 11}):
        for scheme in COLORS:
            path = picture.with_stem(f"{picture.stem}-{scheme}")
            figure = _figure(rows, scheme)
            figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            paths.append(path)
    return paths


def _figure(rows: list[dict[str, Any]], scheme: str) -> Any:
    from hf_xent.system.figures import panels

    text, grid, ours, others = COLORS[scheme]
    figure, [panel] = panels(1, 6.4, 4.0)
    lines = {name: [(int(r["N"]), float(r["peak_mib"])) for r in rows if r["contestant"] == name] for name in DRAWN}
    colors = dict(zip(DRAWN, (*others, ours), strict=True))
    for name, points in lines.items():
        width = 3.0 if name == "hf_xent" else 1.6
        panel.plot(*zip(*points, strict=True), color=colors[name], lw=width, marker=DRAWN[name][1], markersize=5)
    places = spread([points[-1][1] for points in lines.values()], factor=1.36)
    for (name, points), place in zip(lines.items(), places, strict=True):
        last, peak = points[-1]
        weight = "bold" if name == "hf_xent" else "normal"
        label = f"{DRAWN[name][0]}: {peak:,.0f}"
        panel.text(last * 1.09, place, label, color=colors[name], va="center", weight=weight)
    counts = [n for n, _ in lines["hf_xent"]]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [f"{n:,}" for n in counts])
    panel.set_yticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1,000", "3,000"])
    panel.minorticks_off()
    panel.set_xlabel("tokens in a step", color=text)
    panel.set_ylabel("peak memory, MiB", color=text)
    panel.tick_params(colors=text)
    panel.spines[["left", "bottom"]].set_color(text)
    panel.grid(axis="y", color=grid, lw=0.8)
    return figure


def spread(values: list[float], factor: float) -> list[float]:
    """Places for labels of points on a logarithmic axis, each at least a factor above the next lower one."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = list(values)
    for lower, upper in pairwise(order):
        places[upper] = max(places[upper], places[lower] * factor)
    return places
