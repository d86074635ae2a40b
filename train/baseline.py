"""What a general-purpose compressor needs for the held-out documents: the number a language model has to beat."""

from __future__ import annotations

import lzma
from collections.abc import Iterable


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of `xz -9e`, run on each document by itself; a model reads each by itself too."""
    original = compressed = 0
    for text in texts:
        data = text.encode()
        original += len(data)
        compressed += len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return 8 * compressed / original
