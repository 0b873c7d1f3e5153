"""The CUDA driver's launch call, by itself: what is left of a launch when all else is kept.

CuPy's own launch looks at every argument's type again, which is most of what it costs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

Launch = Callable[[int, int, Any], None]
"""Queues one kernel: grid x, grid y, void*[] to its arguments, which are copied at once."""


class Driver:
    """Launches on one device, on torch's current stream, from any thread.

    stream  handle of the current stream of a device's number; None: torch's
    """

    def __init__(self, device: torch.device, stream: Callable[[int], int] | None = None) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._library = library
        self._index = device.index or 0
        self._stream = stream or _stream_of_torch()
        self._launch = library.cuLaunchKernel
        self._launch.argtypes = (
            ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
        )  # fmt: skip
        self._enter, self._leave = library.cuCtxPushCurrent_v2, library.cuCtxPopCurrent_v2
        self._enter.argtypes = self._leave.argtypes = (ctypes.c_void_p,)
        number, self._context, left = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._require(library.cuDeviceGet(ctypes.byref(number), self._index))
        retain = library.cuDevicePrimaryCtxRetain
        self._require(retain(ctypes.byref(self._context), number))
        self._left = ctypes.byref(left)  # what is popped is known: nobody reads it

    def launcher(self, function: int, threads: int) -> Launch:
        """Launches `function`, a handle of the driver's, with so many threads a block."""
        enter, leave, launch = self._enter, self._leave, self._launch
        context, left, stream, index = self._context, self._left, self._stream, self._index

        def call(grid_x: int, grid_y: int, arguments: Any) -> None:
            # A thread that has not used the device yet has no context, or another device's.
            failed = enter(context)
            if not failed:
                failed = launch(
                    function, grid_x, grid_y, 1, threads, 1, 1, 0, stream(index), arguments, None
                )
                leave(left)
            self._require(failed)

        return call

    def _require(self, failed: int) -> None:
        if failed:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(failed, ctypes.byref(text))
            said = (text.value or b"unknown").decode()
            raise RuntimeError(f"the CUDA driver refused a launch: {said} (error {failed})")


def _stream_of_torch() -> Callable[[int], int]:
    # What torch's own compiled code uses; the public way makes an object each time.
    return torch._C._cuda_getCurrentRawStream
