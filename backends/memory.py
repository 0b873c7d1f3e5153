"""How freed memory is kept and given back, where the C library is glibc.

By itself glibc gives back what is freed at the end of a thread's part of the heap, and maps large
arrays anew each time. A pass of a 1B's shape then meets half a million page faults, a sixth of all
that its owner computes. So here all threads share one heap, which is kept. But between arrays that
come and go at different times there are holes, a third of the memory that a pass needs: they are
given back before the largest products, which is when the most memory is in use.
"""

from __future__ import annotations

import ctypes
import threading

_libc = ctypes.CDLL(None)
_trim = getattr(_libc, "malloc_trim", None)  # glibc's alone
_CALLS = 16
"""Products between two times that holes are given back, at least: filling them costs faults."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_MAPPED = 32 << 20
"""Arrays from this size on are mapped on their own, and gone when they are freed."""


def keep_one_heap() -> None:
    """Let all threads allocate from one heap, whose end is kept.

    Before other threads have allocated anything: glibc decides once how many heaps there may be.
    """
    if _trim is not None:
        for option, value in (
            (_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MAPPED), (_M_TRIM_THRESHOLD, (1 << 31) - 1),
        ):  # fmt: skip
            _libc.mallopt(option, value)


def give_back() -> None:
    """Give all freed memory back, where the C library can."""
    if _trim is not None:
        _trim(0)


class Holes:
    """Gives holes back before the largest products. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._largest = self._since = 0

    def before(self, values: int) -> None:
        """A product with so many results is about to be asked for."""
        with self._lock:
            self._since += 1
            self._largest = max(self._largest, values)
            due = values == self._largest and self._since >= _CALLS
            if due:
                self._since = 0
        if due:
            give_back()
