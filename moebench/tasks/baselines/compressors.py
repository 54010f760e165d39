"""General compressors of the standard library, each with its strongest setting, on the text of one domain alone."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Mapping

COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9, mtime=0),
    "bz2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}
MAX_BYTES = 1 << 24
"""Bytes that are compressed, divided equally among the domains: xz takes a second for 1 to 2 MB."""


def compute_bits_per_byte(name: str, text: bytes) -> float:
    """Return the size of the compressed file over that of the text, in bits per byte; 0 for an empty text."""
    return 8 * len(COMPRESSORS[name](text)) / len(text) if text else 0.0
