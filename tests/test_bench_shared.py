"""The benchmark whose contestants share processes: on a CPU, with the code that a GPU runs. No timing is asserted."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent.bench import (
    CONTESTANTS,
    OBJECTIVES,
    BenchConfig,
    Contestant,
    Journal,
    Row,
    markdown,
    run_shared,
    two_models,
)
from hf_xent.bench import shared as module
from hf_xent.bench.contestants import BASE, FLOOR, GROUPS, for_objective
from hf_xent.bench.inputs import truth
from hf_xent.bench.methods import iterate
from hf_xent.bench.timer import time_calls

TINY = BenchConfig(model="random", tokens=37, vocab=301, width=16, repeats=4, warmup=1, device="cpu", threads=1)
OURS = ("hf_xent", "hf_xent recompute")


def doubled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A wrong contestant: right loss, doubled gradients."""
    loss = F.cross_entropy(F.linear(hidden, weight), labels)
    return 2 * loss - loss.detach()


def raises(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A contestant that raises."""
    raise RuntimeError("out of luck\nsecond line")


def kills(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A contestant that ends its process, as a broken context does."""
    os._exit(7)


def hangs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A contestant that never answers."""
    time.sleep(600)
    return hidden.sum()


def cuts(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A contestant without a weight gradient."""
    return F.cross_entropy(F.linear(hidden, weight.detach()), labels)


ODD = {"doubled": doubled, "kills": kills, "raises": raises, "cuts": cuts}


def measured(configs: list[BenchConfig], journal: Journal | None = None, **options: object) -> list[list[Row]]:
    return list(run_shared(configs, journal, **options))


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Contestants of all groups, and odd ones between them: those after an odd one share its group."""
    with pytest.MonkeyPatch.context() as patch:
        for name, method in ODD.items():
            patch.setitem(CONTESTANTS, name, Contestant(method, group="hf_xent"))
        patch.setitem(CONTESTANTS, "after", Contestant(CONTESTANTS["hf_xent"].loss, group="hf_xent"))
        steps: list[tuple[str, int, int]] = []
        names = (FLOOR, *OURS, *ODD, "after", "liger")
        [found] = measured([replace(TINY, contestants=names)], report=lambda *step: steps.append(step))
        assert [done for _, done, _ in steps] == [*range(len(found)), len(found)]
        assert {total for _, _, total in steps} == {len(found)}
    return {row.contestant: row for row in found}


def test_contestants_in_shared_processes_are_right(rows: dict[str, Row]) -> None:
    assert list(rows) == [name for name in [*CONTESTANTS, *ODD, "after"] if name in rows]  # the registry's order
    for name in (BASE, *OURS, "after"):
        row = rows[name]
        assert row.status == "ok" and 3 <= row.repeats <= 4 and row.time_ms and row.time_ratio and row.matmul_ratio
        assert max(row.loss_error, row.hidden_error, row.weight_error) < 1e-5 and row.peak_mib is not None
    assert rows[BASE].time_ratio == 1 and rows["after"].time_ratio == pytest.approx(
        rows["after"].time_ms / rows[BASE].time_ms, rel=1e-6
    )
    assert rows[FLOOR].matmul_ratio == 1 and rows[FLOOR].hidden_error is None and rows[FLOOR].peak_mib is None
    assert (rows["liger"].status, rows["liger"].note) == ("absent", "runs on CUDA alone")


def test_what_a_contestant_does_costs_only_itself(rows: dict[str, Row]) -> None:
    assert (rows["raises"].status, rows["raises"].note) == ("failed", "RuntimeError: out of luck")
    assert rows["kills"].status == "failed" and "died with exit code 7" in rows["kills"].note
    for name in ("doubled", "cuts"):
        assert rows[name].status == "wrong" and rows[name].time_ms is None and rows[name].repeats == 0
    assert rows["doubled"].weight_error == pytest.approx(1, rel=1e-3) and rows["cuts"].weight_error == float("inf")
    assert rows["cuts"].hidden_error < 1e-5 and rows["doubled"].loss_error < 1e-5


def test_a_contestant_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "hangs", Contestant(hangs, group="dense"))
    monkeypatch.setitem(CONTESTANTS, "next", Contestant(CONTESTANTS[BASE].loss, group="dense"))
    [found] = measured([replace(TINY, contestants=("hangs", "next"), patience=5.0)])
    assert [row.status for row in found] == ["ok", "failed", "ok"] and found[1].note == "gave no answer within 5 s"


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there" / "cpu.jsonl"
    config = replace(TINY, contestants=("hf_xent", FLOOR))
    [first] = measured([replace(config, contestants=(FLOOR,))], Journal(path))
    with path.open("a") as file:
        file.write('{"contestant": "hf_x')  # cut off by a kill
    journal = Journal(path)
    assert list(journal.rows.values()) == first
    [second] = measured([config], journal)
    assert second[:2] == first and second[2].contestant == "hf_xent" and second[2].status == "ok"
    assert second[2].time_ratio == pytest.approx(second[2].time_ms / first[0].time_ms, rel=1e-6)
    assert len(path.read_text().splitlines()) == 4  # the broken line stays
    monkeypatch.setattr(module._Run, "started", lambda self, group: pytest.fail("a process was started"))
    assert measured([config], Journal(path)) == [second]
    assert [line["contestant"] for line in map(json.loads, path.read_text().splitlines()[:2])] == [BASE, FLOOR]


def test_another_commit_or_shape_is_measured_again(rows: dict[str, Row], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "cpu.jsonl")
    journal.append(rows[BASE])
    again = Journal(tmp_path / "cpu.jsonl")
    assert again.find(replace(rows[BASE], time_ms=None, date="")) == rows[BASE]
    for other in ({"commit": "other"}, {"N": 5}, {"objective": "softcap"}, {"contestant": "x"}, {"threads": 9}):
        assert again.find(replace(rows[BASE], **other)) is None
    assert Journal().find(rows[BASE]) is None


def test_nothing_starts_after_the_limit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "cpu.jsonl")
    assert measured([replace(TINY, contestants=("hf_xent", FLOOR))], journal, limit=-1.0) == [[]]
    assert not journal.rows and not (tmp_path / "cpu.jsonl").exists()


def test_objectives_on_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, str]] = []
    ask = module.Remote.ask

    def listening(self: module.Remote, method: str, *args: object, seconds: float | None = None) -> object:
        loads.append((method, self.worker.name))
        return ask(self, method, *args, seconds=seconds)

    monkeypatch.setattr(module.Remote, "ask", listening)
    configs = [replace(TINY, contestants=OURS, objective=name) for name in OBJECTIVES]
    found = measured(configs)
    assert [[row.contestant for row in group] for group in found] == [
        [BASE, *OURS],
        [BASE, "hf_xent"],
        [BASE, "hf_xent"],
        [BASE, *OURS],
        *[[BASE, "hf_xent"]] * 3,
    ]
    for group, name in zip(found, OBJECTIVES, strict=True):
        assert {row.status for row in group} == {"ok"} and {row.objective for row in group} == {name}
        assert all(max(row.loss_error, row.hidden_error, row.weight_error) < 1e-5 for row in group)
    assert sorted(name for method, name in loads if method == "load") == ["bench dense", "bench hf_xent"]
    text = markdown([row for group in found for row in group])
    assert (
        text.count("\n| dense |") == len(OBJECTIVES) and "D=16, float32; cross-entropy of logits capped at 30" in text
    )


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, objective) for name, c in CONTESTANTS.items() for objective in c.objectives if c.available("cpu") is None],
)
def test_contestants_of_other_objectives(name: str, objective: str) -> None:
    """Both gradients against the objective on float64 logits, where a debugger can follow."""
    if name == "dense compiled":
        pytest.skip("half a minute to compile")
    contestant = for_objective(CONTESTANTS[name], objective)
    hidden = (1.5 * torch.randn(21, 16)).requires_grad_()
    weight, labels = torch.randn(301, 16, requires_grad=True), torch.randint(301, (21,))
    if not contestant.gated:
        floor = two_models.matmuls if OBJECTIVES[objective].with_teacher else CONTESTANTS[FLOOR].loss
        assert name == FLOOR and contestant.loss is floor and contestant.logits == 1
        return
    expected = truth(hidden, weight, labels, "cpu", objective)
    plain = truth(hidden, weight, labels, "cpu")
    loss = iterate(contestant.loss, hidden, weight, labels)
    torch.testing.assert_close(loss, expected["loss"])
    torch.testing.assert_close(hidden.grad, expected["hidden"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad, expected["weight"], rtol=1e-4, atol=1e-6)
    assert (plain["hidden"] - expected["hidden"]).norm() > 0.01 * plain["hidden"].norm()  # another objective indeed


def test_the_truth_of_objectives_is_torch_s_own() -> None:
    logits, labels = 20 * torch.randn(9, 30, dtype=torch.float64), torch.randint(30, (9,))
    p = torch.distributions.Categorical(logits=logits)
    nll = -p.log_prob(labels)
    capped = 30 * torch.tanh(logits / 30)
    smooth = 0.9 * nll - 0.1 * logits.log_softmax(-1).mean(-1)
    q = (5 * torch.randn(9, 30, dtype=torch.float64)).softmax(-1)
    middle, kl = (p.probs + q) / 2, lambda a, b: (a * (a / b).log()).sum(-1)
    expected = (
        nll,
        capped.logsumexp(-1) - capped[range(9), labels],
        smooth,
        nll - 0.1 * p.entropy(),
        kl(q, p.probs),
        kl(p.probs, q),
    )
    expected += ((kl(p.probs, middle) + kl(q, middle)) / 2,)
    for objective, losses in zip(OBJECTIVES.values(), expected, strict=True):
        second = (q.log() + 1,) if objective.with_teacher else ()
        torch.testing.assert_close(objective.on_logits(logits, labels, *second), losses)


def test_every_contestant_has_a_group_and_known_objectives() -> None:
    for contestant in CONTESTANTS.values():
        assert contestant.group in GROUPS and contestant.objectives.keys() <= OBJECTIVES.keys() - {"cross-entropy"}
    for objective in OBJECTIVES:
        assert {BASE, FLOOR, "hf_xent"} <= set(replace(TINY, objective=objective).names)


def test_calls_are_timed_one_by_one() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.01)

    times = time_calls(call, 3, "cpu")
    assert len(calls) == 3 and all(seconds >= 0.01 for seconds in times)


def test_a_shape_that_cannot_be_drawn_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="width is 16: calibrated inputs need 256"):
        measured([replace(TINY, model="calibrated", contestants=("hf_xent",))])


def test_calibrated_inputs_name_their_source() -> None:
    config = replace(TINY, model="calibrated", width=256, contestants=("hf_xent",), dtype="bfloat16")
    [found] = measured([config])
    assert [(row.source, row.N, row.V, row.D, row.dtype, row.status) for row in found] == [
        ("calibrated to gemma3-270m", 37, 301, 256, "bfloat16", "ok")
    ] * 2
    assert found[1].hidden_tolerance == 2 * found[0].hidden_error


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's compiler is full of them
def test_every_input_is_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch compiles one function for as many inputs as its limit; others run as they are, and a log says so."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a run that was killed leaves halves of files
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    for V, objective in product((300, 301), ("cross-entropy", "softcap")):
        hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
        labels = torch.randint(V, (5,))
        method = CONTESTANTS["dense compiled"].method(objective)
        assert method is not None
        with torch._dynamo.config.patch(recompile_limit=2):
            loss = iterate(method, hidden, weight, labels)
        torch.testing.assert_close(loss, truth(hidden, weight, labels, "cpu", objective)["loss"])
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shared_processes_on_a_gpu(tmp_path: Path) -> None:
    """Inputs drawn there, the matmuls beside each contestant, memory by the allocator, objectives, and the journal."""
    config = BenchConfig("calibrated", tokens=600, vocab=5000, width=256, dtype="bfloat16", repeats=3, device="cuda")
    names = (FLOOR, "dense float32 logits", "hf_xent", "hf_xent recompute")
    configs = [replace(config, contestants=names, objective=objective) for objective in OBJECTIVES]
    journal = Journal(tmp_path / "gpu.jsonl")
    found = measured(configs, journal)
    assert {row.contestant for row in found[0]} == {BASE, *names}
    for row in (row for group in found for row in group):
        assert row.status == "ok" and row.device == torch.cuda.get_device_name(), f"{row.contestant}: {row.note}"
        assert row.time_ms and row.time_ratio and row.matmul_ratio
        assert row.contestant == FLOOR or (row.peak_mib is not None and row.hidden_error < 0.05)
    assert measured(configs, Journal(journal.path)) == found
