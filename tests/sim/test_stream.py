"""A TCP connection in the simulated network: overhead, window, slow start, and idling."""

from __future__ import annotations

import random

import pytest
import simpy

from sim.flows import Link
from sim.network import Network
from sim.stream import Stream, Tcp
from sim.topologies import star

RTT_S = 0.1
PLAIN = Tcp(overhead=1.0, window_bytes=1e6, first_bytes=1e6)


def arrivals(
    sends: list[tuple[float, int]], tcp: Tcp | None, bits_per_s: float = 80e6
) -> list[float]:
    """When frames sent at these moments arrive, over a line of 10 MB/s and 100 ms round trip."""
    env = simpy.Environment()
    graph = star(["o"], ["w"], Link(bits_per_s, RTT_S / 2), Link(1e15, 0.0))
    network = Network(env, graph, random.Random(0))
    stream, found = Stream(env, network, "o", "w", tcp), []
    for at_s, size in sends:
        event = env.timeout(at_s)
        event.callbacks.append(
            lambda _, size=size: stream.send(size, lambda: found.append(env.now))
        )
    env.run()
    return found


def test_without_tcp_a_line_is_filled() -> None:
    """Size over rate, and the delay; one frame after the other."""
    assert arrivals([(0, 2_000_000), (0, 1_000_000)], None) == pytest.approx([0.25, 0.35])


def test_overhead_takes_its_part_of_the_line() -> None:
    """A tenth more bytes take a tenth longer."""
    tcp = Tcp(overhead=1.1, window_bytes=1e9, first_bytes=1e9)
    assert arrivals([(0, 1_000_000)], tcp) == pytest.approx([0.11 + 0.05])


def test_a_window_that_the_line_does_not_fill_changes_nothing() -> None:
    """1 MB is what the line carries in a round trip."""
    assert arrivals([(0, 5_000_000)], PLAIN) == pytest.approx([0.55])


def test_a_small_window_waits_for_the_round_trip() -> None:
    """Half of what a round trip would carry: four rounds for 2 MB, the last one without a wait."""
    tcp = Tcp(overhead=1.0, window_bytes=5e5, first_bytes=5e5)
    assert arrivals([(0, 2_000_000)], tcp) == pytest.approx([3 * RTT_S + 0.05 + 0.05])


def test_slow_start_doubles_every_round_trip() -> None:
    """100 + 200 + 400 + 300 kB; a second frame at once finds the window open."""
    tcp = Tcp(overhead=1.0, window_bytes=1e6, first_bytes=1e5)
    first, second = arrivals([(0, 1_000_000), (0.5, 800_000)], tcp)
    assert first == pytest.approx(3 * RTT_S + 0.03 + 0.05)
    assert second == pytest.approx(0.5 + 0.08 + 0.05)


def test_an_idle_connection_forgets() -> None:
    """Half for every timeout of 0.3 s, never less than the first window."""
    tcp = Tcp(overhead=1.0, window_bytes=1e6, first_bytes=1e5)
    # The window is 1 MB after the first frame, 250 kB two timeouts later: 250 + 500 + 50 kB.
    _, late = arrivals([(0, 2_000_000), (1.2, 800_000)], tcp)
    assert late == pytest.approx(1.2 + 2 * RTT_S + 0.005 + 0.05)
    _, never = arrivals([(0, 2_000_000), (100.0, 100_000)], tcp)
    assert never == pytest.approx(100.0 + 0.01 + 0.05)


def test_a_connection_of_nonsense_is_refused() -> None:
    """Named, with its numbers."""
    with pytest.raises(ValueError, match="at least 1"):
        Tcp(overhead=0.9)
    with pytest.raises(ValueError, match="grows"):
        Tcp(window_bytes=1e3)
