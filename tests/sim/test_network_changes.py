"""Links that change under way, one seed one story, mistakes, and ready-made networks."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import networkx
import pytest

from sim.flows import Link
from sim.topologies import describe, star, two_sites
from tests.sim.slow_network import (
    FAST,
    SLOW,
    World,
    cable,
    chain,
)

# --- links that change ----------------------------------------------------------------------


def test_a_cut_stops_what_is_on_the_link_until_it_is_healed() -> None:
    """In both directions; what has left the link already still arrives; others go on."""
    graph = star(["one", "two"], ["worker"], Link(8e6, 0.2), FAST)
    world = World(graph)
    world.send("before", "one", "worker", 100_000)
    world.send("up", "one", "worker", 1_000_000, at_s=0.1)
    world.send("down", "worker", "one", 1_000_000, at_s=0.1)
    world.send("other", "two", "worker", 1_000_000, at_s=0.1)
    world.at(0.2, lambda: world.network.cut("internet", "one"))
    world.send("during", "one", "worker", 0, at_s=1.0)
    world.at(5.2, lambda: world.network.heal("one", "internet"))
    world.run()
    delay = 0.2 + FAST.delay_s
    assert world.arrived_s["before"] == pytest.approx(0.1 + delay)
    assert world.arrived_s["other"] == pytest.approx(1.1 + delay)
    assert world.arrived_s["up"] == pytest.approx(6.1 + delay)
    assert world.arrived_s["down"] == pytest.approx(6.1 + delay)
    assert world.arrived_s["during"] == pytest.approx(5.2 + delay)


def test_a_stalled_flow_leaves_its_share_to_others() -> None:
    """Two owners share the worker's link; while one is cut off the other has all of it."""
    world = World(star(["one", "two"], ["worker"], Link(8e9, 0), Link(8e6, 0)))
    world.send("one", "one", "worker", 1_000_000)
    world.send("two", "two", "worker", 1_000_000)
    world.at(0.5, lambda: world.network.cut("one", "internet"))
    world.at(9.0, lambda: world.network.heal("one", "internet"))
    world.run()
    assert world.arrived_s["two"] == pytest.approx(1.25)
    assert world.arrived_s["one"] == pytest.approx(9.75)


def test_a_link_can_be_replaced_under_a_frame() -> None:
    """Rate and delay change at once for what is under way; the caller's graph stays as it was."""
    graph = cable(SLOW)
    world = World(graph)
    world.send("frame", "a", "b", 1_000_000)
    world.at(0.5, lambda: world.network.set_link("b", "a", Link(80e6, 0.3)))
    assert world.run()["frame"] == pytest.approx(0.5 + 0.05 + 0.3)
    assert graph.edges["a", "b"]["link"] == SLOW
    assert world.network.graph.edges["a", "b"]["link"] == Link(80e6, 0.3)


def test_new_frames_take_the_better_way_and_old_ones_keep_theirs() -> None:
    """A change of delay can change the route, for those that have not started."""
    graph = chain(Link(8e6, 0.1), Link(8e6, 0.1))
    graph.add_edge("a", "c", link=Link(8e6, 1.0))
    world = World(graph)
    world.send("old", "a", "c", 1_000_000)
    world.at(0.5, lambda: world.network.set_link("a", "c", Link(8e6, 0.01)))
    world.send("new", "a", "c", 1_000_000, at_s=0.5)
    world.run()
    assert world.arrived_s["old"] == pytest.approx(1.0 + 0.2)
    assert world.arrived_s["new"] == pytest.approx(1.5 + 0.01)
    assert world.network.moved_bytes["b", "c"] == 1_000_000
    assert world.network.moved_bytes["a", "c"] == 1_000_000


def test_a_replaced_link_stays_cut() -> None:
    """And healing it twice does no harm."""
    world = World(cable(SLOW))
    world.network.cut("a", "b")
    world.network.cut("a", "b")
    world.network.set_link("a", "b", FAST)
    world.send("frame", "a", "b", 0)
    world.at(2.0, lambda: world.network.heal("a", "b"))
    world.at(3.0, lambda: world.network.heal("a", "b"))
    assert world.run()["frame"] == pytest.approx(2.0 + FAST.delay_s)


# --- determinism ----------------------------------------------------------------------------

STORY = """
import hashlib, random, simpy
from sim.flows import Link
from sim.network import Network
from sim.topologies import star
env, rng, log = simpy.Environment(), random.Random(3), []
owners, workers = [f"owner{i}" for i in range(5)], [f"worker{i}" for i in range(4)]
graph = star(owners, workers, Link(1e7, 0.01, 0.002, 0.001), Link(2e7, 0.001, 0.001))
network = Network(env, graph, random.Random(4))
def send(i):
    a, b = rng.choice(owners), rng.choice(workers)
    network.send(a, b, rng.randrange(50_000), lambda: log.append((i, env.now)))
for i in range(300):
    env.timeout(rng.random()).callbacks.append(lambda _, i=i: send(i))
env.run()
assert len(log) == 300
print(hashlib.sha256(repr((log, network.moved_bytes)).encode()).hexdigest())
"""


def test_the_same_seed_is_the_same_story_in_every_process() -> None:
    """Order and times of all arrivals, whatever the hash seed of the interpreter."""
    told = [
        subprocess.run(
            [sys.executable, "-c", STORY],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 65


def test_equal_frames_arrive_in_the_order_they_were_sent() -> None:
    """Ties are broken by the order of sending."""
    world = World(cable(SLOW))
    for i in range(20):
        world.send(str(i), "a", "b", 1000)
    assert list(world.run()) == [str(i) for i in range(20)]


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bandwidth_bps": 0}, "bandwidth_bps is positive"),
        ({"bandwidth_bps": -1}, "bandwidth_bps is positive"),
        ({"bandwidth_bps": math.inf}, "finite"),
        ({"bandwidth_bps": math.nan}, "bandwidth_bps"),
        ({"delay_s": -0.001}, "delay_s is finite and not negative, got -0.001"),
        ({"delay_s": math.nan}, "delay_s"),
        ({"jitter_s": -1}, "jitter_s"),
        ({"loss": -0.1}, "0 <= loss < 1"),
        ({"loss": 1}, "0 <= loss < 1"),
    ],
)
def test_a_link_must_make_sense(kwargs: dict[str, float], message: str) -> None:
    """Refused on construction, by name."""
    with pytest.raises(ValueError, match=message):
        Link(**{"bandwidth_bps": 1e6, "delay_s": 0.0, **kwargs})


def test_mistakes_in_sending_are_named() -> None:
    """And leave the network as it was."""
    graph = chain(SLOW)
    graph.add_edge("island", "sea", link=SLOW)
    network = World(graph).network
    for source, target, size, message in (
        ("a", "nobody", 1, "no host 'nobody' in this network; it has a, b, island, sea"),
        ("nobody", "nobody", 1, "no host 'nobody'"),
        ("a", "island", 1, "no route from a to island"),
        ("a", "b", -1, "a -> b: a frame has at least 0 bytes, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            network.send(source, target, size, lambda: None)
    with pytest.raises(ValueError, match="no host 'nobody'"):
        network.round_trip_s("nobody", "nobody")
    assert network.bytes_sent == 0
    assert network.rates_bps() == []


def test_only_links_that_exist_can_change() -> None:
    """The message says which there are."""
    network = World(chain(SLOW, SLOW)).network
    with pytest.raises(ValueError, match="no link a - c; a has links to b"):
        network.cut("a", "c")
    with pytest.raises(ValueError, match="no host 'x'"):
        network.heal("a", "x")
    with pytest.raises(ValueError, match="no link a - c"):
        network.set_link("a", "c", SLOW)


def test_only_plain_graphs_of_links() -> None:
    """An edge without a link, or a direction, is a mistake of the caller."""
    with pytest.raises(ValueError, match=r"'a' - 'b' has link=None.*link=Link"):
        World(networkx.Graph([("a", "b")]))
    with pytest.raises(ValueError, match="undirected"):
        World(networkx.DiGraph())
    with pytest.raises(ValueError, match="undirected"):
        World(networkx.MultiGraph())


# --- ready-made networks --------------------------------------------------------------------


def test_star() -> None:
    """One access and one site link between any owner and any worker."""
    world = World(star(["o1", "o2"], ["w1", "w2"], SLOW, FAST))
    assert world.network.round_trip_s("o2", "w1") == pytest.approx(0.022)
    world.send("one", "o1", "w1", 1_000_000)
    world.send("two", "o2", "w2", 1_000_000)
    world.run()
    assert list(world.arrived_s.values()) == [pytest.approx(1 + 0.011)] * 2


def test_two_sites() -> None:
    """Workers of a site share its uplink; the other site has its own."""
    world = World(
        two_sites(["o"], ["a1", "a2"], ["b1"], access=FAST, lan=FAST, uplink_a=SLOW, uplink_b=SLOW)
    )
    for worker in ("a1", "a2", "b1"):
        world.send(worker, "o", worker, 1_000_000)
    world.run()
    assert world.arrived_s["a1"] == world.arrived_s["a2"] == pytest.approx(2 + 0.012)
    assert world.arrived_s["b1"] == pytest.approx(1 + 0.012)
    assert world.network.round_trip_s("a1", "a2") == pytest.approx(4 * FAST.delay_s)


def test_names_are_used_once() -> None:
    """Also those of the nodes between."""
    with pytest.raises(ValueError, match="two hosts are called 'x'"):
        star(["x"], ["x"], SLOW, FAST)
    with pytest.raises(ValueError, match="two hosts are called 'internet'"):
        star(["internet"], ["x"], SLOW, FAST)
    with pytest.raises(ValueError, match="two hosts are called 'site A'"):
        two_sites(["site A"], [], [], access=SLOW, lan=SLOW, uplink_a=SLOW, uplink_b=SLOW)


def test_a_network_in_words() -> None:
    """Equal links of one hub on one line, in units people use."""
    owners = [f"owner{i}" for i in range(40)]
    home = Link(100e6, 0.010, 0.0005, 0.001)
    assert describe(star(owners, ["worker0"], home, Link(10e9, 0.001))) == (
        "owner0, owner1, owner2, owner3, owner4, ..., owner39 (40 in all) - internet: "
        "100 Mb/s, 10 ms one way, jitter 0.5 ms, loss 0.001, each\n"
        "worker0 - internet: 10 Gb/s, 1 ms one way"
    )
    assert describe(cable(Link(56e3, 0))) == "a - b: 56 kb/s, 0 ms one way"
