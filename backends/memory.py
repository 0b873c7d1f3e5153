"""How freed memory is kept and given back, where the C library is glibc.

By itself glibc gives back what is freed at the end of a thread's part of the heap, and maps large
arrays anew each time. A pass of a 1B's shape then meets half a million page faults, a sixth of all
that its owner computes. So here all threads share one heap, which is kept, and numpy does not ask
for huge pages, each of which is cleared whole for an array that may need a part of it. But between
arrays that come and go at different times there are holes, as large as what is in use. The next
arrays mostly fit into them; when they do not, and more and more is held, holes are given back. To
fill them again is a tenth of what an owner computes; to keep them all takes a third more memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import numpy  # noqa: F401  its allocator is set

_libc = ctypes.CDLL(None)
_trim = getattr(_libc, "malloc_trim", None)  # glibc's alone
_mallinfo = getattr(_libc, "mallinfo2", None)  # since glibc 2.33
_CALLS = 16
"""Products between two looks: glibc counts what is in use by walking through all that is free,
which takes milliseconds where that is in many pieces."""
_SPARE = 1.5
"""What may be held, in terms of the most that has been in use."""
_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # mallopt(3)


def keep_one_heap() -> None:
    """Let all threads allocate from one heap, whose end is kept; no array is mapped on its own.

    Before other threads have allocated anything: glibc decides once how many heaps there may be.
    """
    if _trim is not None:
        for option, value in (
            (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, (1 << 31) - 1),
        ):  # fmt: skip
            _libc.mallopt(option, value)
        # Of numpy's own making, but the environment is read when it is imported: too late.
        arrays = sys.modules.get("numpy._core.multiarray")
        getattr(arrays, "_set_madvise_hugepage", bool)(False)


def give_back() -> None:
    """Give all freed memory back, where the C library can."""
    if _trim is not None:
        _trim(0)


class _Heap(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


if _mallinfo is not None:
    _mallinfo.restype = _Heap


def _memory() -> tuple[int, int]:
    """(bytes of its own that the process holds, bytes in use); zeros where nobody tells."""
    if _mallinfo is None:
        return 0, 0
    try:
        pages = [int(word) for word in _STATM.read_text().split()]
    except OSError:
        return 0, 0
    found = _mallinfo()
    return (pages[1] - pages[2]) * _PAGE, found.uordblks + found.hblkhd


class Holes:
    """Gives holes back when they make much more memory than was ever used. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._most = self._calls = 0

    def look(self) -> None:
        """Before a product."""
        with self._lock:
            self._calls += 1
            if self._calls % _CALLS:
                return
            held, used = _memory()
            self._most = max(self._most, used)
            if held <= _SPARE * self._most:
                return
        give_back()
