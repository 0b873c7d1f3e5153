"""Checks of what a scheme keeps to itself: keys, requests that tell nothing, errors that do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from logging import StreamHandler, getLogger
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.conformance.case import Bytes, Case, Scheme, held, own, refused
from backends.he.entropy import SeededEntropy
from backends.he.interface import Encrypted
from backends.he.secret import SecretReuseError

_ALIKE = 9.0
"""Deviations that the bytes of one place agree with those of another: among 10^7 places, by chance,
in one run of 10^11."""


def a_sealed_value_opens_once(scheme: Scheme) -> None:
    """Then, and after `discard`, it holds and opens nothing, nor does its owner keep anything."""
    case = Case(scheme)
    for ends in (case.open, lambda sent, answer: case.owner.discard(sent.sealed)):
        x = case.inputs(4)
        public = [*held(case.owner), *held(case.matrix), x]
        sent, answer = case.ask(x)
        public.append(sent.payload)
        private = list(_private(sent.sealed, public))
        assert private, "a sealed value holds nothing that could be wiped"
        copies = [_raw(each) for each in (*private, x)]
        found = ends(sent, answer)
        copies += [] if found is None else [_raw(found)]
        left = [*private, *_private(sent.sealed, [*public, *held(case.owner)])]
        assert not any(_raw(each).strip(b"\0") for each in left), "something of a request is left"
        refused(lambda s=sent, a=answer: case.open(s, a), SecretReuseError, "an answer again")  # type: ignore[misc]
        case.owner.discard(sent.sealed)
        kept = [_raw(each) for each in held(case.owner)]
        for copy in copies:
            known = _telling(copy) and any(copy in each for each in kept)
            assert not known, "the owner keeps something of a request, or of its result"


def _private(sealed: Any, public: list[Any]) -> Iterator[Any]:
    """What a sealed value holds, but for what is the owner's all along, or not secret."""
    arrays = [each for each in public if isinstance(each, np.ndarray)]
    known = {id(each) for each in public}
    for each in held(sealed):
        shared = isinstance(each, np.ndarray) and any(np.shares_memory(each, a) for a in arrays)
        if id(each) not in known and not shared:
            yield each


def _raw(thing: Any) -> bytes:
    if isinstance(thing, bytes | bytearray):
        return bytes(thing)
    return np.asarray(thing.cpu() if hasattr(thing, "cpu") else thing).tobytes()


def _telling(data: bytes) -> bool:
    """Whether these bytes would not be found elsewhere by chance, as few small numbers are."""
    return len(data) >= 16 and len(set(data)) > 10


def requests_are_fresh(scheme: Scheme) -> None:
    """The same input twice is two different requests; no key is used again, or in a request."""
    case = Case(scheme, 16, 4)
    tokens = max(64, 2 * scheme.block)
    x, before = case.inputs(tokens), case.owner.blocks
    x[tokens // 2 :] = x[: tokens // 2]  # two blocks of the same, where there are several
    if scheme.encrypts:
        made = [case.owner.encrypt(x, case.matrix) for _ in range(2)]
        _unlike(np.concatenate([own(each.payload) for each in made]))
        public = [*held(case.owner), *held(case.matrix)]
        made.append(case.owner.encrypt(case.inputs(tokens), case.matrix))
        sealed = [list(_private(each.sealed, [*public, each.payload])) for each in made]
        for each, private in zip(made, sealed, strict=True):
            _without_a_key(each, private)
        _with_other_keys(sealed[0], sealed[-1])
        now = before + 3 * -(-tokens // scheme.block)
        assert case.owner.blocks in (before, now), f"{case.owner.blocks} blocks, not {now}"
    assert not case.owner.simulated_randomness, "keys of a seed, which nobody asked for"
    assert scheme.owner(SeededEntropy(1), False).simulated_randomness, "a seed goes unsaid"


def _unlike(sent: Bytes) -> None:
    """Raise AssertionError where bytes of requests agree with others more than by chance.

    A key or a mask that is used twice, or none, leaves two places at some distance whose bytes go
    together: all distances at once are one convolution. Words of 64 bits are never the same twice.
    """
    words = sent[: len(sent) // 8 * 8].view("<u8")
    again = 1 - len(np.unique(words)) / len(words)
    assert again < 0.01, f"{again:.0%} of two requests' words were sent before"
    values = words.view(np.uint8).reshape(-1, 8).astype(np.float64)
    values -= values.mean(axis=0)  # numbers of fewer bits have bytes of zeros
    flat = values.reshape(-1)
    spectrum = np.abs(np.fft.rfft(flat, 2 * len(flat))) ** 2
    together = np.fft.irfft(spectrum)[1 : len(flat) // 2 + 1]
    pairs = len(flat) - np.arange(1, len(together) + 1)
    worst = (together / np.mean(flat**2) / np.sqrt(pairs)).max()
    assert worst < _ALIKE, f"bytes of two requests go together, by {worst:.0f} deviations"


def _without_a_key(sent: Encrypted, private: list[Any]) -> None:
    """Raise AssertionError where a request has in it what its sealed value holds."""
    public = _words(_raw(own(sent.payload)))
    for each in private:
        found = np.intersect1d(_words(_raw(each)), public)
        assert not len(found), "a request has something in it that is sealed"


def _with_other_keys(one: list[Any], other: list[Any]) -> None:
    """Raise AssertionError where something is sealed that another request has in it, too."""
    theirs = [_words(_raw(each)) for each in other]
    for each in other:
        mine = np.unique(_words(_raw(each)))
        if len(mine) >= 4:
            again = len(mine) < 0.9 * len(_words(_raw(each)))
            assert not again, "tokens of a request have one key"
    for each in one:
        mine = np.unique(_words(_raw(each)))
        if len(mine) >= 4:  # fewer are what a matrix has for all its requests
            assert not any(np.isin(mine, part).all() for part in theirs), (
                "two requests have one key"
            )


def _words(data: bytes) -> NDArray[np.uint64]:
    """The words of 64 bits, but for small numbers, which mean nothing where they turn up twice."""
    words = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
    return np.asarray(words[(words > 1 << 32) & (words < (1 << 64) - (1 << 32))])


def errors_tell_nothing(scheme: Scheme) -> None:
    """Texts, causes, what is printed and logged are the same whatever the values were."""
    case = Case(scheme)
    first, second = (_heard(partial(_texts, case, case.inputs(5))) for _ in range(2))
    for what, text in first.items():
        assert text == second[what], f"{what}: what is said of it depends on values: {text}"


def _heard(call: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The texts, and what was printed or logged meanwhile."""
    said = StringIO()
    handler = StreamHandler(said)
    getLogger().addHandler(handler)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            texts = call()
    finally:
        getLogger().removeHandler(handler)
    return texts | {"what is printed": _nameless(said.getvalue())}


def _texts(case: Case, x: NDArray[np.float32]) -> dict[str, str]:
    """What is said of each thing that can go wrong with an input, and with an answer."""
    bad, (sent, answer) = x.copy(), case.ask(x)
    bad[1, 2] = np.nan
    other = case.answer(case.owner.encrypt(case.inputs(5), case.matrix).payload, 5)
    told = {
        "NaN": _told(lambda: case.owner.encrypt(bad, case.matrix)),
        "a wrong shape": _told(lambda: case.owner.encrypt(x[:, 1:], case.matrix)),
        "a wrong type": _told(lambda: case.owner.encrypt(x.astype(np.float64), case.matrix)),
        "a short request": _told(lambda: case.answer(own(sent.payload)[:-1], 5)),
        "a short answer": _told(lambda: case.open(sent, answer[:-1])),
        "another answer": _told(lambda: case.open(sent, other)),
        "zeros": _told(lambda: case.open(sent, bytes(len(answer)))),
        "a sealed value": _nameless(repr(sent.sealed)),
    }
    case.open(sent, answer)
    told["an answer again"] = _told(lambda: case.open(sent, answer))
    told["an open value"] = _nameless(repr(sent.sealed))
    return told


def _told(call: Callable[[], object]) -> str:
    """The whole chain of an error, as a traceback prints it; its places aside."""
    try:
        call()
    except Exception as raised:
        error: BaseException | None = raised
        parts = []
        while error is not None:
            parts += [type(error).__name__, str(error), *getattr(error, "__notes__", ())]
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return _nameless("; ".join(parts))
    return "nothing"


def _nameless(text: str) -> str:
    """Without addresses of memory."""
    return re.sub(r"\b0x[0-9a-f]+", "0x", text)
