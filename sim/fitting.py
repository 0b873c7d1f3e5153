"""From measured times to a device profile: the rates, overheads and widths that explain them.

The model is that of `sim.device`, for a case of several parts one after the other

    seconds = sum over parts of max(sum of count / rate, bytes / bandwidth) + launches * overhead

and the unknowns are the rates, the bandwidth and the overheads. They are positive and differ by
orders of magnitude, and it is relative errors that matter: so their logarithms are fitted to the
logarithms of the times, by least squares (Levenberg-Marquardt). Each kind of task weighs the same,
however many cases it has. What no case depends on would be free to go anywhere: a weak pull
towards the starting guess, PULL per factor of e, holds it there, and bends nothing else.

Widths follow from passes of several lanes at once. Where lanes keep all cores busy, the time of
`lanes` passes is what they keep from each other,

    seconds * cores = lanes * sum over kinds of (seconds alone * width)

The cipher's kernels are split over all cores, so their width is known. Those of the owner's
layers and of overhead are fitted; more than one core for overhead is what lanes lose in waiting
for the interpreter's lock and in waking each other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.device import DeviceProfile, Origin, Work

GUESSES: Mapping[str, float] = {
    "rates.int8": 2e11, "rates.float": 5e10, "rates.ring_row": 4e6, "rates.value": 3e8,
    "bytes_per_s": 2e10, "overhead_s.local": 3e-5, "overhead_s.encrypt": 3e-4,
    "overhead_s.multiply": 3e-4, "overhead_s.decrypt": 3e-4, "overhead_s.update": 1e-5,
}  # fmt: skip
"""Where a fit starts: a core or two of a server."""
PULL = 0.01
_ROUNDS = 200
_STEPS = 21  # candidates of each width


@dataclass(frozen=True)
class Case:
    """A measured task: its kind, its work in parts that follow each other, its time alone."""

    name: str
    task: str
    parts: tuple[Work, ...]
    seconds: float

    def explained(self, profile: DeviceProfile) -> float:
        """Seconds it takes according to a profile."""
        return sum(profile.seconds(part, self.task) for part in self.parts)


@dataclass(frozen=True)
class Crowd:
    """Passes of several lanes at once: seconds they took, and a lane's cases when alone."""

    name: str
    lanes: int
    cases: tuple[Case, ...]
    seconds: float


def fit(cases: Sequence[Case], name: str, origin: Origin, cores: float) -> DeviceProfile:
    """The profile, with all widths as they are by default, that explains the cases best."""
    keys = list(GUESSES)
    start = np.log([GUESSES[key] for key in keys])
    measured = np.log([case.seconds for case in cases])
    counts = Counter(case.task for case in cases)
    weights = np.array([counts[case.task] ** -0.5 for case in cases])

    def profile(logs: NDArray[np.float64]) -> DeviceProfile:
        values = dict(zip(keys, np.exp(logs).tolist(), strict=True))
        return DeviceProfile(
            name, origin, cores, _under("rates.", values), values["bytes_per_s"],
            _under("overhead_s.", values),
        )  # fmt: skip

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        guess = profile(logs)
        errors = np.log([case.explained(guess) for case in cases]) - measured
        return np.concatenate([weights * errors, PULL * (logs - start)])

    return profile(least_squares(residuals, start))


def _under(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)}


def least_squares(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A minimum of the sum of squares, by Levenberg-Marquardt with numerical derivatives."""
    x, damping, width = start.copy(), 1e-2, 1e-5
    r = residuals(x)
    for _ in range(_ROUNDS):
        jacobian = np.stack([(residuals(x + width * unit) - r) / width for unit in np.eye(len(x))])
        normal, slope = jacobian @ jacobian.T, jacobian @ r
        for _ in range(30):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), -slope)
            tried = residuals(x + step)
            if tried @ tried < r @ r:
                break
            damping *= 4
        else:
            return x
        done = float(np.abs(step).max()) < 1e-6
        x, r, damping = x + step, tried, damping / 3
        if done:
            return x
    return x


def fit_widths(crowds: Sequence[Crowd], profile: DeviceProfile) -> dict[str, float]:
    """Widths of the owner's layers and of overhead, between half a core and all, on a grid."""
    rows = []
    for crowd in crowds:
        layers = cipher = overhead = 0.0
        for case in crowd.cases:
            launching = sum(part.launches for part in case.parts) * profile.overhead_s[case.task]
            share = min(launching / case.explained(profile), 1.0)
            overhead += share * case.seconds
            if case.task == "local":
                layers += (1 - share) * case.seconds
            else:
                cipher += (1 - share) * case.seconds
        rows.append([crowd.lanes * kind / profile.cores for kind in (layers, overhead, cipher)])
    alone = np.array([sum(case.seconds for case in crowd.cases) for crowd in crowds])
    measured = np.log([crowd.seconds for crowd in crowds])
    grid = np.linspace(min(0.5, profile.cores), profile.cores, _STEPS)
    choices = np.array([(*pair, profile.cores) for pair in itertools.product(grid, repeat=2)])
    expected = np.maximum(choices @ np.array(rows).T, alone)
    best = choices[np.square(np.log(expected) - measured).sum(axis=1).argmin()]
    layers, overhead, _ = best.tolist()
    return {"local": layers, "update": layers, "overhead": overhead}
