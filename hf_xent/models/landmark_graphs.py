"""Closed rings of landmarks as a graph, and what `landmarks.py` computes on its nodes.

    A                        a ring joins each node with the one before and the one after it; rings are not joined
    D [ceil(n/2), n]         halves a ring: row i is the mean of nodes 2i and 2i + 1
    U [n, ceil(n/2)]         doubles it: an even row 2i copies node i, an odd row 2i + 1 is the mean of i and i + 1
    L = -d^-1/2 A d^-1/2     the normalised Laplacian, scaled as if its largest eigenvalue were 2; d are the degrees
    T_0 = x, T_1 = L x, T_k = 2 L T_(k-1) - T_(k-2)        Chebyshev polynomials: T_k reaches k nodes along the ring

As published, D and U end where the list of nodes ends: the last row of D is the last node alone if n is odd, and the
last row of U copies if n is even. So the last and the first node, which are neighbours, are no pair of either; with
`wrap` they are.

Source: Gaggion et al. 2022, arXiv:2203.10977, and its code ngaggion/HybridGNet; Defferrard et al. 2016,
arXiv:1606.09375, for graph convolutions with Chebyshev polynomials.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 3


def halved(rings: Sequence[int]) -> list[int]:
    """The numbers of nodes of rings [R] after D."""
    return [(n + 1) // 2 for n in rings]


def ring_matrices(rings: Sequence[int], wrap: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The adjacency of rings, and the matrices that halve and double them, each with a block for every ring.

    Args:
        rings: The number of landmarks of each ring [R], from 3.
        wrap: Whether D and U treat the last and the first node of a ring as the neighbours that they are; as published,
            they do not.

    Returns:
        A [N, N], D [M, N] and U [N, M], with N landmarks and the M = sum ceil(n/2) of half as many; rows of D and U sum
        to 1.

    Raises:
        ValueError: No ring, or one of fewer than 3 landmarks.
    """
    if not rings or min(rings) < SMALLEST:
        raise ValueError(f"rings is {list(rings)}: give one number of landmarks for each ring, 3 or more")
    parts = [(ring(n), *_resizing(n, wrap)) for n in rings]
    adjacency, down, up = (torch.block_diag(*blocks) for blocks in zip(*parts, strict=True))
    return adjacency, down, up


def ring(n: int) -> Tensor:
    """The adjacency of one ring [n, n]; that of two nodes has one edge."""
    one = torch.eye(n).roll(1, 0)
    return torch.maximum(one, one.T)


def _resizing(n: int, wrap: bool) -> tuple[Tensor, Tensor]:
    """D and U of one ring."""
    half = (n + 1) // 2
    down, up = torch.zeros(half, n), torch.zeros(n, half)
    for i in range(half):
        pair = (2 * i, (2 * i + 1) % n if wrap else min(2 * i + 1, n - 1))
        for node in pair:
            down[i, node] += 0.5
    for j in range(n):
        after = (j // 2 + 1) % half if wrap else min(j // 2 + 1, half - 1)
        for node in (j // 2, after if j % 2 else j // 2):
            up[j, node] += 0.5
    return down, up


def laplacian(adjacency: Tensor) -> Tensor:
    """The scaled Laplacian -d^-1/2 A d^-1/2 of a graph without lonely nodes [N, N]: eigenvalues from -1 to 1."""
    degrees = adjacency.sum(1)
    return -adjacency / (degrees[:, None] * degrees).sqrt()


def chebyshev(x: Tensor, matrix: Tensor, order: int) -> Tensor:
    """The first Chebyshev polynomials of a matrix, applied to features of nodes.

    Args:
        x: Features [..., N, D].
        matrix: The scaled Laplacian [N, N].
        order: The number K of polynomials, from 1.

    Returns:
        T_0 x to T_(K-1) x [K, ..., N, D].

    Raises:
        ValueError: An order below 1.
    """
    if order < 1:
        raise ValueError(f"order is {order}: choose 1 or more polynomials")
    found = [x]
    for k in range(1, order):
        found.append(matrix @ x if k == 1 else 2 * (matrix @ found[-1]) - found[-2])
    return torch.stack(found)


def around(maps: Tensor, positions: Tensor) -> Tensor:
    """The mean of a feature map over a window of 3 x 3 cells around each landmark, by bilinear samples.

    It is RoIAlign with one output cell. Its window is centred, where the published one is half a cell to the right and
    below; beyond the border, the map continues as it is there. No gradient reaches the positions, as in RoIAlign.

    Args:
        maps: Feature maps [B, C, H, W].
        positions: x and y of landmarks [B, N, 2], from 0 to 1 across the map.

    Returns:
        Features [B, N, C], in the dtype of the maps.
    """
    low = maps.dtype in (torch.float16, torch.bfloat16)  # too coarse for positions
    values = maps.float() if low else maps
    step = torch.arange(-1, 2, device=maps.device, dtype=values.dtype)
    offsets = torch.cartesian_prod(step / maps.shape[-1], step / maps.shape[-2])  # [9, 2], x first
    grid = 2 * (positions.detach().to(values.dtype)[:, :, None] + offsets) - 1
    samples = F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return samples.mean(-1).transpose(1, 2).to(maps.dtype)


class ChebyshevConvolution(nn.Module):
    """y = sum_k T_k(L) x W_k + b; see the module's docstring.

    Args:
        inputs: The number of features of a node.
        outputs: That of its results.
        order: The number K of polynomials.
    """

    def __init__(self, inputs: int, outputs: int, order: int):
        super().__init__()
        self.order = order
        self.linear = nn.Linear(order * inputs, outputs)

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Results of nodes [B, N, outputs], from features [B, N, inputs] and the scaled Laplacian [N, N]."""
        powers = chebyshev(x, matrix, self.order)  # [K, B, N, inputs]
        return self.linear(powers.permute(1, 2, 0, 3).flatten(2))
