"""The Hopper kernel's ring of buffers, run line by line on a model of the machine.

Gluon has no interpreter, so the kernel's own Python body is run here with numpy in the place of
its language. Copies land and products are read as early or as late as the hardware may, by a
seeded choice: a buffer refilled too soon, a wait for the wrong phase, or a tile out of place
changes the result or is refused. Warps are not modelled, one thread stands for all.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he.cuda import hopper
from backends.he.wire import EXACT, Format
from tests.he import plain_wire

UNWRITTEN = 1 << 20


class Tensor(np.ndarray[Any, Any]):
    """An array with the one method the kernel calls."""

    def to(self, dtype: Any) -> Tensor:
        """The same values in another type."""
        return self.astype(dtype)


class Machine:
    """Shared memory, barriers, the copy engine and the tensor cores of one multiprocessor."""

    def __init__(self, seed: int, program: int, programs: int, out: NDArray[np.int64]) -> None:
        self.chance = random.Random(seed)
        self.under_way: list[Any] = []
        self.out = out.reshape(-1)
        self.gl = SimpleNamespace(
            int8=np.int8, int16=np.int16, int32=np.int32, int64=np.int64,
            cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, static_range=range,
            program_id=lambda axis: program, num_programs=lambda axis: programs,
            NVMMADistributedLayout=lambda *a: None, BlockedLayout=lambda *a: None,
            SliceLayout=lambda *a: None, convert_layout=lambda values, layout: values,
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor),
            arange=lambda first, last, layout: np.arange(first, last).view(Tensor),
            allocate_shared_memory=lambda dtype, shape, layout: Ring(dtype, shape),
            store=self.store,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=self.init, expect=self.expect, wait=self.wait
        )
        self.tma = SimpleNamespace(async_copy_global_to_shared=self.copy)

    def store(self, target: Tensor, values: Tensor, mask: NDArray[np.bool_]) -> None:
        """Write results; every value exactly once."""
        places = np.asarray(target)[mask]
        assert (self.out[places] == UNWRITTEN).all()
        self.out[places] = np.asarray(values)[mask]

    def init(self, barrier: SimpleNamespace, count: int) -> None:
        """A barrier in phase 0."""
        barrier.completed, barrier.bytes_left, barrier.copies = 0, 0, []

    def expect(self, barrier: SimpleNamespace, size: int, pred: bool) -> None:
        """Open the next phase; the last one must be over."""
        if pred:
            assert not barrier.copies
            assert barrier.bytes_left == 0
            barrier.bytes_left = size

    def copy(
        self, source: SimpleNamespace, at: list[int], barrier: Any, buffer: Any, pred: bool
    ) -> None:
        """Start a copy, of zeros past the source's end; it may land at once or when waited for."""
        if not pred:
            return
        barrier.copies.append((source.data, at, buffer))
        if self.chance.random() < 0.5:
            self.land(barrier)

    def land(self, barrier: SimpleNamespace) -> None:
        """Finish a barrier's copies, and its phase when that was all of it."""
        for data, (row, column), buffer in barrier.copies:
            piece = data[row : row + len(buffer), column : column + buffer.shape[1]]
            buffer[:] = 0
            buffer[: piece.shape[0], : piece.shape[1]] = piece
            barrier.bytes_left -= buffer.size
            barrier.completed += barrier.bytes_left == 0
        barrier.copies.clear()

    def wait(self, barrier: SimpleNamespace, phase: int) -> None:
        """Wait for the phase of this parity; a real machine would hang where this refuses."""
        self.land(barrier)
        assert barrier.completed
        assert (barrier.completed - 1) & 1 == phase

    def product(self, a: Any, b: Any, acc: Tensor, is_async: bool) -> Tensor:
        """Start a product; its operands may be read now or as late as when it is waited for."""
        assert is_async
        if self.chance.random() < 0.5:
            a, b = a.copy(), b.copy()
        self.under_way.append((a, b, acc))
        return acc

    def finish(self, outstanding: int, deps: list[Tensor]) -> list[Tensor]:
        """Finish all products but the latest `outstanding`."""
        while len(self.under_way) > outstanding:
            a, b, acc = self.under_way.pop(0)
            acc += a.astype(np.int32) @ b.astype(np.int32)
        return deps


class Buffer(np.ndarray[Any, Any]):
    """A tile in shared memory."""

    def permute(self, order: tuple[int, int]) -> Buffer:
        """The same bytes, seen the other way round."""
        return self.transpose(order)


class Ring:
    """Shared memory of several tiles, or of several barriers; nothing is there to begin with."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        barriers = dtype is np.int64
        self.tiles: Any = (
            [SimpleNamespace() for _ in range(shape[0])]
            if barriers
            else np.full(shape, 77, dtype).view(Buffer)
        )

    def index(self, index: int) -> Any:
        """One of them."""
        return self.tiles[index]


def run(
    request: NDArray[np.int8], weight: NDArray[np.int8], format: Format,
    stages: int, programs: int, group: int, seed: int,
) -> NDArray[np.int16]:  # fmt: skip
    """The kernel's answer for request int8[limbs, T, K] and weight int8[N, K], in tiny tiles."""
    limbs, tokens, inputs = request.shape
    out = np.full((tokens, len(weight)), UNWRITTEN)
    planes = SimpleNamespace(data=request.reshape(-1, inputs), layout=None)
    for program in range(programs):
        machine = Machine(seed + program, program, programs, out)
        changes = {
            "gl": machine.gl, "mbarrier": machine.mbarrier, "tma": machine.tma,
            "warpgroup_mma": machine.product, "warpgroup_mma_wait": machine.finish,
            "fence_async_shared": lambda: None,
            "_origin": hopper._origin.fn, "_fetch": hopper._fetch.fn,
        }  # fmt: skip
        with patch.multiple(hopper, **changes):
            hopper.async_kernel.fn(
                planes, SimpleNamespace(data=weight, layout=None), 0, tokens, len(weight), inputs,
                LIMBS=limbs, SHIFT=format.dropped_bits, BM=64, BN=16, BK=32, GROUP=group,
                STAGES=stages, num_warps=4,
            )  # fmt: skip
        assert not machine.under_way
    assert (out != UNWRITTEN).all()
    return out.astype(np.int16)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from([EXACT, Format(16, 8)]),
    tokens=st.integers(1, 200),
    inputs=st.integers(1, 14).map(lambda n: 16 * n),
    outputs=st.integers(1, 50),
    stages=st.integers(2, 5),
    programs=st.integers(1, 5),
    group=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_schedule_is_right_however_early_or_late(
    format: Format, tokens: int, inputs: int, outputs: int,
    stages: int, programs: int, group: int, seed: int,
) -> None:  # fmt: skip
    """Every output once, and the definition's bits, for ragged shapes and any timing."""
    rng = np.random.default_rng(seed)
    request = rng.integers(-128, 128, (format.limbs, tokens, inputs)).astype(np.int8)
    weight = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    right = plain_wire.answer(request.tobytes(), tokens, weight, format.up_bits, format.down_bits)
    out = run(request, weight, format, stages, programs, group, seed)
    assert out.astype(np.uint8 if format.down_bits == 8 else np.int16).tobytes() == right


def test_the_model_would_notice_an_early_refill() -> None:
    """Fetching before the wait for the last step's products overwrites what they still read."""
    rng = np.random.default_rng(0)
    request = rng.integers(-128, 128, (3, 64, 320)).astype(np.int8)
    weight = rng.integers(-127, 128, (16, 320)).astype(np.int8)
    right = plain_wire.answer(request.tobytes(), 64, weight, 24, 16)
    assert run(request, weight, EXACT, 3, 1, 8, 0).tobytes() == right
    lazy = Machine.finish

    def waits_for_less(machine: Machine, outstanding: int, deps: list[Tensor]) -> list[Tensor]:
        return lazy(machine, 2 * outstanding, deps)

    with patch.object(Machine, "finish", waits_for_less):
        assert run(request, weight, EXACT, 3, 1, 8, 0).tobytes() != right
