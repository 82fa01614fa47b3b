"""The interval of a share, such as an accuracy: Wilson's, which stays within 0 to 1 and is right at both ends.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)        p = count / n

Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
"""

from __future__ import annotations

from statistics import NormalDist

from ..options.ranges import check_count


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share.

    Args:
        count: How many of them are, at least 0.
        total: Of how many, at least 1.
        level: The probability that intervals of such draws contain the share they are drawn from, about.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: A count that is below 0 or above the total, a total below 1, or a level that is not between 0 and 1.
    """
    check_count("count", count, 0)
    check_count("total", total, 1)
    if count > total:
        raise ValueError(f"count is {count}, but total is {total}: a share is at most 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}: choose a number in (0, 1)")
    z, share = NormalDist().inv_cdf(0.5 + level / 2), count / total
    middle, half = share + z**2 / (2 * total), z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    low, high = ((middle + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)
