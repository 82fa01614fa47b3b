"""Scaling by a number on the device, and whether Triton can launch there at all."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from hf_xent.losses import CrossEntropy
from hf_xent.ops import Head, autograd
from hf_xent.ops.gpu import launch
from support.oracle import assert_close_at_scale, assert_no_worse, gradients

scaling = pytest.importorskip("hf_xent.ops.gpu.scaling", reason="needs triton")


@pytest.fixture(autouse=True)
def interpreted_or_compiled(device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled: they do not run on the CPU")


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    """What an earlier test found out about a device is forgotten."""
    launch.can_launch.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, -2.0, 0.0, float("nan"), 70_000.0])
@pytest.mark.parametrize("shape", [(1,), (5, 13), (3, 64), (0, 4)])
def test_every_element_is_scaled_in_the_wide_dtype(
    device: str, dtype: torch.dtype, factor: float, shape: tuple[int, ...]
) -> None:
    """float16 cannot hold the factor 70000, and need not."""
    x = (1e-2 * torch.randn(shape, device=device)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for given in (wide, torch.float32):
        number = torch.tensor(factor, dtype=given, device=device)
        want, found = (x.to(wide) * number.to(wide)).to(dtype), x.clone()
        assert scaling.scale_unless_one_(found, number) is found
        cut = 2**-7 if scaling.INTERPRETED and dtype == torch.bfloat16 else 0  # the interpreter does not round
        torch.testing.assert_close(found, want, rtol=cut, atol=0, equal_nan=True)


def test_nothing_is_written_where_the_factor_is_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signaling NaN would come out of any arithmetic as a quiet one."""
    bits = torch.full((70,), 0x7F800001, dtype=torch.int32, device=device)
    x = bits.clone().view(torch.float32)
    scaling.scale_unless_one_(x, torch.ones((), device=device))
    assert torch.equal(x.view(torch.int32), bits)
    with pytest.raises(ValueError, match=r"x has strides \(1, 2\): pass a contiguous tensor"):
        scaling.scale_unless_one_(torch.ones(2, 3, device=device).T.contiguous().T, x[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_the_upstream_gradient_scales_all_gradients(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, upstream: float
) -> None:
    """Against dense torch; and a graph that is kept is not scaled twice."""
    monkeypatch.setattr(autograd, "_has_triton", lambda x: True)
    hidden, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((9, 6), (33, 6), (33,)))
    labels = torch.randint(33, (9,), device=device)
    labels[2] = -100

    def run(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, dense: bool) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if dense:
            logits = leaves[0] @ leaves[1].T + leaves[2]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        else:
            loss = CrossEntropy()(leaves[0], Head(leaves[1], leaves[2]), labels, reduction="sum")
        first = [g.clone() for g in gradients(loss * upstream, leaves, retain_graph=True)]
        for one, other in zip(first, gradients(loss * upstream, leaves), strict=True):
            assert torch.equal(one, other)
        return first

    found = run(hidden, weight, bias, dense=False)
    plain = run(hidden, weight, bias, dense=True)
    want = run(hidden.double(), weight.double(), bias.double(), dense=True)
    for one, rounded, truth in zip(found, plain, want, strict=True):
        if dtype == torch.float64:
            assert_close_at_scale(one, truth, 1e-12)
        else:
            assert_no_worse(one, rounded, truth)


def test_a_device_where_kernels_run(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.can_launch(torch.empty(0, device=device).device)


@pytest.mark.parametrize("failure", [RuntimeError("Failed to find C compiler."), FileNotFoundError("gcc"), None])
def test_a_device_where_they_do_not(device: str, monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    """One warning that names the cause and the remedy; asked again, the same answer and no second try."""
    launches = []

    def fail(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        launches.append(x)
        if failure is not None:
            raise failure
        return x

    monkeypatch.setattr(scaling, "scale_unless_one_", fail)
    cause = f"{type(failure).__name__}: {failure}" if failure else "the result of a first kernel is wrong"
    where = torch.empty(0, device=device).device
    message = rf"Triton cannot run a kernel on {where} \({cause}\): slower operations of torch.* a C compiler"
    with pytest.warns(RuntimeWarning, match=message):
        assert not launch.can_launch(where)
    assert not launch.can_launch(where) and len(launches) == 1


def test_without_triton_nothing_is_said(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_xent.ops.gpu.scaling", None)
    assert not launch.can_launch(torch.empty(0, device=device).device)
