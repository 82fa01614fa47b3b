"""The roofline page: estimates of this project's designs and of others on four GPUs, beside what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks import estimates
from benchmarks.estimates import BEFORE, DESIGNS, EPILOGUES, STORED, Device, Estimate, Shape, matmuls, streamed
from benchmarks.first_gpu import table

FILE = Path("benchmarks/results/roofline.md")
FOLDER = Path(__file__).parent / "results" / "h200"
SHAPES = (
    Shape("gemma2", 8192, 256000, 2304),
    Shape("trl", 16384, 248320, 2048),
    Shape("qwen3", 8192, 151936, 2048),
    Shape("llama3", 8192, 128256, 4096),
)
# Dense bfloat16 operations and bytes per second of the datasheets.
DATASHEETS = {
    "H200": (989e12, 4.8e12),
    "H100 SXM": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "MI300X": (1307e12, 5.3e12),
}
# The three matmuls ran at 674 to 711 TFLOP/s, and a copy as env.json says. The cache's rate is an assumption.
H200_PRODUCTS, H200_MEMORY, H200_CACHE = 690e12, 4.25e12, 5.5e12
RUN_2_CHUNKS = 16  # the most in one visit when the lines of tune-2.jsonl were measured

PAGE = """\
# Roofline of the GPU path

Every number on this page is an estimate unless it is marked 'measured'. Made by `python -m benchmarks roofline`: the
stages and their assumptions are in `benchmarks/estimates.py`, and chunks are as high as the code itself plans them. It
is the mean cross-entropy of N tokens with both gradients, in bfloat16, without a softcap or a bias.

Each stage takes the longer of its arithmetic and its memory traffic. A matmul that adds a chunk to the weight gradient
reads and writes [V, D]; {hidden:.0%} of the shorter of the two is assumed to be hidden by the longer. The logits'
matmul is assumed to take {epilogue:.0%} longer with the softmax in its epilogue. A small kernel is assumed to take
{launch:g} microseconds, and a chunk to have {now} of them, {old} at commit 9cec539. BLAS is assumed to split the hidden
gradient, whose result has few tiles, over the vocabulary. None of these numbers was fitted to the measured times below.
BLAS loses nothing to a chunk that is no whole number of tiles: that is measured
([anatomy-1.jsonl](h200/anatomy-1.jsonl), heights 512, 529 and 560).

- *hf_xent*: the softmax in the epilogue of the logits' matmul, no pass over logits.
- *hf_xent, stored rows*: logits are stored and read again, as losses with other statistics have it: 3 passes, each a
  read or a write of every logit. At 9cec539 plain cross-entropy had it too, with 5 passes, and the finished weight
  gradient was scaled once more. A plan of more than {most} chunks ({before} at 9cec539) is visited twice, with four
  matmuls.
- *dense*: 10 passes over the logits, of which three tensors are in memory.
- *Liger* 0.8.5: the chunks of its own formula, 3 passes.
- *cut-cross-entropy*: no logits in memory; tiles of 128 x 128 whose operands come from the cache. Of its two lines one
  is for inputs where the gradients of all tiles are negligible and skipped, the other for its exact form.
- *quack*: chunks of 4096, the softmax in the epilogue, a weight gradient in float32.

## What the GPUs are assumed to sustain

The H200's rates of products and of memory are measured ([time-1.jsonl](h200/time-1.jsonl), [env.json](h200/env.json)):
the three matmuls ran at 674 to 711 TFLOP/s in the first three shapes, a copy at 4.25 TB/s. Nothing was measured on an
H100, a B200 or an MI300X: each is given the share of its datasheet that the H200 reached, {product_share:.0%} of the
products and {memory_share:.0%} of the memory. The rate of the second-level cache, which matters for cut-cross-entropy
alone, is an assumption on Hopper and scaled elsewhere like that of products. The columns of these GPUs say what the
same plans would cost at these rates, not that the kernels run there or reach them.

{devices}
## How good the model is

Run 1 ([time-1.jsonl](h200/time-1.jsonl)) is of commit 9cec539, run 2 ([tune-2.jsonl](h200/tune-2.jsonl)) of c93034e,
which visited plans of more than {run_2} chunks twice, run 3 ([tune-3.jsonl](h200/tune-3.jsonl)) of 45d3f66; all are of
an H200. A plan is the number of chunks and the rows of the first. The mean absolute error of the estimated time is
{error:.1%} over {count} measured lines, beside the three matmuls, whose rate the model was given; that of the memory is
{memory_error:.1%} for designs that store logits. On average the estimate is {bias:.1%} below the measured time: a
roofline leaves out whatever is slower than it has to be. By design:

{groups}
{lines}
{shapes}"""


class Measured(NamedTuple):
    """One line of the files of measurements."""

    design: str
    shape: Shape
    estimate: Estimate  # of the plan that was measured
    ms: float
    ratio: float | None  # to the three matmuls of the same process
    peak: float | None  # bytes beyond inputs and gradients
    source: str


def devices() -> list[Device]:
    """The H200 as measured, then others by the same shares of their datasheets."""
    products, memory = DATASHEETS["H200"]
    return [
        Device(
            name,
            H200_PRODUCTS * datasheet[0] / products,
            H200_MEMORY * datasheet[1] / memory,
            H200_CACHE * datasheet[0] / products,
        )
        for name, datasheet in DATASHEETS.items()
    ]


# The keys of measured lines after the shape's name, as patterns, whose number is the height asked for: of which design.
OTHERS = {
    "three matmuls": "three matmuls",
    "cut_cross_entropy": "cut-cross-entropy, no tile has gradients",
    "cut exact": "cut-cross-entropy, all tiles have them",
    "liger": "Liger",
    "quack": "quack",
}
RUNS = {
    "time-1.jsonl": ((r"hf_xent(?: rows=(\d+))?", "hf_xent of 9cec539, stored rows", BEFORE),),
    "tune-2.jsonl": (
        (r"n=(\d+) dw=cublas", "hf_xent", replace(EPILOGUES, most_chunks=RUN_2_CHUNKS)),
        (r"n=(\d+) stored", "hf_xent, stored rows", replace(STORED, most_chunks=RUN_2_CHUNKS)),
    ),
    "tune-3.jsonl": (
        (r"n=(\d+)", "hf_xent", EPILOGUES),
        (r"default(?: again)?()", "hf_xent", EPILOGUES),
        (r"default stored()", "hf_xent, stored rows", STORED),
    ),
}


def measurements(device: Device) -> Iterator[Measured]:
    """The measured lines that the model has an estimate for."""
    shapes = {shape.name: shape for shape in SHAPES}
    for file, designs in RUNS.items():
        for number, text in enumerate((FOLDER / file).read_text(encoding="utf-8").splitlines(), start=1):
            line = json.loads(text)
            name, _, key = line["key"].partition("/")
            found = [(label, design, m) for pattern, label, design in designs if (m := re.fullmatch(pattern, key))]
            if "ms" not in line or name not in shapes or not (found or key in OTHERS):
                continue
            shape = shapes[name]
            if found:
                label, design, match = found[0]
                estimate = streamed(design, device, shape, int(match[1]) if match[1] else None)
            else:
                label = OTHERS[key]
                estimate = DESIGNS[label](device, shape)
            peak = line["peak_MB"] * 1e6 if "peak_MB" in line else None
            yield Measured(label, shape, estimate, line["ms"], line.get("ratio"), peak, f"{file}:{number}")


def page() -> str:
    """The whole page."""
    gpus = devices()
    measured = list(measurements(gpus[0]))
    errors = [_error(m) for m in measured if m.design != "three matmuls"]
    memory_errors = [abs(m.estimate.memory / m.peak - 1) for m in measured if m.peak and _stores(m)]
    products, memory = DATASHEETS["H200"]
    return PAGE.format(
        hidden=estimates.HIDDEN_SHARE,
        epilogue=estimates.EPILOGUE,
        launch=estimates.LAUNCH * 1e6,
        now=EPILOGUES.launches,
        old=BEFORE.launches,
        most=EPILOGUES.most_chunks,
        before=BEFORE.most_chunks,
        run_2=RUN_2_CHUNKS,
        product_share=H200_PRODUCTS / products,
        memory_share=H200_MEMORY / memory,
        devices=_devices(gpus),
        error=fmean(map(abs, errors)),
        bias=-fmean(errors),
        count=len(errors),
        memory_error=fmean(memory_errors),
        groups=_groups(measured),
        lines=_lines(measured),
        shapes="\n".join(_shape(shape, gpus, measured) for shape in SHAPES),
    )


def _error(m: Measured) -> float:
    """Of the estimated time, relative to the measured one."""
    return m.estimate.seconds * 1e3 / m.ms - 1


def _stores(m: Measured) -> bool:
    """Whether the design stores logits: of one that does not, hardly any memory is left to estimate."""
    return bool(m.estimate.heights)


def _devices(gpus: Iterable[Device]) -> str:
    columns = ("GPU", "products, TFLOP/s", "memory, TB/s", "cache, TB/s")
    return table(
        columns, ([d.name, f"{d.products / 1e12:.0f}", f"{d.memory / 1e12:.2f}", f"{d.cache / 1e12:.1f}"] for d in gpus)
    )


def _groups(measured: Sequence[Measured]) -> str:
    """The mean error of each design."""
    groups: dict[str, list[float]] = {}
    for m in measured:
        groups.setdefault(m.design, []).append(_error(m))
    columns = ("design", "measured lines", "mean absolute error", "mean error")
    return table(
        columns, ([k, str(len(v)), f"{fmean(map(abs, v)):.1%}", f"{fmean(v):+.1%}"] for k, v in groups.items())
    )


def _lines(measured: Iterable[Measured]) -> str:
    """Every measured line beside its estimate."""
    columns = ("design", "shape", "plan", "ms", "measured ms", "error", "MB", "measured MB", "source")
    return table(
        columns,
        (
            [
                m.design,
                m.shape.name,
                _plan(m.estimate),
                f"{m.estimate.seconds * 1e3:.1f}",
                f"{m.ms:.1f}",
                f"{_error(m):+.0%}",
                _megabytes(m.estimate.memory),
                "" if m.peak is None else _megabytes(m.peak),
                m.source,
            ]
            for m in measured
        ),
    )


def _shape(shape: Shape, gpus: Sequence[Device], measured: Sequence[Measured]) -> str:
    """The section of one shape: a line for each design, a column for each device."""
    lines = []
    for name, design in DESIGNS.items():
        cells = [design(gpu, shape) for gpu in gpus]
        times = [
            _time(e.seconds * 1e3, e.seconds / matmuls(d, shape).seconds) for d, e in zip(gpus, cells, strict=True)
        ]
        same = [m for m in measured if (m.design, m.shape) == (name, shape) and _same_plan(m.estimate, cells[0])]
        found = [f"{_time(same[-1].ms, same[-1].ratio)} measured", same[-1].source] if same else ["", ""]  # the last
        lines.append([name, _plan(cells[0]), _megabytes(cells[0].memory), times[0], *found, *times[1:]])
    first, *others = (d.name for d in gpus)
    columns = ("design", "plan", "MB", first, f"{first}, measured", "source", *others)
    title = f"## {shape.name}: N={shape.N}, V={shape.V}, D={shape.D}"
    about = "Milliseconds, in brackets the ratio to the three matmuls; MB beyond inputs and gradients."
    return f"{title}\n\n{about}\n\n{table(columns, lines)}"


def _same_plan(x: Estimate, y: Estimate) -> bool:
    return (x.heights, x.visits) == (y.heights, y.visits)


def _plan(estimate: Estimate) -> str:
    """Such as '11 x 768', the chunks and the rows of the first of them."""
    heights = estimate.heights
    text = f"{len(heights)} x {heights[0]}" if heights else ""
    return text + (", two visits" if estimate.visits == 2 else "")


def _time(ms: float, ratio: float | None) -> str:
    return f"{ms:.1f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _megabytes(count: float) -> str:
    return format(count / 1e6, ".0f")
