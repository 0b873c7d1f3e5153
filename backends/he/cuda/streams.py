"""Small helpers around streams: results read back early, and host memory carried to the device.

On the emulated device everything happens at once and in order, so marks and streams are nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.threads import run_split


class Mark:
    """A point in a stream that others can wait for. Waiting for one never set is nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self._device = gpu.device
        self._event: Any = None
        if gpu.device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def set(self) -> None:
        """Here, in the current stream."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def hold_stream(self) -> None:
        """What is queued on the current stream from now on waits."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def hold_host(self) -> None:
        """This thread waits."""
        if self._event is not None:
            self._event.synchronize()


class Flag:
    """An int32[1] that a kernel sets, read as soon as it is known, whatever is queued behind."""

    def __init__(self, gpu: Gpu, pool: Flags) -> None:
        self.cell = torch.zeros(1, dtype=torch.int32, device=gpu.device)
        self._host = gpu.pinned(4).view(torch.int32)
        self._fetched = Mark(gpu)
        self._pool = pool

    def fetch(self) -> None:
        """Queue the copy to the host, after the kernel and before what need not be waited for."""
        self._host.copy_(self.cell, non_blocking=True)
        self._fetched.set()

    def read(self) -> bool:
        """Wait for the copy. Once: the flag is then the next taker's."""
        self._fetched.hold_host()
        found = bool(self._host.item())
        self._pool.give_back(self, found)
        return found


class Flags:
    """Flags with their events and page-locked memory, used again and again.

    One read as not set is as good as new: its kernel has ended and its cell is still zero. One
    that was set is let go. One that is never read stays, as its kernel may still be at work.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._all: set[Flag] = set()
        self._free: list[Flag] = []

    def take(self) -> Flag:
        """A flag that is not set; safe from several threads."""
        try:
            return self._free.pop()
        except IndexError:
            flag = Flag(self._gpu, self)
            self._all.add(flag)
            return flag

    def give_back(self, flag: Flag, found: bool) -> None:
        """The device is done with it; `found` set or not."""
        if found:
            self._all.discard(flag)
        else:
            self._free.append(flag)


class Readback:
    """A tensor of the device on its way to the host, behind what is queued now."""

    def __init__(self, gpu: Gpu, values: torch.Tensor) -> None:
        self._values = values
        self._host = gpu.pinned(values.nbytes).view(values.dtype).view(values.shape)
        self._arrived = Mark(gpu)  # nothing can fail once there is a copy
        self._host.copy_(values, non_blocking=True)
        self._arrived.set()

    def read(self) -> NDArray[Any]:
        """Wait for the copy."""
        self._arrived.hold_host()
        return self._host.numpy()

    def wipe(self) -> None:
        """Overwrite what arrived, and queue the overwriting of what was sent."""
        self._arrived.hold_host()
        self._host.zero_()
        self._values.zero_()


class Conveyor:
    """Carries host arrays to the device through two page-locked buffers, one slab at a time.

    While the device works on one slab the next is copied, on a stream of its own.
    """

    def __init__(self, gpu: Gpu, slab_bytes: int) -> None:
        self._device = gpu.device
        self._host = [gpu.pinned(slab_bytes) for _ in range(2)]
        self._slabs = [
            torch.empty(slab_bytes, dtype=torch.uint8, device=gpu.device) for _ in range(2)
        ]
        self._arrived, self._used = [Mark(gpu), Mark(gpu)], [Mark(gpu), Mark(gpu)]
        for mark in self._used:
            mark.set()  # The slabs' memory may have had another user, still at work.
        self._stream: Any = None
        if gpu.device.type == "cuda":
            self._stream = torch.cuda.Stream(gpu.device)  # type: ignore[no-untyped-call]
        self._busy = threading.Lock()

    def carry(self, parts: Iterable[NDArray[Any]]) -> Iterator[torch.Tensor]:
        """Each part as a uint8 tensor on the device, good until the next but one is asked for.

        parts  contiguous arrays of at most `slab_bytes`
        """
        with self._busy:
            for turn, part in enumerate(parts):
                side = turn % 2
                raw = part.reshape(-1).view(np.uint8)
                host, slab = self._host[side][: raw.size], self._slabs[side][: raw.size]
                self._arrived[side].hold_host()
                _copy(raw, host.numpy())
                with self._on_copy_stream():
                    self._used[side].hold_stream()
                    slab.copy_(host, non_blocking=True)
                    self._arrived[side].set()
                self._arrived[side].hold_stream()
                try:
                    yield slab
                finally:
                    self._used[side].set()

    def _on_copy_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _copy(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """One core cannot fill a fast bus; several come closer."""

    def part(first: int, last: int) -> None:
        target[first:last] = source[first:last]

    run_split(part, source.size, grain=1 << 20)
