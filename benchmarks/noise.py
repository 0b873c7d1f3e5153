"""The error of a result: the law that `docs/cipher.md` derives, against real encryptions.

    python -m benchmarks.noise --json FILE        5*10^7 results of each of four matrices

Every result is decrypted to an integer; its error against the exact product is divided by the
deviation that the law gives its output. Tokens are independent of each other, the outputs of one
token are not, so every figure's standard error is that of a sum over tokens. `score` is how many
standard errors a figure is from the law.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from backends.he.interface import OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import ERROR_BITS, PRESETS, Parameters, preset
from backends.he.plan import plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.wire import EXACT
from backends.options import Parser, Whole
from benchmarks.he_linear import heavy_tailed
from scenarios import record
from scenarios.cli import clean_exit

Float64Array = NDArray[np.float64]

SIGMAS = (1, 2, 3, 4, 5)
_REACH = 12.0  # deviations of frequency: a normal law's transform is below 10^-31 there
_POINTS = 2400


@dataclass(frozen=True)
class Law:
    """The error of each of N outputs, in units of the worker modulus; `docs/cipher.md` derives it.

    mean, deviation  float64[N]
    fourth           float64[N], E((error - mean)/deviation)^4; 3 for a normal law
    beyond           float64[N, 5], P(|error - mean| > z * deviation) for z in SIGMAS
    """

    mean: Float64Array
    deviation: Float64Array
    fourth: Float64Array
    beyond: Float64Array


def law(matrix: NDArray[np.int8], parameters: Parameters) -> Law:
    """The law for int8[N, K], whatever the input, where its message is in general position.

    Raises ValueError for a row of zeros, or of multiples of 2^dropped_bits.
    """
    squares = np.sum(matrix.astype(np.float64) ** 2, axis=1)
    fourths = np.sum(matrix.astype(np.float64) ** 4, axis=1)
    odd = np.bitwise_or.reduce(matrix.astype(np.int64), axis=1)
    grid = odd & -odd
    steps = 2**EXACT.dropped_bits // np.maximum(grid, 1)
    if np.any(grid == 0) or np.any(steps < 2):
        raise ValueError("a row is zero, or its results need no rounding")
    ratio = EXACT.modulus / parameters.modulus
    # Cumulants: of a uniform number of width w, w^2/12 and -w^4/120; of a fair sign of 1/2, 1/4 and
    # -1/8; of n steps of g, (n^2 - 1)g^2/12 and -(n^4 - 1)g^4/120.
    up2 = 1 / 12 + ratio**2 * (ERROR_BITS / 4 + 1 / 12)
    up4 = -1 / 120 - ratio**4 * (ERROR_BITS / 8 + 1 / 120)
    variance = squares * up2 + ((steps**2 - 1) * grid**2 + 1) / 12
    cumulant = fourths * up4 - ((steps**4 - 1) * grid.astype(float) ** 4 + 1) / 120
    deviation = np.sqrt(variance)
    beyond = [
        _beyond(row, ratio, int(g), int(n), float(s))
        for row, g, n, s in zip(matrix, grid, steps, deviation, strict=True)
    ]
    return Law(grid / 2, deviation, 3 + cumulant / variance**2, np.array(beyond))


def _beyond(
    row: NDArray[np.int8], ratio: float, grid: int, steps: int, deviation: float
) -> list[float]:
    """P(|error - mean| > z * deviation), from the characteristic function of one row's error."""
    width = _REACH / _POINTS
    t = (np.arange(_POINTS) + 0.5) * width / deviation  # the midpoint rule
    sizes, counts = np.unique(np.abs(row.astype(np.int64)), return_counts=True)
    half = sizes[:, None] * t / 2
    each = _sinc(half) * np.cos(ratio * half) ** ERROR_BITS * _sinc(ratio * half)
    down = np.sin(steps * grid * t / 2) / (steps * np.sin(grid * t / 2)) * _sinc(t / 2)
    transform = np.prod(each ** counts[:, None], axis=0) * down
    return [
        float(1 - 2 / np.pi * np.sum(np.sin(z * deviation * t) / t * transform) * width / deviation)
        for z in SIGMAS
    ]


def _sinc(x: Float64Array) -> Float64Array:
    return np.sinc(x / np.pi)


@dataclass(frozen=True)
class Case:
    """A matrix int8[outputs, inputs] to encrypt for, `tokens` a request."""

    name: str
    inputs: int
    outputs: int
    tokens: int
    step: int = 1  # of the weights

    def weight(self) -> NDArray[np.int8]:
        """Normal weights on multiples of `step`, of all sizes up to 127."""
        rng = np.random.default_rng(self.inputs)
        codes = np.clip(np.rint(rng.normal(0, 40, (self.outputs, self.inputs))), -127, 127)
        return (np.fix(codes / self.step) * self.step).astype(np.int8)


CASES = (
    Case("24 inputs", 24, 64, 4096),
    Case("24 inputs, multiples of 16", 24, 64, 4096, step=16),
    Case("2,048 inputs", 2048, 512, 512),
    Case("8,192 inputs", 8192, 256, 512),
)


def measure(case: Case, parameters: Parameters, samples: int, seed: int = 1) -> dict[str, Any]:
    """At least `samples` errors of a case against its law."""
    weight = case.weight()
    expected = law(weight, parameters)
    public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
    ones = np.ones(case.outputs, np.float32)
    matrix = OwnerMatrix(
        case.name, np.ones(case.inputs, np.float32), ones, plan_matrix(weight, ones, parameters),
        HintBuilder(public).build(weight, True),
    )  # fmt: skip
    owner, worker = MlweOwner(parameters, public, unverified=True), MlweWorker()
    loaded, exact = worker.load(weight, True, matrix.plan.format), weight.T.astype(np.float64)
    data = heavy_tailed(8 * case.tokens, case.inputs, seed)
    rng = np.random.default_rng(seed)
    tally = Tally(case.outputs)
    with tqdm(total=samples, desc=case.name, unit="results", leave=False, delay=1) as bar:
        while tally.tokens * case.outputs < samples:
            start = int(rng.integers(len(data) - case.tokens))
            # Other messages every time, as their roundings are part of the law.
            channels = rng.uniform(0.5, 2, case.inputs).astype(np.float32)
            x = data[start : start + case.tokens] * channels
            sent = owner.encrypt(x, matrix)
            answer = worker.multiply(sent.payload, case.tokens, loaded)
            # Results are integers, which float32 holds exactly, in units of their own.
            plain = replace(sent.sealed, inverse_alpha=np.ones(case.tokens))
            y = owner.decrypt(plain, answer, matrix)
            true = (x.astype(np.float64) @ exact) / sent.sealed.inverse_alpha[:, None]
            tally.add((y - true - expected.mean) / expected.deviation)
            bar.update(case.tokens * case.outputs)
    return {
        "case": case.name,
        "in": case.inputs,
        "out": case.outputs,
        "samples": tally.tokens * case.outputs,
        "deviation": float(np.mean(expected.deviation)),
        "relative_error_predicted": matrix.plan.predicted_error(parameters),
        **tally.against(expected),
    }


class Tally:
    """Sums of standardised errors over independent tokens.

    tokens  so far
    """

    def __init__(self, outputs: int) -> None:
        self.tokens = 0
        self._outputs = outputs
        self._sums = np.zeros((2, 3 + len(SIGMAS)))
        self._by_output = np.zeros(outputs)

    def add(self, z: Float64Array) -> None:
        """Errors float64[T, N], each less its mean and over its deviation."""
        size = np.abs(z)
        square = z * z
        columns = [z.sum(axis=1), square.sum(axis=1), (square * square).sum(axis=1)]
        columns += [np.count_nonzero(size > sigma, axis=1) for sigma in SIGMAS]
        token = np.array(columns, np.float64)
        self._sums += token.sum(axis=1), (token**2).sum(axis=1)
        self._by_output += z.sum(axis=0)
        self.tokens += len(z)

    def against(self, expected: Law) -> dict[str, Any]:
        """Every figure as measured, as predicted, and its score."""
        means = self._sums[0] / self.tokens
        variances = self._sums[1] / self.tokens - means**2
        errors = np.sqrt(variances / self.tokens)
        found: dict[str, Any] = {}
        predictions = (0.0, 1.0, float(np.mean(expected.fourth)))
        names = ("mean", "variance", "fourth_moment")
        for n, (name, predicted) in enumerate(zip(names, predictions, strict=True)):
            found[name] = {
                "measured": means[n] / self._outputs,
                "predicted": predicted,
                "standard_error": errors[n] / self._outputs,
                "score": (means[n] - predicted * self._outputs) / errors[n],
            }
        for n, sigma in enumerate(SIGMAS, start=len(names)):
            # The integral of a tail may end below zero, by as much as it is off.
            probability = max(0.0, float(np.mean(expected.beyond[:, n - len(names)])))
            predicted, measured = probability * self._outputs * self.tokens, self._sums[0, n]
            # Outputs of a token go together a little: counts vary more than Poisson's, whose square
            # roots are nearly normal even where few are counted (Anscombe 1948).
            spread = max(1.0, variances[n] / max(means[n], 1e-300)) if measured >= 100 else 1.0
            score = 2 * (np.sqrt(measured + 0.375) - np.sqrt(predicted + 0.375)) / np.sqrt(spread)
            found[f"beyond_{sigma}_sigma"] = {
                "measured": int(measured), "predicted": predicted, "score": float(score),
            }  # fmt: skip
        found["largest_score_of_an_outputs_mean"] = float(
            np.max(np.abs(self._by_output)) / np.sqrt(self.tokens)
        )
        return found


def scores(found: dict[str, Any]) -> dict[str, float]:
    """All scores of one case, by name."""
    named = {name: part["score"] for name, part in found.items() if isinstance(part, dict)}
    return named | {"outputs": found["largest_score_of_an_outputs_mean"]}


def largest_score(found: dict[str, Any]) -> float:
    """The largest of one case, whatever its sign; infinite where one is no number, since `max`
    passes over those."""
    sizes = [abs(score) for score in scores(found).values()]
    return max(inf if isnan(size) else size for size in sizes)


def print_case(found: dict[str, Any]) -> None:
    """One case as lines of a table."""
    print(f"{found['case']}, {found['samples']:,} results, deviation {found['deviation']:.1f}:")
    for name, part in found.items():
        if isinstance(part, dict):
            print(f"  {name:<15} {part['measured']:>16,.6g} measured {part['predicted']:>16,.6g} "
                  f"predicted {part['score']:>6.2f} standard errors")  # fmt: skip


def main() -> None:
    parser = Parser(__doc__, "benchmarks.noise")
    add = parser.add_argument
    add("--preset", default="exact", choices=sorted(PRESETS), help="cipher parameters")
    add("--samples", type=Whole(), default=50_000_000, help="results of each case (50000000)")
    record.add_json_option(parser)
    args = parser.parse()
    start = time.perf_counter()
    cases = []
    with clean_exit():
        for case in CASES:
            cases.append(measure(case, preset(args.preset), args.samples))
            print_case(cases[-1])
    largest = max(map(largest_score, cases))
    print(f"largest score: {largest:.2f} standard errors")
    figures = {
        "preset": args.preset,
        "cases": cases,
        "largest_score": largest,
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
