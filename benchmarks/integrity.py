"""Does the check of answers hold? Lies of many kinds, honest data by the million, a small bias.

    python -m benchmarks.integrity --json FILE        all of it, some ten minutes

Every attack is one request under the real cipher whose answer is changed as its kind says; the
share that was accepted stands beside the bound that `backends/he/integrity.py` proves for errors of
that size, averaged over the attacks. Secret rows are drawn anew every few attacks.

Under a thin preset attacks take the formats of FORMATS in turn, and the scale is learnt as it would
be, so honest answers have wraps among them; a wrap by p is no lie there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from backends.he.integrity import LIMIT, ROWS, SUSPICION
from backends.he.interface import Encrypted, OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.packing import pack_answer, unpack_answer
from backends.he.params import PRESETS, Parameters, preset
from backends.he.plan import plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.repair import tolerance
from backends.he.wire import Format
from backends.options import TIMES, Number, Parser, Whole
from benchmarks.he_linear import heavy_tailed
from protocol.errors import WrongAnswerError
from scenarios import record
from scenarios.cli import clean_exit

Answer = NDArray[np.uint16]
Rng = np.random.Generator
TOP = 1 << 15
FORMATS = (Format(16, 8), Format(18, 8), Format(18, 10), Format(20, 12), Format(24, 12))
"""What attacks under a thin preset go through."""
RENEWED_AFTER = 20
"""Attacks on one draw of secret rows."""


@dataclass(frozen=True)
class Asked:
    """One request, the honest answer uint16[T, N], and what it stands for.

    exact  float64[T, N], the product in units of the worker modulus
    """

    sent: Encrypted
    answer: Answer
    exact: NDArray[np.float64]


class Desk:
    """An owner with a guarded matrix, and what its worker would answer."""

    def __init__(
        self, inputs: int, outputs: int, parameters: Parameters, seed: int,
        form: Format | None = None,
    ) -> None:  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.parameters = parameters
        self.weight = _codes(self.rng, outputs, inputs, parameters.weight_limit)
        self._public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
        scale = self.rng.uniform(1e-4, 1e-2, outputs).astype(np.float32)
        plan = plan_matrix(self.weight, scale, parameters)
        if form is not None:
            plan = replace(plan, up_bits=form.up_bits, down_bits=form.down_bits)
        self.matrix = OwnerMatrix(
            f"{inputs}x{outputs}", np.ones(inputs, np.float32), scale, plan,
            HintBuilder(self._public).build(self.weight, True),
        )  # fmt: skip
        self.worker = MlweWorker()
        self.form = self.matrix.plan.format
        self.loaded = self.worker.load(self.weight, True, self.form)
        self._attacks = 0
        self.renew()

    def renew(self) -> None:
        """An owner with other secret rows."""
        self.owner = MlweOwner(self.parameters, self._public)
        self.owner.guard(self.matrix, self.weight, True)

    def ask(self, x: NDArray[np.float32], matrix: OwnerMatrix | None = None) -> Asked:
        """Encrypt float32[T, K] and multiply; `matrix`: under another plan."""
        sent = self.owner.encrypt(x, matrix or self.matrix)
        raw = self.worker.multiply(sent.payload, len(x), self.loaded)
        alpha = np.divide(1.0, sent.sealed.inverse_alpha, where=sent.sealed.inverse_alpha > 0,
                          out=np.zeros(len(x)))  # fmt: skip
        exact = alpha[:, None] * (x.astype(np.float64) @ self.weight.T.astype(np.float64))
        return Asked(sent, self.told(raw, len(x)), exact)

    def told(self, answer: NDArray[np.uint8], tokens: int) -> Answer:
        """The values of an answer in the upper bits of uint16[T, N], whatever their number."""
        values = unpack_answer(answer, tokens, len(self.weight), self.form)
        return values << np.uint16(16 - self.form.down_bits)

    def answer(self, told: Answer) -> NDArray[np.uint8]:
        """The bytes of values as `told` gives them."""
        return pack_answer(told >> np.uint16(16 - self.form.down_bits), self.form)

    def accepts(self, asked: Asked, told: Answer, worker: str) -> bool:
        """Whether the owner takes the answer."""
        try:
            self.owner.decrypt(asked.sent.sealed, self.answer(told), self.matrix, worker)
        except WrongAnswerError:
            return False
        return True

    def bound(self, asked: Asked, told: Answer) -> float:
        """The proven probability that a request passes whose answer errs as this one does."""
        honesty = self.owner._checks[self.matrix.name].judge.honesty
        p, unused = self.form.modulus, 16 - self.form.down_bits
        step = (told >> unused).astype(np.int64) - (asked.answer >> unused).astype(np.int64)
        results = asked.exact + step * 2.0**self.form.dropped_bits
        errors = results - p * np.rint(results / p) - asked.exact
        thin = self.parameters.thin
        if thin:  # what is off by p is moved
            errors -= p * np.rint(errors / p)
        largest = np.maximum(np.abs(errors).max(axis=1), 1e-9)
        # Where all rows together are suspicious, each value is looked at.
        seen = thin and largest > 2 * tolerance(self.matrix.plan, self.parameters)
        limit = np.where(seen, np.sqrt(SUSPICION), LIMIT)
        tolerated = limit * honesty.deviation.max() + np.abs(honesty.mean).max()
        length = np.maximum(np.linalg.norm(errors, axis=1), 1e-9)
        one = np.minimum(2 * tolerated / largest, 4 * np.sqrt(2) * tolerated / length)
        return float(np.minimum(one, 1.0).min() ** ROWS)

    def attack(self, craft: Craft) -> tuple[bool, float]:
        """(accepted, bound) of one drawn attack."""
        if self._attacks % RENEWED_AFTER == 0:
            self.renew()
        self._attacks += 1
        x = heavy_tailed_block(self.rng, int(self.rng.choice((1, 3, 8))), self.weight.shape[1])
        asked, told = craft(self, x)
        return self.accepts(asked, told, str(self._attacks)), self.bound(asked, told)


Craft = Callable[[Desk, NDArray[np.float32]], tuple[Asked, Answer]]


def _codes(rng: Rng, outputs: int, inputs: int, limit: int) -> NDArray[np.int8]:
    """Weights as quantising normal ones leaves them: the largest of a row is `limit`."""
    values = rng.standard_normal((outputs, inputs))
    return np.rint(values * limit / np.abs(values).max(axis=1, keepdims=True)).astype(np.int8)


def heavy_tailed_block(rng: Rng, tokens: int, inputs: int) -> NDArray[np.float32]:
    """A few tokens of heavy-tailed data at any scale."""
    x = rng.standard_t(3, (tokens, inputs)) * 10.0 ** rng.uniform(-6, 6)
    return x.astype(np.float32)


def changed(change: Callable[[Rng, NDArray[np.int64]], None]) -> Craft:
    """An honest answer, changed in place as int64[T, N] and taken mod 2^16."""

    def craft(desk: Desk, x: NDArray[np.float32]) -> tuple[Asked, Answer]:
        asked = desk.ask(x)
        values = asked.answer.astype(np.int64)
        change(desk.rng, values)
        return asked, (values % (1 << 16)).astype(np.uint16)

    return craft


def _power(rng: Rng) -> int:
    return int(1 << rng.integers(16)) * int(rng.choice((-1, 1)))


def _places(rng: Rng, outputs: int, count: int) -> NDArray[np.int64]:
    return rng.choice(outputs, min(count, outputs), replace=False)


def _flip(parity: int) -> Craft:
    def change(rng: Rng, values: NDArray[np.int64]) -> None:
        count = 2 * int(rng.integers(1, values.shape[1] // 2 - 1)) + parity
        values[rng.integers(len(values)), _places(rng, values.shape[1], count)] ^= TOP

    return changed(change)


def _flip_all(rng: Rng, values: NDArray[np.int64]) -> None:
    values[:, _places(rng, values.shape[1], 2 * int(rng.integers(1, 9)))] ^= TOP


def _one(rng: Rng, values: NDArray[np.int64]) -> None:
    values[rng.integers(len(values)), rng.integers(values.shape[1])] += _power(rng)


def _few(rng: Rng, values: NDArray[np.int64]) -> None:
    places = _places(rng, values.shape[1], int(rng.integers(2, 6)))
    values[rng.integers(len(values)), places] += _power(rng) * rng.choice((-1, 1), len(places))


def _many(rng: Rng, values: NDArray[np.int64]) -> None:
    places = _places(rng, values.shape[1], values.shape[1] // 2)
    values[rng.integers(len(values)), places] += _power(rng)


def _opposite(rng: Rng, values: NDArray[np.int64]) -> None:
    a, b = _places(rng, values.shape[1], 2)
    size = _power(rng)
    token = rng.integers(len(values))
    values[token, a] += size
    values[token, b] -= size


def _signs(rng: Rng, values: NDArray[np.int64]) -> None:
    period = int(rng.integers(1, 9))  # alternating, in blocks, or drawn
    pattern = np.where(np.arange(values.shape[1]) // period % 2, 1, -1)
    if period == 8:
        pattern = rng.choice((-1, 1), values.shape[1])
    values += _power(rng) * pattern


def _bias_one(rng: Rng, values: NDArray[np.int64]) -> None:
    values[:, rng.integers(values.shape[1])] += int(2.0 ** rng.uniform(0, 15))


def _bias_all(rng: Rng, values: NDArray[np.int64]) -> None:
    values += int(2.0 ** rng.uniform(0, 15))


def _noise(rng: Rng, values: NDArray[np.int64]) -> None:
    values += np.rint(rng.normal(0, 2.0 ** rng.uniform(0, 14), values.shape)).astype(np.int64)


def _swap_tokens(rng: Rng, values: NDArray[np.int64]) -> None:
    if len(values) == 1:
        values[:] = np.roll(values, 1, axis=1)
    else:
        a, b = _places(rng, len(values), 2)
        values[[a, b]] = values[[b, a]]


def _swap_outputs(rng: Rng, values: NDArray[np.int64]) -> None:
    a, b = _places(rng, values.shape[1], 2)
    values[:, [a, b]] = values[:, [b, a]]


def _scaled(rng: Rng, values: NDArray[np.int64]) -> None:
    values[:] = np.rint(values * float(rng.choice((-1.0, 0.5, 0.999, 1.001, 2.0, 3.0))))


def _zeros(rng: Rng, values: NDArray[np.int64]) -> None:
    values[...] = 0


def _random(rng: Rng, values: NDArray[np.int64]) -> None:
    values[...] = rng.integers(0, 1 << 16, values.shape)


def _replayed(desk: Desk, x: NDArray[np.float32]) -> tuple[Asked, Answer]:
    """The answer to the same values, encrypted before."""
    return desk.ask(x), desk.ask(x).answer


def _wrapped(desk: Desk, x: NDArray[np.float32]) -> tuple[Asked, Answer]:
    """Honest arithmetic under a plan that lies: a result is beyond p/2 and comes back p off."""
    longest = np.argmax(np.linalg.norm(desk.weight.astype(np.float64), axis=1))
    along = np.tile(desk.weight[longest].astype(np.float32), (len(x), 1))
    along *= np.float32(desk.rng.choice((-1, 1)))
    plan = replace(
        desk.matrix.plan, max_norm=desk.matrix.plan.max_norm / desk.rng.uniform(1.5, 1.9)
    )
    asked = desk.ask(along, replace(desk.matrix, plan=plan))
    return asked, asked.answer


def _other_weight(desk: Desk, x: NDArray[np.float32]) -> tuple[Asked, Answer]:
    """The product with a weight of which one bit is wrong."""
    weight = desk.weight.copy()
    place = desk.rng.integers(weight.shape[0]), desk.rng.integers(weight.shape[1])
    weight[place] ^= np.int8(1 << int(desk.rng.integers(7)))
    asked = desk.ask(x)
    loaded = desk.worker.load(weight, True, desk.form)
    return asked, desk.told(desk.worker.multiply(asked.sent.payload, len(x), loaded), len(x))


KINDS: dict[str, Craft] = {
    "top bits of an even number of values": _flip(0),
    "top bits of an odd number of values": _flip(1),
    "top bits of the same even number of outputs in all tokens": changed(_flip_all),
    "a power of two, one value": changed(_one),
    "a power of two, a few values": changed(_few),
    "a power of two, half of the values": changed(_many),
    "opposite powers of two": changed(_opposite),
    "a sign pattern times a power of two": changed(_signs),
    "a bias of one output": changed(_bias_one),
    "a bias of all outputs": changed(_bias_all),
    "noise": changed(_noise),
    "swapped tokens": changed(_swap_tokens),
    "swapped outputs": changed(_swap_outputs),
    "scaled": changed(_scaled),
    "zeros": changed(_zeros),
    "random bytes": changed(_random),
    "an answer to another request": _replayed,
    "a wrap by p": _wrapped,
    "one wrong bit of a weight": _other_weight,
}


def attacks(parameters: Parameters, total: int) -> list[dict[str, Any]]:
    """Tries of every kind: {name, tried, accepted, bound}. Even flips get at least a tenth."""
    desks = [
        Desk(96, 64, parameters, seed=1, form=form)
        for form in (FORMATS if parameters.thin else (None,))
    ]
    kinds = [name for name in KINDS if not (parameters.thin and KINDS[name] is _wrapped)]
    rows = []
    for number, name in enumerate(kinds):
        tries = max(1, total // 10 if number == 0 else total * 9 // (10 * (len(kinds) - 1)) + 1)
        results = [
            desks[turn % len(desks)].attack(KINDS[name])
            for turn in tqdm(range(tries), name[:40], leave=False)
        ]
        accepted = sum(taken for taken, _ in results)
        bound = float(np.mean([bound for _, bound in results]))
        rows.append({"name": name, "tried": tries, "accepted": accepted, "bound": bound})
        print(f"  {accepted:6} of {tries:6} accepted, bound {bound:9.2e}   {name}", flush=True)
    return rows


def honest(parameters: Parameters, tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    """Heavy-tailed tokens through one check; some are zeros, some the same in every request."""
    each = 1024
    desk = Desk(inputs, outputs, parameters, seed=2)
    data = heavy_tailed(8 * each, inputs, seed=3)
    rejected, done = 0, 0
    with tqdm(total=tokens, desc=f"honest {inputs}x{outputs}", leave=False) as bar:
        while done < tokens:
            start = int(desk.rng.integers(len(data) - each))
            x = data[start : start + each] * np.float32(10.0 ** desk.rng.uniform(-4, 4))
            x[::128] = data[0]  # a first token of every sequence
            x[127::128] = 0  # padding
            sent = desk.owner.encrypt(x, desk.matrix)
            told = desk.worker.multiply(sent.payload, each, desk.loaded)
            try:
                desk.owner.decrypt(sent.sealed, told, desk.matrix, "honest")
            except WrongAnswerError:
                rejected += each
            done += each
            bar.update(each)
    return {"in": inputs, "out": outputs, "tokens": done, "rejected": rejected}


def bias_found(
    parameters: Parameters, inputs: int, outputs: int, fraction: float, seed: int, most: int
) -> int:
    """Tokens until a constant bias of one output is found, `most` if it is not.

    fraction  of the output's standard deviation; the worker adds whole units of its answer, now
              the next above and now the next below
    """
    each = 256
    desk = Desk(inputs, outputs, parameters, seed)
    data = heavy_tailed(8 * each, inputs, seed)
    output = int(desk.rng.integers(outputs))
    column = desk.weight[output].astype(np.float32)
    for done in range(each, most, each):
        start = int(desk.rng.integers(len(data) - each))
        x = data[start : start + each]
        sent = desk.owner.encrypt(x, desk.matrix)
        told = desk.worker.multiply(sent.payload, each, desk.loaded)
        values = unpack_answer(told, each, outputs, desk.form).copy()
        exact = x @ column / sent.sealed.inverse_alpha
        wanted = fraction * float(exact.std()) / 2.0**desk.form.dropped_bits
        bias = np.floor(wanted + desk.rng.random(each)).astype(np.int64)
        values[:, output] = (values[:, output].astype(np.int64) + bias) % (1 << desk.form.down_bits)
        told = pack_answer(values, desk.form)
        try:
            desk.owner.decrypt(sent.sealed, told, desk.matrix, "liar")
        except WrongAnswerError:
            return done
    return most


def main() -> None:
    parser = Parser(__doc__, "benchmarks.integrity")
    add = parser.add_argument
    add("--preset", default="exact", choices=sorted(PRESETS), help="cipher parameters")
    add("--attacks", type=Whole(), default=100_000, help="attacks in total (100000)")
    add("--honest", type=Whole(), default=10_000_000, help="honest tokens (10000000)")
    add("--biased", type=TIMES, default=3, help="runs under a small bias (3)")
    add("--bias", type=Number(1e-6, 10.0), default=0.01,
        help="that bias, of an output's standard deviation (0.01)")  # fmt: skip
    record.add_json_option(parser)
    args = parser.parse()
    parameters = preset(args.preset)
    start = time.perf_counter()
    with clean_exit():
        print("lies:", flush=True)
        kinds = attacks(parameters, args.attacks)
        wide = args.honest // 50
        runs = [
            honest(parameters, args.honest - wide, 192, 160),
            honest(parameters, wide, 2048, 2048),
        ]
        for run in runs:
            print("honest: {in} -> {out}, {tokens} tokens, {rejected} rejected".format(**run))
        after = [
            bias_found(parameters, 2048, 2048, args.bias, seed, 1_000_000)
            for seed in range(args.biased)
        ]
        print(f"a bias of {args.bias:.1%} of an output's deviation: found after {after} tokens")
    figures = {
        "preset": args.preset,
        "kinds": kinds,
        "honest": runs,
        "honest_tokens": sum(run["tokens"] for run in runs),
        "honest_rejected": sum(run["rejected"] for run in runs),
        "bias_fraction": args.bias,
        "bias_found_after_tokens": max(after),
        "bias_found_after": after,
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
