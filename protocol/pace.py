"""How long a worker takes, as far as an owner has seen: what time-outs are made of.

A line may be a data centre's or a phone's: a wait that fits one would have the other send
everything twice, or stare at a dead worker for an hour. So waits follow from what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pace:
    """Seconds a byte takes, both ways and the worker's product included.

    The estimator is TCP's for its retransmissions (RFC 6298), for a byte instead of a round trip:
    a smoothed mean, and four times the smoothed deviation from it.
    """

    mean_s: float = 0.0
    deviation_s: float = 0.0
    seen: bool = False

    def observe(self, seconds: float, size: int) -> None:
        """Learn that `size` bytes, at least 1, took so many seconds."""
        sample = seconds / size
        if not self.seen:
            self.mean_s, self.deviation_s, self.seen = sample, sample / 2, True
            return
        self.deviation_s += (abs(sample - self.mean_s) - self.deviation_s) / 4
        self.mean_s += (sample - self.mean_s) / 8

    def seconds(self, size: int) -> float:
        """What `size` bytes will hardly take longer than."""
        return size * (self.mean_s + 4 * self.deviation_s)
