"""The divergence between two predictions of a span: of its start and its end, each a softmax over all positions.

    KL = 1/2 sum over {start, end} of T^2 KL(softmax(t / T) || softmax(s / T))        the mean over rows

t are the teacher's logits and s the student's. The factor T^2 keeps the size of the gradient independent of T.

Source: Hinton et al. 2015, arXiv:1503.02531; Carrino et al. 2023, arXiv:2309.17134.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..ops.statistics import widened

Logits = tuple[Tensor, Tensor]
"""Of the start and of the end, [N, T] each: N rows of T positions."""


def span_divergence(student: Logits, teacher: Logits, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, the mean over start, end and rows.

    Args:
        student: The student's logits of start and end, [N, T] each, of any float dtype; the sum is in float32 or wider.
        teacher: The teacher's, without a gradient.
        temperature: T > 0.

    Returns:
        A scalar; its gradient in a student's logit is T (softmax(s / T) - softmax(t / T)) / (2 N).
    """
    parts = [_divergence(s, t.detach(), temperature) for s, t in zip(student, teacher, strict=True)]
    return sum(parts[1:], parts[0]) / len(parts)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student, teacher = widened(student), widened(teacher)
    ours, theirs = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
