"""What a machine is, measured and fitted: see `sim.calibrate`."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig

from backends.files import write_json
from backends.he.matmul import isa
from backends.he.matmul.choice import chosen_kernel
from backends.he.params import Parameters, preset
from backends.machine import busy_elsewhere_s, commit, machine
from backends.threads import core_count
from protocol.catalogue import MatrixShape
from sim.device import DeviceProfile, Origin, Work
from sim.fitting import Case, Crowd, fit, fit_widths
from sim.rehearsal import PassTimes, Rehearsal, rehearsal
from sim.wire import wire_rate
from sim.workload import (
    Local,
    Workload,
    decrypt_work,
    encrypt_work,
    multiply_work,
    trace_step,
)

T = TypeVar("T")

TOKENS = (64, 256)
LANES = (4, 2)
TASKS: Mapping[str, Callable[[MatrixShape, int, Parameters], Work]] = {
    "encrypt": encrypt_work,
    "multiply": lambda shape, tokens, _: multiply_work(shape, tokens),
    "decrypt": decrypt_work,
}
BUDGET_S = 25.0
"""Seconds of measuring, after the set-up."""
PATIENCE_S = 15.0
"""Seconds it waits, in all, for other processes to end."""
MIN_ROUNDS = 3
_GLANCE_S = 0.2
DISTURBED = 0.15  # busy cores elsewhere from which on a measurement counts as disturbed
_STREAM_BYTES = 1 << 26


def _llama(hidden: int, intermediate: int, heads: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


MODELS = {
    "narrow": _llama(192, 512, 3, 3, 2048),
    "middle": _llama(768, 2048, 12, 2, 4096),
    "wide": _llama(2048, 8192, 32, 1, 16_384),
}


@dataclass
class Samples:
    """Times of one thing in seconds, and the cores that were busy elsewhere meanwhile."""

    times: list[tuple[float, float]] = field(default_factory=list)

    def add(self, seconds: float, elsewhere: float) -> None:
        """One more."""
        self.times.append((seconds, elsewhere))

    @property
    def undisturbed(self) -> int:
        """How many of them nothing else disturbed."""
        return sum(elsewhere <= DISTURBED for _, elsewhere in self.times)

    def kept(self) -> list[int]:
        """Which count: of the undisturbed ones (the least disturbed half, if too few) the faster
        half. Whatever disturbs a measurement makes it longer, seen or unseen.
        """
        quiet = [i for i, (_, elsewhere) in enumerate(self.times) if elsewhere <= DISTURBED]
        if len(quiet) < min(MIN_ROUNDS, len(self.times)):
            ranked = sorted(range(len(self.times)), key=lambda i: self.times[i][1])
            quiet = ranked[: max(MIN_ROUNDS, len(ranked) // 2)]
        return sorted(quiet, key=lambda i: self.times[i][0])[: max(2, (len(quiet) + 1) // 2)]

    @property
    def typical_s(self) -> float:
        """Mean of those that count."""
        return fmean(self.times[i][0] for i in self.kept())


@dataclass
class Passes:
    """Passes of one lane alone: their whole times, and where the time went."""

    samples: Samples = field(default_factory=Samples)
    times: list[PassTimes] = field(default_factory=list)

    def add(self, times: PassTimes, elsewhere: float) -> None:
        """One more."""
        self.samples.add(times.total, elsewhere)
        self.times.append(times)

    def kept(self) -> list[PassTimes]:
        """Those that count, by their whole time."""
        return [self.times[i] for i in self.samples.kept()]


@dataclass
class Model:
    """One model of the calibration, its traces by tokens, and what was measured of it."""

    name: str
    rehearsed: Rehearsal
    workloads: dict[int, Workload]
    alone: dict[int, Passes] = field(default_factory=lambda: defaultdict(Passes))
    together: dict[tuple[int, int], Samples] = field(default_factory=lambda: defaultdict(Samples))
    """By tokens and lanes."""
    update: Samples = field(default_factory=Samples)


class Calibration:
    """Models that are measured in turn, round by round, and the cases they give.

    A `with` opens and closes it. Others may interleave measurements of their own with `round`.

    patience_s  how long to wait, in all, for other processes to end
    """

    def __init__(self, patience_s: float, parameters: Parameters | None = None) -> None:
        self.parameters = parameters or preset("exact")
        self.patience_s = patience_s
        self.models: list[Model] = []
        self.stream = Samples()
        self.wire: list[float] = []
        self.rounds = 0
        self.disturbed = 0
        self.measured = 0
        self._restless = False
        self._stack = ExitStack()
        self._source = torch.rand(_STREAM_BYTES // 4)
        self._target = torch.empty_like(self._source)

    def __enter__(self) -> Calibration:
        for name, config in MODELS.items():
            rehearsed = self._stack.enter_context(rehearsal(config, self.parameters, max(LANES)))
            workloads = {tokens: self._trace(config, tokens) for tokens in TOKENS}
            self.models.append(Model(name, rehearsed, workloads))
            for tokens in TOKENS:  # compiles, fills caches, makes the optimiser's moments
                rehearsed.alone(tokens)
                rehearsed.update()
        return self

    def _trace(self, config: LlamaConfig, tokens: int) -> Workload:
        return trace_step(config, tokens, preset=self.parameters.name)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def round(self) -> None:
        """Measure everything once; passes of several lanes with another number each time."""
        self.rounds += 1
        for model in self.models:
            for tokens in TOKENS:
                self._measure(model, tokens)
        self.stream.add(*self.timed(self._copy))
        self.wire.append(wire_rate())

    def timed(self, action: Callable[[], T]) -> tuple[T, float]:
        """(result of the action, cores busy elsewhere while it ran)."""
        if self._restless:
            self._wait_for_quiet()
        result, elsewhere = _watched(action)
        self._restless = elsewhere > DISTURBED
        self.measured += 1
        self.disturbed += self._restless
        return result, elsewhere

    def _wait_for_quiet(self) -> None:
        while self.patience_s > 0:
            self.patience_s -= _GLANCE_S
            if _watched(lambda: time.sleep(_GLANCE_S))[1] <= DISTURBED:
                return

    def _copy(self) -> float:
        start = time.perf_counter()
        self._target.copy_(self._source)
        return time.perf_counter() - start

    def _measure(self, model: Model, tokens: int) -> None:
        rehearsed = model.rehearsed
        model.alone[tokens].add(*self.timed(lambda: rehearsed.alone(tokens)))
        model.update.add(*self.timed(rehearsed.update))
        lanes = LANES[self.rounds % len(LANES)]
        together = self.timed(lambda: rehearsed.together(tokens, lanes))
        model.together[tokens, lanes].add(*together)

    def cases(self) -> list[Case]:
        """What was measured so far, to be fitted; equal tasks of a pass once, by their mean."""
        stream = Work(bytes_moved=2.0 * _STREAM_BYTES, launches=1)
        found = [Case("copy of 64 MB", "update", (stream,), self.stream.typical_s)]
        for model in self.models:
            update = model.workloads[TOKENS[0]].update
            found.append(Case(f"{model.name} update", "update", (update,), model.update.typical_s))
            for tokens in TOKENS:
                found += {case.name: case for case in self._lane_cases(model, tokens)}.values()
        return found

    def crowds(self) -> list[Crowd]:
        """The passes of several lanes at once so far."""
        return [
            Crowd(
                f"{model.name} {tokens} tokens {lanes} lanes", lanes,
                tuple(self._lane_cases(model, tokens)), samples.typical_s,
            )
            for model in self.models
            for (tokens, lanes), samples in model.together.items()
        ]  # fmt: skip

    def _lane_cases(self, model: Model, tokens: int) -> list[Case]:
        workload, passes = model.workloads[tokens], model.alone[tokens].kept()
        local = [part for item in workload.lane if isinstance(item, Local) for part in item.parts]
        name = f"{model.name} {tokens} tokens"
        local_s = fmean(times.local for times in passes)
        found = [Case(f"{name} layers", "local", tuple(local), local_s)]
        phases: dict[tuple[int, int], list[tuple[float, ...]]] = defaultdict(list)
        for times in passes:
            for shape, (_, *spent) in zip(workload.linears, times.linears, strict=True):
                phases[shape.in_features, shape.out_features].append(tuple(spent))
        for shape in workload.linears:
            sizes = (shape.in_features, shape.out_features)
            for place, (task, work) in enumerate(TASKS.items()):
                part = work(shape, tokens, self.parameters)
                seconds = fmean(measured[place] for measured in phases[sizes])
                title = f"{name} {task} {sizes[0]} to {sizes[1]}"
                found.append(Case(title, task, (part,), seconds))
        return found

    def profile(self, name: str) -> DeviceProfile:
        """What this machine is, by the measurements so far."""
        assumed = (
            "the cipher's tasks keep all cores busy: their kernels are split over them",
            "overheads include the hand-over between the threads of the in-process driver",
            "int8_pair follows from int8 by the digits that this processor multiplies",
        )
        today = time.strftime("%Y-%m-%d")
        origin = Origin("measured", describe_machine(), today, commit(), assumed)
        fitted = fit(self.cases(), name, origin, float(core_count()))
        rates = {**fitted.rates, **pair_rate(fitted.rates["int8"]), "wire": max(self.wire)}
        return _rounded(replace(fitted, rates=rates, width=fit_widths(self.crowds(), fitted)))


def pair_rate(int8: float) -> dict[str, float]:
    """The rate of products of two limbs beside that of products of three, which is measured.

    A product takes as long as its digits: two 16-bit ones for three limbs, and one for two, where
    the processor has no 8-bit dot product. Without a kernel of its own, it is the same rate.
    """
    kernel = next((each for each in isa.ALL if each.name == chosen_kernel().name), None)
    if kernel is None:
        return {}
    return {"int8_pair": int8 * (2 / kernel.digits(2)) / (3 / kernel.digits(3))}


def _watched(action: Callable[[], T]) -> tuple[T, float]:
    start, elsewhere_s = time.perf_counter(), busy_elsewhere_s()
    result = action()
    return result, (busy_elsewhere_s() - elsewhere_s) / (time.perf_counter() - start)


def _rounded(profile: DeviceProfile) -> DeviceProfile:
    """To four digits, which is more than the measurements bear."""

    def short(values: Mapping[str, float]) -> dict[str, float]:
        return {key: float(f"{value:.4g}") for key, value in values.items()}

    return replace(
        profile,
        rates=short(profile.rates),
        bytes_per_s=float(f"{profile.bytes_per_s:.4g}"),
        overhead_s=short(profile.overhead_s),
        width=short(profile.width),
    )


def describe_machine() -> str:
    """One line for the profile's origin; no host name."""
    facts = machine()
    return (
        f"{facts['cores']} cores of {facts['processor']}, {facts['memory_gb']:.0f} GB, "
        f"torch {facts['torch']}, Python {facts['python']}"
    )


def explanations(cases: Iterable[Case], profile: DeviceProfile) -> list[dict[str, Any]]:
    """Each case with its measured and its fitted time, in ms, and the fit's relative error."""
    return [
        {
            "case": case.name,
            "task": case.task,
            "measured_ms": 1e3 * case.seconds,
            "fitted_ms": 1e3 * case.explained(profile),
            "error": case.explained(profile) / case.seconds - 1,
        }
        for case in cases
    ]


def report(profile: DeviceProfile, rows: Sequence[dict[str, Any]]) -> None:
    """Print the fit and what it leaves unexplained."""
    print(f"{'case':<44}{'measured':>12}{'fitted':>12}{'error':>9}")
    for row in rows:
        print(
            f"{row['case']:<44}{row['measured_ms']:>9.2f} ms{row['fitted_ms']:>9.2f} ms"
            f"{row['error']:>+9.0%}"
        )
    for task in dict.fromkeys(row["task"] for row in rows):
        errors = [abs(row["error"]) for row in rows if row["task"] == task]
        print(f"{task:<10} median error {median(errors):.0%}, worst {max(errors):.0%}")
    rates = ", ".join(f"{kind} {rate:.3g}/s" for kind, rate in profile.rates.items())
    print(f"rates: {rates}; memory {profile.bytes_per_s / 1e9:.1f} GB/s")
    overheads = ", ".join(f"{task} {1e6 * s:.0f} us" for task, s in profile.overhead_s.items())
    print(f"overheads: {overheads}")
    widths = ", ".join(f"{task} {cores:.2f}" for task, cores in profile.width.items())
    print(f"cores kept from others: {widths}")


def calibrate(name: str) -> tuple[DeviceProfile, dict[str, Any]]:
    """(profile, figures) of this machine."""
    with Calibration(PATIENCE_S) as calibration:
        start = time.perf_counter()
        while calibration.rounds < MIN_ROUNDS or time.perf_counter() - start < BUDGET_S:
            calibration.round()
    profile = calibration.profile(name)
    rows = explanations(calibration.cases(), profile)
    report(profile, rows)
    share = calibration.disturbed / calibration.measured
    if share > 0.5:
        print(
            f"warning: other processes were busy during {share:.0%} of the measurements; stop them "
            "and calibrate again"
        )
    figures = {"rounds": calibration.rounds, "disturbed": share, "cases": rows}
    return profile, figures | {"profile": profile.facts()}


def run(args: argparse.Namespace) -> None:
    """Measure, and write what was asked for."""
    print(f"kernel: {chosen_kernel().name}")
    name = args.out.stem if args.out else f"cpu-{core_count()}core"
    profile, figures = calibrate(name)
    if args.out:
        profile.save(args.out)
        print(f"profile written to {args.out}")
    if args.json:
        origin = {"machine": machine(), "commit": commit(), "date": profile.origin.when}
        write_json(args.json, figures | {"origin": origin})
        print(f"figures written to {args.json}")
