"""How much of a worker one client may have, and when one that asks for more may come back.

A client is who owns a link, however many it has. Theory of the rate: the generic cell rate
algorithm (ITU-T I.371), a token bucket kept as one number, the time until which a client has used
what it is due. It may be ahead by `burst_s`, so that a step's requests may come at once, and one
request of any size is taken from whoever is not ahead. Of the room of all: dynamic thresholds
(Choudhury and Hahne 1998). Were it given to whoever asks first, some clients that always ask would
keep it full, and one that has nothing in work would be sent away each time that it came.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from protocol.pace import Pace

_UNKNOWN_S = 0.25
"""To come back in where nothing has been computed yet."""
_BACK_S = (0.01, 30.0)
"""To come back in, at least and at most."""
_FORGET = 1024
"""Clients whose past is remembered before it is looked for what no longer matters."""


@dataclass(frozen=True)
class Quota:
    """What a client, or all together, may have.

    requests, size  in work, of one client: requests, and bytes of them and of their answers; its
                    only request may be larger
    size_all        the same bytes of all clients together; a second request is taken of a client
                    that has then no more of them than are left free
    bytes_per_s     the same bytes, of one client, over time
    burst_s         seconds that a client may be ahead of that
    """

    requests: int = 64
    size: int = 512 << 20
    size_all: int = 4 << 30
    bytes_per_s: float = math.inf
    burst_s: float = 2.0

    def __post_init__(self) -> None:
        if min(self.requests, self.size, self.size_all) < 1:
            raise ValueError("a quota lets at least one request, and one byte, be in work")
        if not (self.bytes_per_s > 0 and 0 <= self.burst_s < math.inf):
            raise ValueError("a rate is positive, a burst finite and not negative")


@dataclass
class _Work:
    """Of one client, or of all: requests, and bytes of them and of their answers."""

    requests: int = 0
    size: int = 0


class Admission:
    """Counts what is in work, and says who has to wait. Times are the machine's, in seconds."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._work: dict[Hashable, _Work] = {}
        self._all = _Work()
        self._used_until: dict[Hashable, float] = {}
        self._pace = Pace()
        self._ended_s = 0.0

    def working(self, client: Hashable) -> bool:
        """Whether anything of a client is in work."""
        return client in self._work

    def wait_s(self, client: Hashable, size: int, now: float) -> float | None:
        """Seconds until a request of `size` bytes is worth sending again; None to take it."""
        quota, theirs = self._quota, self._work.get(client, _Work())
        ahead_s = self._used_until.get(client, now) - now - quota.burst_s
        waits = [ahead_s] if ahead_s > 0 else []
        if theirs.requests >= quota.requests:
            waits.append(self._done_s(theirs.size // theirs.requests))
        if theirs.requests and theirs.size + size > quota.size:
            waits.append(self._done_s(theirs.size + size - quota.size))
        left = theirs.size + size if theirs.requests else 0
        excess = self._all.size + size + left - quota.size_all
        if self._all.requests and excess > 0:
            waits.append(self._done_s(excess))
        return min(max(_BACK_S[0], *waits), _BACK_S[1]) if waits else None

    def begin(self, client: Hashable, size: int, now: float) -> None:
        """A request is in work from now on."""
        for work in (self._work.setdefault(client, _Work()), self._all):
            work.requests, work.size = work.requests + 1, work.size + size
        if self._quota.bytes_per_s == math.inf:
            return
        if len(self._used_until) >= _FORGET:
            self._used_until = {c: s for c, s in self._used_until.items() if s > now}
        used_until = max(now, self._used_until.get(client, now))
        self._used_until[client] = used_until + size / self._quota.bytes_per_s

    def end(self, client: Hashable, size: int, begun_s: float, now: float) -> None:
        """A request that was in work since `begun_s` is not any more."""
        for work in (self._work[client], self._all):
            work.requests, work.size = work.requests - 1, work.size - size
        if not self._work[client].requests:
            del self._work[client]
        self._pace.observe(max(0.0, now - max(begun_s, self._ended_s)), size)
        self._ended_s = now

    def _done_s(self, size: int) -> float:
        """How long so many bytes take, as far as has been seen."""
        return self._pace.mean_s * size if self._pace.seen else _UNKNOWN_S
