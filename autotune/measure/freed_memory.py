"""The allocator of a process that measures."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation, as a long-running program's allocator ends up doing.

    Otherwise each call of each form faults its results' pages in anew: 4 ms for the 8.6 MB of a scan that takes 3 ms.
    Says whether the allocator could be told.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, -1))
