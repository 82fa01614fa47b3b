"""A head that predicts vectors as digits, one dimension after another: D choices of L in place of one of L^D.

    nll(t | c) = -sum_k log p(t_o_k | c, t_o_1, ..., t_o_k-1)      exactly -log of the joint probability of D digits

    factorised      the same without the earlier digits: dimensions are independent, given the condition c
    autoregressive  dimensions in one order; the sequence is [W c, E_1(t_1), ..., E_D-1(t_D-1)] plus an embedding of the
                    dimension that is next, and goes through a small causal transformer that c modulates (adaLN-zero)
    random_order    as above; in training every row has its own order, so that any order will do afterwards

Two digits that are always equal, each 0 or 1 half of the time, cost log 4 if factorised and log 2 if not. Dimensions
that are nearly independent, as those of whitened principal components, gain nothing from an order.

The first element is the same in training and sampling; in the authors' code it lacks an embedding in training.
`sigma` smooths targets over neighbouring digits, sigma in widths of a digit, as HL-Gauss does; 0 is cross-entropy.

Source: Wang et al. 2025, arXiv:2503.16430; Peebles and Xie 2023, arXiv:2212.09748, for adaLN-zero; Farebrother et al.
2024, arXiv:2403.03950, for smoothed targets. This file needs torch alone.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

KINDS = ("factorised", "autoregressive", "random_order")


class ZeroLinear(nn.Linear):
    """A linear layer that starts at 0."""

    def reset_parameters(self) -> None:
        """Weight and bias are 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x normalised, then scaled by 1 + scale and shifted; [N, K, W], [N, 1, W]."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """A layer of the transformer: attention with normalised queries and keys, and a perceptron, modulated by c."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulate = ZeroLinear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, causal: bool, past: list[Tensor] | None = None) -> Tensor:
        """x [N, K, W] and c [N, 1, W]; `past` has keys and values of earlier elements, and then also those of x."""
        scale, shift, gate, scale2, shift2, gate2 = self.modulate(F.silu(c)).chunk(6, -1)
        n, length, width = x.shape
        parts = self.attend(_scaled(x, scale, shift)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = F.rms_norm(parts[0], parts.shape[-1:]), F.rms_norm(parts[1], parts.shape[-1:]), parts[2]
        if past is not None:
            past[:] = (k, v) if not past else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
            k, v = past
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal and past is None)
        x = x + gate * self.merge(mixed.transpose(1, 2).reshape(n, length, width))
        return x + gate2 * self.down(F.gelu(self.up(_scaled(x, scale2, shift2))))


class DigitHead(nn.Module):
    """A distribution of D digits for hidden states; see the module's docstring.

    Args:
        hidden_size: The width H of the hidden states.
        dims: The number D of digits of a vector.
        levels: The number L of values of a digit.
        kind: 'factorised', 'autoregressive' or 'random_order'.
        layers: Layers of the transformer. 'factorised' may have 0, then the head is one linear layer, H to D L; with
            more it is the transformer of the others, without a sight of digits. None is 0 for it, and 2 for the others.
        width: The width of the transformer, a multiple of `heads`.
        heads: Its attention heads.
        sigma: The standard deviation of targets over neighbouring digits in training, in widths of a digit.

    Raises:
        ValueError: An unknown kind, or numbers that are out of range.
    """

    def __init__(  # noqa: PLR0913  one argument for each option
        self, hidden_size: int, dims: int, levels: int, kind: str = "autoregressive", layers: int | None = None,
        width: int = 64, heads: int = 4, sigma: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        layers = check_head(dims, levels, kind, layers, width, heads, sigma)
        self.dims, self.levels, self.kind, self.sigma = dims, levels, kind, sigma
        self.out = nn.Linear(width if layers else hidden_size, dims * levels)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        if layers:
            self.condition = nn.Linear(hidden_size, width)
            self.digit = nn.Embedding(dims * levels, width) if kind != "factorised" else None
            self.place = nn.Embedding(dims, width)
            self.last = ZeroLinear(width, 2 * width)

    def logits(self, hidden: Tensor, digits: Tensor, order: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """Logits of every digit, given those before it.

        Args:
            hidden: Hidden states [N, H].
            digits: Digits [N, D]; one that is ignored conditions nothing.
            order: Dimensions in the order of prediction, [D] or [N, D]; None is 0 to D - 1. For 'random_order' alone.
            ignore_index: Marks digits that are unknown.

        Returns:
            Logits [N, D, L], by dimension whatever the order is.

        Raises:
            ValueError: Digits of another shape or out of range, an order that is none, or for a head that has its own.
        """
        digits = self._checked(digits, ignore_index)
        order = self._order(order, len(digits), digits.device)
        if not self.blocks:
            return self.out(hidden).view(-1, self.dims, self.levels)
        x, c = self._start(hidden, order)
        if self.digit is not None:  # element k has the digit of the dimension before the k-th
            known = digits.gather(1, order)[:, :-1]
            seen = self.digit(order[:, :-1] * self.levels + known.clamp(min=0)) * (known >= 0)[..., None]
            x = torch.cat([x[:, :1], x[:, 1:] + seen], 1)
        for block in self.blocks:
            x = block(x, c, causal=self.digit is not None)
        x = x.gather(1, order.argsort(1)[..., None].expand(-1, -1, x.shape[-1]))  # by dimension
        weight = self.out.weight.view(self.dims, self.levels, -1)
        return torch.einsum("ndw,dlw->ndl", self._end(x, c), weight) + self.out.bias.view(self.dims, -1)

    def nll(self, hidden: Tensor, digits: Tensor, order: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """-log p of every digit, given those before it; the sum over D is exactly -log of their joint probability.

        Args:
            hidden: Hidden states [N, H].
            digits: Digits [N, D].
            order: As for `logits`.
            ignore_index: Digits that are not predicted, and that condition nothing.

        Returns:
            Nats [N, D] in float32 or wider; 0 where ignored.

        Raises:
            ValueError: As for `logits`.
        """
        logp = _log_softmax(self.logits(hidden, digits, order, ignore_index))
        kept = digits != ignore_index
        return -logp.gather(-1, digits.where(kept, 0)[..., None]).squeeze(-1) * kept

    def loss(
        self, hidden: Tensor, digits: Tensor, order: Tensor | None = None, ignore_index: int = -100,
        generator: Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """What is trained: `nll`, with targets smoothed by sigma; 'random_order' draws an order for each row.

        Args:
            hidden: Hidden states [N, H].
            digits: Digits [N, D].
            order: As for `logits`; None, for 'random_order' in training, draws one.
            ignore_index: As for `nll`.
            generator: What draws orders; torch's own if None.

        Returns:
            Nats [N, D] in float32 or wider; 0 where ignored.

        Raises:
            ValueError: As for `logits`.
        """
        if self.kind == "random_order" and order is None and self.training:
            device = digits.device if generator is None else generator.device
            order = torch.rand(digits.shape, device=device, generator=generator).argsort(-1).to(digits.device)
        if not self.sigma:
            return self.nll(hidden, digits, order, ignore_index)
        logp = _log_softmax(self.logits(hidden, digits, order, ignore_index))
        kept = digits != ignore_index
        targets = smoothed(digits.where(kept, 0), self.levels, self.sigma).to(logp.dtype)
        return -(targets * logp).sum(-1) * kept

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, temperature: float = 1.0, generator: Generator | None = None, order: Tensor | None = None
    ) -> Tensor:
        """Digits drawn one dimension after another: D short passes, each of one element, as keys and values are kept.

        Args:
            hidden: Hidden states [N, H].
            temperature: Divides logits; 0 takes the most likely value of each digit.
            generator: What draws; torch's own if None. It may be of the CPU whatever the device is.
            order: As for `logits`.

        Returns:
            Digits [N, D], int64.

        Raises:
            ValueError: A temperature that is not finite or below 0, or an order as for `logits`.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: choose 0 or a number above")
        order, rows = self._order(order, len(hidden), hidden.device), torch.arange(len(hidden), device=hidden.device)
        digits = torch.zeros_like(order)
        if not self.blocks:
            return _drawn(self.logits(hidden, digits), temperature, generator)
        if self.digit is None:
            return _drawn(self.logits(hidden, digits), temperature, generator)
        x, c = self._start(hidden, order)
        weight, bias = self.out.weight.view(self.dims, self.levels, -1), self.out.bias.view(self.dims, -1)
        pasts: list[list[Tensor]] = [[] for _ in self.blocks]
        for k in range(self.dims):
            element, now = x[:, k : k + 1], order[:, k]
            if k:
                before = order[:, k - 1]
                element = element + self.digit(before * self.levels + digits[rows, before])[:, None]
            for block, past in zip(self.blocks, pasts, strict=True):
                element = block(element, c, causal=True, past=past)
            logits = torch.einsum("nw,nlw->nl", self._end(element, c)[:, 0], weight[now]) + bias[now]
            digits[rows, now] = _drawn(logits, temperature, generator)
        return digits

    def _start(self, hidden: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence without digits [N, D, W], and the condition [N, 1, W]."""
        c = self.condition(hidden)[:, None]
        x = self.place(order)
        return torch.cat([x[:, :1] + c, x[:, 1:]], 1), c

    def _end(self, x: Tensor, c: Tensor) -> Tensor:
        """What the output layer reads."""
        return _scaled(x, *self.last(F.silu(c)).chunk(2, -1))

    def _checked(self, digits: Tensor, ignore_index: int) -> Tensor:
        """Digits, with -1 for those to ignore."""
        if digits.ndim != 2 or digits.shape[1] != self.dims:
            raise ValueError(f"digits has shape {tuple(digits.shape)}: give {self.dims} for each row, [N, {self.dims}]")
        if bool(((digits != ignore_index) & ((digits < 0) | (digits >= self.levels))).any()):
            raise ValueError(f"digits has an id beyond 0 to {self.levels - 1}: mark what to ignore by {ignore_index}")
        return digits.where(digits != ignore_index, -1)

    def _order(self, order: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """An order for each row [N, D]."""
        ascending = torch.arange(self.dims, device=device)
        if order is None:
            return ascending.expand(rows, -1)
        if self.kind != "random_order":
            raise ValueError(f"order is given, but the head is {self.kind!r}: 'random_order' takes one")
        order = order.to(device).expand(rows, -1)
        if order.shape[1] != self.dims or not bool((order.sort(1).values == ascending).all()):
            raise ValueError(f"order has shape {tuple(order.shape)}: give 0 to {self.dims - 1}, each once")
        return order


def check_head(dims: int, levels: int, kind: str, layers: int | None, width: int, heads: int, sigma: float) -> int:
    """The number of layers that a head has. Raises: ValueError, for an option that is out of range."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
    least = 0 if kind == "factorised" else 1
    if layers is None:
        layers = 2 * least
    for name, number, lowest in (
        ("dims", dims, 1), ("levels", levels, 2), ("layers", layers, least), ("width", width, 1), ("heads", heads, 1),
    ):  # fmt: skip
        if not isinstance(number, int) or number < lowest:
            raise ValueError(f"{name} is {number!r}: choose a whole number of at least {lowest}")
    if width % heads:
        raise ValueError(f"width is {width}: choose a multiple of heads, which is {heads}")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma is {sigma}: choose 0 or a number above")
    return layers


def smoothed(digits: Tensor, levels: int, sigma: float) -> Tensor:
    """The mass [..., L] in the cell of each level, of a normal distribution around a digit that the ends cut off."""
    edges = torch.arange(levels + 1, device=digits.device, dtype=torch.float32) - 0.5
    mass = ((edges - digits[..., None]) / (math.sqrt(2) * sigma)).erf()
    return mass.diff(dim=-1) / (mass[..., -1:] - mass[..., :1])


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _drawn(logits: Tensor, temperature: float, generator: Generator | None) -> Tensor:
    """A value for each row of logits [..., L]."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = _log_softmax(logits / temperature).exp()
    flat = probs.reshape(-1, probs.shape[-1])
    if generator is not None:
        flat = flat.to(generator.device)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
