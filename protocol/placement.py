"""Which worker gets the next request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def least_loaded(ready: Sequence[str], in_flight: Mapping[str, int], window: int) -> str | None:
    """The ready worker with the fewest requests in flight, the first of equals.

    Returns None when every ready worker has `window` requests in flight already.
    """
    free = [peer for peer in ready if in_flight.get(peer, 0) < window]
    return min(free, key=lambda peer: in_flight.get(peer, 0), default=None)
