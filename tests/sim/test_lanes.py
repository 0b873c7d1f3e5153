"""Lanes: real blocking code in simulated time, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import simpy
import torch
from numpy.typing import NDArray

from sim.lanes import LanePool, Outcome

Values = NDArray[np.float32]


class Doubler:
    """A world that answers 2x after `matrix` seconds, and notes who asked when."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.asked: list[tuple[float, int]] = []

    def __call__(self, matrix: int, x: Values, answer: Callable[[Outcome], None]) -> None:
        self.asked.append((float(self.env.now), matrix))
        event = self.env.timeout(matrix)
        event.callbacks.append(lambda _: answer(2 * x))


def test_results_come_and_simulated_time_passes() -> None:
    """Two lanes overlap: three products of 5 s each on two lanes end at 10 s."""
    env = simpy.Environment()
    world = Doubler(env)
    with LanePool(env, 2, world) as pool:
        futures = [pool.submit(lambda: pool.linear(5, np.ones((1, 2), np.float32)))] * 1
        futures += [pool.submit(lambda: pool.linear(5, np.ones((1, 2), np.float32)))]
        futures += [pool.submit(lambda: pool.linear(5, np.ones((1, 2), np.float32)))]
        for future in futures:
            assert (future.result() == 2).all()
    assert env.now == 10
    assert [at for at, _ in world.asked] == [0, 0, 5]


def test_never_two_lanes_at_once() -> None:
    """Between two products a lane has the process to itself."""
    env = simpy.Environment()
    world = Doubler(env)
    running: list[int] = []

    def work(name: int) -> int:
        for _ in range(20):
            running.append(name)
            total = sum(range(2000))
            assert running.pop() == name
            assert not running
            pool.linear(1, np.full((1, 1), total, np.float32))
        return name

    with LanePool(env, 3, world) as pool:
        futures = [pool.submit(work, name) for name in range(6)]
        assert [future.result() for future in futures] == list(range(6))


def test_autograd_blocks_inside_backward() -> None:
    """A product asked for in backward is awaited there."""
    env = simpy.Environment()

    class Remote(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(pool.linear(1, x.detach().numpy()))

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(pool.linear(3, dy.numpy()))

    def work() -> torch.Tensor:
        x = torch.ones(1, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(Remote.apply(x).sum(), x)  # type: ignore[no-untyped-call]
        return gradient

    with LanePool(env, 1, Doubler(env)) as pool:
        assert pool.submit(work).result().tolist() == [[2.0, 2.0]]
    assert env.now == 4


def test_what_a_lane_or_the_world_raises_comes_out_of_the_result() -> None:
    """An error of the lane, an answer that is an error, and a crash of the world itself."""
    env = simpy.Environment()

    def failing(matrix: int, x: Values, answer: Callable[[Outcome], None]) -> None:
        if matrix == 0:
            answer(RuntimeError("no product"))
            return
        event = env.timeout(1.0)
        event.callbacks.append(lambda _: (_ for _ in ()).throw(KeyError("crash")))

    x = np.ones((1, 1), np.float32)
    pool = LanePool(env, 1, failing)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result()
    with pytest.raises(RuntimeError, match="no product"):
        pool.submit(lambda: pool.linear(0, x)).result()
    with pytest.raises(KeyError, match="crash"):
        pool.submit(lambda: pool.linear(1, x)).result()
    pool.shutdown()


def test_shutdown_unwinds_blocked_lanes_and_forgets_waiting_ones() -> None:
    """A lane's `finally` runs; no thread is left; a late answer disturbs nobody."""
    env = simpy.Environment()
    cleaned: list[str] = []
    answers: list[Callable[[Outcome], None]] = []

    def work(name: str) -> None:
        try:
            pool.linear(0, np.ones((1, 1), np.float32))
        except Exception:
            cleaned.append("caught as an ordinary error")
        finally:
            cleaned.append(name)

    before = threading.active_count()
    pool = LanePool(env, 2, lambda matrix, x, answer: answers.append(answer))
    for name in ("a", "b", "c"):
        pool.submit(work, name)
    env.run(until=1.0)
    assert len(answers) == 2
    pool.shutdown()
    assert cleaned == ["a", "b"]
    assert threading.active_count() == before
    answers[0](np.ones((1, 1), np.float32))
    env.run(until=2.0)
    assert cleaned == ["a", "b"]


def test_shutdown_before_a_lane_has_started() -> None:
    """Submitted and ended at the same moment: there is no thread yet to wait for."""
    env = simpy.Environment()
    pool = LanePool(env, 1, Doubler(env))
    ran: list[int] = []
    pool.submit(lambda: ran.append(1))
    pool.shutdown()
    env.run(until=1.0)
    assert not ran
