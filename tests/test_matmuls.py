"""The softmax in the matmul's epilogue, interpreted on the CPU, against dense torch in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_xent.losses import CrossEntropy, Focal
from hf_xent.ops import Head, chunked, ranks, vocab_loss, vocab_stats
from hf_xent.ops.algebra import Coefficients
from hf_xent.ops.problem import Problem
from support.oracle import Polynomial, assert_no_worse, gradients, make, statistics

matmuls = pytest.importorskip("hf_xent.ops.gpu.matmuls", reason="needs triton")
CE = ("lse", "target")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch, device: str) -> list[int]:
    """`chunked` takes the kernels on the CPU too, where they are interpreted; returns the heights of their chunks."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled: they do not run on the CPU")
    heights: list[int] = []

    real = matmuls.exponentials

    def counted(hidden, *args):
        heights.append(len(hidden))
        return real(hidden, *args)

    monkeypatch.setattr(chunked, "_matmul_kernels", lambda device: matmuls)
    monkeypatch.setattr(matmuls, "exponentials", counted)
    return heights


def solved(case, loss, **options):
    total, stats = vocab_loss(
        loss, case.tensors["hidden"], case.head, case.labels, token_weight=case.weight, impl="chunked", **options
    )
    return total, stats, gradients(total, case.leaves)


def verify(case, **options):
    loss = Polynomial(CE)
    _, stats, grads = solved(case, loss, **options)
    true_values, true_grads = case.to(torch.float64).solve(loss)
    torch_values, torch_grads = case.solve(loss)
    for name in (*CE, *options.get("observe", ())):
        value = stats.values[name][stats.mask]
        if name == "top":
            assert torch.equal(value, true_values[name])
        else:
            assert_no_worse(value, torch_values[name], true_values[name])
    for grad, plain, truth in zip(grads, torch_grads, true_grads, strict=True):
        assert_no_worse(grad, plain, truth)


@pytest.mark.parametrize(("N", "V", "D"), [(37, 203, 32), (16, 64, 16), (1, 333, 64), (37, 1, 64), (5, 300, 48)])
@pytest.mark.parametrize("head", [{}, {"bias": False}, {"scale": -0.6}, {"softcap": 3.0, "scale": 0.7}])
def test_values_and_gradients(device: str, everywhere: list[int], N: int, V: int, D: int, head: dict) -> None:
    case = make(N, V, D, device=device, dtype=torch.bfloat16, **head)
    verify(case)
    assert everywhere


@pytest.mark.parametrize("budget", [1, 40_000])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_several_chunks_ignored_labels_and_frozen_tensors(
    device: str, everywhere: list[int], budget: int, frozen: str
) -> None:
    case = make(40, 300, 32, device=device, dtype=torch.bfloat16, ignore=lambda rows: rows % 3 == 1).frozen(frozen)
    verify(case, observe=("entropy", "top"), memory_budget=40 * 300 * 2 // (2 if budget > 1 else 16))
    assert len(everywhere) > 1


@pytest.mark.parametrize("head", [{}, {"bias": False}, {"scale": -0.6}, {"softcap": 3.0, "scale": 0.7}])
@pytest.mark.parametrize("rows", [4, 40])
def test_statistics_and_their_gradients_in_two_visits(
    device: str, everywhere: list[int], head: dict[str, float], rows: int
) -> None:
    """Any function of the statistics, an entropy among them; the columns come in panels."""
    case = make(40, 300, 32, device=device, dtype=torch.bfloat16, ignore=lambda rows: rows % 3 == 1, **head)
    loss = Polynomial(("lse", "target", "entropy"))
    stats = vocab_stats(
        case.tensors["hidden"], case.head, case.labels, outputs=("lse", "target", "entropy", "top"), impl="chunked",
        memory_budget=rows * 300 * 2,
    )  # fmt: skip
    grads = gradients((loss.of(stats) * case.weight)[stats.mask].sum(), case.leaves)
    true_values, true_grads = case.to(torch.float64).solve(loss)
    torch_values, torch_grads = case.solve(loss)
    for name in loss.uses:
        assert_no_worse(stats.values[name][stats.mask], torch_values[name], true_values[name])
    for grad, plain, truth in zip(grads, torch_grads, true_grads, strict=True):
        assert_no_worse(grad, plain, truth)
    assert everywhere


@pytest.mark.parametrize("tail", [1e-3, 0.03])
def test_the_sparse_tail(device: str, everywhere: list[int], tail: float) -> None:
    hidden = (2 * torch.randn(60, 32, device=device)).bfloat16().requires_grad_()
    weight = torch.randn(400, 32, device=device).bfloat16().requires_grad_()
    labels = torch.randint(400, (60,), device=device)

    def answer(h, w, **options):
        total, _ = vocab_loss(CrossEntropy(), h, Head(w), labels, impl="chunked", **options)
        return gradients(total, [h, w])

    truth = answer(*(x.detach().double().requires_grad_() for x in (hidden, weight)), tail=tail)
    everywhere.clear()
    for found, want in zip(answer(hidden, weight, tail=tail), truth, strict=True):
        assert (found.double() - want).norm() < 0.01 * want.norm()
    assert everywhere


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.7}], ids=["plain", "softcap"])
def test_two_ranks_make_a_row(device: str, head: dict[str, float]) -> None:
    """Each has half of the columns, and one of them the label; gradients are those of whole rows, in both visits."""
    case = make(6, 160, 32, device=device, dtype=torch.bfloat16, **head)
    case.labels[:] = torch.tensor([5, 79, 80, 159, 0, 100], device=device)
    hidden, labels, outputs = case.tensors["hidden"].detach(), case.labels, frozenset({"lse", "target", "entropy"})
    a, o = torch.rand(2, 6, device=device)
    halves = [case.head.detach()[start : start + 80] for start in (0, 80)]
    e = [matmuls.rows_of(hidden, 80, 6) for _ in halves]
    local = [
        matmuls.exponentials(hidden, half, (labels - start).clamp(0, 79), outputs, rows)
        for half, start, rows in zip(halves, (0, 80), e, strict=True)
    ]
    values = [{**part.values} for part in local]
    for part, start in zip(values, (0, 80), strict=True):
        part["target"] = torch.where((labels >= start) & (labels < start + 80), part["target"], 0.0)
    merged = ranks._whole_rows({name: torch.stack([part[name] for part in values]) for name in outputs})
    raw = (hidden.double() @ case.head.weight.detach().double().T + case.head.bias.detach().double()).requires_grad_()
    z = case.head.activate(raw)
    truth = statistics(z.detach(), labels)
    for name in outputs:
        torch.testing.assert_close(merged[name].double(), truth[name], rtol=1e-5, atol=1e-5)
    total = (a * z.logsumexp(-1) + o * z.gather(1, labels[:, None])[:, 0]).sum()
    want = torch.autograd.grad(total, raw)[0]
    for half, sums, rows, start in zip(halves, local, e, (0, 80), strict=True):
        share = (sums.values["lse"] - merged["lse"]).exp()
        factor = matmuls.add_label_term_(rows, half, labels - start, Coefficients(a * share, o), sums)
        columns = want[:, start : start + 80]
        torch.testing.assert_close((rows * factor).double(), columns, rtol=6e-3, atol=1e-5)
        mass = torch.zeros(6, device=device)
        dz = matmuls.rows_of(hidden, 80, 6)
        matmuls.dlogits(hidden, half, labels - start, merged["lse"], Coefficients(a, o), dz, mass)
        torch.testing.assert_close(dz.double(), columns, rtol=6e-3, atol=1e-5)
        torch.testing.assert_close(mass, share, rtol=1e-5, atol=1e-6)


def one_hot(labels: list[int], D: int = 16, device: str = "cpu") -> torch.Tensor:
    """Hidden states whose product with an identity head is 1 at the label."""
    return torch.eye(D, dtype=torch.bfloat16, device=device)[labels]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy, of the rows that are computed again
@pytest.mark.parametrize("softcap", [None, 150.0])
def test_rows_far_from_their_label_are_computed_again(device: str, softcap: float | None) -> None:
    """The label's logit is 0, another one is 40, 100, 140, 256 or as far below."""
    heights = torch.tensor([40, 100, 140, 256, -100, -256], dtype=torch.bfloat16, device=device)
    hidden = (heights[:, None] * one_hot([3] * 6, device=device)).requires_grad_()
    weight = torch.eye(80, 16, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.arange(5, 11, device=device)
    total, stats = vocab_loss(
        CrossEntropy(), hidden, Head(weight, softcap=softcap), labels, observe=("entropy", "top"), impl="chunked"
    )
    grads = gradients(total, [hidden, weight])
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    z = h @ w.T if softcap is None else softcap * torch.tanh(h @ w.T / softcap)
    truth = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(stats.nll.double(), truth, rtol=1e-6, atol=1e-5)
    p = z.softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-4)
    assert torch.equal(stats.top, z.argmax(-1))
    for found, want in zip(grads, torch.autograd.grad(truth.sum(), [h, w]), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=1e-2)


def test_banned_tokens_and_a_banned_label(device: str) -> None:
    case = make(9, 70, 16, device=device, dtype=torch.bfloat16).frozen("bias")
    case.tensors["bias"].data[20:60] = -float("inf")
    case.labels[:] = torch.arange(9, device=device)
    verify(case, observe=("top",))
    labels = torch.full_like(case.labels, 30)
    total, stats = vocab_loss(CrossEntropy(), case.tensors["hidden"], case.head, labels, impl="chunked")
    assert stats.nll.eq(float("inf")).all() and not total.isnan()


def test_weights_of_zero_and_losses_of_the_logit_alone(device: str) -> None:
    """Rows without a softmax part: an upstream gradient of zero, and a loss that only the label's logit enters."""
    case = make(12, 90, 16, device=device, dtype=torch.bfloat16)
    case.weight[::2] = 0
    verify(case)
    _, _, grads = solved(case, Polynomial(("target",)))
    truth = case.to(torch.float64).solve(Polynomial(("target",)))[1]
    for grad, plain, want in zip(grads, case.solve(Polynomial(("target",)))[1], truth, strict=True):
        assert_no_worse(grad, plain, want)


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(gamma=2.0)])
def test_gradients_are_closer_to_the_truth_than_those_of_dense_torch(device: str, loss) -> None:
    """Logits are not rounded to bfloat16: for logits of a real model's size the error of dense torch is a multiple."""
    hidden = (3 * torch.randn(48, 32, device=device)).bfloat16().requires_grad_()
    weight = torch.randn(400, 32, device=device).bfloat16().requires_grad_()
    labels = torch.randint(400, (48,), device=device)

    def answer(h, w):
        return gradients(loss.on_logits(h @ w.T, labels), [h, w])

    ours = gradients(loss(hidden, Head(weight), labels), [hidden, weight])
    truth = answer(*(x.detach().double().requires_grad_() for x in (hidden, weight)))
    for found, plain, want in zip(ours, answer(hidden, weight), truth, strict=True):
        error, torchs = ((x.double() - want).norm() / want.norm() for x in (found, plain))
        assert error < 0.5 * torchs


def test_copies_of_the_best_column_and_the_largest_column_of_the_last_tile(device: str) -> None:
    hidden = one_hot([2, 3, 4], device=device)
    weight = torch.zeros(100, 16, dtype=torch.bfloat16, device=device)
    weight[[40, 70], 2] = 3.0
    weight[99, 3] = 5.0
    weight[[0, 17], 4] = 2.0
    sums = matmuls.exponentials(
        hidden, Head(weight), torch.zeros(3, dtype=torch.int64, device=device), frozenset({"lse", "target", "top"}),
        matmuls.rows_of(hidden, 100, 3),
    )  # fmt: skip
    assert sums.values["top"].tolist() == [40, 99, 0]


@pytest.mark.parametrize(("change", "supported"), [
    (lambda h, w: (h, w), True),
    (lambda h, w: (h.float(), w.float()), False),
    (lambda h, w: (h, w.T.contiguous().T), False),
    (lambda h, w: (h[:, :12].contiguous(), w[:, :12].contiguous()), False),
])  # fmt: skip
def test_operands_that_the_matmul_cannot_read_are_left_to_stored_rows(device: str, change, supported: bool) -> None:
    zeros = [torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in ((4, 16), (32, 16))]
    hidden, weight = change(*zeros)
    assert matmuls.readable(hidden, weight) is supported


# Operations that launch nothing: views, allocations and types. `fill_` is what tests do to memory without a value.
FREE = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "fill_",
    "is_same_size", "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice",
    "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")  # wait for a device


class Operations(TorchDispatchMode):
    """Counts operations by name, backward included; under "kernels" the launches of `matmuls`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name, launches in {"exponentials": 3, "add_label_term_": 1, "dlogits": 1}.items():
            monkeypatch.setattr(matmuls, name, self._uncounted(getattr(matmuls, name), launches))

    def _uncounted(self, function: Any, launches: int) -> Any:
        def call(*args: Any) -> Any:
            self.counts["kernels"] += launches
            with _disable_current_modes():  # the interpreter's own operations are none of a GPU's
                return function(*args)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in FREE)


def loss_of_chunks(loss: Any, chunks: int, device: str) -> torch.Tensor:
    """A loss of 64 rows, one of them ignored, in some chunks."""
    hidden, weight = (torch.randn(64, 16, device=device).bfloat16().requires_grad_() for _ in range(2))
    labels = torch.randint(64, (64,), device=device)
    labels[-1] = -100
    return loss(hidden, Head(weight), labels, memory_budget=64 // chunks * 64 * 2)


@pytest.mark.parametrize(("loss", "most"), [(CrossEntropy(), 8), (Focal(gamma=2.0), 40)])
def test_launches_of_a_further_chunk(
    device: str, everywhere: list[int], monkeypatch: pytest.MonkeyPatch, loss: Any, most: int
) -> None:
    """Four kernels, two matmuls and their row factors; a loss that is not linear has a graph of its own besides."""
    found = {}
    for chunks in (2, 4):
        everywhere.clear()
        with monkeypatch.context() as patches, Operations(patches) as operations:
            loss_of_chunks(loss, chunks, device).backward()
        assert len(everywhere) == chunks
        found[chunks] = operations.launches
    assert 6 * 2 <= found[4] - found[2] <= most * 2


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(gamma=2.0)])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_host_reads_the_device_once(device: str, monkeypatch: pytest.MonkeyPatch, loss: Any, chunks: int) -> None:
    """Three numbers of the labels, in one piece."""
    lists: list[int] = []
    real = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        lists.append(self.numel())
        return real(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with Operations(monkeypatch) as operations:
        loss_of_chunks(loss, chunks, device)
    assert lists == [3]
    assert sum(operations.counts[name] for name in READS) == 0


@pytest.mark.parametrize(
    ("capability", "softcap", "supported"),
    [((8, 0), None, False), ((9, 0), None, True), ((9, 0), 30.0, True), ((10, 0), None, True), ((10, 0), 30.0, False)],
)
def test_which_gpus_and_heads_the_matmuls_are_for(monkeypatch, capability, softcap, supported) -> None:
    """Ampere has no copy engine, and Triton compiles no softcap in the epilogue for Blackwell."""
    monkeypatch.setattr(matmuls, "INTERPRETED", False)
    monkeypatch.setattr(matmuls, "_capability", lambda device: capability)
    hidden, weight = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, 16), (32, 16)))
    labels = torch.zeros(4, dtype=torch.int64)
    problem = Problem(hidden, Head(weight, softcap=softcap), labels, frozenset({"lse", "target"}))
    assert matmuls.supports(problem) is supported
