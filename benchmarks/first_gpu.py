"""The page of the first measurements on a GPU, from the raw lines in benchmarks/results/h200."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results" / "h200"
SHAPES = {  # name in the raw lines: N, V, D
    "gemma2": (8192, 256000, 2304),
    "trl": (16384, 248320, 2048),
    "qwen3": (8192, 151936, 2048),
    "llama3": (8192, 128256, 4096),
}
COMMITS = {1: "9cec539", 2: "c93034e", 3: "45d3f66"}
PLAIN = ("three matmuls", "quack", "cut_cross_entropy", "cut exact", "liger", "liger float32 accumulator")
HEIGHTS = (512, 768, 1024, 1536, 2048)
OBJECTIVES = {  # key in the second run: what it is
    "softcap": "softcap 30",
    "softcap stored": "softcap 30, stored rows",
    "smoothing": "label smoothing 0.1",
    "entropy eager": "entropy bonus as a loss, three matmuls",
    "entropy recompute": "entropy bonus on the statistics, four matmuls",
    "recompute": "cross-entropy on the statistics, four matmuls",
    "log_sum_sq observed": "cross-entropy, entropy and log_sum_sq observed",
    "entropy top observed": "cross-entropy, entropy and top observed",
    "tail=1e-3": "sparse tail, 1e-3",
    "tail=1e-3 stored": "sparse tail, 1e-3, stored rows",
    "tail=3e-4": "sparse tail, 3e-4",
}


def read(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a file of raw lines, by key."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *lines))


def _loss(name: str, run: int, row: dict[str, Any]) -> list[str]:
    """One contestant on one shape."""
    errors = row.get("errors") or [None, None, None]
    memory = f"{row['peak_MB']:.0f}" if row.get("peak_MB") else ""
    shown = [f"{error:.1e}" if error else "" for error in errors[1:]]
    return [name, str(run), f"{row['ms']:.1f}", f"{row.get('ratio', 1):.2f}", memory, *shown]


def _losses(first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]) -> str:
    """A table for each shape: peers and the old kernels in the first run, the new kernels in the others."""
    header = ["", "run", "ms", "/ matmuls", "MB", "hidden error", "weight error"]
    parts = []
    for shape, (N, V, D) in SHAPES.items():
        rows = [_loss(name, 1, first[key]) for name in PLAIN if first.get(key := f"{shape}/{name}", {}).get("ok")]
        for name in ("hf_xent", "hf_xent recompute", "hf_xent tail=1e-3", "hf_xent tail=3e-4"):
            if (row := first.get(f"{shape}/{name}")) and row["ok"]:
                rows.append(_loss(f"{name}, before", 1, row))
        for run, lines in ((2, second), (3, third)):
            for key, row in lines.items():
                setting = key.partition("/")[2].replace(" dw=cublas", "")
                others = shape == "gemma2" and setting.removesuffix(" stored") in OBJECTIVES  # in a table of their own
                if key.startswith(f"{shape}/") and row["ok"] and "add" not in key and not others:
                    rows.append(_loss(f"**hf_xent**, {OBJECTIVES.get(setting, setting)}", run, row))
        parts.append(f"### {N} tokens, vocabulary {V}, width {D}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _objectives(first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]) -> str:
    header = ["", "run", "ms", "/ matmuls", "MB"]
    names = {"softcap dense": "dense, softcap 30", "smoothing dense": "dense, label smoothing 0.1"}
    before = ("softcap hf_xent", "smoothing hf_xent", "entropy bonus hf_xent")
    rows = [_loss(names.get(name, f"{name}, before"), 1, first[f"gemma2/{name}"])[:5] for name in (*names, *before)]
    for run, lines in ((2, second), (3, third)):
        measured = {key: lines[f"gemma2/{key}"] for key in OBJECTIVES if f"gemma2/{key}" in lines}
        rows += [_loss(f"**hf_xent**, {OBJECTIVES[key]}", run, row)[:5] for key, row in measured.items()]
    return table(header, rows)


def _anatomy(lines: dict[str, Any]) -> str:
    """TFLOP/s of each product of a chunk by its height, and of the product with exponentials in its epilogue."""
    products = {
        "logits": "logits mm",
        "logits, exponentials in the epilogue": "proto exp_gemm 128x256x64 w8 s3 g8",
        "hidden gradient": "dh mm",
        "weight gradient, first chunk": "dw mm first",
        "weight gradient, added": "dw addmm_ bf16",
    }
    rows = []
    for shape in SHAPES:
        for name, product in products.items():
            cells = [lines.get(f"{shape} n={n} {product}", {}).get("TFLOPs") for n in HEIGHTS]
            if any(cells):
                rows.append([f"{shape}: {name}", *("" if x is None else f"{x:.0f}" for x in cells)])
    return table(["rows of the chunk", *map(str, HEIGHTS)], rows)


def _passes(second: dict[str, Any]) -> str:
    rows = [
        [key.removeprefix("rows/"), f"{row['ms']:.3f}", f"{row['TBs']:.2f}"]
        for key, row in second.items()
        if key.startswith("rows/") and row["ok"]
    ]
    return table(["pass; bytes x warps x stages of a program", "ms", "TB/s"], rows)


def _correct() -> str:
    parts = []
    for run in (1, 2):
        rows = read(f"correct-{run}.jsonl")
        bad = [key for key, row in rows.items() if not row.get("ok")]
        parts.append(f"Run {run}: {len(rows) - len(bad)} of {len(rows)} rows pass. The others: {', '.join(bad)}.")
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    env = json.loads((FOLDER / "env.json").read_text(encoding="utf-8"))
    first, second, third = read("time-1.jsonl"), read("tune-2.jsonl"), read("tune-3.jsonl")
    odd = [
        [f"{key.partition('/')[2]}, run {run}", f"{row['ms']:.2f}", *(f"{error:.1e}" for error in row["errors"][1:])]
        for run, lines in ((2, second), (3, third))
        for key, row in lines.items()
        if key.startswith("gpt2/")
    ]
    steps = [
        [key, f"{row['ms']:.1f}", f"{row['min_ms']:.1f} to {row['max_ms']:.1f}", f"{row['peak_MB'] / 1e3:.1f}"]
        for key, row in read("step-3.jsonl").items()
    ]
    machine = (
        f"{env['gpu']['name']}, driver {env['smi'].splitlines()[1].split(', ')[2]}, torch {env['torch']}, Triton"
        f" {env['triton']}, transformers {env['transformers']}; Liger 0.8.5, cut-cross-entropy"
        f" {env['cut_cross_entropy']},"
        f" quack 0.6.5. A large copy moves {env['copy_TBs']:.2f} TB/s, a bfloat16 product of 8192 cubed runs at"
        f" {env['mm8192_TFLOPs']:.0f} TFLOP/s."
    )
    text = (Path(__file__).parent / "first_gpu.md").read_text(encoding="utf-8")
    filled = text.format(
        machine=machine,
        contest="[NVIDIA H200](nvidia-h200.md)",
        losses=_losses(first, second, third),
        objectives=_objectives(first, second, third),
        steps=table(["", "ms", "range", "GB"], steps),
        anatomy=_anatomy(read("anatomy-1.jsonl")),
        passes=_passes(second),
        correct=_correct(),
        odd=table(["4096 tokens, vocabulary 50257, width 768", "ms", "hidden error", "weight error"], odd),
        **{f"commit_{run}": commit for run, commit in COMMITS.items()},
    )
    return re.sub(r"\n{3,}", "\n\n", filled)
