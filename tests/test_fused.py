"""The one-pass kernels over stored logits, interpreted on the CPU, against torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_xent.losses import CrossEntropy, Focal
from hf_xent.ops import Head, tiles, vocab_stats
from support.oracle import assert_close_at_scale

fused = pytest.importorskip("hf_xent.ops.gpu.fused", reason="needs triton")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """`chunked` takes the kernels on the CPU too, where they are interpreted."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled: they do not run on the CPU")
    monkeypatch.setattr(tiles, "_kernels", lambda z: fused)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "V", "scale"), [(5, 64, 1.0), (3, 1, 2.0), (7, 203, -0.7), (1, 65, 0.0), (0, 9, 1.0)])
def test_softmax_rows(device: str, dtype: torch.dtype, n: int, V: int, scale: float) -> None:
    z = (4 * torch.randn(n, V + 3, device=device)).to(dtype)[:, :V]  # rows that do not touch
    labels = torch.randint(V, (n,), device=device)
    wide = scale * z.to(torch.promote_types(dtype, torch.float32))
    p, left = wide.softmax(-1), z.clone()
    head = Head(torch.empty(V, 1), scale=scale)
    found = fused.softmax_(z, labels, head, overwrite=False)
    assert torch.equal(z, left)
    want = {
        "lse": wide.logsumexp(-1),
        "target": wide.gather(-1, labels[:, None]).squeeze(-1),
        "entropy": -(p * p.log()).nan_to_num().sum(-1),
        "top": wide.argmax(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, check_dtype=name != "top")
    fused.softmax_(z, labels, head)
    torch.testing.assert_close(z, p.to(dtype))
    share = torch.ones(n, device=device, dtype=wide.dtype)
    assert fused.softmax_(left, labels, head, lse=want["lse"] + 1, share=share) == {}
    torch.testing.assert_close(left, (p / torch.e).to(dtype))
    torch.testing.assert_close(share, 1 + p.sum(-1) / torch.e)


def test_banned_tokens_and_ties(device: str) -> None:
    z = torch.zeros(2, 150, device=device)
    z[:, 3:] = float("-inf")
    z[1, 70] = 5.0
    z[1, 140] = 5.0
    found = fused.softmax_(z, torch.tensor([0, 70], device=device), Head(torch.empty(150, 1)))
    torch.testing.assert_close(found["lse"][0], torch.tensor(3.0, device=device).log())
    torch.testing.assert_close(found["entropy"][0], torch.tensor(3.0, device=device).log())
    assert found["top"].tolist() == [0, 70] and z[0, 3:].eq(0).all() and not z.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_column_sums_add_up(device: str, dtype: torch.dtype) -> None:
    p, a = torch.rand(11, 77, device=device).to(dtype), torch.rand(11, device=device)
    energy, mass = torch.ones(77, device=device), torch.zeros(77, device=device)
    a = a.to(torch.promote_types(dtype, torch.float32))
    energy, mass = energy.to(a.dtype), mass.to(a.dtype)
    fused.column_sums(p, a, energy, mass)
    weighted = a[:, None] * p.to(a.dtype)
    torch.testing.assert_close(energy, 1 + weighted.square().sum(0))
    torch.testing.assert_close(mass, weighted.sum(0))


@pytest.mark.parametrize("tail", [0.0, 0.1])
@pytest.mark.parametrize("loss", [CrossEntropy(z_loss=0.1), Focal(gamma=1.0), CrossEntropy(label_smoothing=0.1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_whole_loss_is_the_same(
    monkeypatch: pytest.MonkeyPatch, device: str, tail: float, loss: CrossEntropy | Focal, softcap: float | None
) -> None:
    if tail and (softcap or "mean" in loss.uses):
        pytest.skip("the sparse tail is refused there")
    weight = torch.randn(301, 12, dtype=torch.float64, device=device)
    labels = torch.randint(301, (19,), device=device)
    hidden = weight[labels] + 0.5 * torch.randn(19, 12, dtype=torch.float64, device=device)
    bias = torch.randn(301, dtype=torch.float64, device=device)
    labels[5] = -100

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        head = Head(leaves[1], leaves[2], scale=0.9, softcap=softcap)
        options = {"tail": tail, "observe": ("entropy", "top"), "memory_budget": 20_000}
        value, stats = loss.compute(leaves[0], head, labels, **options)
        return [value.detach(), stats.entropy, stats.top, *torch.autograd.grad(value, leaves)]

    got = run()
    monkeypatch.setattr(tiles, "_kernels", lambda z: None)
    for one, other in zip(got, run(), strict=True):
        assert_close_at_scale(one, other, 1e-9)


def test_recompute_takes_them_in_both_directions(device: str) -> None:
    hidden = torch.randn(9, 6, device=device, requires_grad=True)
    weight = torch.randn(131, 6, device=device, requires_grad=True)
    labels = torch.randint(131, (9,), device=device)
    stats = vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target"), memory_budget=1500)
    found = torch.autograd.grad(stats.nll.mean(), (hidden, weight))
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), (hidden, weight))
    torch.testing.assert_close(found, want)
