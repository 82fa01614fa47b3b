"""Continuous vectors as digits: each dimension by itself is replaced with the nearest of L values; nothing is trained.

    id = argmin_i |x - r_i|         r_i, increasing, of each dimension; of equally near values the lower
    gaussian  b_i = clip(Phi^-1(i / L), -cut, cut), i = 0..L;  r_i = (phi(b_i) - phi(b_i+1)) / (Phi(b_i+1) - Phi(b_i)),
              the mean of a normal variable between b_i and b_i+1; x is multiplied by cut / span before
    fit       r_i is the mean of the i-th of L parts of the sorted data, which have equally many rows

So digits of data as they were fitted to are used equally often. The value is the nearest, as published, which is not
always the one whose part x is in: cells meet half-way between values. Beyond the outer values nothing is reproduced:
of `gaussian`, with 64 values and a span of 5, no |x| above 4.06.

Digits with probabilities P make a density, if x is uniform within its cell, and exponential beyond the outer cuts:

    log p(x) = sum_d [log P(id_d) + log q(x_d | id_d)]
    q = 1 / width of an inner cell,    q = exp(-t / s) / s at distance t beyond an outer cut

s is the mean distance of the data beyond that cut. A density of data with values that recur (a pixel that is always 0)
means nothing: narrow cells make it as large as one likes.

Source: Wang et al. 2025, Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation,
arXiv:2503.16430, and its code for the values; the exponential tails are this project's.
"""

from __future__ import annotations

import json
import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Quantiles:
    """Values that stand for numbers, a row for each dimension; `gaussian` and `fit` make them.

    Args:
        values: The values [D, L], increasing along each row, or [1, L] for any number of dimensions that share them.
            A row with fewer than L ends in repetitions of its last value, whose ids are never used.
        tails: The mean distances beyond the lowest and the highest cut [D, 2], above 0; the distances of the outer
            values from these cuts if None. They matter for densities alone.

    Raises:
        ValueError: Values of another shape, that are not finite, or decrease; tails of another shape or not above 0.
    """

    def __init__(self, values: Any, tails: Any = None):
        table = _float64(values)
        if table.ndim != 2 or table.shape[1] < 2 or not len(table):
            raise ValueError(f"values has shape {tuple(table.shape)}: give at least two for each dimension, [D, L]")
        if not bool(table.isfinite().all()) or bool((table.diff() < 0).any()):
            raise ValueError("values has a row that is not finite or decreases: sort each row")
        self.values = table
        """[D, L], float64."""
        self.used = (table.diff() > 0).sum(1) + 1
        """How many different values each dimension has [D]."""
        repeated = torch.arange(1, self.levels, device=table.device) >= self.used[:, None]
        self.cuts = ((table[:, 1:] + table[:, :-1]) / 2).masked_fill(repeated, math.inf)
        """Where cells meet [D, L - 1], float64; infinite before repeated values."""
        self.tails = self._own_tails() if tails is None else _float64(tails)
        if self.tails.shape != (len(table), 2) or not bool((self.tails > 0).all()):
            raise ValueError(f"tails has shape {tuple(self.tails.shape)}: give two numbers above 0 for each dimension")

    @classmethod
    def gaussian(cls, levels: int, span: float | None = 5.0, cut: float = 3.0) -> Quantiles:
        """The published values, from a normal distribution that is cut off, for any number of dimensions.

        Args:
            levels: The number L of values, at least 2; below 1 / Phi(-cut), which is 740 for 3.
            span: The |x| that is `cut` standard deviations; None takes x as it is, in standard deviations.
            cut: Where the normal distribution ends, in standard deviations.

        Returns:
            Quantiles with one row of values.

        Raises:
            ValueError: Too few or too many levels, or a span or cut that is not above 0.
        """
        check_levels(levels)
        for name, number in (("span", span), ("cut", cut)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} is {number}: choose a number above 0")
        edges = torch.special.ndtri(torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels)
        edges = edges.clamp(-cut, cut)
        if bool((edges.diff() <= 0).any()):
            raise ValueError(f"levels is {levels}: beyond cut={cut} there is less than one part; choose fewer")
        values = -_phi(edges).diff() / torch.special.ndtr(edges).diff()
        last = (values[-1] + values[-2]) / 2  # E[g - c | g > c] = phi(c) / Phi(-c) - c
        tail = _phi(last) / torch.special.ndtr(-last) - last
        scale = 1.0 if span is None else span / cut
        return cls(values[None] * scale, (tail * scale).expand(1, 2))

    @classmethod
    def fit(cls, data: Any, levels: int) -> Quantiles:
        """Values from data: means of equal parts.

        A number that makes up 1 / L of a dimension or more is one of its values, exactly. A dimension with up to L
        different numbers keeps them all, so nothing is lost; a constant one has one value.

        Args:
            data: Rows of numbers [N, D], a tensor or an array.
            levels: The number L of values, at least 2.

        Returns:
            Quantiles with a row of values for each dimension, on the CPU.

        Raises:
            ValueError: Data of another shape, without rows, or with numbers that are not finite; too few levels.
        """
        check_levels(levels)
        table = _float64(data).cpu()
        if table.ndim != 2 or not table.numel():
            raise ValueError(f"data has shape {tuple(table.shape)}: give rows of numbers, [N, D]")
        if not bool(table.isfinite().all()):
            raise ValueError("data has a number that is nan or infinite: leave such rows out")
        found = cls(torch.stack([_parts(column, levels) for column in table.T]))
        return cls(found.values, found._mean_tails(table))

    @property
    def levels(self) -> int:
        """The number L of values."""
        return self.values.shape[1]

    @property
    def dims(self) -> int | None:
        """The number D of dimensions; None if there is one row for any number."""
        return None if len(self.values) == 1 else len(self.values)

    @property
    def log_widths(self) -> Tensor:
        """Log of the widths of cells [D, L]: infinite for the two outer cells, -inf for values that are not used.

        Inner cells have a density of one over the width; `log_density` says what the outer ones have.
        """
        outer = torch.full_like(self.cuts[:, :1], math.inf)
        widths = torch.cat([-outer, self.cuts, outer], 1).diff()
        return widths.nan_to_num(nan=0.0, posinf=math.inf).log()  # inf - inf: not used

    def encode(self, values: Any) -> Any:
        """Digits of vectors.

        Args:
            values: Vectors [..., D], a tensor or an array.

        Returns:
            The ids of the nearest values, from 0 to L - 1, int64 [..., D]; a tensor on the same device, or an array.

        Raises:
            ValueError: Another number of dimensions, or nan among the numbers.
        """
        x = self._checked(values)
        cuts = self.cuts.to(x.device)
        rows = x.reshape(-1, x.shape[-1]).T.contiguous()
        ids = torch.searchsorted(cuts if len(cuts) > 1 else cuts.expand(len(rows), -1).contiguous(), rows)
        return _like(values, ids.T.reshape(x.shape))

    def decode(self, digits: Any, dtype: Any = None) -> Any:
        """Vectors of digits.

        Args:
            digits: Ids from 0 to L - 1 [..., D], a tensor or an array.
            dtype: The type of the vectors; None is torch's default type, and float64 for arrays.

        Returns:
            The values [..., D], on the same device.

        Raises:
            ValueError: Another number of dimensions, or ids out of range.
        """
        ids = torch.as_tensor(digits).long()
        self._check_dims(ids)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.levels):
            raise ValueError(f"digits has an id beyond 0 to {self.levels - 1}: give those of values")
        found = self._of_ids(self.values, ids)
        if isinstance(digits, Tensor):
            return found.to(dtype or torch.get_default_dtype())
        return found.numpy().astype(dtype or np.float64)

    def round(self, values: Any) -> Any:
        """What is left of vectors [..., D] after `encode` and `decode`, in their type and on their device."""
        return self.decode(self.encode(values), values.dtype)

    def log_density(self, values: Any, digits: Any = None) -> Any:
        """Log-density of numbers within their cells: add log-probabilities of digits to have that of the numbers.

        Args:
            values: Vectors [..., D], a tensor or an array.
            digits: Their digits, if they are there already.

        Returns:
            log q(x | id) in nats [..., D], float64: minus the log width of an inner cell, exponential in an outer one.

        Raises:
            ValueError: As for `encode`.
        """
        x = self._checked(values)
        ids = torch.as_tensor(self.encode(values) if digits is None else digits)
        of = lambda table: self._of_ids(table, ids)  # noqa: E731  read four times below
        outer = torch.full_like(self.cuts[:, :1], math.inf)
        low, high = of(torch.cat([-outer, self.cuts], 1)), of(torch.cat([self.cuts, outer], 1))
        below, above = (self.tails[:, i : i + 1].expand_as(self.values) for i in (0, 1))
        inner = -(high - low).log()
        lower = -(high - x).clamp(min=0) / of(below) - of(below).log()
        upper = -(x - low).clamp(min=0) / of(above) - of(above).log()
        found = torch.where(low.isinf(), lower, torch.where(high.isinf(), upper, inner))
        # a constant dimension has one cell, the whole line: half of it on each side of the value
        both = -(x - of(self.values)).abs() / of(below) - of(below).log() - math.log(2)
        return _like(values, torch.where(low.isinf() & high.isinf(), both, found))

    def to_dict(self) -> dict[str, Any]:
        """The numbers as lists, for JSON and for configurations; `Quantiles(**numbers)` is the way back."""
        return {"values": self.values.tolist(), "tails": self.tails.tolist()}

    def save(self, path: str | Path) -> None:
        """Write the numbers into a JSON file, all digits of them."""
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Quantiles:
        """Read what `save` has written.

        Raises:
            ValueError: The file has no quantiles.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no quantiles ({error}): give a file that Quantiles.save wrote") from error

    def _own_tails(self) -> Tensor:
        """The distances of the outer values from the outer cuts; 1 where there is a single cell."""
        last = self.cuts.masked_fill(self.cuts.isinf(), -math.inf).amax(1)
        tails = torch.stack([self.cuts[:, 0] - self.values[:, 0], self.values[:, -1] - last], 1)
        return torch.where(tails.isfinite(), tails, 1.0)

    def _mean_tails(self, data: Tensor) -> Tensor:
        """The mean distances of data [N, D] beyond the outer cuts, which are exponentials of most likelihood."""
        first = self.cuts[:, 0]
        last = self.cuts.masked_fill(self.cuts.isinf(), -math.inf).amax(1)
        below = [(f - x[x <= f]).mean() for x, f in zip(data.T, first, strict=True)]
        above = [(x[x > g] - g).mean() for x, g in zip(data.T, last, strict=True)]
        tails = torch.stack([torch.stack(below), torch.stack(above)], 1)
        return torch.where(tails.isfinite() & (tails > 0), tails, self._own_tails())

    def _of_ids(self, table: Tensor, ids: Tensor) -> Tensor:
        """The entries of a table [D, L] at ids [..., D]."""
        table = table.to(ids.device)
        return table[torch.arange(len(table), device=ids.device) if len(table) > 1 else 0, ids]

    def _check_dims(self, x: Tensor) -> None:
        if not x.ndim or self.dims not in (None, x.shape[-1]):
            raise ValueError(f"the shape is {tuple(x.shape)}: give vectors of {self.dims or 'some'} dimensions")

    def _checked(self, values: Any) -> Tensor:
        """Numbers in float64."""
        x = _float64(values)
        self._check_dims(x)
        if bool(x.isnan().any()):
            raise ValueError("values has a number that is nan: leave it out, or put a number in its place")
        return x


def check_levels(levels: Any) -> None:
    """Refuse a number of levels that is not whole or below 2. Raises: ValueError."""
    if not isinstance(levels, Integral) or levels < 2:
        raise ValueError(f"levels is {levels!r}: choose a whole number of at least 2")


def _parts(column: Tensor, levels: int) -> Tensor:
    """L values for numbers [N]: those that recur in 1 / L of the rows, and means of equal parts of the others."""
    values, counts = column.unique(return_counts=True)
    if len(values) > levels:
        often = values[counts * levels >= len(column)]
        others = column[~torch.isin(column, often)].sort().values
        parts = others.tensor_split(levels - len(often))
        values = torch.cat([often, torch.stack([part.mean() for part in parts if len(part)])]).unique()
    return torch.cat([values, values[-1:].expand(levels - len(values))])


def _phi(x: Tensor) -> Tensor:
    """The density of a normal variable."""
    return (-x * x / 2).exp() / math.sqrt(2 * math.pi)


def _float64(values: Any) -> Tensor:
    """A tensor in float64, on the device it has; lists and arrays on the CPU, also if a model is made on 'meta'."""
    if isinstance(values, Tensor):
        return values.detach().to(torch.float64)
    return torch.tensor(np.asarray(values, dtype=np.float64), device="cpu")


def _like(given: Any, found: Tensor) -> Any:
    """A tensor for a tensor, else an array."""
    return found if isinstance(given, Tensor) else found.numpy()
