"""Gives freed memory back to the system.

glibc keeps what is freed between pieces that are in use. Several lanes, whose arrays come and go at
different times, leave more of such holes than a pass needs: with four lanes of a 1B's shape a third
of the owner's memory. Filling them anew costs page faults, so it is done now and then only.
"""

from __future__ import annotations

import ctypes
import itertools

_EVERY = 16
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
_calls = itertools.count(1)


def give_back() -> None:
    """Give all freed memory back, where the C library can."""
    if _trim is not None:
        _trim(0)


def give_back_sometimes() -> None:
    """`give_back` at every 16th call. Called in several threads."""
    if next(_calls) % _EVERY == 0:
        give_back()
