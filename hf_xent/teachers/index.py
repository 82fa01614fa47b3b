"""Where a document is in a cache, by its tokens alone: so a cache does not care how batches are made.

A document is listed under hashes of its first n tokens, for every power of two n and for all of them. So one that
was cut off is found, too: a causal model's targets for the first tokens are the first of its targets.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np


class Index:
    """The documents of a cache by their tokens.

    Args:
        documents: The token ids of each, in the order of the cache.
        tokens_of: The token ids of the document of a number.
    """

    def __init__(self, documents: Iterable[np.ndarray], tokens_of: Callable[[int], np.ndarray]):
        self.tokens_of = tokens_of
        listed, numbers = array("Q"), array("q")  # a cache may have millions of documents
        for number, ids in enumerate(documents):
            found = _keys(ids).values()
            listed.extend(found)
            numbers.extend([number] * len(found))
        keys = np.array(listed, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        self.keys, self.numbers = keys[order], np.array(numbers, dtype=np.int64)[order]

    def find(self, ids: np.ndarray) -> int | None:
        """The first document that begins with these tokens [n], int32, or None."""
        keys = _keys(ids)
        powers = [n for n in keys if n & (n - 1) == 0]
        for length in dict.fromkeys((len(ids), *powers[-1:])):
            first, last = (np.searchsorted(self.keys, np.uint64(keys[length]), side) for side in ("left", "right"))
            for number in self.numbers[first:last]:
                if np.array_equal(self.tokens_of(int(number))[: len(ids)], ids):
                    return int(number)
        return None


def _keys(ids: np.ndarray) -> dict[int, int]:
    """Hashes of the first n tokens, by n: powers of two, ascending, and the number of all of them."""
    lengths = sorted({1 << j for j in range(len(ids).bit_length())} | {len(ids)})
    digest, start, found = blake2b(digest_size=8), 0, dict[int, int]()
    for n in lengths:
        if n <= len(ids):
            digest.update(np.ascontiguousarray(ids[start:n], dtype="<i4").tobytes())
            found[n], start = int.from_bytes(digest.copy().digest(), "little"), n
    return found
