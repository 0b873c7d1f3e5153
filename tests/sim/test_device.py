"""Device profiles, processor sharing and queues, against slow readable references."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim.device import (
    NO_WORK,
    PROFILES,
    Device,
    DeviceProfile,
    Origin,
    Processor,
    ProfileError,
    Work,
    builtin_names,
)

ORIGIN = Origin("datasheet", "a test", "2026-01-01", assumed=("everything",))
PROFILE = DeviceProfile(
    "toy", ORIGIN, cores=2.0, rates={"float": 100.0, "int8": 1000.0}, bytes_per_s=50.0,
    overhead_s={"local": 0.25, "multiply": 0.0}, width={"local": 1.0},
)  # fmt: skip


def shared(jobs: list[tuple[float, float, float]], cores: float) -> list[float]:
    """When each (start, seconds, demand) ends: from one change of the running set to the next."""
    left = [seconds for _, seconds, _ in jobs]
    ends = [float("inf")] * len(jobs)
    now = 0.0
    while any(end == float("inf") for end in ends):
        running = [i for i, job in enumerate(jobs) if job[0] <= now and ends[i] == float("inf")]
        demand = sum(jobs[i][2] for i in running)
        pace = min(1.0, cores / demand) if demand else 1.0
        coming = [start - now for start, _, _ in jobs if start > now]
        step = min([left[i] / pace for i in running] + coming)
        now += step
        for i in running:
            left[i] -= step * pace
            if left[i] <= 1e-9:
                ends[i] = now
    return ends


JOBS = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda i: i / 8),
        st.integers(0, 40).map(lambda i: i / 8),
        st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(JOBS, st.sampled_from([2.0, 2.5, 8.0]))
def test_sharing_agrees_with_the_slow_reference(
    jobs: list[tuple[float, float, float]], cores: float
) -> None:
    env = simpy.Environment()
    processor = Processor(env, cores)
    ends = [-1.0] * len(jobs)

    def start(index: int) -> None:
        _, seconds, demand = jobs[index]

        def done() -> None:
            assert ends[index] == -1.0
            ends[index] = env.now

        processor.run(seconds, demand, done)
        assert ends[index] == -1.0, "done is never called before run returns"

    for index, (begin, _, _) in enumerate(jobs):
        event = env.timeout(begin)
        event.callbacks.append(lambda _, index=index: start(index))
    env.run()
    assert ends == pytest.approx(shared(jobs, cores), abs=1e-6)
    assert processor.running == 0


@given(JOBS)
def test_no_core_is_idle_while_work_waits(jobs: list[tuple[float, float, float]]) -> None:
    """Tasks that want all cores, all there from the start, end with their work's sum."""
    env = simpy.Environment()
    processor = Processor(env, 2.0)
    for _, seconds, _ in jobs:
        processor.run(seconds, 2.0, lambda: None)
    env.run()
    assert env.now == pytest.approx(sum(seconds for _, seconds, _ in jobs))


def test_a_task_may_start_the_next_from_its_end() -> None:
    env = simpy.Environment()
    processor = Processor(env, 1.0)
    times: list[float] = []

    def again() -> None:
        times.append(env.now)
        if len(times) < 4:
            processor.run(0.5 if len(times) % 2 else 0.0, 1.0, again)

    processor.run(1.0, 1.0, again)
    env.run()
    assert times == [1.0, 1.5, 1.5, 2.0]


@pytest.mark.parametrize(("seconds", "demand"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 3.0)])
def test_impossible_tasks_are_refused(seconds: float, demand: float) -> None:
    with pytest.raises(ValueError, match="a task takes"):
        Processor(simpy.Environment(), 2.0).run(seconds, demand, lambda: None)


def queued(jobs: list[tuple[float, float, float]], servers: int) -> list[tuple[float, float]]:
    """(start, end) first come, first served, when servers do not share anything."""
    free = [0.0] * servers
    times = []
    for arrival, seconds, _ in jobs:
        free.sort()
        begin = max(arrival, free[0])
        free[0] = begin + seconds
        times.append((begin, free[0]))
    return times


@given(JOBS, st.integers(1, 3))
def test_a_queue_is_first_come_first_served(
    jobs: list[tuple[float, float, float]], servers: int
) -> None:
    jobs = sorted(jobs, key=lambda job: job[0])
    env = simpy.Environment()
    profile = DeviceProfile(
        "wide", ORIGIN, 64.0, {"float": 1.0}, 1.0, {"local": 0.0}, {"local": 1.0}
    )
    device = Device(env, "d", profile, servers=servers)
    found: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(jobs)

    def submit(index: int) -> None:
        def done(queued_at: float, started_at: float, ended_at: float) -> None:
            assert ended_at == env.now
            found[index] = (queued_at, started_at, ended_at)

        device.submit("local", Work({"float": jobs[index][1]}), done)

    for index, (begin, _, _) in enumerate(jobs):
        env.timeout(begin).callbacks.append(lambda _, index=index: submit(index))
    env.run()
    for (arrival, _, _), times, expected in zip(jobs, found, queued(jobs, servers), strict=True):
        assert times == pytest.approx((arrival, *expected), abs=1e-9)
    assert device.busy_s == pytest.approx(sum(seconds for _, seconds, _ in jobs))
    assert device.queued == 0


def test_two_devices_on_one_processor_slow_each_other() -> None:
    env = simpy.Environment()
    processor = Processor(env, 2.0)
    ends: dict[str, float] = {}
    for name in ("owner", "worker"):
        device = Device(env, name, PROFILE, processor)
        device.submit(
            "multiply", Work({"int8": 1000.0}), lambda q, s, e, name=name: ends.update({name: e})
        )
    env.run()
    assert ends == {"owner": 2.0, "worker": 2.0}


def test_a_slow_device_takes_longer_from_its_next_task_on() -> None:
    env = simpy.Environment()
    device = Device(env, "d", PROFILE)
    ends: list[float] = []
    for _ in range(2):
        device.submit("multiply", Work({"int8": 1000.0}), lambda q, s, e: ends.append(e))
    device.speed = 0.5
    assert device.busy_s == 0.0
    env.run(until=0.5)
    assert device.busy_s == 0.5
    env.run()
    assert ends == [1.0, 3.0]


def test_the_cost_is_a_roofline_and_an_overhead() -> None:
    compute = Work({"float": 200.0, "int8": 1000.0}, bytes_moved=50.0)
    assert PROFILE.seconds(compute, "multiply") == 3.0
    memory = Work({"float": 200.0}, bytes_moved=500.0, launches=4)
    assert PROFILE.seconds(memory, "local") == 11.0
    # Ten seconds on the task's one core, one of overhead on one core.
    assert PROFILE.cost(memory, "local") == (11.0, 1.0)
    # Three seconds on all cores, no overhead.
    assert PROFILE.cost(compute, "multiply") == (3.0, 2.0)
    # Half of the time on one core, half of it, the overhead, on both.
    crowded = replace(PROFILE, width={"local": 1.0, "overhead": 2.0})
    assert crowded.cost(Work({"float": 25.0}), "local") == (0.5, 1.5)


def test_a_profile_says_what_it_lacks() -> None:
    with pytest.raises(ProfileError, match=r"'toy' has no rate for 'ring_row'"):
        PROFILE.seconds(Work({"ring_row": 1.0}), "local")
    with pytest.raises(ProfileError, match=r"'toy' has no overhead .* 'encrypt'"):
        PROFILE.seconds(Work({"float": 1.0}), "encrypt")


COUNTS = st.floats(0, 1e12)
WORKS = st.builds(Work, st.dictionaries(st.sampled_from(["float", "int8"]), COUNTS), COUNTS, COUNTS)


@given(WORKS, WORKS)
def test_work_adds_up(a: Work, b: Work) -> None:
    total = a + b
    for kind in ("float", "int8"):
        expected = a.operations.get(kind, 0.0) + b.operations.get(kind, 0.0)
        assert total.operations.get(kind, 0.0) == expected
    assert (total.bytes_moved, total.launches) == (
        a.bytes_moved + b.bytes_moved,
        a.launches + b.launches,
    )
    assert a + NO_WORK == a
    assert 2 * a == a * 2 == a + a


@pytest.mark.parametrize(
    "wrong", [{"operations": {"float": -1.0}}, {"bytes_moved": float("inf")}, {"launches": -1.0}]
)
def test_impossible_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        Work(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cores": 0.0},
        {"rates": {"float": 0.0}},
        {"bytes_per_s": -1.0},
        {"overhead_s": {"local": -1.0}},
        {"width": {"local": 3.0}},
    ],
)
def test_impossible_profiles_are_refused(wrong: dict[str, object]) -> None:
    facts: dict[str, object] = {
        "name": "bad", "origin": ORIGIN, "cores": 2.0, "rates": {"float": 1.0},
        "bytes_per_s": 1.0, "overhead_s": {"local": 0.0},
    }  # fmt: skip
    with pytest.raises(ProfileError, match="'bad'"):
        DeviceProfile(**(facts | wrong))  # type: ignore[arg-type]


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "toy.json")
    assert DeviceProfile.load(tmp_path / "toy.json") == PROFILE


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    for text in ("", "{}", '{"origin": {"kind": "dreamt", "where": "", "when": ""}}'):
        path.write_text(text)
        with pytest.raises(ProfileError, match=r"bad\.json"):
            DeviceProfile.load(path)
    with pytest.raises(ProfileError, match=r"none\.json"):
        DeviceProfile.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", builtin_names())
def test_profiles_that_come_along(name: str) -> None:
    """Each covers every task, and none of a data sheet claims to be measured."""
    profile = DeviceProfile.builtin(name)
    assert profile.name == name
    operations = {"int8": 1e6, "float": 1e6, "ring_row": 1e3, "value": 1e3}
    for task in ("local", "encrypt", "multiply", "decrypt", "update"):
        assert profile.seconds(Work(operations, 1e6), task) > 0
    if profile.origin.kind == "datasheet":
        assert profile.origin.assumed
        assert not profile.origin.commit
    else:
        assert profile.origin.commit


def test_an_unknown_profile_names_the_choices() -> None:
    assert {"a100", "cpu-2core", "h100", "h200", "l4", "rtx4090"} <= set(builtin_names())
    with pytest.raises(ProfileError, match="a100, cpu-2core, h100, h200"):
        DeviceProfile.builtin("tpu")


def test_profile_files_are_plain_json() -> None:
    """A person can read them: rates by name, units in the keys."""
    for path in PROFILES.glob("*.json"):
        assert {"rates", "bytes_per_s", "overhead_s", "origin"} <= set(json.loads(path.read_text()))


def test_products_of_two_limbs_have_a_rate_of_their_own() -> None:
    """Where the profile has one; else they are as fast as those of three."""
    pair = Work({"int8_pair": 1000.0}, launches=0.0)
    assert PROFILE.seconds(pair, "multiply") == PROFILE.seconds(
        Work({"int8": 1000.0}, launches=0.0), "multiply"
    )
    faster = replace(PROFILE, rates={**PROFILE.rates, "int8_pair": 2000.0})
    assert faster.seconds(pair, "multiply") == pytest.approx(PROFILE.seconds(pair, "multiply") / 2)
