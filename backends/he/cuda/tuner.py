"""Chooses how to cut the worker's product, by measurement on the device at hand.

Triton's own autotuner is not used: it keeps its arguments on an object that all launches share,
and the worker launches from several threads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from backends.he.cuda.device import Gpu, GpuError
from backends.he.cuda.gemm import fused_product, library_product
from backends.he.cuda.tiling import SKIP_VARIABLE, Tiling, candidates, token_class

log = logging.getLogger(__name__)

_TUNED_FROM = 1 << 30  # multiply-adds of a limb: below, a launch costs more than a wrong tile
_LAUNCHES = 5
_HOLD_CYCLES = 1_000_000  # half a millisecond, longer than a launch takes
_PATIENCE_S = 20.0


class Tuner:
    """Remembers a tiling for each matrix shape and class of request sizes.

    A choice is made once, with a request of the class's size, whatever request came first. Small
    products, and emulated devices, take the first candidate unmeasured. Tilings named by the
    environment variable PRIVATE_LORA_SKIP_TILINGS (`tiling.py`) are none.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._skipped = os.environ.get(SKIP_VARIABLE, "")
        self._chosen: dict[tuple[int, int, int, int], Tiling] = {}
        self._lock = threading.Lock()

    @property
    def chosen(self) -> dict[tuple[int, int, int, int], Tiling]:
        """Measured choices so far, by (limbs, class of tokens, outputs, inputs)."""
        with self._lock:
            return dict(self._chosen)

    def tiling(self, limbs: int, tokens: int, weight: torch.Tensor, dropped_bits: int) -> Tiling:
        """The tiling for `tokens` tokens times weight int8[N, K].

        Raises GpuError when no candidate runs and gives the library's bits, and when one leaves
        the device unusable for this process.
        """
        outputs, inputs = weight.shape
        size = token_class(tokens)
        options = candidates(self._gpu.capability, size, self._skipped)
        if not options:
            raise GpuError(f"{SKIP_VARIABLE}={self._skipped} leaves no tiling to choose from")
        if weight.device.type != "cuda" or size * outputs * inputs < _TUNED_FROM:
            return options[0]
        key = (limbs, size, outputs, inputs)
        with self._lock:
            if key not in self._chosen:
                shape = (limbs, size, inputs)
                planes = torch.randint(-128, 128, shape, dtype=torch.int8, device=weight.device)
                self._chosen[key] = self._fastest(planes, weight, dropped_bits, options)
            return self._chosen[key]

    def _fastest(
        self,
        planes: torch.Tensor,
        weight: torch.Tensor,
        dropped_bits: int,
        options: tuple[Tiling, ...],
    ) -> Tiling:
        right = library_product(planes, weight, dropped_bits)
        timed: dict[Tiling, float] = {}
        for option in options:
            try:
                product = fused_product(planes, weight, dropped_bits, option)
                if self._gpu.device.type == "cuda":
                    end = _event()
                    end.record()
                    require_end(end, option, self._gpu.name)
                if torch.equal(product, right):
                    timed[option] = milliseconds(planes, weight, dropped_bits, option)
                else:
                    self._leave_out(option, "it differs from the library's product")
            except OutOfResources:
                continue
            except (GpuError, torch.OutOfMemoryError):
                raise
            except (TritonError, RuntimeError) as error:
                self._leave_out(option, f"{type(error).__name__}: {error}")
                self._require_sound(option, error)
        if not timed:
            raise GpuError(f"{self._gpu.name}: no kernel for this product runs on this device")
        return min(timed, key=lambda option: timed[option])

    def _leave_out(self, option: Tiling, why: str) -> None:
        log.error("%s: tiling %s is left out: %s", self._gpu.name, option.name, why)

    def _require_sound(self, option: Tiling, error: Exception) -> None:
        """Raise GpuError when the error left a fault behind that every later call would meet."""
        try:
            self._gpu.synchronize()
        except RuntimeError as fault:
            raise GpuError(
                f"{self._gpu.name}: tiling {option.name} failed ({error}), and this process "
                f"cannot go on; {_advice(option)}"
            ) from fault


def require_end(end: Any, tiling: Tiling, where: str) -> None:
    """Wait for an event; raise GpuError when it does not come, which is better than for ever."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not end.query():
        if time.monotonic() > deadline_s:
            raise GpuError(
                f"{where}: tiling {tiling.name} has not ended after {_PATIENCE_S:.0f} s, and this "
                f"process cannot go on; {_advice(tiling)}"
            )
        time.sleep(1e-4)


def _advice(tiling: Tiling) -> str:
    return (
        f"set {SKIP_VARIABLE}={tiling.name} to do without it, and please report it with the "
        "output of `nvidia-smi`"
    )


def milliseconds(
    planes: torch.Tensor, weight: torch.Tensor, dropped_bits: int, tiling: Tiling
) -> float:
    """Of the fastest of a few launches on the current stream, without what the host does."""
    best = float("inf")
    for _ in range(_LAUNCHES):
        begin, end = _event(), _event()
        torch.cuda._sleep(_HOLD_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        fused_product(planes, weight, dropped_bits, tiling)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
