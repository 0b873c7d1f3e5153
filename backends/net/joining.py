"""Joins requests for one matrix that pile up while a device is busy into one product.

Leader and followers. A thread with a request leads at once while fewer than `slots` batches are
under way; else it waits. A leader that has finished hands its slot to the oldest request that
waits, together with those for the same matrix behind it, as many as fit `max_size`. So nothing
is ever held back in the hope of company, and an idle device sees each request alone.

Rules
  * A free slot means that nobody waits; every transition keeps this, under one lock.
  * Every request is in exactly one batch, and gets its own result or error, exactly once.
  * Oldest first over all matrices, and in order of arrival within one: none can starve.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Ticket(Generic[Key, Request, Result]):
    """One request: it waits until it is told to lead `batch`, or that its outcome is there."""

    key: Key
    request: Request
    size: int
    turn: threading.Event = field(default_factory=threading.Event)
    batch: list[_Ticket[Key, Request, Result]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    error: BaseException | None = None


class Joiner(Generic[Key, Request, Result]):
    """Runs requests of many threads through `multiply_many`, joined while they wait.

    multiply_many  (key, requests) -> one result a request, in order; called by up to `slots`
                   threads at once
    slots          batches under way at once, at least 1
    size           of one request, in the unit of `max_size`
    max_size       of a joined batch; a larger request runs alone
    """

    def __init__(
        self,
        multiply_many: Callable[[Key, list[Request]], Sequence[Result]],
        slots: int,
        size: Callable[[Request], int],
        max_size: int,
    ) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots run nothing; at least 1")
        self._multiply_many = multiply_many
        self._free = slots
        self._size = size
        self._max_size = max_size
        self._waiting: deque[_Ticket[Key, Request, Result]] = deque()
        self._lock = threading.Lock()

    def run(self, key: Key, request: Request) -> Result:
        """The result for `request`; blocks until it is there.

        Raises what multiply_many raised for its batch. A ValueError is the fault of one request:
        then those of the batch are run again one by one, and only that one's caller hears of it.
        """
        ticket: _Ticket[Key, Request, Result] = _Ticket(key, request, self._size(request))
        with self._lock:
            if self._free:
                self._free -= 1
                ticket.batch = [ticket]
            else:
                self._waiting.append(ticket)
        if not ticket.batch:
            ticket.turn.wait()
        if ticket.batch:
            try:
                self._settle(ticket.batch)
            finally:
                self._hand_over()
                for other in ticket.batch:
                    other.turn.set()
        if ticket.error is not None:
            raise ticket.error
        return ticket.results[0]

    def _settle(self, batch: list[_Ticket[Key, Request, Result]]) -> None:
        """Give every ticket of the batch its result or its error."""
        key = batch[0].key
        try:
            results = self._multiply_many(key, [ticket.request for ticket in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} requests")
        except BaseException as error:
            if isinstance(error, ValueError) and len(batch) > 1:
                for ticket in batch:
                    self._settle([ticket])
                return
            for ticket in batch:
                ticket.error = error
            return
        for ticket, result in zip(batch, results, strict=True):
            ticket.results.append(result)

    def _hand_over(self) -> None:
        """Pass this thread's slot to those who wait, or leave it free."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            leader = self._waiting[0]
            room = self._max_size
            stay: deque[_Ticket[Key, Request, Result]] = deque()
            full = False
            for ticket in self._waiting:
                if ticket.key == leader.key and not full:
                    room -= ticket.size
                    full = room < 0 and ticket is not leader
                    if not full:
                        leader.batch.append(ticket)
                        continue
                stay.append(ticket)
            self._waiting = stay
        leader.turn.set()
