"""Measure this machine and write the device profile that a simulated one runs on.

    python -m sim.calibrate [--out PROFILE.json] [--json FIGURES.json]

Small models of three widths take private training passes (see `sim.rehearsal`): the owner's
layers, encrypting, multiplying and decrypting are timed where they happen, at 64 and 256 tokens,
round after round, and the medians are fitted with rates, a bandwidth and overheads (see
`sim.fitting`). Passes of four lanes at once then tell how much of the machine each kind of task
keeps from the others. What the fit does not explain is printed beside it, case by case.

Measurements during which other processes were busy are left out, as far as enough others remain:
a machine that does something else at the time cannot be measured. Takes about 40 seconds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from backends.files import write_json
from backends.he.params import Parameters, preset
from backends.machine import busy_elsewhere_s, commit, machine
from backends.threads import core_count
from protocol.catalogue import MatrixShape
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

TOKENS = (64, 256)
LANES = 4
BUDGET_S = 30.0
"""Seconds of measuring, after the set-up."""
_MIN_ROUNDS = 3
_DISTURBED = 0.15  # busy cores elsewhere from which on a measurement counts as disturbed
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

    def quiet(self) -> list[float]:
        """Undisturbed times; the least disturbed half where there are too few."""
        quiet = [seconds for seconds, elsewhere in self.times if elsewhere <= _DISTURBED]
        if len(quiet) >= min(_MIN_ROUNDS, len(self.times)):
            return quiet
        ranked = sorted(self.times, key=lambda sample: sample[1])
        return [seconds for seconds, _ in ranked[: max(_MIN_ROUNDS, len(ranked) // 2)]]

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
    linear: dict[tuple[str, int, int], Samples] = field(
        default_factory=lambda: defaultdict(Samples)
    )
    crowd: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    update: Samples = field(default_factory=Samples)


class Calibration:
    """Models that are measured in turn, round by round, and the cases they give.

    A `with` opens and closes it. Others may interleave measurements of their own with `round`.
    """

    def __init__(self, parameters: Parameters | None = None) -> None:
        self.parameters = parameters or preset("standard")
        self.models: list[Model] = []
        self.stream = Samples()
        self.disturbed = 0
        self.measured = 0
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
        """Measure everything once."""
        for model in self.models:
            for tokens in TOKENS:
                self._alone(model, tokens)
                seconds, elsewhere = self._timed(
                    lambda m=model, t=tokens: m.rehearsed.together(t, LANES)
                )
                model.crowd[tokens].add(seconds, elsewhere)
        self.stream.add(*self._timed(lambda: _seconds(lambda: self._target.copy_(self._source))))

    def _timed(self, action: Callable[[], float]) -> tuple[float, float]:
        """(seconds that the action reports, cores busy elsewhere while it ran)."""
        start, elsewhere_s = time.perf_counter(), busy_elsewhere_s()
        seconds = action()
        elsewhere = (busy_elsewhere_s() - elsewhere_s) / (time.perf_counter() - start)
        self.measured += 1
        self.disturbed += elsewhere > _DISTURBED
        return seconds, elsewhere

    def _alone(self, model: Model, tokens: int) -> None:
        start, elsewhere_s = time.perf_counter(), busy_elsewhere_s()
        times = model.rehearsed.alone(tokens)
        update_s = model.rehearsed.update()
        elsewhere = (busy_elsewhere_s() - elsewhere_s) / (time.perf_counter() - start)
        self.measured += 1
        self.disturbed += elsewhere > _DISTURBED
        expected = [
            item.matrix for item in model.workloads[tokens].lane if isinstance(item, Linear)
        ]
        assert [matrix for matrix, *_ in times.linears] == expected, "the trace is of another pass"
        model.local[tokens].add(times.local, elsewhere)
        model.update.add(update_s, elsewhere)
        for matrix, *phases in times.linears:
            for task, seconds in zip(("encrypt", "multiply", "decrypt"), phases, strict=True):
                model.linear[task, matrix, tokens].add(seconds, elsewhere)

    def cases(self) -> list[Case]:
        """The medians so far, to be fitted."""
        stream = Work(bytes_moved=2.0 * _STREAM_BYTES, launches=1)
        found = [Case("copy of 64 MB", "update", (stream,), self.stream.median)]
        for model in self.models:
            found.append(
                Case(
                    f"{model.name} update", "update", (model.workloads[TOKENS[0]].update,),
                    model.update.median,
                )
            )  # fmt: skip
            for tokens in TOKENS:
                found += self._lane_cases(model, tokens)
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
        works = {"encrypt": encrypt_work, "multiply": multiply_work, "decrypt": decrypt_work}
        for item in workload.lane:
            if not isinstance(item, Linear):
                continue
            shape: MatrixShape = workload.matrices[item.matrix]
            for task, work in works.items():
                seconds = model.linear[task, item.matrix, tokens].median
                part = work(shape, tokens, self.parameters)
                sizes = f"{shape.in_features} to {shape.out_features}"
                found.append(Case(f"{name} {task} {sizes}", task, (part,), seconds))
        return found

    def profile(self, name: str) -> DeviceProfile:
        """What this machine is, by the measurements so far."""
        origin = Origin("measured", describe_machine(), time.strftime("%Y-%m-%d"), commit())
        fitted = fit(self.cases(), name, origin, float(core_count()))
        return replace(fitted, width=fit_widths(self.crowds(), fitted))


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


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
    with Calibration() as calibration:
        start, rounds = time.perf_counter(), 0
        while rounds < _MIN_ROUNDS or time.perf_counter() - start < BUDGET_S:
            calibration.round()
            rounds += 1
    profile = calibration.profile(name)
    rows = explanations(calibration.cases(), profile)
    report(profile, rows)
    share = calibration.disturbed / calibration.measured
    if share > 0.5:
        print(
            f"warning: other processes were busy during {share:.0%} of the measurements; stop them "
            "and calibrate again"
        )
    figures = {"rounds": rounds, "disturbed": share, "cases": rows}
    return profile, figures


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
