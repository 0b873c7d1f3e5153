"""The simulated world against closed forms and bounds that hold for any workload."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.catalogue import MatrixShape
from protocol.messages import (
    HEADER_BYTES,
    SESSION_BYTES,
    Bye,
    Farewell,
    Multiply,
    Product,
    Reason,
    Refuse,
    decode,
    encode,
)
from protocol.owner_memory import OwnerConfig
from protocol.placement import Placement
from sim.device import DeviceProfile, Origin, Work
from sim.flows import Link
from sim.frames import call_of, payload_at
from sim.hosts import phantom, wire_bytes
from sim.trace import critical_path
from sim.workload import Linear, Local, Workload
from sim.world import Step, World, WorldConfig, WorldError, WorldResult, simulate

ORIGIN = Origin("datasheet", "a test", "2026-01-01")
TASKS = ("encrypt", "decrypt", "multiply", "local", "update")
OWNER = DeviceProfile(
    "owner", ORIGIN, 2.0, {"float": 1e6, "ring_row": 1e5, "value": 1e6}, 1e12,
    dict.fromkeys(TASKS, 1e-4), {"encrypt": 1.0, "decrypt": 1.0},
)  # fmt: skip
WORKER = DeviceProfile("worker", ORIGIN, 1.0, {"int8": 1e9}, 1e12, dict.fromkeys(TASKS, 1e-5))
UP, DOWN = HEADER_BYTES + 16, HEADER_BYTES + 8
"""Bytes a request and an answer have besides their payload."""


def workload(shapes: list[tuple[int, int]], local: list[float], tokens: int = 4) -> Workload:
    """Groups of (inputs, outputs), forward in order and back again, own layers in between."""
    matrices = []
    for index, (inputs, outputs) in enumerate(shapes):
        for way, k, n in (("forward", inputs, outputs), ("backward", outputs, inputs)):
            matrices.append(MatrixShape(f"group{index} {way}", k, n, 3 * k, 2 * n))
    order = [2 * i for i in range(len(shapes))] + [2 * i + 1 for i in reversed(range(len(shapes)))]
    items: list[Local | Linear] = []
    for place, matrix in enumerate(order):
        items += [_local(local[place % len(local)]), Linear(matrix)]
    return Workload(
        "toy", tokens, tokens, tuple(matrices), (*items, _local(local[-1])),
        Work({"float": 50.0}, 100.0), Work({"float": 100.0}, 100.0), 4, False, "exact",
    )  # fmt: skip


def _local(count: float) -> Local:
    return Local("own", (Work({"float": count}), Work({}, 100.0)))


WORKLOADS = st.builds(
    workload,
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=4),
    st.lists(st.floats(0, 5e5), min_size=1, max_size=5),
    st.integers(1, 16),
)
LINKS = st.builds(Link, st.sampled_from([1e5, 1e6, 1e8, 1e10]), st.sampled_from([0.0, 1e-3, 0.05]))


def config(load: Workload, **changes: object) -> WorldConfig:
    """A quiet world of one owner and one worker, with patience for the slowest line."""
    patient = OwnerConfig(request_timeout_s=1e4, timeout_s_max=1e5)
    base = WorldConfig(load, OWNER, WORKER, steps=2, protocol=patient, tcp=None)
    return replace(base, **changes)  # type: ignore[arg-type]


def costs(world: WorldConfig) -> dict[str, float]:
    """Seconds of one lane's pass, each kind of task alone on its device, and the update."""
    found = World(world).costs
    linears = [i.matrix for i in world.workload.lane if isinstance(i, Linear)]
    return {
        "local": sum(c.seconds for c in found.layers if c is not None),
        "encrypt": sum(found.encrypt[m].seconds for m in linears),
        "decrypt": sum(found.decrypt[m].seconds for m in linears),
        "multiply": sum(found.multiply(m, world.workload.tokens).seconds for m in linears),
        "update": found.update.seconds,
    }


def frames(load: Workload) -> tuple[int, int]:
    """Bytes one pass sends and receives, headers included."""
    count = len(load.linears)
    return load.up_bytes + count * UP, load.down_bytes + count * DOWN


def last_step_s(result: WorldResult) -> float:
    """Duration of the last step."""
    return result.steps[-1].duration_s


@settings(max_examples=60, deadline=None)
@given(WORKLOADS, LINKS, st.booleans())
def test_one_lane_alone_is_the_sum_of_its_parts(load: Workload, link: Link, streams: bool) -> None:
    """Nothing to wait for but the chain itself: a closed form, to the last digit."""
    world = config(load, access=link, streams=streams)
    up, down = frames(load)
    wire = (up + down) * 8 / link.bandwidth_bps + 2 * link.delay_s * len(load.linears)
    expected = sum(costs(world).values()) + wire
    result = simulate(world)
    for step in result.steps:
        assert step.duration_s == pytest.approx(expected, rel=1e-9)
    assert result.resent == 0


@settings(max_examples=60, deadline=None)
@given(
    WORKLOADS, LINKS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_no_resource_does_more_than_it_can(
    load: Workload, link: Link, lanes: int, owners: int, workers: int, streams: bool, warm: bool
) -> None:
    """Each step lasts as long as any of the resources it needs; bytes are the catalogue's."""
    world = config(
        load, access=link, lanes=lanes, owners=owners, workers=workers, streams=streams,
        warmup=int(warm),
    )  # fmt: skip
    result = simulate(world)
    parts, (up, down) = costs(world), frames(load)
    chain = sum(parts.values()) + (up + down) * 8 / link.bandwidth_bps
    chain += 2 * link.delay_s * len(load.linears)
    # Own layers and update keep both cores busy while they compute, and one in their overhead.
    cipher_s = lanes * (parts["encrypt"] + parts["decrypt"]) / OWNER.cores
    bounds = [
        chain,
        lanes * up * 8 / link.bandwidth_bps,
        lanes * down * 8 / link.bandwidth_bps,
        lanes * parts["multiply"] / workers,
        cipher_s,
    ]
    assert len(result.steps) == owners * world.steps
    for step in result.steps:
        assert step.duration_s >= max(bounds) * (1 - 1e-9)
        assert (step.bytes_up, step.bytes_down) == (lanes * up, lanes * down)
    # One after the other they could not be slower: somebody always makes progress.
    assert last_step_s(simulate(replace(world, owners=1))) <= lanes * last_step_s(
        simulate(replace(world, owners=1, lanes=1))
    ) * (1 + 1e-9)
    assert 0 < result.utilisation <= 1 + 1e-9


@settings(max_examples=30, deadline=None)
@given(WORKLOADS, st.integers(1, 2))
def test_a_faster_line_is_never_slower(load: Workload, lanes: int) -> None:
    """No jitter, nobody else: more bandwidth cannot hurt one lane. Two may meet at the processor in
    another order, which costs a little now and then."""
    slack = 1e-9 if lanes == 1 else 0.05
    times = [
        last_step_s(simulate(config(load, lanes=lanes, access=Link(bps, 1e-3))))
        for bps in (1e5, 1e6, 1e7, 1e9)
    ]
    assert all(b <= a * (1 + slack) for a, b in pairwise(times))


@settings(max_examples=20, deadline=None)
@given(WORKLOADS, st.integers(0, 5))
def test_the_seed_decides_everything(load: Workload, seed: int) -> None:
    """Same seed, same spans; and it does decide something."""
    world = config(
        load, owners=3, lanes=2, warmup=1, access=Link(1e7, 0.01, jitter_s=0.01), seed=seed
    )
    first, second = simulate(world), simulate(world)
    assert first.trace.spans == second.trace.spans
    assert first.steps == second.steps
    assert simulate(replace(world, seed=seed + 1)).steps != first.steps


def busy_gpu(**changes: object) -> WorldConfig:
    """Steps of which the device's products take nearly all."""
    slow = replace(WORKER, rates={"int8": 1e5})
    return config(workload([(100, 100)] * 3, [10.0]), worker=slow, warmup=1, **changes)


def test_two_owners_share_one_gpu() -> None:
    """Alone they would need it nearly always: together each takes twice as long."""
    alone, both = simulate(busy_gpu()), simulate(busy_gpu(owners=2, steps=4))
    assert alone.utilisation > 0.98
    for step in both.steps:
        assert step.duration_s == pytest.approx(2 * last_step_s(alone), rel=0.05)
    assert both.utilisation == pytest.approx(1, abs=0.01)
    two = simulate(busy_gpu(owners=2, workers=2, steps=4))
    assert last_step_s(two) == pytest.approx(last_step_s(alone), rel=0.01)


def test_measuring_stops_at_the_last_owner_and_counts_after_warm_up() -> None:
    """Each owner has its own steps; the window begins when all are warm."""
    result = simulate(busy_gpu(owners=3, steps=2))
    assert [(s.owner, s.index) for s in result.steps] == [
        (f"owner{i}", j) for i in range(3) for j in range(2)
    ]
    start_s, end_s = result.window_s
    assert start_s <= max(step.start_s for step in result.steps if step.index == 0)
    assert end_s == max(step.end_s for step in result.steps)


def test_streams_let_two_lanes_overlap_where_sharing_keeps_them_in_step() -> None:
    """Two lanes that share a line fairly upload together, then download together."""
    load, line = workload([(400, 400)] * 4, [10.0]), Link(1e6, 0.0)
    apart, together = (
        simulate(config(load, lanes=2, access=line, streams=streams)) for streams in (True, False)
    )
    assert last_step_s(apart) < 0.75 * last_step_s(together)


def test_placement_is_kept() -> None:
    """Each request goes to a worker that holds its matrix."""
    load = workload([(30, 20), (20, 50)], [10.0])
    placement = Placement((("worker0",), ("worker0",), ("worker1",), ("worker1",)))
    result = simulate(config(load, workers=2, placement=placement))
    products = {(s.track, s.name) for s in result.trace.spans if s.kind == "worker"}
    assert products == {
        (f"worker{i}/gpu", f"group{i} {way}") for i in (0, 1) for way in ("forward", "backward")
    }


def test_in_one_process_there_is_no_network() -> None:
    """The same chain, without a wire, on one processor."""
    load = workload([(30, 20), (20, 50)], [1000.0])
    both = replace(OWNER, rates={**OWNER.rates, **WORKER.rates})
    world = config(load, owner=both, worker=both, in_process=True)
    assert last_step_s(simulate(world)) == pytest.approx(sum(costs(world).values()), rel=1e-9)
    with pytest.raises(ValueError, match="one owner"):
        config(load, in_process=True, owners=2)


@settings(max_examples=20, deadline=None)
@given(WORKLOADS, LINKS, st.integers(1, 4))
def test_every_moment_of_a_step_is_accounted_for(load: Workload, link: Link, lanes: int) -> None:
    """The critical path adds up to the step, and a quiet world is never idle."""
    result = simulate(config(load, access=link, lanes=lanes))
    for step in result.steps:
        parts = critical_path(result.trace.spans, step.start_s, step.end_s)
        assert sum(parts.values()) == pytest.approx(step.duration_s, rel=1e-9)
        assert parts["idle"] <= 1e-9 * step.duration_s


def test_only_what_is_asked_for_is_recorded() -> None:
    """Spans of the first owner, of all, of none; never at the cost of another result."""
    world = config(workload([(30, 20)], [10.0]), owners=2)
    every, first, none = (
        simulate(replace(world, record=record, record_owners=owners))
        for record, owners in ((True, None), (True, 1), (False, None))
    )
    assert every.steps == first.steps == none.steps
    assert not none.trace.spans
    kept = [s for s in every.trace.spans if "owner1" not in s.track and "owner1" not in s.lane]
    assert first.trace.spans == kept
    assert len(kept) < len(every.trace.spans)


def test_impatience_is_seen_and_despair_is_said() -> None:
    """A frame that takes longer than the patience is sent again; in the end the run stops."""
    load, line = workload([(400, 400)], [10.0]), Link(1e5, 0.0)
    hasty = OwnerConfig(request_timeout_s=0.3, timeout_s_max=10.0)
    result = simulate(config(load, access=line, protocol=hasty, streams=False))
    assert result.resent > 0
    assert result.steps[0].bytes_up > frames(load)[0]
    hopeless = OwnerConfig(request_timeout_s=0.01, timeout_s_max=0.01, attempts_max=2)
    with pytest.raises(WorldError, match=r"owner0: .*no answer"):
        simulate(config(load, access=line, protocol=hopeless, streams=False))


@given(st.integers(0, 1 << 40), st.integers(1, 64))
def test_phantoms_have_the_size_they_stand_for(size: int, tokens: int) -> None:
    """A phantom in a frame is counted as the payload it stands for, other frames as they are."""
    body = bytes(16) + phantom(size, tokens)
    assert wire_bytes(bytes(5) + b"\x03" + bytes(HEADER_BYTES - 6) + body) == UP + size
    assert wire_bytes(bytes(5) + b"\x01" + bytes(HEADER_BYTES - 6) + body) == (
        HEADER_BYTES + len(body)
    )


@given(st.integers(1, (1 << 64) - 1))
def test_frames_are_read_where_they_say_it(call: int) -> None:
    """Requests and answers name their call and where their payload begins; others do neither."""
    session = bytes(SESSION_BYTES)
    for message in (Multiply(session, call, 7, 9, b"xy"), Product(session, call, b"xy")):
        frame = encode(message)
        assert call_of(frame) == decode(frame).request == call
        assert frame[payload_at(frame) :] == b"xy"
    for other in (Refuse(session, call, Reason.BUSY), Bye(session), Farewell(session)):
        assert call_of(encode(other)) == 0
        assert payload_at(encode(other)) is None


@pytest.mark.parametrize("name", ["lanes", "owners", "workers", "steps"])
def test_a_world_has_at_least_one_of_each(name: str) -> None:
    """Settings are checked where they are made."""
    with pytest.raises(ValueError, match=f"{name} is at least 1"):
        config(workload([(2, 2)], [1.0]), **{name: 0})
    assert Step("owner0", 0, 1.0, 3.5).duration_s == 2.5


def test_a_line_may_carry_less_down_than_up() -> None:
    """Each direction is as slow as its own rate makes it."""
    load = workload([(400, 400)], [10.0])
    even = last_step_s(simulate(config(load, access=Link(1e6, 0.0))))
    slow = last_step_s(simulate(config(load, access=Link(1e6, 0.0), down_bps=5e5)))
    (step,) = simulate(config(load, access=Link(1e6, 0.0), steps=1)).steps
    assert slow - even == pytest.approx(8 * step.bytes_down / 1e6, rel=1e-6)


def test_cores_send_and_take_bytes_while_the_line_does() -> None:
    """A core slower than the line sets the pace; a faster one is not noticed."""
    load, line = workload([(400, 400)], [10.0]), Link(1e6, 0.0)
    (step,) = simulate(config(load, access=line, steps=1)).steps
    moved = step.bytes_up + step.bytes_down

    def with_wire(rate: float) -> float:
        owner = replace(OWNER, rates={**OWNER.rates, "wire": rate})
        return last_step_s(simulate(config(load, access=line, steps=1, owner=owner)))

    assert with_wire(1e9) == pytest.approx(step.duration_s, rel=1e-9)
    assert with_wire(1e5) - step.duration_s == pytest.approx(
        moved / 1e5 - 8 * moved / 1e6, rel=0.01
    )
