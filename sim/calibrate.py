"""Measure this machine and write the device profile that a simulated one runs on.

    python -m sim.calibrate [--out PROFILE.json] [--json FIGURES.json]

Small models of three widths take private training passes (see `sim.rehearsal`): the owner's
layers, encrypting, multiplying and decrypting are timed where they happen, at 64 and 256 tokens,
round after round, and the medians are fitted with rates, a bandwidth and overheads (see
`sim.fitting`). Passes of four lanes at once then tell how much of the machine a lane keeps from
the others. What the fit does not explain is printed beside it, case by case.

A machine that does something else at the time cannot be measured: when other processes are busy
it waits for them, for a while, and measurements they disturbed are left out as far as enough
others remain. Takes about 45 seconds on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig

from backends.files import write_json
from backends.he.params import Parameters, preset
from backends.machine import busy_elsewhere_s, commit, machine
from backends.threads import core_count
from sim.device import DeviceProfile, Origin, Work
from sim.fitting import Case, Crowd, fit, fit_widths
from sim.rehearsal import Rehearsal, rehearsal
from sim.workload import (
    Linear,
    Local,
    Workload,
    decrypt_work,
    encrypt_work,
    multiply_work,
    trace_step,
)

T = TypeVar("T")

TOKENS = (64, 256)
LANES = 4
TASKS = {"encrypt": encrypt_work, "multiply": multiply_work, "decrypt": decrypt_work}
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
    "wide": _llama(2048, 8192, 32, 1, 2048),
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

    def quiet(self) -> list[float]:
        """Undisturbed times; the least disturbed half where there are too few."""
        quiet = [seconds for seconds, elsewhere in self.times if elsewhere <= DISTURBED]
        if len(quiet) >= min(MIN_ROUNDS, len(self.times)):
            return quiet
        ranked = sorted(self.times, key=lambda sample: sample[1])
        return [seconds for seconds, _ in ranked[: max(MIN_ROUNDS, len(ranked) // 2)]]

    @property
    def median(self) -> float:
        """Of the quiet ones."""
        return median(self.quiet())


@dataclass
class Model:
    """One model of the calibration, its traces, and what was measured of it."""

    name: str
    rehearsed: Rehearsal
    workloads: dict[int, Workload]
    local: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    linear: dict[tuple[str, int, int, int], Samples] = field(
        default_factory=lambda: defaultdict(Samples)
    )
    """By task, inputs, outputs and tokens."""
    crowd: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    update: Samples = field(default_factory=Samples)


class Calibration:
    """Models that are measured in turn, round by round, and the cases they give.

    A `with` opens and closes it. Others may interleave measurements of their own with `round`.

    patience_s  how long to wait, in all, for other processes to end
    """

    def __init__(self, patience_s: float, parameters: Parameters | None = None) -> None:
        self.parameters = parameters or preset("standard")
        self.patience_s = patience_s
        self.models: list[Model] = []
        self.stream = Samples()
        self.rounds = 0
        self.disturbed = 0
        self.measured = 0
        self._restless = False
        self._stack = ExitStack()
        self._source = torch.rand(_STREAM_BYTES // 4)
        self._target = torch.empty_like(self._source)

    def __enter__(self) -> Calibration:
        for name, config in MODELS.items():
            rehearsed = self._stack.enter_context(rehearsal(config, self.parameters, LANES))
            workloads = {tokens: trace_step(config, tokens) for tokens in TOKENS}
            self.models.append(Model(name, rehearsed, workloads))
            for tokens in TOKENS:  # compiles, fills caches, makes the optimiser's moments
                rehearsed.alone(tokens)
                rehearsed.update()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def round(self) -> None:
        """Measure everything once; lanes together, which takes longest, every other time."""
        self.rounds += 1
        for model in self.models:
            for tokens in TOKENS:
                self._measure(model, tokens)
        self.stream.add(*self.timed(self._copy))

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
        rehearsed, workload = model.rehearsed, model.workloads[tokens]
        times, elsewhere = self.timed(lambda: rehearsed.alone(tokens))
        asked = [item.matrix for item in workload.lane if isinstance(item, Linear)]
        assert [matrix for matrix, *_ in times.linears] == asked, "the trace is of another pass"
        model.local[tokens].add(times.local, elsewhere)
        for matrix, *phases in times.linears:
            shape = workload.matrices[matrix]
            for task, seconds in zip(TASKS, phases, strict=True):
                key = (task, shape.in_features, shape.out_features, tokens)
                model.linear[key].add(seconds, elsewhere)
        model.update.add(*self.timed(rehearsed.update))
        if self.rounds % 2:
            model.crowd[tokens].add(*self.timed(lambda: rehearsed.together(tokens, LANES)))

    def cases(self) -> list[Case]:
        """The medians so far, to be fitted; equal ones once."""
        stream = Work(bytes_moved=2.0 * _STREAM_BYTES, launches=1)
        found = [Case("copy of 64 MB", "update", (stream,), self.stream.median)]
        for model in self.models:
            update = model.workloads[TOKENS[0]].update
            found.append(Case(f"{model.name} update", "update", (update,), model.update.median))
            for tokens in TOKENS:
                found += {case.name: case for case in self._lane_cases(model, tokens)}.values()
        return found

    def crowds(self) -> list[Crowd]:
        """The medians so far of passes of several lanes at once."""
        return [
            Crowd(
                f"{model.name} {tokens} tokens {LANES} lanes", LANES,
                tuple(self._lane_cases(model, tokens)), model.crowd[tokens].median,
            )
            for model in self.models
            for tokens in TOKENS
        ]  # fmt: skip

    def _lane_cases(self, model: Model, tokens: int) -> list[Case]:
        workload = model.workloads[tokens]
        local = [part for item in workload.lane if isinstance(item, Local) for part in item.parts]
        name = f"{model.name} {tokens} tokens"
        found = [Case(f"{name} layers", "local", tuple(local), model.local[tokens].median)]
        for shape in workload.linears:
            inputs, outputs = shape.in_features, shape.out_features
            for task, work in TASKS.items():
                part = work(shape, tokens, self.parameters)
                seconds = model.linear[task, inputs, outputs, tokens].median
                found.append(Case(f"{name} {task} {inputs} to {outputs}", task, (part,), seconds))
        return found

    def profile(self, name: str) -> DeviceProfile:
        """What this machine is, by the measurements so far."""
        assumed = (
            "the cipher's tasks keep all cores busy: their kernels are split over them",
            "overheads include the hand-over between the threads of the in-process driver",
        )
        today = time.strftime("%Y-%m-%d")
        origin = Origin("measured", describe_machine(), today, commit(), assumed)
        fitted = fit(self.cases(), name, origin, float(core_count()))
        return _rounded(replace(fitted, width=fit_widths(self.crowds(), fitted)))


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sim.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the profile here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write cases and residuals here")
    args = parser.parse_args()
    name = args.out.stem if args.out else f"cpu-{core_count()}core"
    profile, figures = calibrate(name)
    if args.out:
        profile.save(args.out)
        print(f"profile written to {args.out}")
    if args.json:
        origin = {"machine": machine(), "commit": commit(), "date": profile.origin.when}
        write_json(args.json, figures | {"origin": origin})
        print(f"figures written to {args.json}")


if __name__ == "__main__":
    main()
