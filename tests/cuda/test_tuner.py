"""The choice of a tiling: the fastest of those that run and are right, once a shape."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from triton.runtime.errors import OutOfResources

from backends.he.cuda import tuner
from backends.he.cuda.device import Gpu, GpuError, emulated
from backends.he.cuda.gemm import library_product
from backends.he.cuda.tiling import (
    AMPERE_LARGE,
    AMPERE_SMALL,
    HOPPER_LARGE,
    HOPPER_SMALL,
    SKIP_VARIABLE,
    Tiling,
    candidates,
    token_class,
)
from backends.he.cuda.tuner import Tuner

PLANES = torch.arange(-60, 60, dtype=torch.int8).reshape(3, 5, 8)
WEIGHT = torch.arange(32, dtype=torch.int8).reshape(4, 8)


def test_classes_of_requests() -> None:
    """A class is named by its largest request; the last has no end."""
    assert [token_class(n) for n in (1, 64, 65, 512, 4096, 99999)] == [64, 64, 512, 512, 4096, 4096]


def test_candidates_by_gpu() -> None:
    """Only Hopper is offered what only Hopper can run."""
    assert candidates((9, 0), 64) == HOPPER_SMALL
    assert candidates((9, 0), 4096) == HOPPER_LARGE
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert candidates(other, 64) == AMPERE_SMALL
        assert candidates(other, 4096) == AMPERE_LARGE


def choose(
    monkeypatch: pytest.MonkeyPatch,
    times: dict[Tiling, float],
    wrong: set[Tiling],
    big: set[Tiling],
    failing: set[Tiling] = frozenset(),  # type: ignore[assignment]
) -> Tiling:
    """The tuner's choice where tilings take `times`, and some are wrong, do not fit or fail."""

    def product(
        planes: torch.Tensor, weight: torch.Tensor, bits: int, tiling: Tiling
    ) -> torch.Tensor:
        if tiling in big:
            raise OutOfResources(300000, 232448, "shared memory")
        if tiling in failing:
            raise RuntimeError("unspecified launch failure")
        return library_product(planes, weight, bits) + (tiling in wrong)

    monkeypatch.setattr(tuner, "fused_product", product)
    monkeypatch.setattr(tuner, "milliseconds", lambda p, w, bits, tiling: times[tiling])
    return Tuner(emulated())._fastest(PLANES, WEIGHT, 8, HOPPER_LARGE)


def test_the_fastest_that_fits_and_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong one is never chosen however fast, and is reported."""
    wrong, big, fast = HOPPER_LARGE[1], HOPPER_LARGE[2], HOPPER_LARGE[4]
    times = dict.fromkeys(HOPPER_LARGE, 9.0) | {wrong: 1.0, big: 2.0, fast: 3.0}
    with caplog.at_level(logging.ERROR):
        assert choose(monkeypatch, times, {wrong}, {big}) == fast
    assert [record.args[1] for record in caplog.records if record.args] == [wrong.name]


def test_a_failing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And named, with its error; the others are tried."""
    failing, fast = HOPPER_LARGE[3], HOPPER_LARGE[4]
    times = dict.fromkeys(HOPPER_LARGE, 9.0) | {failing: 1.0, fast: 3.0}
    assert choose(monkeypatch, times, set(), set(), {failing}) == fast
    (record,) = caplog.records
    assert failing.name in record.message
    assert "unspecified launch failure" in record.message


def test_a_fault_that_stays_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable that leaves the tiling out next time; full memory is no tiling's fault."""

    def poisoned(gpu: Gpu) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Gpu, "synchronize", poisoned)
    bad = HOPPER_LARGE[3]
    times = dict.fromkeys(HOPPER_LARGE, 9.0)
    with pytest.raises(GpuError, match=f"{SKIP_VARIABLE}={bad.name} "):
        choose(monkeypatch, times, set(), set(), {bad})

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuner, "fused_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        Tuner(emulated())._fastest(PLANES, WEIGHT, 8, HOPPER_LARGE)


def test_tilings_are_left_out_by_name_kind_or_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name is another's; a tuner left with none says whose doing it is."""
    everything = HOPPER_LARGE + HOPPER_SMALL + AMPERE_LARGE + AMPERE_SMALL
    assert len({tiling.name for tiling in everything}) == len(everything)
    assert candidates((9, 0), 4096, "async") == HOPPER_LARGE[:3]
    assert candidates((9, 0), 4096, "bulk-*, async-64x256x64-7") == (
        HOPPER_LARGE[3], *HOPPER_LARGE[5:],
    )  # fmt: skip
    assert candidates((9, 0), 4096, "async-64x256") == HOPPER_LARGE
    monkeypatch.setenv(SKIP_VARIABLE, "pointers")
    with pytest.raises(GpuError, match="leaves no tiling"):
        Tuner(emulated()).tiling(3, 5, WEIGHT, 8)


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the device is refused."""
    with pytest.raises(GpuError, match="no kernel"):
        choose(monkeypatch, dict.fromkeys(HOPPER_LARGE, 1.0), set(), set(HOPPER_LARGE))


def test_small_products_are_not_measured(gpu: Gpu) -> None:
    """A request too small to matter takes the first tiling, and so does an emulated device."""
    chooser = Tuner(gpu)
    weight = torch.zeros((64, 64), dtype=torch.int8, device=gpu.device)
    assert chooser.tiling(3, 5, weight, 8) == candidates(gpu.capability, 64)[0]
    assert chooser.tiling(3, 9999, weight, 8) == candidates(gpu.capability, 4096)[0]
    assert chooser.chosen == {}


def test_a_choice_is_measured_once(gpu: Gpu) -> None:
    """On a GPU: one measurement for a shape and a class, whatever the requests in it."""
    if gpu.device.type != "cuda":
        pytest.skip("needs a GPU")
    chooser = Tuner(gpu)
    weight = torch.randint(-127, 128, (2048, 2048), dtype=torch.int8, device=gpu.device)
    first = chooser.tiling(3, 700, weight, 8)
    assert first in candidates(gpu.capability, 4096)
    assert chooser.tiling(3, 4000, weight, 8) == first
    assert list(chooser.chosen) == [(3, 4096, 2048, 2048)]


def test_a_kernel_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named; one that ends after a while is fine."""

    class Event:
        def __init__(self, glances: int) -> None:
            self.glances = glances

        def query(self) -> bool:
            self.glances -= 1
            return self.glances < 0

    slow, stuck = HOPPER_LARGE[:2]
    tuner.require_end(Event(3), slow, "a GPU")
    monkeypatch.setattr(tuner, "_PATIENCE_S", 0.01)
    with pytest.raises(GpuError, match=f"{stuck.name} has not ended.*{SKIP_VARIABLE}={stuck.name}"):
        tuner.require_end(Event(10**9), stuck, "a GPU")
