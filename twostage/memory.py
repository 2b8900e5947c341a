"""Keep the memory that a training step frees, for the next step to use.

glibc gives large freed blocks back to the kernel, and the kernel clears each page before it lends
it again: at every step some hundreds of MiB of activations would be cleared anew, a tenth of the
time of a large batch. This is a setting of the whole process, so the command line makes it and the
library never does.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_HEAP_BLOCK = 32 * 2**20
"""The most that glibc takes for M_MMAP_THRESHOLD: larger blocks always come from the kernel."""


def keep_freed_memory() -> None:
    """Ask glibc not to return freed blocks of up to 32 MiB; nothing happens elsewhere."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
