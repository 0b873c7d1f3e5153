"""Real code as lanes of the simulated world: ordinary blocking torch code, one lane at a time.

A lane runs on a thread of its own, but only while it holds the baton; the simulated clock stands
still meanwhile. It gives the baton back where it meets a remote linear, and gets it again when
the world has an answer. So real training runs in simulated time, and the same seed gives the same
run: no two threads ever run at once.

`LanePool` takes the place of the trainer's thread pool. Waiting for a lane's result is what lets
simulated time pass.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import simpy

Float32Array: TypeAlias = NDArray[np.float32]
Outcome: TypeAlias = Float32Array | Exception
Ask: TypeAlias = Callable[[int, Float32Array, Callable[[Outcome], None]], None]
"""(matrix, float32[T, K], answer): asks the world for a product; it calls `answer` once."""


class _Killed(BaseException):
    """Unwinds a lane whose owner crashed. Not an Exception, so that no lane can catch it."""


class _Lane:
    """One submitted call, its thread, and the baton's two hand-overs."""

    def __init__(self, pool: LanePool, work: Callable[[], Any]) -> None:
        self.future: SimulatedFuture = SimulatedFuture(pool)
        self.wants: tuple[int, Float32Array] | None = None
        self.outcome: Outcome | None = None
        self.killed = False
        self.ended = False
        self._work = work
        # Plain locks as hand-overs, closed until the other side opens them: a Semaphore costs more.
        self._go = threading.Lock()
        self._back = threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self.thread = threading.Thread(target=self._run, args=(pool,), daemon=True)

    def take_baton(self) -> None:
        """Let the lane run until it blocks or ends. Called on the simulation's thread."""
        if not self.thread.is_alive():
            self.thread.start()
        else:
            self._go.release()
        self._back.acquire()

    def block(self, matrix: int, x: Float32Array) -> Float32Array:
        """Give the baton back and wait for a product. Called on the lane's thread."""
        self.wants = (matrix, x)
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise _Killed
        outcome, self.outcome = self.outcome, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def _run(self, pool: LanePool) -> None:
        pool.lane_of_thread.lane = self
        try:
            result = self._work()
        except _Killed:
            self.future.cancel()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
        self.ended = True
        self._back.release()


class SimulatedFuture(Future[Any]):
    """A lane's result; asking for it runs the simulation until it is there."""

    def __init__(self, pool: LanePool) -> None:
        super().__init__()
        self._pool = pool

    def result(self, timeout: float | None = None) -> Any:
        """The lane's result. Raises what the lane, or the simulated world, raised."""
        if not self.done():
            self._pool.run_until(self)
        return super().result(0)


class LanePool(Executor):
    """Runs at most `lanes` submitted calls at once, in simulated time.

    ask      hands a lane's linear to the world
    """

    def __init__(self, env: simpy.Environment, lanes: int, ask: Ask) -> None:
        self.lane_of_thread = threading.local()
        self._env = env
        self._lanes = lanes
        self._ask = ask
        self._waiting: deque[_Lane] = deque()
        self._running: list[_Lane] = []
        self._done: dict[int, simpy.Event] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> SimulatedFuture:
        """Queue a call; it starts in simulated time."""
        lane = _Lane(self, lambda: fn(*args, **kwargs))
        self._waiting.append(lane)
        self._start_more()
        return lane.future

    def linear(self, matrix: int, x: Float32Array) -> Float32Array:
        """float32[T, N] = x[T, K] times a matrix, from the world. For lanes of this pool only."""
        lane: _Lane = self.lane_of_thread.lane
        return lane.block(matrix, x)

    def run_until(self, future: SimulatedFuture) -> None:
        """Let simulated time pass until `future` is done."""
        event = self._done[id(future)] = self._env.event()
        self._env.run(until=event)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End every lane; one that still waits for a product is unwound."""
        self._waiting.clear()
        for lane in self._running:
            lane.killed = True
            # One that was submitted at this very moment has no thread yet.
            if lane.thread.is_alive():
                lane.take_baton()
                lane.thread.join()
        self._running.clear()

    def _start_more(self) -> None:
        while self._waiting and len(self._running) < self._lanes:
            lane = self._waiting.popleft()
            self._running.append(lane)
            self._soon(lambda lane=lane: self._advance(lane))  # type: ignore[misc]

    def _soon(self, action: Callable[[], None]) -> None:
        event = self._env.event()
        event.callbacks.append(lambda _: action())
        event.succeed()

    def _advance(self, lane: _Lane) -> None:
        if lane.killed or lane not in self._running:
            return
        lane.take_baton()
        if not lane.ended:
            assert lane.wants is not None
            matrix, x = lane.wants
            self._ask(matrix, x, lambda outcome: self._answer(lane, outcome))
            return
        lane.thread.join()
        self._running.remove(lane)
        self._start_more()
        done = self._done.pop(id(lane.future), None)
        if done is not None:
            done.succeed()

    def _answer(self, lane: _Lane, outcome: Outcome) -> None:
        lane.outcome = outcome
        self._soon(lambda: self._advance(lane))
