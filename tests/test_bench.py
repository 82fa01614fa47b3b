"""The benchmark's machinery: the gate, the meters, the files. No timing is asserted."""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent import bench
from hf_xent.bench import CONTESTANTS, BenchConfig, Contestant, PeakMemory, Row, measure, memory
from hf_xent.bench.contestants import BASE, FLOOR
from hf_xent.bench.inputs import truth
from hf_xent.bench.methods import iterate, matmul_outputs, matmuls
from hf_xent.bench.pages import largest, summary
from hf_xent.bench.plots import draw, longest
from hf_xent.bench.rows import shaped

TINY = BenchConfig(model="random", tokens=37, vocab=301, width=16, repeats=2, warmup=1, device="cpu", threads=1)
HERE = [name for name, contestant in CONTESTANTS.items() if contestant.gated and contestant.available("cpu") is None]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def twice(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A wrong contestant: right loss, doubled gradients."""
    loss = F.cross_entropy(F.linear(hidden, weight), labels)
    return 2 * loss - loss.detach()


def broken(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A contestant that raises."""
    raise RuntimeError("out of luck\nsecond line")


def near(hidden: Tensor, weight: Tensor, labels: Tensor, error: float = 1e-3) -> Tensor:
    """An approximate contestant: right loss, gradients off by a relative error."""
    loss = F.cross_entropy(F.linear(hidden, weight), labels)
    return (1 + error) * loss - error * loss.detach()


def two_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, float]]:
    """One beyond the tolerance, one within it."""
    return {f"error={error}": {"error": error} for error in (1e-1, 1e-3)}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One run: every contestant of this machine but torch.compile (half a minute to build), and some odd ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure._Session, "group_size", lambda self: 99)  # one group, however little memory is free
        patch.setitem(CONTESTANTS, "twice", Contestant(twice))
        patch.setitem(CONTESTANTS, "broken", Contestant(broken))
        patch.setitem(CONTESTANTS, "choice", Contestant(near, settings=two_settings, tolerance=1e-2))
        patch.setitem(CONTESTANTS, "overstated", Contestant(near, tolerance=1e-4))
        names = tuple(name for name in CONTESTANTS if name != "dense compiled")
        steps: list[tuple[str, int, int]] = []
        found = bench.run(replace(TINY, contestants=names), report=lambda *step: steps.append(step))
        assert [row.contestant for row in found] == list(names)
    assert steps[-1] == ("done", steps[0][2], steps[0][2])
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    return found


def named(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row.contestant == name)


def test_every_contestant_of_this_machine_is_right(rows: list[Row]) -> None:
    for name in HERE:
        if name == "dense compiled":
            continue
        row = named(rows, name)
        assert row.status == "ok", f"{name}: {row.status} {row.note}"
        assert row.time_ms and row.time_ms > 0 and row.time_ratio and row.tokens_per_s and row.repeats == 2
        assert row.matmul_ratio and row.matmul_ratio > 0
        assert row.peak_mib is not None and row.peak_ratio is not None
        assert max(row.loss_error, row.hidden_error, row.weight_error) < 1e-5
    assert named(rows, "dense").time_ratio == 1


def test_the_floor_has_a_time_alone(rows: list[Row]) -> None:
    row = named(rows, FLOOR)
    assert row.status == "ok" and row.time_ms and row.matmul_ratio == 1 and row.time_ratio and row.repeats == 2
    assert {row.loss_error, row.hidden_error, row.weight_error, row.peak_mib} == {None}
    assert {row.hidden_tolerance, row.weight_tolerance} == {None}


def test_the_floor_is_the_three_products() -> None:
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    outputs = matmul_outputs(hidden, weight)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = iterate(matmuls, hidden, weight, torch.zeros(5, dtype=torch.long), **outputs)
    assert loss.ndim == 0 and loss.untyped_storage().data_ptr() != outputs["logits"].untyped_storage().data_ptr()
    logits = hidden @ weight.T
    for name, expected in (("logits", logits), ("hidden_out", logits @ weight), ("weight_out", logits.T @ hidden)):
        torch.testing.assert_close(outputs[name], expected.detach())
    assert hidden.grad is None and weight.grad is None


def test_a_contestant_s_own_tolerance_widens_its_gate(rows: list[Row]) -> None:
    exact, kept, broke = (named(rows, name) for name in ("twice", "choice", "overstated"))
    assert (kept.status, broke.status) == ("ok", "wrong") and kept.time_ms and broke.time_ms is None
    assert kept.hidden_error == pytest.approx(1e-3, rel=0.02) == broke.weight_error
    assert [row.hidden_tolerance for row in (exact, kept, broke)] == [1e-5, 1e-2, 1e-4]
    assert [row.weight_tolerance for row in (exact, kept, broke)] == [1e-5, 1e-2, 1e-4]


def test_wrong_gradients_get_no_time(rows: list[Row]) -> None:
    row = named(rows, "twice")
    assert row.status == "wrong" and row.time_ms is None and row.time_ratio is None and row.repeats == 0
    assert row.loss_error < 1e-5 and row.hidden_error == pytest.approx(1, rel=1e-3)
    assert "| wrong |" in bench.markdown([row])


def test_what_a_contestant_raises_is_its_note(rows: list[Row]) -> None:
    row = named(rows, "broken")
    assert (row.status, row.note) == ("failed", "RuntimeError: out of luck")
    absent = named(rows, "liger")
    assert (absent.status, absent.note) == ("absent", "runs on CUDA alone")


def test_a_wrong_setting_is_passed_over(rows: list[Row]) -> None:
    row = named(rows, "choice")
    assert (row.status, row.note) == ("ok", "error=0.001")
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since torch 2.13
        assert named(rows, "torch chunked tuned").note.startswith("batch_chunk_size=64")


def test_rows_say_where_they_were_measured(rows: list[Row]) -> None:
    row = rows[0]
    assert (row.N, row.V, row.D, row.dtype, row.source, row.threads) == (37, 301, 16, "float32", "random", 1)
    assert row.device and row.torch.split("+")[0] == torch.__version__.split("+")[0] and row.date[:2] == "20"


def test_csv_round_trip_and_merge(rows: list[Row], tmp_path: Path) -> None:
    [path] = bench.to_csv(rows, tmp_path)
    assert bench.from_csv(path) == rows
    newer = replace(rows[0], time_ms=1.5)
    other = replace(rows[0], N=99)
    half = replace(rows[0], dtype="bfloat16")
    assert bench.to_csv([newer, other, half], tmp_path) == [path]
    assert bench.from_csv(path) == [newer, *rows[1:], other, half]
    elsewhere = replace(rows[0], device="Some GPU (80 GB)")
    assert bench.to_csv([elsewhere], tmp_path) == [tmp_path / "some-gpu-80-gb.csv"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".csv"}  # no draft is left


def test_a_page_has_one_table_an_input_and_its_plots(rows: list[Row], tmp_path: Path) -> None:
    wider = [replace(row, V=999) for row in rows]
    [path] = bench.to_csv([*wider, *[replace(row, dtype="bfloat16") for row in rows], *rows], tmp_path)
    page, plot = bench.write_page(path)
    assert (page, plot) == (path.with_suffix(".md"), path.with_name(f"{path.stem}-float32-vocabulary.png"))
    text = page.read_text()
    assert text.startswith(f"# {rows[0].device}\n") and f"]({path.name})" in text and f"]({plot.name})" in text
    assert re.findall(r"^## random: N=37, (V=\d+), D=16, (\w+)$", text, re.MULTILINE) == [
        ("V=301", "bfloat16"),
        ("V=301", "float32"),
        ("V=999", "float32"),
    ]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in tables[0].strip("|").split("|")]
    assert columns[:5] == ["contestant", "time (ms)", "tokens/s", "time / dense", "time / matmuls"]
    assert {line.count("|") for line in tables} == {len(columns) + 1}
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def made(N: int, V: int, contestant: str = BASE, **other: object) -> Row:
    """A row nobody measured."""
    shape = {"N": N, "V": V, "D": 8, "dtype": "float32", "source": "m on t", "device": "GPU", "threads": 1}
    times = {"time_ms": N * V / 1e6, "time_ratio": 1.0, "peak_mib": N / 8, "hidden_error": 1e-6, "weight_error": 1e-6}
    return Row(contestant, **{"status": "ok", **times, **shape, **other})


def test_a_plot_follows_the_longest_series() -> None:
    tokens = [made(N, 100) for N in (2, 1)]
    vocabularies = [made(4, V, source="random") for V in (100, 300, 200)]
    assert longest([*tokens, *vocabularies], "N") == tokens[::-1]
    assert [row.V for row in longest([*tokens, *vocabularies], "V")] == [100, 200, 300]
    assert longest([made(1, 100), made(2, 100, D=9), made(3, 100, threads=2), made(4, 100, source="u")], "N") == []
    shorter = [made(N, 500, source="random") for N in (1, 2)]
    assert longest([*shorter, *tokens], "N") == tokens[::-1]  # real ones, where both are as long


def test_plots_leave_out_what_has_no_number(tmp_path: Path) -> None:
    rows = [made(N, 100, name) for N in (1, 2) for name in (BASE, "hf_xent", "unheard of")]
    rows += [made(N, 100, FLOOR, peak_mib=None) for N in (1, 2)]
    rows += [made(N, 100, "liger", peak_mib=0.0) for N in (1, 2)]
    rows += [made(N, 100, "trl", status="wrong", time_ms=None) for N in (1, 2, 3)]
    [path] = bench.to_csv(rows, tmp_path)
    assert [file.name for file in bench.write_page(path)] == ["gpu.md", "gpu-float32-tokens.png"]


def test_shapes_that_differ_in_all_numbers_stand_side_by_side(tmp_path: Path) -> None:
    shapes = ({}, {"N": 4, "V": 50, "D": 4})
    rows = [
        replace(made(2, 100, name), matmul_ratio=1.5, **shape) for shape in shapes for name in (BASE, FLOOR, "hf_xent")
    ]
    rows += [replace(row, objective="softcap") for row in rows]
    [path] = bench.to_csv(rows, tmp_path)
    page, plot = bench.write_page(path)
    assert plot.name == "gpu-float32-shapes.png" and f"]({plot.name})" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    assert draw([row for row in rows if row.objective == "softcap"], tmp_path / "x") == []


def test_the_readme_shows_the_largest_real_inputs_of_each_device() -> None:
    small, large, wide = made(10, 100), made(20, 100), made(5, 300)
    half = made(2, 50, dtype="bfloat16")
    unfit = [made(90, 900, source="random"), made(90, 900, dtype="float16"), made(90, 900, status="failed")]
    there = made(1, 10, device="CPU")
    wrong = made(20, 100, "hf_xent", status="wrong", time_ms=None, time_ratio=None)
    assert largest([half, wrong, small, large, *unfit, there]) == [[there], [large, wrong], [half]]
    assert largest([large, wide]) == [[large]] and largest([small, wide]) == [[wide]]
    text = summary([half, wrong, small, large, *unfit, there], "some/where")
    assert "in float32 and bfloat16, with every contestant that ran" in text
    assert "| *[GPU](some/where/gpu.md): m on t* | *N=20* | *V=100* | *D=8* | *float32* | *1 threads* |" in text
    assert "| **hf_xent** | wrong | 2 |  | 1.0e-06 | 1.0e-06 |" in text and "N=90" not in text
    with pytest.raises(ValueError, match="no results of a real model: run `hf-xent bench`"):
        summary(unfit, "")


def test_update_readme_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    bench.to_csv([made(10, 100)], folder)
    with pytest.raises(ValueError, match=r"README.md does not exist: name a file that has <!-- bench -->"):
        bench.update_readme(readme, folder)
    readme.write_text("above\n<!-- bench -->\nold\n")
    with pytest.raises(ValueError, match="has no table to replace: put <!-- bench --> and <!-- /bench -->"):
        bench.update_readme(readme, folder)
    readme.write_text("above\n<!-- bench -->\nold\n<!-- /bench -->\nbelow\n")
    for _ in range(2):
        bench.update_readme(readme, folder)
        text = readme.read_text()
        assert text.startswith("above\n<!-- bench -->\nMean") and text.endswith(".\n<!-- /bench -->\nbelow\n")
        assert "[GPU](results/gpu.md)" in text and "old" not in text and text.count("| dense |") == 1
    readme.write_text(text.replace("](results/", "](https://example.org/blob/main/results/"))
    bench.update_readme(readme, folder)
    assert "[GPU](https://example.org/blob/main/results/gpu.md)" in readme.read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_pages_are_generated(path: Path, tmp_path: Path) -> None:
    """If this fails: `make report`."""
    files = bench.write_page(Path(shutil.copy(path, tmp_path)))
    assert files[0].read_text() == path.with_suffix(".md").read_text()
    assert all((RESULTS / file.name).is_file() for file in files)


def test_a_sweep_is_every_combination() -> None:
    configs = bench.sweep("32, 16,16", "100,300", "float32,bfloat16", model="random", repeats=3)
    assert [(c.dtype, c.vocab, c.tokens) for c in configs] == [
        (dtype, vocab, tokens) for dtype in ("float32", "bfloat16") for vocab in (100, 300) for tokens in (32, 16)
    ]
    assert {c.repeats for c in configs} == {3}
    assert bench.sweep("7", None, "float32") == [BenchConfig(tokens=7)]
    assert configs[0].shape == "random, float32, N=32, V=100, D=64"
    shapes = bench.sweep(
        None, None, "float32", model="random", shapes="9x8x7, 6x5x4", objectives="softcap,cross-entropy"
    )
    assert [(c.tokens, c.vocab, c.width, c.objective) for c in shapes] == [
        (*size, objective) for size in ((9, 8, 7), (6, 5, 4)) for objective in ("softcap", "cross-entropy")
    ]
    assert shapes[0].shape == "random, float32, N=9, V=8, D=7, softcap"
    assert [c.objective for c in bench.sweep(None, None, "float32", objectives="all")] == list(bench.OBJECTIVES)
    assert BenchConfig(tokens=7).shape == "smollm2, float32, N=7"


@pytest.mark.parametrize(
    ("source", "made_up"),
    [("random", True), ("random:odd", True), ("random to m", True), ("randomly/named on t", False)],
)
def test_what_counts_as_real(source: str, made_up: bool) -> None:
    assert shaped(source) == made_up and made(1, 1, source=source).real != made_up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": "5x6"}, "shapes is '5x6': give tokens x vocabulary x width"),
        ({"shapes": "5x6x7", "width": 3}, "shapes is '5x6x7', but tokens, vocab or width is given, too"),
        ({"shapes": "5x0x7"}, "vocab is 0: give a positive number"),
        ({"shapes": "5x6x7", "model": "smollm2"}, "shapes is '5x6x7', but smollm2 has its own"),
        ({"objectives": "mse"}, "objective is 'mse': choose one of cross-entropy, softcap"),
    ],
)
def test_shapes_and_objectives_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.sweep(None, None, "float32", **{"model": "random", **options})


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (("5x", None, "float32"), "tokens is '5x': give whole numbers, with commas between them"),
        (("5,", None, "float32"), "tokens is '5,': give whole numbers"),
        (("5,0", None, "float32"), "tokens is 0: give a positive number"),
        (("5", None, "float32,int8"), "dtype is 'int8': choose one of"),
        (
            ("5", "9,10", "float32"),
            "vocab is '9,10', but smollm2 has its own: leave it out, or choose model calibrated or random",
        ),
    ],
)
def test_a_sweep_is_checked_before_it_runs(lists: tuple[str, str | None, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.sweep(*lists)


def test_contestants_run_in_groups_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure._Session, "group_size", lambda self: 1)
    config = replace(TINY, contestants=(FLOOR, "hf_xent", "hf_xent recompute"), dtype="bfloat16")
    steps: list[tuple[str, int, int]] = []
    found = bench.run(config, report=lambda *step: steps.append(step))
    assert [(row.contestant, row.status) for row in found] == [(n, "ok") for n in ("dense", *config.contestants)]
    assert [row.repeats for row in found] == [4, 4, 2, 2]  # dense and the floor run beside each group
    assert all(row.time_ratio and row.matmul_ratio for row in found)
    assert max(done for _, done, _ in steps[:-1]) <= steps[0][2]  # a reference's turns are not counted


def test_dense_is_not_tried_where_its_logits_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure._Session, "free", lambda self: 1000)
    base, bare, ours = bench.run(replace(TINY, contestants=("hf_xent", FLOOR)))
    assert base.status == bare.status == "absent" and "GiB" in base.note and "GiB" in bare.note
    assert ours.status == "ok" and ours.time_ms and ours.time_ratio is None and ours.matmul_ratio is None


@pytest.mark.parametrize("name", [name for name in HERE if name != "dense compiled"])
def test_contestants_in_this_process(name: str) -> None:
    """Both gradients, where a debugger can follow."""
    hidden, weight = torch.randn(21, 16, requires_grad=True), torch.randn(301, 16, requires_grad=True)
    labels = torch.randint(301, (21,))
    expected = truth(hidden, weight, labels, "cpu")
    contestant = CONTESTANTS[name]
    for setting in contestant.settings("cpu", torch.float32, 21).values():
        loss = iterate(contestant.loss, hidden, weight, labels, **setting)
        torch.testing.assert_close(loss, expected["loss"])
        torch.testing.assert_close(hidden.grad, expected["hidden"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(weight.grad, expected["weight"], rtol=1e-4, atol=1e-7)


def test_truth_is_the_dense_gradient_chunk_by_chunk() -> None:
    hidden, weight = torch.randn(9, 5, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64)
    labels = torch.randint(70, (9,))
    found = truth(hidden.float(), weight.float(), labels, "cpu")
    p = (hidden.float().double() @ weight.float().double().T).softmax(-1)
    p[range(9), labels] -= 1
    torch.testing.assert_close(found["hidden"], (p / 9 @ weight.float().double()).float())
    torch.testing.assert_close(found["weight"], (p.T / 9 @ hidden.float().double()).float())


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_what_is_freed_within(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/nonexistent/clear_refs"))
    with PeakMemory() as meter:
        kept = torch.ones(16 << 18)
        gone = torch.ones(64 << 18)
        gone.add_(1)
        until = time.monotonic() + 60
        while sampled and meter._meter.peak < meter._before + (72 << 20) and time.monotonic() < until:
            time.sleep(0.001)  # on a busy machine, the thread that looks comes late
        del gone
    assert meter.extra == pytest.approx(80 << 20, rel=0.2)
    assert kept.sum() > 0
    with PeakMemory() as meter:
        math.sqrt(2)
    assert meter.extra < 4 << 20


def test_config_refuses_what_it_cannot_run() -> None:
    for options, message in (
        ({"dtype": "int8"}, "choose one of float32, bfloat16"),
        ({"contestants": ("unknown",)}, "choose among dense"),
        ({"device": "tpu"}, "'cpu' or 'cuda'"),
        ({"repeats": 0}, "positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**options)


@pytest.mark.slow
def test_compiled_dense_and_real_activations() -> None:
    """The two costly parts: torch.compile, and hidden states of the embedded model."""
    pytest.importorskip("gguf")
    config = BenchConfig(tokens=64, repeats=1, warmup=1, device="cpu", contestants=("dense compiled", "hf_xent"))
    found = bench.run(config)
    status = {row.contestant: row.status for row in found}
    assert len(found) == 3 and status["dense"] == status["hf_xent"] == "ok"
    # whether torch compiles it, and rightly, differs between CPUs (with AVX2 alone it can be far off): the row says so
    compiled = named(found, "dense compiled")
    assert compiled.status in ("ok", "wrong") or compiled.note.startswith("BackendCompilerFailed")
    assert (compiled.time_ms is not None) == (compiled.status == "ok")
    assert (found[0].N, found[0].V, found[0].D, found[0].source) == (64, 49152, 576, "smollm2 on pydoc")
    assert named(found, "hf_xent").peak_ratio < named(found, "dense").peak_ratio


@pytest.mark.slow  # three processes load TRL
def test_one_dpo_step_of_each_side(tmp_path):
    """Both sides find the same loss and gradient, or `run` raises; the table holds them against TRL."""
    from benchmarks import dpo
    from support.models import tiny, tiny_tokenizer

    tiny(std=0.05, max_position_embeddings=128).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = dpo.run(dpo.Shape(str(tmp_path), pairs=2, tokens=32, prompt=8), rounds=1)
    for mine, theirs in zip(found["hf_xent"], found["TRL"], strict=True):
        assert (mine.loss, mine.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-4)
        assert mine.loss != pytest.approx(math.log(2), rel=1e-6) and mine.seconds > 0 < mine.mib
    assert "| TRL |" in dpo.table(found) and dpo.table(found).count("1.00") >= 2
