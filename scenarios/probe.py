"""A short look at the line to a worker, through the product's own link, before the first step.

A few products of ones, of growing size, are timed from the sending of the request to the arrival of
the answer. A request's time is a round trip, its bytes up and down, and the worker's arithmetic;
products of a wide input, of a wide output and of neither tell those apart. The worker sees nothing
that a training step would not show it, and does nothing for the probe that it would not do for one.

A new TCP connection is slow at first: it sends ten packets a round trip, twice as many in the next
one, and so on. These waits are reckoned (as `sim.stream` does) and taken off a request's time, else
they would be blamed on the line's rate, or on the worker.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import MatrixShape

TOKENS = (16, 64, 256)
BYTES_MAX = 16_000_000
SECONDS_MAX = 4.0
WINDOW_FIRST, WINDOW_MAX = 14_480.0, 4e6
_PINGS = 3
_TURNS = 40
_SETTLED = 0.9
_FASTEST = 1e-12
"""Seconds a byte, or a multiply-add, that is not to be told from nothing."""


@dataclass(frozen=True)
class Sample:
    """One product: bytes and multiply-adds (of the clear product), and seconds it was away.

    windows_up, windows_down  what TCP sent in each round trip that it had to wait for
    """

    up: int
    down: int
    products: float
    seconds: float
    windows_up: tuple[float, ...] = ()
    windows_down: tuple[float, ...] = ()

    def waited_s(self, rtt_s: float, up: float, down: float) -> float:
        """Seconds without a byte on the line, at so many seconds a byte."""
        return sum(
            max(0.0, rtt_s - window * each)
            for windows, each in ((self.windows_up, up), (self.windows_down, down))
            for window in windows
        )


def opened(window: float, size: float) -> tuple[tuple[float, ...], float]:
    """(windows that were sent and waited for, the window afterwards) of `size` bytes."""
    waited = []
    while size > window:
        waited.append(window)
        size -= window
        window = min(WINDOW_MAX, 2 * window)
    return tuple(waited), min(WINDOW_MAX, 2 * window) if size > window / 2 else window


@dataclass(frozen=True)
class LineProbe:
    """What was found.

    rtt_s             a round trip, with what a worker needs for the smallest request
    up_b_s, down_b_s  bytes of frames a second
    products_per_s    multiply-adds of the clear product that the worker does in a second
    owner_s           what the owner's cipher took for the `asked` products (matrix, tokens)
    bytes, seconds    that the probe took
    """

    rtt_s: float
    up_b_s: float
    down_b_s: float
    products_per_s: float
    owner_s: float
    asked: tuple[tuple[int, int], ...]
    bytes: int
    seconds: float


def telling(shapes: Sequence[MatrixShape], unasked: Collection[int] = ()) -> list[int]:
    """Matrices whose times differ for different reasons: indices, the smallest first.

    unasked  those that no run asks for: the owner has nothing ready for them
    """

    def ratio(index: int) -> float:
        return shapes[index].in_features / shapes[index].out_features

    def share(index: int) -> float:
        inputs, outputs = shapes[index].in_features, shapes[index].out_features
        return inputs * outputs / (inputs + outputs)

    every = [index for index in range(len(shapes)) if index not in unasked]
    chosen = (min(every, key=share), max(every, key=ratio), min(every, key=ratio))
    return list(dict.fromkeys(chosen))


def explained(samples: Sequence[Sample], ping: Sample) -> tuple[float, float, float, float]:
    """Seconds of (a round trip, a byte up, a byte down, a multiply-add) that explain the times.

    ping  the smallest request, whose time is mostly the round trip
    """
    rtt_s, each = ping.seconds, (0.0, 0.0, 0.0)
    for _ in range(_TURNS):
        moved = [replace(s, seconds=s.seconds - s.waited_s(rtt_s, *each[:2])) for s in samples]
        found = solved(moved, rtt_s)
        # Halfway, lest rates and waits swing about each other.
        each = tuple((a + b) / 2 for a, b in zip(each, found, strict=True))  # type: ignore[assignment]
        sizes = (ping.up, ping.down, ping.products)
        carried_s = sum(size * seconds for size, seconds in zip(sizes, each, strict=True))
        rtt_s = max(0.0, ping.seconds - carried_s)
    return (rtt_s, *each)


def solved(samples: Sequence[Sample], rtt_s: float) -> tuple[float, float, float]:
    """Seconds (a byte up, a byte down, a multiply-add), none negative, that explain the samples."""
    rows = np.array([[s.up, s.down, s.products] for s in samples], dtype=np.float64)
    wanted = np.array([max(0.0, s.seconds - rtt_s) for s in samples])
    best: tuple[float, NDArray[np.float64]] = (float("inf"), np.zeros(3))
    for size in (1, 2, 3):
        for columns in itertools.combinations(range(3), size):
            part = list(columns)
            found, *_ = np.linalg.lstsq(rows[:, part], wanted, rcond=None)
            if (found < 0).any():
                continue
            error = float(np.square(rows[:, part] @ found - wanted).sum())
            if error < best[0] * (1 - 1e-6):
                values = np.zeros(3)
                values[part] = found
                best = error, values
    up, down, product = (max(_FASTEST, float(value)) for value in best[1])
    return up, down, max(1e-16, product)


class Prober:
    """Asks for products and times them.

    shapes  of the catalogue
    ask     computes one: (matrix, tokens)
    away    seconds that requests have been under way so far
    busy    seconds that the owner's cipher has computed so far
    unasked  as for `telling`
    """

    def __init__(
        self,
        shapes: Sequence[MatrixShape],
        ask: Callable[[int, int], object],
        away: Callable[[], float],
        busy: Callable[[], float],
        unasked: Collection[int] = (),
    ) -> None:
        self._unasked = unasked
        self._shapes, self._ask, self._away, self._busy = shapes, ask, away, busy
        self._asked: list[tuple[int, int]] = []
        self._bytes = 0
        self._window_up = self._window_down = WINDOW_FIRST

    def run(self) -> LineProbe:
        """Probe; takes up to about `SECONDS_MAX`. Raises what `ask` raises."""
        start, busy, began = time.perf_counter(), self._busy(), self._away()
        chosen = telling(self._shapes, self._unasked)
        pings = [self._time(chosen[0], 1) for _ in range(_PINGS)]
        ping = min(pings, key=lambda sample: sample.seconds)
        samples: list[Sample] = []
        for tokens in TOKENS:
            before = self._away()
            # Twice: the first opens the connection's window for the second.
            for _ in range(2):
                samples = [self._time(matrix, tokens) for matrix in chosen]
            now = self._away()
            grown = TOKENS[1] // TOKENS[0]
            size = 2 * grown * sum(sample.up + sample.down for sample in samples)
            took_s, most_s = now - before, SECONDS_MAX - (now - began)
            if self._bytes + size > BYTES_MAX:
                break
            if grown * took_s > most_s and not self._quick(samples, ping, grown, most_s / 2):
                break
        # A real connection may open more slowly than the reckoning: on, while it gets faster.
        size, took_s = sum(s.up + s.down for s in samples), sum(s.seconds for s in samples)
        while self._bytes + size <= BYTES_MAX and self._away() - began + took_s <= SECONDS_MAX:
            again = [self._time(matrix, tokens) for matrix in chosen]
            again_s = sum(s.seconds for s in again)
            if again_s > took_s:
                break
            settled, samples, took_s = again_s > _SETTLED * took_s, again, again_s
            if settled:
                break
        rtt_s, up, down, product = explained(samples, ping)
        return LineProbe(
            rtt_s, 1 / up, 1 / down, 1 / product, self._busy() - busy, tuple(self._asked),
            self._bytes, time.perf_counter() - start,
        )  # fmt: skip

    def _quick(self, samples: Sequence[Sample], ping: Sample, grown: int, most_s: float) -> bool:
        """Whether a request `grown` times as large still takes a round trip above all.

        Over a long line that is fast, small products say little of its rate, and larger ones cost
        little more. Over one that is slow they may also fill it up, lose packets and take seconds.
        """
        _, up, down, product = explained(samples, ping)
        carried_s = [grown * (s.up * up + s.down * down + s.products * product) for s in samples]
        return max(carried_s) < ping.seconds and len(samples) * 2 * ping.seconds < most_s

    def _time(self, matrix: int, tokens: int) -> Sample:
        shape, before = self._shapes[matrix], self._away()
        self._ask(matrix, tokens)
        seconds = self._away() - before
        up, down = shape.up_bytes(tokens), shape.down_bytes(tokens)
        self._asked.append((matrix, tokens))
        self._bytes += up + down
        products = float(tokens) * shape.in_features * shape.out_features
        waits_up, self._window_up = opened(self._window_up, up)
        waits_down, self._window_down = opened(self._window_down, down)
        return Sample(up, down, products, seconds, waits_up, waits_down)
