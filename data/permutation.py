"""A pseudo-random order of 0..size-1 that is computed, not stored: position -> element, in constant time and memory.

A Feistel network is a bijection of [0, 2^k) whatever its round functions; walking its cycles until the value falls below
`size` restricts it to [0, size) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 2).  A linear
congruential generator would be simpler, but its order is regular enough to show up in a loss curve.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4  # even, so that unequal halves end up where they began


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Elements at positions `index` of the permutation of range(size) that `key` names.

    Args:
      index: integers [n], each in [0, size).
      size: at least 1, below 2^62.
      key: any text; another key is another permutation.

    Returns:
      int64 [n].
    """
    index = np.asarray(index)
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"permutation positions must lie in [0, {size}), got {index.min()}..{index.max()}")
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    round_keys = np.frombuffer(digest, "<u8")
    bits = max(2, (size - 1).bit_length())
    value = _feistel(index.astype(np.uint64), round_keys, bits)
    while (outside := np.flatnonzero(value >= size)).size:
        value[outside] = _feistel(value[outside], round_keys, bits)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, round_keys: np.ndarray, bits: int) -> np.ndarray:
    """A keyed bijection of [0, 2^bits)."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = value >> np.uint64(right_bits), value & np.uint64((1 << right_bits) - 1)
    for round_key in round_keys:
        # The finaliser of splitmix64 (wrapping arithmetic); its high bits are the best mixed.
        mixed = right + round_key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ (mixed >> np.uint64(64 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
