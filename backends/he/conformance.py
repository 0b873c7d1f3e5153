"""What every scheme has to pass, as functions that raise AssertionError and say what was promised.

    for check in CHECKS:
        check(Scheme("mine", owner=..., worker=..., matrix=...))

They look at a scheme through `interface.py` alone, and import no scheme: an honest worker's answer
opens, whatever else arrives does not, and neither can make the owner do anything but refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy, SeededEntropy
from backends.he.interface import (
    Encrypted,
    Float32Array,
    NonFiniteInputError,
    OwnerCipher,
    OwnerMatrix,
    UnguardedError,
    WorkerCipher,
)
from backends.he.secret import SecretReuseError
from protocol.errors import WrongAnswerError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scheme:
    """One to try, and what it says of itself.

    owner     makes the owner's half, from a source of keys (None: its own), unverified or not
    worker    makes the worker's half
    matrix    the owner's view of int8[N, K] and a direction (True: forward)
    error     of products, relative, at most
    word      an answer's bytes are numbers of this type (as bits, where they are not whole)
    modulus   that these numbers are below
    encrypts  False for one that sends its inputs as they are
    block     tokens after which it begins another ciphertext
    """

    name: str
    owner: Callable[[Entropy | None, bool], OwnerCipher]
    worker: Callable[[], WorkerCipher]
    matrix: Callable[[NDArray[np.int8], bool], OwnerMatrix]
    error: float
    word: str = "<u2"
    modulus: int = 1 << 16
    encrypts: bool = True
    block: int = 256


class Case:
    """A matrix with random weights, both halves, and the check of answers."""

    def __init__(
        self, scheme: Scheme, inputs: int = 12, outputs: int = 10, forward: bool = True,
        guarded: bool = True, unverified: bool = False,
    ) -> None:  # fmt: skip
        self.rng = np.random.default_rng([inputs, outputs, forward])
        shape = (outputs, inputs) if forward else (inputs, outputs)
        self.scheme, self.forward = scheme, forward
        self.weight = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.matrix = scheme.matrix(self.weight, forward)
        self.owner, self.worker = scheme.owner(None, unverified), scheme.worker()
        if guarded:
            self.owner.guard(self.matrix, self.weight, forward)
        self.operand = self._load(self.weight)

    def _load(self, weight: NDArray[np.int8]) -> Any:
        return self.worker.load(weight, self.forward, self.matrix.plan.format)

    def inputs(self, tokens: int, size: float = 1.0) -> Float32Array:
        """float32[T, K], a few of them much larger than others."""
        drawn = self.rng.standard_t(2, (tokens, self.matrix.in_features))
        return np.ascontiguousarray((size * drawn).astype(np.float32))

    def exact(self, x: Float32Array) -> NDArray[np.float64]:
        """What the product stands for."""
        operand = (self.weight.T if self.forward else self.weight).astype(np.float64)
        scaled = x.astype(np.float64) * self.matrix.in_scale
        return (scaled @ operand) * self.matrix.out_scale

    def answer(self, payload: Any, tokens: int, operand: Any = None) -> Bytes:
        """The worker's, as bytes of its own."""
        operand = self.operand if operand is None else operand
        return _own(self.worker.multiply(payload, tokens, operand))

    def ask(self, x: Float32Array) -> tuple[Encrypted, Bytes]:
        """A request, and an honest answer to it."""
        sent = self.owner.encrypt(x, self.matrix)
        return sent, self.answer(sent.payload, len(x))

    def open(self, sent: Encrypted, answer: Any) -> Float32Array:
        found = self.owner.decrypt(sent.sealed, answer, self.matrix, "worker")
        return np.asarray(found.cpu() if hasattr(found, "cpu") else found)

    def without_a_row(self) -> Any:
        """The matrix as a worker has it that takes one output's weights for zeros."""
        broken = self.weight.copy()
        broken[(0, ...) if self.forward else (..., 0)] = 0
        return self._load(broken)


def _own(answer: Any) -> Bytes:
    return np.array(np.frombuffer(answer, np.uint8))


def _refused(
    call: Callable[[], object], kinds: type[BaseException] | tuple[type[BaseException], ...],
    what: str,
) -> None:  # fmt: skip
    """Raise AssertionError unless the call raises one of `kinds`."""
    try:
        call()
    except kinds:
        return
    except Exception as error:
        raise AssertionError(f"{what}: raised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: was taken")


def _close(case: Case, found: Float32Array, x: Float32Array) -> None:
    want = case.exact(x)
    assert found.shape == want.shape, f"a result of shape {found.shape}, not {want.shape}"
    assert found.dtype == np.float32, f"results are {found.dtype}"
    off = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert off <= case.scheme.error, f"a product is {off:.2e} off; {case.scheme.error:.2e} was said"


def _delivers(case: Case, sent: Encrypted, answer: Bytes, x: Float32Array) -> None:
    """Raise AssertionError unless an honest answer opens to the product."""
    try:
        found = case.open(sent, answer)
    except WrongAnswerError as error:
        raise AssertionError(f"an honest answer was refused: {error}") from error
    _close(case, found, x)


def products_are_right(scheme: Scheme) -> None:
    """Both directions, one token and many, a ragged last block, one input, one output."""
    for inputs, outputs, tokens, forward in (
        (12, 10, 5, True), (10, 12, 5, False), (1, 3, 2, True), (40, 1, 1, True),
        (3, 2, scheme.block + 3, True),
    ):  # fmt: skip
        case = Case(scheme, inputs, outputs, forward)
        x = case.inputs(tokens)
        sent, answer = case.ask(x)
        _delivers(case, sent, answer, x)


def products_are_right_at_any_scale(scheme: Scheme) -> None:
    """Tokens of every size in one request, and zeros, of which the product is zero."""
    case = Case(scheme)
    x = case.inputs(8)
    x /= np.abs(x).max(axis=1, keepdims=True)
    sizes = np.array([1, 1e-30, 1e30, 0, 1e-6, 1e6, 3, 0], np.float32)
    sent, answer = case.ask(x * sizes[:, None])
    found = case.open(sent, answer)
    want = case.exact(x * sizes[:, None])
    assert not found[sizes == 0].any(), "a token of zeros has a product"
    for row, right in zip(found[sizes > 0], want[sizes > 0], strict=True):
        off = np.linalg.norm(row - right) / np.linalg.norm(right)
        assert off <= 3 * scheme.error, f"a token's product is {off:.2e} off"


def sizes_are_as_declared(scheme: Scheme) -> None:
    """Of requests and answers; whatever is in them."""
    case = Case(scheme)
    for tokens in (1, 2, scheme.block, scheme.block + 1):
        up = case.owner.up_bytes(case.matrix, tokens)
        down = case.owner.down_bytes(case.matrix, tokens)
        for size in (0.0, 1.0, 1e20):
            sent = case.owner.encrypt(case.inputs(tokens, size), case.matrix)
            assert len(sent.payload) == up, f"{len(sent.payload)} bytes went up, {up} were said"
            case.owner.discard(sent.sealed)
        answer = case.answer(bytes(up), tokens)
        assert len(answer) == down, f"{len(answer)} bytes came down, {down} were said"


def bad_input_is_refused(scheme: Scheme) -> None:
    """What is no number, and what has another shape or type; the next request works."""
    case = Case(scheme)
    good = case.inputs(3)
    for value in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[1, 2] = value
        _refused(lambda b=bad: case.owner.encrypt(b, case.matrix), NonFiniteInputError, str(value))  # type: ignore[misc]
    shapes: tuple[Any, ...] = (
        good[:, 1:], good[0], good[None], good[:0], good.astype(np.float64), good[:, ::-1],
    )  # fmt: skip
    for bad in shapes:
        what = f"{bad.dtype}{list(bad.shape)}"
        _refused(lambda b=bad: case.owner.encrypt(b, case.matrix), ValueError, what)  # type: ignore[misc]
    sent, answer = case.ask(good)
    _delivers(case, sent, answer, good)


def a_sealed_value_opens_once(scheme: Scheme) -> None:
    """Then, and after `discard`, it holds and opens nothing; `discard` twice is harmless."""
    case = Case(scheme)
    for ends in (case.open, lambda sent, answer: case.owner.discard(sent.sealed)):
        x = case.inputs(4)
        sent, answer = case.ask(x)
        private = [a for a in _arrays(sent.sealed) if not _shared(a, (x, sent.payload))]
        assert private, "a sealed value holds nothing that could be wiped"
        ends(sent, answer)
        assert not any(a.any() for a in private), "something of a request is left"
        _refused(lambda s=sent, a=answer: case.open(s, a), SecretReuseError, "an answer again")  # type: ignore[misc]
        case.owner.discard(sent.sealed)


def _arrays(thing: Any) -> Iterator[Any]:
    """Every array and tensor an object holds, but for the check of its matrix, which lives on."""
    if hasattr(thing, "any") and hasattr(thing, "dtype"):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _arrays(part)
    elif hasattr(thing, "__dict__") and not isinstance(thing, Enum):
        for name, part in vars(thing).items():
            if name != "check":
                yield from _arrays(part)


def _shared(array: Any, others: tuple[Any, ...]) -> bool:
    if not isinstance(array, np.ndarray):
        return False
    return any(isinstance(o, np.ndarray) and np.shares_memory(array, o) for o in others)


def requests_are_fresh(scheme: Scheme) -> None:
    """The same input twice is two different requests, and neither reuses a key."""
    if not scheme.encrypts:
        return
    case = Case(scheme, 64, 4)
    x, before = case.inputs(16), case.owner.blocks
    made = [case.owner.encrypt(x, case.matrix) for _ in range(2)]
    first, second = (_own(each.payload) for each in made)
    whole = len(first) // 8 * 8
    same = np.mean(first[:whole].view("<u8") == second[:whole].view("<u8"))
    assert same < 0.01, f"{same:.0%} of a request are as in the one before"
    assert not case.owner.simulated_randomness, "keys of a seed, which nobody asked for"
    assert scheme.owner(SeededEntropy(1), False).simulated_randomness, "a seed goes unsaid"
    now = before + 2 * -(-len(x) // scheme.block)
    assert case.owner.blocks in (before, now), f"{case.owner.blocks} blocks, not {now}"


def workers_are_exact(scheme: Scheme) -> None:
    """The same request has the same answer, alone or with others, in whatever bytes come in."""
    case = Case(scheme)
    sent = case.owner.encrypt(case.inputs(5), case.matrix)
    right, raw = case.answer(sent.payload, 5), _own(sent.payload).tobytes()
    for payload in (raw, bytearray(raw), memoryview(raw)):
        assert np.array_equal(case.answer(payload, 5), right), "an answer differs from the first"
    for answer in case.worker.multiply_many([(raw, 5), (raw, 5)], case.operand):
        assert np.array_equal(_own(answer), right), "an answer differs when there are several"


def wrong_lengths_are_refused(scheme: Scheme) -> None:
    """By both sides, with ValueError; the request still opens with the right answer."""
    case = Case(scheme)
    x = case.inputs(5)
    sent, answer = case.ask(x)
    raw = _own(sent.payload).tobytes()
    for payload in (b"", raw[:-1], raw + b"\0", raw[: len(raw) // 2], raw * 2):
        _refused(lambda p=payload: case.answer(p, 5), ValueError, f"{len(payload)} bytes up")  # type: ignore[misc]
    told = answer.tobytes()
    for payload in (b"", told[:-1], told + b"\0", told[: len(told) // 2], told * 2):
        _refused(lambda p=payload: case.open(sent, p), ValueError, f"{len(payload)} bytes down")  # type: ignore[misc]
    _delivers(case, sent, answer, x)


def garbage_is_refused(scheme: Scheme) -> None:
    """Any bytes of the right number: the owner refuses them, the worker answers or refuses."""
    case = Case(scheme)
    x = case.inputs(5)
    sent, answer = case.ask(x)
    up, down = len(sent.payload), len(answer)
    for kind in ("zeros", "ones", "noise", "text"):
        request, told = (_garbage(kind, size, case.rng) for size in (up, down))
        with suppress(ValueError):
            assert len(case.answer(request, 5)) == down, f"{kind}: an answer of another size"
        _refused(lambda t=told: case.open(sent, t), ValueError, f"an answer of {kind}")  # type: ignore[misc]
    _delivers(case, sent, answer, x)


def _garbage(kind: str, size: int, rng: np.random.Generator) -> bytes:
    if kind == "noise":
        return rng.bytes(size)
    return ({"zeros": b"\0", "ones": b"\xff", "text": b"private "}[kind] * size)[:size]


def lies_are_found(scheme: Scheme) -> None:
    """Structured ones, of which each has fooled some check. What was lied to still opens.

    What changes no result is no lie: half of a modulus on what a key then multiplies by 2.
    """
    case, (_, replayed) = Case(scheme), Case(scheme).ask(Case(scheme).inputs(6))
    for name in (*LIES, "the answer to another request", "an output left out"):
        x = case.inputs(6)
        sent, answer = case.ask(x)
        if name in LIES:
            told = _as_bytes(LIES[name](case, answer), scheme)
        elif name == "an output left out":
            told = case.answer(sent.payload, 6, case.without_a_row())
        else:
            told = replayed
        assert not np.array_equal(told, answer), f"{name}: no lie at all"
        try:
            found = case.open(sent, told)
        except WrongAnswerError:
            _delivers(case, sent, answer, x)
        else:
            off = float(np.abs(found - case.exact(x)).max())
            assert off <= scheme.error * np.abs(case.exact(x)).max(), f"{name}: was believed"


Lie = Callable[[Case, Bytes], list[int]]


def _numbers(case: Case, answer: Bytes) -> list[int]:
    return [int(number) for number in answer.view(case.scheme.word)]


def _as_bytes(numbers: list[int], scheme: Scheme) -> Bytes:
    whole = [number % scheme.modulus for number in numbers]
    return np.array(whole, scheme.word).view(np.uint8)


def _top_bits(count: int | None) -> Lie:
    """Twice p/2 is nothing mod p: what a check mod p with signs for coefficients cannot see."""

    def lie(case: Case, answer: Bytes) -> list[int]:
        numbers = _numbers(case, answer)
        for place in range(len(numbers) // 2 * 2 if count is None else count):
            numbers[place] += case.scheme.modulus // 2
        return numbers

    return lie


def _each(change: Callable[[int, int], int]) -> Lie:
    """`change` of a number and the modulus."""
    return lambda case, answer: [change(n, case.scheme.modulus) for n in _numbers(case, answer)]


def _moved(shift: Callable[[int], int]) -> Lie:
    def lie(case: Case, answer: Bytes) -> list[int]:
        numbers = _numbers(case, answer)
        by = shift(len(numbers))
        return numbers[by:] + numbers[:by]

    return lie


LIES: dict[str, Lie] = {
    "the top bits of two values": _top_bits(2),
    "the top bits of four values": _top_bits(4),
    "the top bits of all values": _top_bits(None),
    "all shifted by p/2": _each(lambda n, p: n + p // 2),
    "a constant added": _each(lambda n, p: n + p // 16),
    "doubled": _each(lambda n, p: 2 * n),
    "three times as large": _each(lambda n, p: 3 * n),
    "negated": _each(lambda n, p: -n),
    "rows exchanged": _moved(lambda size: size // 2),
    "all values moved by one": _moved(lambda size: 1),
}


def nothing_unchecked_is_delivered(scheme: Scheme) -> None:
    """An unguarded matrix opens nothing, unless that was asked for; either is called a weakness."""
    case = Case(scheme, guarded=False)
    sent, answer = case.ask(case.inputs(2))
    _refused(lambda: case.open(sent, answer), UnguardedError, "an answer that nothing checks")
    assert case.owner.weakness([case.matrix]), "a cipher without a check calls itself fit"
    case = Case(scheme, guarded=False, unverified=True)
    x = case.inputs(2)
    sent, answer = case.ask(x)
    _delivers(case, sent, answer, x)
    assert case.owner.weakness([case.matrix]), "unverified=True is a weakness"
    guarded = Case(scheme)
    fit = guarded.owner.weakness([guarded.matrix]) is None
    assert fit is scheme.encrypts, "a guarded cipher is fit exactly when it encrypts"


def honest_workers_stay_trusted(scheme: Scheme) -> None:
    """Many answers, whose errors the check sums up."""
    case = Case(scheme)
    for _ in range(20):
        x = case.inputs(7)
        sent, answer = case.ask(x)
        _delivers(case, sent, answer, x)


CHECKS = (
    products_are_right, products_are_right_at_any_scale, sizes_are_as_declared,
    bad_input_is_refused, a_sealed_value_opens_once, requests_are_fresh, workers_are_exact,
    wrong_lengths_are_refused, garbage_is_refused, lies_are_found, nothing_unchecked_is_delivered,
    honest_workers_stay_trusted,
)  # fmt: skip
"""All of it, each of one scheme."""
