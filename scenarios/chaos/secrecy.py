"""What must never happen to a secret of the owner in a chaos run; see `checks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarios.chaos.checks import digest, require


class Secrets:
    """Every secret an owner draws, over all its incarnations: one use each."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._blocks: dict[str, str] = {}
        self._opened: set[int] = set()
        self._sealed: list[object] = []
        self._alive: dict[int, object] = {}

    def key_drawn(self, key: bytes) -> None:
        """A key of a random stream."""
        require(key not in self._keys, "a key of randomness was drawn twice")
        self._keys.add(key)

    def encrypted(self, payload: bytes, sealed: Any) -> None:
        """A request was made under the block secrets of a sealed handle."""
        self._sealed.append(sealed)  # kept alive, so that no other object takes its id
        self._alive[id(sealed)] = sealed
        name = digest(payload)
        for secret in getattr(sealed, "secrets", ()):
            block = digest(secret._ntt.tobytes())
            first = self._blocks.setdefault(block, name)
            require(first == name, "a block secret sealed two messages")

    def opened(self, sealed: object) -> None:
        """An answer was decrypted with a sealed handle."""
        require(id(sealed) not in self._opened, "a sealed handle was opened twice")
        self._opened.add(id(sealed))
        self._ended(sealed)

    def discarded(self, sealed: object) -> None:
        """The owner's machine gave up a sealed handle, and its driver wiped it."""
        if id(sealed) not in self._opened:  # the call may have failed while it was being opened
            self._ended(sealed)

    def owner_died(self) -> None:
        """The memory of its process is gone."""
        self._alive.clear()

    def none_is_left(self) -> None:
        """The owner has closed: nothing opens an answer any more, and nothing is readable."""
        require(not self._alive, f"{len(self._alive)} orphaned secrets were not wiped")

    def _ended(self, sealed: object) -> None:
        require(id(sealed) in self._alive, "a sealed handle was given up twice")
        del self._alive[id(sealed)]
        readable = any(array.any() for array in _arrays(sealed))
        require(not readable, "a sealed handle is readable after its end")


def _arrays(thing: Any) -> Iterator[NDArray[Any]]:
    """Every array that a sealed handle holds for itself; a check's pool is not its own."""
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _arrays(part)
    elif hasattr(thing, "__dict__") and not isinstance(thing, Enum):
        for name, part in vars(thing).items():
            if name != "check":
                yield from _arrays(part)
