"""Let the C library keep freed memory: large tensors then reuse warm pages instead of faulting in new ones."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_NEVER_TRIM = 2**31 - 1
_LARGEST_HEAP_BLOCK = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits


def keep_freed_memory(*, all_blocks: bool = False) -> bool:
    """Set glibc to return no memory of its heap to the system; return whether it accepted.

    By default glibc returns the free end of its heap, and maps a block above 32 MB anew for each allocation; the kernel
    then hands out and clears all of their pages at every step. The tensors of a step are larger than what the default
    keeps, the logits of a vocabulary for example. The price: freed memory of the heap, up to its peak, stays with the
    process until it ends.

    `all_blocks`: serve blocks above 32 MB from the heap as well, such as the weight gradients of a bank of many
    experts. For benchmarks only, where it speeds everything that is timed: in a process that keeps small tensors
    between steps, they lie where large ones were, and the heap grows at every step.

    Nothing happens, and False is returned, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    large = (_M_MMAP_MAX, 0) if all_blocks else (_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    return all(library.mallopt(key, value) == 1 for key, value in (large, (_M_TRIM_THRESHOLD, _NEVER_TRIM)))
