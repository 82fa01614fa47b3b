"""The kernels over stored logits, interpreted on the CPU, against dense torch in float64 and torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_xent.losses import EMO, CrossEntropy, Focal
from hf_xent.ops import DIFFERENTIABLE, STATISTICS, Head, chunked, ranks, tiles, vocab_loss, vocab_stats
from hf_xent.ops.algebra import Coefficients, row_factor
from hf_xent.ops.problem import Problem
from hf_xent.ops.statistics import wide
from support.oracle import NAMES, Polynomial, assert_close_at_scale, assert_no_worse, gradients, make, statistics

fused = pytest.importorskip("hf_xent.ops.gpu.fused", reason="needs triton")

# The first visit of a row whose label is far below the top is thrown away, and its sums may be infinite: NumPy says so
# where kernels are interpreted.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BANNED = float("-inf")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """`tiles` takes the kernels on the CPU too, where they are interpreted."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled: they do not run on the CPU")
    monkeypatch.setattr(tiles, "_kernels", lambda z: fused)


def rows_of(n: int, V: int, dtype: torch.dtype, device: str) -> Tensor:
    """Raw products whose rows do not touch."""
    return (3 * torch.randn(n, V + 3, device=device)).to(dtype)[:, :V]


def problem_of(
    z: Tensor, labels: Tensor, outputs: tuple[str, ...] = STATISTICS, payload: bool = True, **head
) -> Problem:
    """A problem whose heads have the shape of z and no matrix: the products are there already."""
    V, hidden = z.shape[1], z.new_empty(len(z), 1)
    second = (hidden, Head(z.new_empty(V, 1), scale=-1.3, softcap=2.0 if head.get("softcap") else None))
    first, needs = Head(z.new_empty(V, 1), **head), frozenset({"hidden", "payload_hidden"})
    return Problem(hidden, first, labels, frozenset(outputs), second if payload else None, needs=needs)


def dense_statistics(problem: Problem, z: Tensor, pay: Tensor, labels: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every statistic from dense logits in a dtype."""
    return statistics(problem.head.activate(z.to(dtype)), labels, problem.payload[1].activate(pay.to(dtype)))


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "V", "scale", "softcap"),
    [
        (4, 203, -0.7, None),
        (3, 203, 0.7, 5.0),
        (2, 1, 2.0, None),
        (1, 64, 1.0, None),
        (1, 65, 0.0, 3.0),
        (0, 9, 1.0, None),
    ],
)
def test_every_statistic(device, dtype, n, V, scale, softcap):
    z, pay, labels = rows_of(n, V, dtype, device), rows_of(n, V, dtype, device), torch.randint(V, (n,), device=device)
    left = z.clone(), pay.clone()
    problem = problem_of(z, labels, scale=scale, softcap=softcap)
    found = fused.statistics(problem, z, pay, labels)
    assert torch.equal(z, left[0]) and torch.equal(pay, left[1]) and set(found) == set(STATISTICS)
    truth, same = (dense_statistics(problem, z, pay, labels, d) for d in (torch.float64, wide(dtype)))
    for name, value in found.items():
        assert value.dtype == (torch.int64 if name in ("top", "rank") else wide(dtype))
        if dtype == torch.float64 or name in ("top", "rank"):
            torch.testing.assert_close(value, truth[name])
        else:
            assert_no_worse(value, same[name], truth[name], what=name)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_alone(device, name):
    """Sums that nobody asked for are not kept; `variance` needs the entropy's."""
    z, pay, labels = rows_of(3, 130, torch.float32, device), rows_of(3, 130, torch.float32, device), [0, 64, 129]
    labels = torch.tensor(labels, device=device)
    problem = problem_of(z, labels, (name,), payload=name == "payload")
    found = fused.statistics(problem, z, pay if name == "payload" else None, labels)
    expected = statistics(z.double(), labels, -1.3 * pay.double())
    assert set(found) == {name}
    torch.testing.assert_close(found[name], expected[name], check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [("lse", "target", "top"), STATISTICS], ids=["lse", "all"])
@pytest.mark.parametrize("gap", [3.0, 10.0, 50.0, 70.0, 1e3, 3e4])
def test_a_label_far_below_the_top(device, dtype, outputs, gap):
    """On both sides of every distance at which the row is read again; the maximum is in the last tile."""
    z, pay = torch.randn(2, 150, device=device, dtype=dtype), torch.randn(2, 150, device=device, dtype=dtype)
    labels = torch.tensor([70, 3], device=device)
    z[0, 140:143] = torch.tensor([gap - 0.5, gap, gap - 0.1], device=device, dtype=dtype)
    z[1, 3] -= gap
    problem = problem_of(z, labels, outputs, payload="payload" in outputs)
    found = fused.statistics(problem, z, pay, labels)
    truth, same = (statistics(z.to(d), labels, -1.3 * pay.to(d)) for d in (torch.float64, dtype))
    one_addition = float(z.abs().sum()) * torch.finfo(dtype).eps / z.shape[1]  # its rounding, in the mean of a row
    for name, value in found.items():
        atol = 1e-12 if dtype == torch.float64 else 1e-5
        atol = max(atol, one_addition) if name == "mean" else atol
        assert_no_worse(value, same[name], truth[name], atol=atol, what=name)


@pytest.mark.parametrize("V", [1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_banned_tokens(device, dtype, V):
    """The label's token, all but one, all but the label's, and all of them."""
    z, pay = torch.full((4, V), BANNED, device=device, dtype=dtype), torch.randn(4, V, device=device).to(dtype)
    z[0] = torch.randn(V, device=device)
    z[0, V // 2] = BANNED
    z[1, V - 1], z[2, V // 2] = -2.0, 1e4
    labels = torch.full((4,), V // 2, device=device)
    found = fused.statistics(problem_of(z, labels), z, pay, labels)
    normal = z.double()
    expected = statistics(normal, labels, -1.3 * pay.double())
    for name in ("lse", "target", "mean", "rank"):
        torch.testing.assert_close(found[name], expected[name], check_dtype=False, rtol=1e-5, atol=1e-5)
    assert found["top"][1:].tolist() == [V - 1, V // 2, 0]
    whole = torch.ones(4, dtype=torch.bool, device=device)
    whole[3], whole[0] = False, V > 1  # without any token there is no distribution
    p = normal.softmax(-1)
    logp = normal.log_softmax(-1).clamp(min=-1e4)
    entropy = -(p * logp).sum(-1)
    wanted = {
        "entropy": entropy,
        "variance": (p * (logp + entropy[:, None]).square()).sum(-1),
        "payload": (p * -1.3 * pay).sum(-1),
        "log_sum_sq": p.square().sum(-1).log(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name][whole], value[whole], check_dtype=False, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_column(device):
    z = torch.zeros(3, 150, device=device)
    z[0, [140, 75, 139]] = 5.0  # of three tiles' worth of columns, two
    z[1, [67, 3, 131]] = 5.0  # one lane sees all of them
    found = fused.statistics(
        problem_of(z, z[:, 0].long(), payload=False), z, None, torch.tensor([75, 131, 9], device=device)
    )
    assert found["top"].tolist() == [75, 3, 0] and found["rank"].tolist() == [0, 0, 0]


def test_what_is_not_finite_is_not_hidden(device):
    z = torch.randn(4, 150, device=device)
    z[0, 7], z[1, 149], z[2, 3], z[3, 140] = torch.nan, torch.inf, torch.inf, torch.nan
    labels = torch.tensor([7, 0, 3, 1], device=device)
    assert fused.statistics(problem_of(z, labels, payload=False), z, None, labels)["lse"].isnan().all()


# ---- gradients ------------------------------------------------------------------------------------------------------


def dense_gradients(
    problem: Problem, z: Tensor, pay: Tensor, labels: Tensor, coef: Coefficients
) -> tuple[Tensor, Tensor]:
    """dz and the payload's by autograd, from a function of dense logits whose gradient has these coefficients."""
    z, pay = (x.detach().requires_grad_() for x in (z, pay))
    wide_z, wide_pay = problem.head.activate(z), problem.payload[1].activate(pay)
    logp = wide_z - wide_z.detach().logsumexp(-1, keepdim=True)
    p = logp.detach().exp()
    terms = [coef.a[:, None] * p * wide_z, (coef.o * wide_z.gather(-1, labels[:, None]).squeeze(-1))[:, None]]
    if coef.b is not None:
        terms.append(coef.b[:, None] * p * logp.detach() * wide_z)
    if coef.c is not None:
        terms.append(coef.c[:, None] * p * logp.detach().square() * wide_z)
    if coef.d is not None:
        terms.append(coef.d[:, None] * p * (wide_pay.detach() * wide_z + wide_pay))
    if coef.s is not None:
        terms.append(coef.s[:, None] * wide_z)
    found = torch.autograd.grad(sum(term.sum() for term in terms), (z, pay), allow_unused=True)
    return found[0], torch.zeros_like(pay) if found[1] is None else found[1]


def random_coefficients(names: str, n: int, dtype: torch.dtype, device: str) -> Coefficients:
    """Random coefficients; the last row of each has no softmax part in `a`."""
    numbers = {name: torch.randn(n, device=device, dtype=dtype) for name in {*names, "a", "o"}}
    for name in {"a", "o"} - set(names):
        numbers[name] = torch.zeros_like(numbers[name])
    numbers["a"][-1:] = 0
    return Coefficients(**numbers)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a kernel stores it: Triton's interpreter does not round to bfloat16, it cuts off."""
    if dtype != torch.bfloat16 or not fused.INTERPRETED:
        return x.to(dtype)
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("names", ["a", "o", "ao", "b", "c", "d", "s", "abcdso"])
def test_gradients_of_every_coefficient(device, dtype, softcap, names):
    n, V = 3, 139
    z, pay, labels = rows_of(n, V, dtype, device), rows_of(n, V, dtype, device), torch.randint(V, (n,), device=device)
    problem = problem_of(z, labels, scale=0.7, softcap=softcap)
    coef = random_coefficients(names, n, wide(dtype), device)
    truth = dense_gradients(problem, z.double(), pay.double(), labels, replace_dtype(coef, torch.float64))
    lse = problem.head.activate(z.double()).logsumexp(-1).to(wide(dtype))
    found, found_pay = z.clone(), pay.clone()
    fused.dlogits_(problem, (found, found_pay), labels, lse, coef)
    if coef.plain and softcap is None:
        truth = truth[0] / row_factor(coef, problem.head), truth[1]
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    best = [rounded(x, dtype) for x in truth]  # nothing in this dtype is closer to the truth
    assert_no_worse(found, best[0], truth[0], factor=1.5, atol=atol)
    if "d" in names:
        assert_no_worse(found_pay, best[1], truth[1], factor=1.5, atol=atol)
    else:
        assert torch.equal(found_pay, pay)


def replace_dtype(coef: Coefficients, dtype: torch.dtype) -> Coefficients:
    """The same coefficients in another dtype."""
    return replace(coef, **{k: x.to(dtype) for k, x in vars(coef).items() if x is not None})


@pytest.mark.parametrize("names", ["ao", "abo"])
def test_labels_of_other_columns_and_shares(device, names):
    """As in one panel of a larger vocabulary: lse is that of all columns, and most labels are elsewhere."""
    z = torch.randn(4, 150, device=device)
    labels = torch.tensor([-1, 150, 149, -(1 << 20)], device=device)
    problem = problem_of(z, labels, payload=False, scale=1.5)
    coef, lse = random_coefficients(names, 4, torch.float32, device), (1.5 * z).logsumexp(-1) + 1
    share, raw = torch.ones(4, device=device), z.clone()
    fused.dlogits_(problem, (z, None), labels, lse, coef, share)
    p = (1.5 * raw).softmax(-1) / torch.e
    torch.testing.assert_close(share, 1 + p.sum(-1))
    if coef.plain:
        expected = torch.where(coef.a[:, None] == 0, 0.0, p)
        expected[2, 149] += coef.o[2] / coef.a[2]
    else:
        expected = p * (coef.a[:, None] + coef.b[:, None] * (1.5 * raw - lse[:, None]))
        expected[2, 149] += coef.o[2]
        expected *= 1.5
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dead_rows_and_banned_tokens_leave_no_nan(device, softcap):
    """A row without softmax part is o 1_y itself, whatever its logits are; a banned token has no gradient."""
    z, labels = torch.randn(3, 150, device=device), torch.tensor([0, 149, 70], device=device)
    z[0], z[1, 149], z[1, :70] = torch.nan, BANNED, BANNED
    coef = Coefficients(a=torch.tensor([0.0, 1.0, 2.0], device=device), o=torch.tensor([-1.0, 0, 0], device=device))
    problem = problem_of(z, labels, payload=False, softcap=softcap)
    expected = problem.head.activate(z).softmax(-1)
    if softcap:
        expected = coef.a[:, None] * expected * problem.head.slope(problem.head.activate(z))
        z[0] = 0.0
        expected[0] = 0.0
        expected[0, 0] = -1.0
    else:
        expected[0] = 0.0
        expected[0, 0] = -1.0
    fused.dlogits_(problem, (z, None), labels, problem.head.activate(z).logsumexp(-1), coef)
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize(("outputs", "names"), [(("lse", "target"), "ao"), (STATISTICS, "abcdso")], ids=["few", "all"])
def test_rows_of_several_tiles(device, dtype, odd, outputs, names):
    """Also on a GPU, whose tiles are long; rows of odd length are loaded in another way there."""
    V = (320 if fused.INTERPRETED else 4 * fused.LIGHT.bytes // dtype.itemsize + 1600) + odd
    z, pay = ((3 * torch.randn(3, V, device=device)).to(dtype) for _ in range(2))
    labels = torch.tensor([V - 1, 7, V // 2], device=device)
    z[1, V - 100] = 200.0  # the second row is read again
    z[2, V // 2] = 12.0
    problem = problem_of(z, labels, outputs, scale=0.7)
    found = fused.statistics(problem, z, pay, labels)
    truth, same = (dense_statistics(problem, z, pay, labels, d) for d in (torch.float64, wide(dtype)))
    for name, value in found.items():
        assert_no_worse(value, same[name], truth[name], what=name)
    coef, lse = random_coefficients(names, 3, wide(dtype), device), truth["lse"].to(wide(dtype))
    expected = dense_gradients(problem, z.double(), pay.double(), labels, replace_dtype(coef, torch.float64))
    expected = (expected[0] / row_factor(coef, problem.head) if coef.plain else expected[0]), expected[1]
    fused.dlogits_(problem, (z, pay), labels, lse, coef)
    for ours, true in zip((z, pay) if "d" in names else (z,), expected, strict=False):
        assert_no_worse(ours, rounded(true, dtype), true, factor=1.5)


def test_a_payload_without_gradient_is_left_alone(device):
    z, pay, labels = (
        torch.randn(2, 70, device=device),
        torch.randn(2, 70, device=device),
        torch.tensor([3, 69]).to(device),
    )
    problem, coef = problem_of(z, labels), random_coefficients("aod", 2, torch.float32, device)
    frozen, results = replace(problem, needs=frozenset({"hidden"})), []
    for one in (problem, frozen):
        dz, dpay = z.clone(), pay.clone()
        fused.dlogits_(one, (dz, dpay), labels, z.logsumexp(-1), coef)
        results.append((dz, dpay))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[1][1], pay) and not torch.equal(results[0][1], pay)


def test_two_ranks_make_a_row(device):
    """Each has half of the columns, and one of them the label: statistics, then gradients from those of whole rows."""
    z, pay = (3 * torch.randn(4, 160, device=device, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([5, 79, 80, 159], device=device)
    outputs = tuple(name for name in STATISTICS if name not in ("rank", "top"))
    parts = []
    for start in (0, 80):
        columns = labels - start
        cut = [x[:, start : start + 80] for x in (z, pay)]
        found = fused.statistics(problem_of(cut[0], labels, outputs), *cut, columns.clamp(0, 79))
        found["target"] = torch.where((columns >= 0) & (columns < 80), found["target"], 0.0)
        found["mean"] = found["mean"] / 2
        parts.append(found)
    merged = ranks._whole_rows({name: torch.stack([part[name] for part in parts]) for name in outputs})
    expected = statistics(z, labels, -1.3 * pay)
    for name in outputs:
        torch.testing.assert_close(merged[name], expected[name])
    whole, coef = problem_of(z, labels), random_coefficients("abcdso", 4, torch.float64, device)
    truth = dense_gradients(whole, z, pay, labels, coef)
    for start in (0, 80):
        cut = [x[:, start : start + 80].clone() for x in (z, pay)]
        fused.dlogits_(problem_of(cut[0], labels), (cut[0], cut[1]), labels - start, merged["lse"], coef)
        for ours, all_columns in zip(cut, truth, strict=True):
            torch.testing.assert_close(ours, all_columns[:, start : start + 80])


# ---- the sparse tail's sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 11])
def test_column_sums_add_up(device, dtype, n):
    z, a = rows_of(n, 77, dtype, device), torch.rand(n, device=device).to(wide(dtype))
    z[0, 5] = BANNED
    energy, mass = torch.ones(77, device=device).to(a.dtype), torch.zeros(77, device=device).to(a.dtype)
    logits = 0.5 * z.double()
    fused.column_sums(Head(z.new_empty(77, 1), scale=0.5), z, logits.logsumexp(-1).to(a.dtype), a, energy, mass)
    weighted = a.double()[:, None] * logits.softmax(-1)
    torch.testing.assert_close(energy, 1 + weighted.square().sum(0), check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass, weighted.sum(0), check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 11])
def test_rows_add_up(device, dtype, n):
    rows, weights = rows_of(n, 77, dtype, device), torch.randn(n, device=device).to(wide(dtype))
    total = torch.ones(77, device=device, dtype=wide(dtype))
    fused.add_rows(total, rows, weights)
    expected = 1 + (weights.double()[:, None] * rows.double()).sum(0)
    torch.testing.assert_close(total, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


# ---- through the public functions -----------------------------------------------------------------------------------


LOSSES = {
    "plain": CrossEntropy(z_loss=0.1),
    "focal": Focal(gamma=1.0),
    "smoothing": CrossEntropy(label_smoothing=0.1),
    "class weights": CrossEntropy(label_smoothing=0.1, class_weight=torch.linspace(0, 2, 90)),  # torch, not the kernels
    "all": Polynomial(DIFFERENTIABLE[:-1]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_loss(device, dtype, softcap, name):
    """Values, observed statistics and all gradients in three chunks, against the reference backend."""
    if dtype == torch.bfloat16 and fused.INTERPRETED:
        pytest.skip("Triton's interpreter does not round to bfloat16, it cuts off")
    loss, observe = LOSSES[name], tuple(s for s in STATISTICS if s != "payload")
    case = make(11, 90, 7, device=device, scale=0.9, softcap=softcap, ignore=lambda i: i % 5 == 4)

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        moved = case.to(dtype)
        options = {
            "token_weight": moved.weight.to(wide(dtype)),
            "memory_budget": 4 * 90 * moved.leaves[0].element_size(),
        }
        hidden = moved.tensors["hidden"]
        total, stats = vocab_loss(loss, hidden, moved.head, moved.labels, observe=observe, impl=impl, **options)
        return [total.detach(), *(stats.values[s] for s in observe), *gradients(total, moved.leaves)]

    truth = run(torch.float64, "reference")
    for ours, torchs, true in zip(run(dtype, "chunked"), run(dtype, "reference"), truth, strict=True):
        if dtype == torch.float64:
            assert_close_at_scale(ours, true, 1e-9)
        else:
            assert_no_worse(ours, torchs, true)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics_and_their_gradients_with_a_payload(device, softcap):
    """Mode recompute: every upstream gradient, in panels of columns, against dense float64."""
    options = {"scale": 0.9, "softcap": softcap, "payload_scale": 1.2, "payload_softcap": softcap}
    case = make(5, 77, 6, D2=3, device=device, **options)
    loss = Polynomial(DIFFERENTIABLE)
    stats = vocab_stats(
        case.tensors["hidden"], case.head, case.labels, outputs=STATISTICS, payload=case.payload, memory_budget=3000
    )
    values, grads = case.solve(loss)
    for name, value in values.items():
        assert_close_at_scale(stats.values[name], value, 1e-9, name)
    found = gradients((loss.of(stats) * case.weight).sum(), case.leaves)
    for name, ours, expected in zip(NAMES, found, grads, strict=True):
        assert_close_at_scale(ours, expected, 1e-9, name)


def test_emo(device):
    """Its payload is the expected similarity of tokens; against the reference backend."""
    case = make(7, 90, 6, device=device, bias=False)
    loss = EMO().bind(torch.randn(90, 6, dtype=torch.float64, device=device))

    def run(impl: str) -> list[Tensor]:
        total = loss(case.tensors["hidden"], case.head, case.labels, impl=impl, memory_budget=3 * 90 * 16)
        return [total.detach(), *gradients(total, case.leaves)]

    for ours, expected in zip(run("chunked"), run("reference"), strict=True):
        assert_close_at_scale(ours, expected, 1e-9)


@pytest.mark.parametrize("loss", [CrossEntropy(z_loss=0.1), Focal(gamma=1.0)], ids=["plain", "focal"])
def test_the_sparse_tail_is_that_of_torch(monkeypatch, device, loss):
    """Statistics, kept columns and gradients are those without kernels."""
    weight = torch.randn(151, 12, dtype=torch.float64, device=device)
    labels = torch.randint(151, (19,), device=device)
    hidden = weight[labels] + 0.5 * torch.randn(19, 12, dtype=torch.float64, device=device)
    bias = torch.randn(151, dtype=torch.float64, device=device)
    labels[5] = -100

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        options = {"tail": 0.1, "observe": ("entropy", "top"), "memory_budget": 10_000}
        value, stats = loss.compute(leaves[0], Head(leaves[1], leaves[2], scale=0.9), labels, **options)
        return [value.detach(), stats.entropy, stats.top, *torch.autograd.grad(value, leaves)]

    got = run()
    monkeypatch.setattr(tiles, "_kernels", lambda z: None)
    for one, other in zip(got, run(), strict=True):
        assert_close_at_scale(one, other, 1e-9)


# ---- what the passes cost -------------------------------------------------------------------------------------------


class Touched(TorchDispatchMode):
    """The operations other than matmuls and views that read or write a tensor of at least `size` elements."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        # the tests poison memory by fill_, and the interpreter of kernels gives tensors to NumPy by set_
        ours = not name.startswith(("mm", "addmm", "empty", "new_empty", "detach", "fill_", "set_"))
        if ours and not views:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            if any(t.numel() >= self.size and t.dtype != torch.uint8 for t in tensors):
                self.found.append(name)
        return out


@pytest.fixture
def bytes_per_logit(monkeypatch) -> Callable[[int], dict[str, float]]:
    """Counts what the kernels read and write of [n, V] tensors: a function of N V that returns it by kernel."""
    moved: dict[str, float] = {}
    launch = fused._launch

    def count(kernel, programs, operands, block):
        z, pay, gradients = operands["Z"], operands.get("PAY"), kernel is fused.row_kernels._row_gradients
        total = z.nbytes * (2 if gradients else 1)
        if pay is not None:
            total += pay.nbytes * (2 if gradients and operands["BOTH"] else 1)
        moved[kernel.__name__] = moved.get(kernel.__name__, 0) + total
        launch(kernel, programs, operands, block)

    monkeypatch.setattr(fused, "_launch", count)
    return lambda logits: {name: total / logits for name, total in moved.items()}


def stats_loss(*outputs: str) -> Callable[..., Tensor]:
    """The sum of statistics, in mode recompute."""

    def loss(hidden: Tensor, head: Head, labels: Tensor, **options: int) -> Tensor:
        stats = vocab_stats(hidden, head, labels, outputs=outputs, **options)
        return sum(getattr(stats, name).sum() for name in outputs)

    return loss


def payload_loss(hidden: Tensor, head: Head, labels: Tensor, **options: int) -> Tensor:
    payload = (hidden.square(), Head(head.weight, softcap=head.softcap))
    return vocab_stats(hidden, head, labels, outputs=("payload",), payload=payload, **options).payload.sum()


def emo_loss(hidden: Tensor, head: Head, labels: Tensor, **options: int) -> Tensor:
    return EMO().bind(head.weight.detach())(hidden, head, labels, **options)


def observing(loss: CrossEntropy, *names: str) -> Callable[..., Tensor]:
    return lambda hidden, head, labels, **options: loss.compute(hidden, head, labels, observe=names, **options)[0]


COSTS = {  # bytes per logit in a dtype of two bytes: statistics, gradients, and sums for a bias
    "plain": (CrossEntropy(), None, (2, 4, 2)),
    "softcap": (CrossEntropy(), 30.0, (2, 4, 2)),
    "label smoothing": (CrossEntropy(label_smoothing=0.1), None, (2, 4, 2)),
    "log_sum_sq observed": (observing(CrossEntropy(), "log_sum_sq", "entropy", "top", "rank"), None, (2, 4, 2)),
    "recomputed": (stats_loss("lse", "target"), None, (2, 4, 2)),
    "entropy bonus": (stats_loss("lse", "target", "entropy"), None, (2, 4, 2)),
    "every gradient": (stats_loss("lse", "target", "mean", "entropy", "variance"), 30.0, (2, 4, 2)),
    "payload": (payload_loss, 30.0, (4, 8, 2)),
    "payload without gradient": (emo_loss, None, (4, 6, 2)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", COSTS)
def test_logits_are_read_twice_and_written_once(monkeypatch, device, bytes_per_logit, name, bias):
    """Whatever the loss: no operation of torch but matmuls touches the logits of a chunk, or those of the payload."""
    loss, softcap, (forward, backward, sums) = COSTS[name]
    N, V, D = 8, 128, 2  # a chunk of four rows has more numbers than the weight
    hidden, weight, shift = (
        torch.randn(*shape, device=device).half().requires_grad_() for shape in ((N, D), (V, D), (V,))
    )
    labels, head = torch.randint(V, (N,), device=device), Head(weight, shift if bias else None, softcap=softcap)
    budget = 4 * V * 2 * (2 if "payload" in name else 1)
    with Touched(4 * V) as touched:
        loss(hidden, head, labels, memory_budget=budget).backward()
    assert touched.found == []
    moved = {"_row_statistics": forward, "_row_gradients": backward} | ({"_column_sums": sums} if bias else {})
    assert bytes_per_logit(N * V) == moved
    assert weight.grad.isfinite().all() and weight.grad.any()
    monkeypatch.setattr(tiles, "_kernels", lambda z: None)
    with Touched(4 * V) as touched:
        loss(hidden, head, labels, memory_budget=budget).backward()
    assert {"sub_", "copy_"} & set(touched.found)  # in torch they are seen


def test_the_sparse_tail_reads_logits_twice(device, bytes_per_logit):
    """Its survey writes no softmax: statistics, then the sums over tokens."""
    hidden, weight = (torch.randn(*shape, device=device).half() for shape in ((8, 2), (128, 2)))
    head, labels = Head(weight), torch.randint(128, (8,), device=device)
    problem = Problem(hidden, head, labels, frozenset({"lse", "target"}), memory_budget=4 * 128 * 2)
    with Touched(4 * 128) as touched:
        chunked.survey(problem, lambda rows, v: {"lse": v["lse"], "target": -v["lse"]}, [slice(0, 8)])
    assert touched.found == []
    assert bytes_per_logit(8 * 128) == {"_row_statistics": 2, "_column_sums": 2}
