"""The benchmark's machinery: the gate, the meters, the files. No timing is asserted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent import bench
from hf_xent.bench import CONTESTANTS, BenchConfig, Contestant, PeakMemory, Row, measure, memory
from hf_xent.bench.contestants import YARDSTICK, matmul_outputs, matmuls, take
from hf_xent.bench.inputs import truth

TINY = BenchConfig(model="random", tokens=37, vocab=301, width=16, repeats=2, warmup=1, device="cpu", threads=1)
HERE = [name for name, contestant in CONTESTANTS.items() if contestant.gated and contestant.available("cpu") is None]


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
    """One beyond the promise, one within it."""
    return {f"error={error}": {"error": error} for error in (1e-1, 1e-3)}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One run: every contestant of this machine but torch.compile (half a minute to build), and some odd ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTESTANTS, "twice", Contestant(twice))
        patch.setitem(CONTESTANTS, "broken", Contestant(broken))
        patch.setitem(CONTESTANTS, "choice", Contestant(near, settings=two_settings, promise=1e-2))
        patch.setitem(CONTESTANTS, "overstated", Contestant(near, promise=1e-4))
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


def test_the_yardstick_has_a_time_alone(rows: list[Row]) -> None:
    row = named(rows, YARDSTICK)
    assert row.status == "ok" and row.time_ms and row.matmul_ratio == 1 and row.time_ratio and row.repeats == 2
    assert {row.loss_error, row.hidden_error, row.weight_error, row.peak_mib} == {None}
    assert {row.hidden_tolerance, row.weight_tolerance} == {None}


def test_the_yardstick_is_the_three_products() -> None:
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    outputs = matmul_outputs(hidden, weight)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = take(matmuls, hidden, weight, torch.zeros(5, dtype=torch.long), **outputs)
    assert loss.ndim == 0 and loss.untyped_storage().data_ptr() != outputs["logits"].untyped_storage().data_ptr()
    logits = hidden @ weight.T
    for name, expected in (("logits", logits), ("hidden_out", logits @ weight), ("weight_out", logits.T @ hidden)):
        torch.testing.assert_close(outputs[name], expected.detach())
    assert hidden.grad is None and weight.grad is None


def test_a_promise_widens_the_gate_for_who_gives_it(rows: list[Row]) -> None:
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
    assert path.name.endswith("-float32.csv") and bench.from_csv(path) == rows
    newer = replace(rows[0], time_ms=1.5)
    other = replace(rows[0], N=99)
    assert bench.to_csv([newer, other], tmp_path) == [path]
    assert bench.from_csv(path) == [newer, *rows[1:], other]


def test_markdown_has_one_table_an_input(rows: list[Row], tmp_path: Path) -> None:
    bench.to_csv(rows, tmp_path)
    [path] = bench.to_markdown([replace(row, N=99) for row in rows], tmp_path)
    lines = path.read_text().splitlines()
    tables = [line for line in lines if line.startswith("| contestant")]
    assert path.suffix == ".md" and len(tables) == 2 and sum(line.startswith("### random") for line in lines) == 2
    columns = [cell.strip() for cell in tables[0].strip("|").split("|")]
    assert columns[:6] == ["contestant", "time (ms)", "tokens/s", "time / dense", "peak (MiB)", "peak / logits"]
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(columns) + 1}


def test_contestants_run_in_groups_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure._Session, "group_size", lambda self: 1)
    config = replace(TINY, contestants=(YARDSTICK, "hf_xent", "hf_xent recompute"), dtype="bfloat16")
    steps: list[tuple[str, int, int]] = []
    found = bench.run(config, report=lambda *step: steps.append(step))
    assert [(row.contestant, row.status) for row in found] == [(n, "ok") for n in ("dense", *config.contestants)]
    assert [row.repeats for row in found] == [4, 4, 2, 2]  # dense and the yardstick run beside each group
    assert all(row.time_ratio and row.matmul_ratio for row in found)
    assert max(done for _, done, _ in steps[:-1]) <= steps[0][2]  # a reference's turns are not counted


def test_dense_is_not_tried_where_its_logits_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure._Session, "free", lambda self: 1000)
    base, bare, ours = bench.run(replace(TINY, contestants=("hf_xent", YARDSTICK)))
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
        loss = take(contestant.loss, hidden, weight, labels, **setting)
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
    assert [row.status for row in found] == ["ok"] * 3
    assert (found[0].N, found[0].V, found[0].D, found[0].source) == (64, 49152, 576, "smollm2 on pydoc")
    assert named(found, "hf_xent").peak_ratio < named(found, "dense").peak_ratio
