"""Let the C library keep freed memory: large tensors then reuse warm pages instead of faulting in new ones."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set glibc to serve every block from the heap and never to return memory; return whether it accepted.

    By default glibc maps a new block above 32 MB (DEFAULT_MMAP_THRESHOLD_MAX) for each allocation, and returns the
    free end of its heap. Logits of a vocabulary and weight gradients of many experts are such blocks: at every step
    the kernel then hands out and clears all of their pages. The price of keeping them: the process holds its peak
    memory until it ends. It speeds dense layers and other libraries as well, so a benchmark sets it for all or for
    none. Nothing happens, and False is returned, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM))
    return all(library.mallopt(key, value) == 1 for key, value in settings)
