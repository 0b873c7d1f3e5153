"""Checks of what a scheme does with what came off a wire: whoever sent it, nothing wrong opens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from backends.he.conformance.case import Bytes, Case, Scheme, delivers, own, refused
from backends.he.interface import Encrypted, Float32Array, UnguardedError
from protocol.errors import WrongAnswerError

PLACES = 24


def wrong_lengths_are_refused(scheme: Scheme) -> None:
    """By both sides, with ValueError; the request still opens with the right answer."""
    case = Case(scheme)
    x = case.inputs(5)
    sent, answer = case.ask(x)
    for payload in _wrong_lengths(own(sent.payload).tobytes()):
        refused(lambda p=payload: case.answer(p, 5), ValueError, f"{len(payload)} bytes up")  # type: ignore[misc]
    for payload in _wrong_lengths(answer.tobytes()):
        refused(lambda p=payload: case.open(sent, p), ValueError, f"{len(payload)} bytes down")  # type: ignore[misc]
    delivers(case, sent, answer, x)


def _wrong_lengths(raw: bytes) -> list[bytes]:
    """Cut, and with more behind: a byte, a number, a row, all of it again; of zeros, too."""
    cuts = {0, 1, len(raw) // 2, *(len(raw) - n for n in (1, 2, 4, 8, len(raw) // 5))}
    more = {1, 2, 4, 8, len(raw) // 5, len(raw)}
    return [
        *(raw[:size] for size in sorted(cuts)), *(raw + bytes(size) for size in sorted(more)),
        *(raw + raw[:size] for size in sorted(more)),
    ]  # fmt: skip


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
        refused(lambda t=told: case.open(sent, t), ValueError, f"an answer of {kind}")  # type: ignore[misc]
    delivers(case, sent, answer, x)


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
        if not _believed(case, sent, told, x, name):
            delivers(case, sent, answer, x)


def _believed(case: Case, sent: Encrypted, told: Bytes, x: Float32Array, name: str) -> bool:
    """Whether a lie was delivered; raise AssertionError where that does harm."""
    try:
        found = case.open(sent, told)
    except WrongAnswerError:
        return False
    off = float(np.abs(found - case.exact(x)).max())
    bound = case.scheme.error * np.abs(case.exact(x)).max()
    assert off <= bound, f"{name}: was believed"
    return True


def a_lie_anywhere_is_found(scheme: Scheme) -> None:
    """One value alone, of the first token or the last, of any output, in any block."""
    case, tokens = Case(scheme), scheme.block + 2
    sent, answer = case.ask(case.inputs(tokens))
    count = len(answer) // np.dtype(scheme.word).itemsize
    case.owner.discard(sent.sealed)
    drawn = case.rng.choice(count, min(PLACES, count), replace=False)
    x, fresh = case.inputs(tokens), None
    for place in (0, count - 1, *drawn.tolist()):
        if fresh is None:
            x = case.inputs(tokens)
            fresh = case.ask(x)
        numbers = _numbers(case, fresh[1])
        numbers[place] += scheme.modulus // 2
        told = _as_bytes(numbers, scheme)
        if _believed(case, fresh[0], told, x, f"value {place} of {count}"):
            fresh = None
    if fresh is not None:
        delivers(case, *fresh, x)


def old_answers_are_refused(scheme: Scheme) -> None:
    """One that was opened, told again; and those to two requests, exchanged."""
    case = Case(scheme)
    x = [case.inputs(4) for _ in range(3)]
    asked = [case.ask(each) for each in x]
    delivers(case, *asked[0], x[0])
    wrong = ((1, 0, "an old answer"), (1, 2, "another's answer"), (2, 1, "another's answer"))
    for to, of, what in wrong * 3:  # who insists is not right
        told = asked[of][1]
        refused(lambda t=to, a=told: case.open(asked[t][0], a), WrongAnswerError, what)  # type: ignore[misc]
    for sent, answer, each in ((*asked[1], x[1]), (*asked[2], x[2])):
        delivers(case, sent, answer, each)


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


def _first_again(case: Case, answer: Bytes) -> list[int]:
    """The first half in the place of the second."""
    numbers = _numbers(case, answer)
    half = len(numbers) // 2
    return numbers[:half] * 2 + numbers[2 * half :]


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
    "one half told twice": _first_again,
}


def nothing_unchecked_is_delivered(scheme: Scheme) -> None:
    """An unguarded matrix opens nothing, unless that was asked for; either is called a weakness."""
    case = Case(scheme, guarded=False)
    sent, answer = case.ask(case.inputs(2))
    refused(lambda: case.open(sent, answer), UnguardedError, "an answer that nothing checks")
    assert case.owner.weakness([case.matrix]), "a cipher without a check calls itself fit"
    case = Case(scheme, guarded=False, unverified=True)
    x = case.inputs(2)
    sent, answer = case.ask(x)
    delivers(case, sent, answer, x)
    assert case.owner.weakness([case.matrix]), "unverified=True is a weakness"
    guarded = Case(scheme)
    fit = guarded.owner.weakness([guarded.matrix]) is None
    assert fit is scheme.encrypts, "a guarded cipher is fit exactly when it encrypts"
    bare = Case(scheme, guarded=False, like=guarded)
    for matrices in ([guarded.matrix, bare.matrix], [bare.matrix, guarded.matrix]):
        said = guarded.owner.weakness(matrices)
        assert isinstance(said, str), "a cipher is called fit of which one matrix is not guarded"
    sent, answer = bare.ask(bare.inputs(2))
    refused(lambda: bare.open(sent, answer), UnguardedError, "an answer that nothing checks")


def honest_workers_stay_trusted(scheme: Scheme) -> None:
    """Many answers, whose errors the check sums up; the next lie is found all the same."""
    case = Case(scheme)
    for _ in range(20):
        x = case.inputs(7)
        sent, answer = case.ask(x)
        delivers(case, sent, answer, x)
    sent, answer = case.ask(case.inputs(7))
    refused(lambda: case.open(sent, answer[::-1].copy()), WrongAnswerError, "an answer reversed")
