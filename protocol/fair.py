"""Whose request is computed next: fair queueing by bytes, and requests of one matrix joined.

Theory. Start-time fair queueing (Goyal, Vin and Cheng 1996). A request of a client begins, on a
clock of its own, where the client's last one ended, or now when it has none; it ends so many bytes
later, divided by the client's share. The earliest beginning leads, and that is what the clock says
next. So of two clients that always have something waiting neither gets ahead of the other, in bytes
by share, by more than one request each, whatever sizes and numbers they ask for, and one that comes
anew waits for as many requests of every other at most as the other's share is: for one, where all
weigh the same.

A leader takes along what waits for the same matrix, in the same order, as far as it fits: joined,
they cost little more than the leader alone. They are charged like all others. A client whose clock
is ahead by a whole joined product is not taken along any more: it would get more than its share
whenever another one leads for its matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, nlargest
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

FEW_TOKENS = 16
"""A product of fewer takes about as long as one of so many: the weight has to be read."""

_FORGET = 1024
"""Clients that are remembered before those are forgotten whose past matters least."""
_PARTS = 1 << 20
"""Of a byte, in which shares are counted: whole numbers stay exact."""
_DEAD = 64
"""Requests that have come, at least, before those are looked for that wait no more."""


def charged(tokens: int) -> int:
    """Tokens that a request of so many counts as.

    By its own bytes alone, whoever asks for one token at a time would take the worker's time from
    those who ask for many: as many bytes in ten times as many products.
    """
    return max(FEW_TOKENS, tokens)


@dataclass(order=True)
class _Entry(Generic[Item]):
    start: int
    number: int
    client: str = field(compare=False)
    matrix: int = field(compare=False)
    tokens: int = field(compare=False)
    charge: int = field(compare=False)
    item: Item | None = field(compare=False)
    """None once it has been taken or removed: of two heaps, the other still holds the entry."""


class FairQueue(Generic[Item]):
    """Requests that wait, each item once. Costs a logarithm of their number for each.

    max_tokens  of requests that are joined; a larger one goes alone
    shares      of clients, in whole numbers of at least 1; whoever is not named has 1

    Raises ValueError for another share.
    """

    def __init__(self, max_tokens: int, shares: Mapping[str, int] | None = None) -> None:
        self._max_tokens, self._shares = max_tokens, dict(shares or {})
        if min(self._shares.values(), default=1) < 1:
            raise ValueError("a client's share is at least 1")
        self._all: list[_Entry[Item]] = []
        self._of: dict[int, list[_Entry[Item]]] = {}
        self._waiting: dict[Item, _Entry[Item]] = {}
        self._ends: dict[str, int] = {}
        self._clock = 0
        self._number = self._compacted = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: Item, client: str, matrix: int, tokens: int, size: int) -> None:
        """One more waits. `size` is what it counts for: bytes of a request and its answer
        of `charged` tokens.

        Raises ValueError for an item that waits already, or a size below 1.
        """
        if item in self._waiting or size < 1:
            raise ValueError(f"an item waits once, and has at least 1 byte, got {size}")
        start = max(self._clock, self._ends.get(client, 0))
        charge = size * _PARTS // self._shares.get(client, 1)
        self._ends[client] = start + charge
        self._number += 1
        entry = _Entry(start, self._number, client, matrix, tokens, charge, item)
        self._waiting[item] = entry
        heappush(self._all, entry)
        heappush(self._of.setdefault(matrix, []), entry)

    def remove(self, item: Item) -> bool:
        """It waits no more; False where it did not wait.

        It stays charged, unless it is the last of its client: whose requests are all removed, the
        last one first, as those of a link that broke, owes nothing for them.
        """
        entry = self._take(item)
        if entry is not None and self._ends.get(entry.client) == entry.start + entry.charge:
            self._ends[entry.client] = entry.start
        return entry is not None

    def _take(self, item: Item) -> _Entry[Item] | None:
        entry = self._waiting.pop(item, None)
        if entry is not None:
            entry.item = None
        return entry

    def pop(self) -> list[Item]:
        """What is to be computed next, all of one matrix, the leader first; empty for nothing."""
        if self._number - self._compacted > 2 * len(self._waiting) + _DEAD:
            self._compact()
        while self._all and self._all[0].item is None:
            heappop(self._all)
        if not self._all:
            return []
        leader = self._all[0]
        self._clock = leader.start
        batch = self._batch(leader)
        if not self._waiting:
            self._begin_anew()
        elif len(self._ends) > _FORGET:
            self._forget()
        return batch

    def _batch(self, leader: _Entry[Item]) -> list[Item]:
        same, room = self._of[leader.matrix], self._max_tokens
        batch: list[Item] = []
        while same:
            entry = same[0]
            if entry.item is not None:
                # In whole numbers: bytes of a joined product, were it all of such requests.
                ahead = (entry.start - leader.start) * entry.tokens
                room -= entry.tokens
                if batch and (room < 0 or ahead > entry.charge * self._max_tokens):
                    break
                batch.append(entry.item)
                self._take(entry.item)
            heappop(same)
        if not same:
            del self._of[leader.matrix]
        return batch

    def _forget(self) -> None:
        """Clients that have had no more than their share, and half of the rest if need be."""
        ends = [(end, client) for client, end in self._ends.items() if end > self._clock]
        if len(ends) > _FORGET:
            ends = nlargest(_FORGET // 2, ends)
        self._ends = {client: end for end, client in ends}

    def _compact(self) -> None:
        """Let go of entries that wait no more, deep in the heaps; not at every turn."""
        self._compacted = self._number
        self._all = [entry for entry in self._all if entry.item is not None]
        heapify(self._all)
        self._of = {}
        for entry in self._all:
            self._of.setdefault(entry.matrix, []).append(entry)
        for same in self._of.values():
            heapify(same)

    def _begin_anew(self) -> None:
        """Nobody waits: all clients are equal, and small numbers stay exact."""
        self._all.clear()
        self._of.clear()
        self._ends.clear()
        self._clock = 0
