"""Inputs of any shape whose softmax has the tail of a real model: `generate(N, V, D, like="gemma3-270m")`.

    logits  z_tj = b_j + x_t . v_j                    hidden = [x_t + c],  weight = [v_j + b_j / (c D)]
    b_j     Gaussian in the rank of the column        the unigram: which columns are likely at all
    x_t     sum_k beta_tk v_jk + noise                CANDIDATES columns that a token boosts, drawn from softmax(pick b)
    beta_tk max(0, peak_t - decline log k)            the peak of the softmax: a power law in k

x_t and v_j have zero mean over D, so that the constant direction carries only b, like the large mean of real hidden
states. |x_t|^2 / D, the variance of a token's logits given b, is (noise e^(spread g))^2 for all boosts, a
lognormal temperature. Labels are drawn from softmax(z / temperature), so that their mean -log p is the measured one.

Other shapes keep the numbers of likely columns, not their shares. b is that of the first V ranks of the fitted
model's vocabulary, since a larger vocabulary adds rare columns: over 1023 tokens of the same text SmolLM2 with V=49152
keeps 9752 columns at 2^-12, Gemma with V=262144 keeps 9813. Columns beyond this vocabulary are as unlikely as its last.
Logits do not depend on D, except through the overlap of random directions, of variance 1/D: below MIN_WIDTH the overlap
of the boosted columns leaves too little variance for the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

CANDIDATES = 32  # boosted columns per token
CONSTANT = 4.0  # c: the mean of the hidden states, about as large as their deviations
MIN_WIDTH = 256
ROWS_BYTES = 256 << 20  # of logits in memory while labels are drawn


@dataclass(frozen=True)
class Law:
    """The parameters of the softmax of one model; logits are in nats."""

    vocab: int
    """V of the model: the number of ranks that `unigram` was fitted over."""
    unigram: float
    """Standard deviation of b over the model's vocabulary."""
    order: float
    """Correlation of a column's rank and its index: real tokenizers number frequent tokens first."""
    noise: float
    """Standard deviation of a token's logits given b."""
    spread: float
    """Standard deviation over tokens of the logarithm of that standard deviation."""
    peak: float
    """Mean boost of a token's first candidate."""
    peak_spread: float
    """Standard deviation of that boost over tokens: some are nearly certain, others are open."""
    decline: float
    """The boost of the k-th candidate is smaller by this number times log k."""
    pick: float
    """Candidates are drawn from softmax(pick b): 0 for any column, 1 for the unigram."""
    temperature: float
    """Temperature of the softmax that labels are drawn from; above 1 if the mean -log p of text exceeds the entropy."""


# Fitted to `tail_curves.json` by Nelder-Mead and rounded by hand: to log2 of columns and mass for chunks of 256 tokens
# and to the quantiles of the entropy; `order` to the blocks; then `temperature` to the mean nll. Down to eps = 2^-18
# columns are within a factor 1.2 of the measured ones and mass within 1.25, for chunks of 1023 tokens too.
LAWS = {
    "smollm2": Law(49152, 2.90, 0.56, 2.02, 0.163, 8.75, 1.85, 1.67, 0.66, 1.03),
    "gemma3-270m": Law(262144, 4.15, 0.66, 2.48, 0.12, 8.40, 2.15, 1.60, 0.52, 1.15),
}
DEFAULT_LAW = "gemma3-270m"


def generate(
    N: int, V: int, D: int, like: str = DEFAULT_LAW, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Generate inputs of a shape with the softmax of a real model.

    Args:
        N: Number of tokens.
        V: Size of the vocabulary.
        D: Hidden size, MIN_WIDTH or more.
        like: The model whose softmax is imitated, a key of LAWS.
        seed: Seed of all draws.
        device: The device of all draws; the same seed gives other numbers on another kind of device.

    Returns:
        hidden [N, D] and weight [V, D] in float32, and labels [N], on the device.

    Raises:
        ValueError: For a model without a law, or a width below MIN_WIDTH.
    """
    check_shape(D, like)
    law, generator = LAWS[like], torch.Generator(device).manual_seed(seed)
    unigram = _unigram(V, law, generator)
    weight = _centered(V, D, generator).mul_(D**-0.5)
    hidden = _deviations(N, weight, unigram, law, generator).add_(CONSTANT)
    weight += (unigram / (CONSTANT * D))[:, None]
    return hidden, weight, _labels(hidden, weight, law, generator)


def check_shape(D: int, like: str) -> None:
    """Raises: ValueError for a model without a law, or a width below MIN_WIDTH."""
    if like not in LAWS:
        raise ValueError(f"no calibration {like!r}: choose among {', '.join(LAWS)}")
    if D < MIN_WIDTH:
        raise ValueError(
            f"width is {D}: calibrated inputs need {MIN_WIDTH} or more, narrower heads have no room for peaks"
        )


def _unigram(V: int, law: Law, generator: Generator) -> Tensor:
    """b [V]: the first V ranks of the law, in an order whose correlation with the index is `law.order`."""
    device = generator.device
    rank = torch.arange(V, device=device)
    b = law.unigram * _normal_score(rank.clamp(max=law.vocab - 1), law.vocab)
    index = law.order * _normal_score(rank, V) + (1 - law.order**2) ** 0.5 * torch.randn(
        V, generator=generator, device=device
    )
    return b[index.argsort(descending=True)]


def _normal_score(rank: Tensor, count: int) -> Tensor:
    """Quantiles of the standard normal distribution, the highest for rank 0."""
    return -torch.special.ndtri((rank + 0.5) / count)


def _centered(rows: int, D: int, generator: Generator) -> Tensor:
    x = torch.randn(rows, D, generator=generator, device=generator.device)
    return x.sub_(x.mean(1, keepdim=True))


def _deviations(N: int, weight: Tensor, unigram: Tensor, law: Law, generator: Generator) -> Tensor:
    """x [N, D]: the boosted candidates of each token, and noise with the remaining variance."""
    D, device = weight.shape[1], generator.device
    scale = law.noise * torch.exp(law.spread * torch.randn(N, 1, generator=generator, device=device))
    peak = law.peak + law.peak_spread * torch.randn(N, 1, generator=generator, device=device)
    boosts = (peak - law.decline * torch.arange(1, CANDIDATES + 1, device=device).log()).clamp_min(0)
    candidates = (law.pick * unigram).softmax(0).multinomial(boosts.numel(), replacement=True, generator=generator)
    x = F.embedding_bag(candidates.view_as(boosts), weight, per_sample_weights=boosts, mode="sum")
    noise_scale = (scale.square() - x.square().mean(1, keepdim=True)).clamp_min(0).sqrt()
    return x.add_(_centered(N, D, generator).mul_(noise_scale))


def _labels(hidden: Tensor, weight: Tensor, law: Law, generator: Generator) -> Tensor:
    """Draw one label per token from softmax(z / temperature), by its cumulative sum."""
    V, labels = len(weight), []
    draws = torch.rand(len(hidden), 1, generator=generator, device=hidden.device)
    for rows, draw in zip(*(x.split(max(1, ROWS_BYTES // (4 * V))) for x in (hidden, draws)), strict=True):
        cumulative = F.linear(rows, weight).div_(law.temperature).softmax(-1).cumsum(-1)
        labels.append(torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp_max(V - 1)[:, 0])
    return torch.cat(labels)
