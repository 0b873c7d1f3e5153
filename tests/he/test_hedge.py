"""A generator that repeats: two different messages share no key all the same.

And where secrets do repeat, errors repeat with them: other errors under the same secrets average
out.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he.entropy import Keystream, OsEntropy, SeededEntropy
from backends.he.hedge import MessageHash, hash_rows, scheme_tag
from backends.he.interface import OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.params import PRESETS, Parameters, preset
from backends.he.public import PublicMatrix, public_seed
from tests.he.conftest import Case, make_case

CASES = {inputs: make_case(inputs, 20) for inputs in (1, 2, 33, 300)}


@dataclass
class Made:
    """A request: its bytes, int32[blocks, rank, 256] secrets, and all error bits."""

    payload: NDArray[np.uint8]
    secrets: NDArray[np.int32]
    errors: NDArray[np.uint8]


def encrypt(owner: MlweOwner, x: NDArray[np.float32], matrix: OwnerMatrix) -> Made:
    """A request, and what it was made with."""
    kernel, noises = owner._encrypt, {}

    def watched(*arguments: Any) -> None:
        noises[arguments[-2]] = arguments[5].copy()  # each thread's, of columns from here on
        kernel(*arguments)

    owner._encrypt = watched
    try:
        made = owner.encrypt(x, matrix)
    finally:
        owner._encrypt = kernel
    secrets = np.stack([secret._ntt for secret in made.sealed.secrets])
    return Made(made.payload, secrets, np.concatenate([noises[first] for first in sorted(noises)]))


class Snapshot:
    """The lives of one snapshot: the same generator, clock and process memory in each."""

    def __init__(self, patch: pytest.MonkeyPatch, case: Case) -> None:
        patch.setattr(os, "urandom", lambda size: b"s" * size)
        patch.setattr(time, "time_ns", lambda: 1)
        self.case = case

    def owner(self) -> MlweOwner:
        """As it was when the snapshot was taken: one request encrypted, the next one to come."""
        owner = MlweOwner(self.case.parameters, self.case.public)
        owner.encrypt(np.ones((1, self.case.matrix.in_features), np.float32), self.case.matrix)
        return owner

    def next(self, x: NDArray[np.float32], matrix: OwnerMatrix | None = None) -> Made:
        """The next request of a life."""
        return encrypt(self.owner(), x, matrix or self.case.matrix)


def unrelated(a: Made, b: Made) -> bool:
    """Bytes and error bits agree about as often as independent ones do, and no secret agrees."""
    for one, other in ((a.payload, b.payload), (a.errors, b.errors)):
        equal, size = np.sum(one == other), one.size
        if equal == size or equal > size / 256 + 8 * np.sqrt(size / 256) + 8:
            return False
    rank = min(a.secrets.shape[1], b.secrets.shape[1])
    return bool(np.mean(a.secrets[:, :rank] == b.secrets[:, :rank]) < 0.01)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    inputs=st.sampled_from(sorted(CASES)),
    tokens=st.sampled_from([1, 2, 40, 256, 257]),
    place=st.integers(0, 1 << 20),
    bit=st.integers(0, 22) | st.just(31),
    seed=st.integers(0, 1000),
)
def test_one_bit_of_one_value_changes_every_key(
    monkeypatch: pytest.MonkeyPatch, inputs: int, tokens: int, place: int, bit: int, seed: int
) -> None:
    """Wherever it is; the same message gives the same ciphertext, which tells no more than that."""
    with monkeypatch.context() as patch:
        world = Snapshot(patch, CASES[inputs])
        x = np.random.default_rng(seed).standard_normal((tokens, inputs)).astype(np.float32)
        other = x.copy()
        other.reshape(-1).view(np.uint32)[place % x.size] ^= np.uint32(1 << bit)
        a, b, same = world.next(x), world.next(other), world.next(x)
        assert unrelated(a, b)
        assert np.array_equal(a.payload, same.payload)


def test_what_else_makes_another_message_changes_every_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same values under another scale, for another matrix, or in another shape."""
    case = CASES[300]
    with monkeypatch.context() as patch:
        world = Snapshot(patch, case)
        x = np.ones((4, 300), np.float32)
        first = world.next(x)
        scaled = case.matrix.in_scale.copy()
        scaled[7] = np.nextafter(scaled[7], np.float32(2))
        wider = replace(case.matrix.plan, max_norm=2 * case.matrix.plan.max_norm)
        for matrix in (replace(case.matrix, in_scale=scaled), replace(case.matrix, plan=wider)):
            assert unrelated(first, world.next(x, matrix))
        hashed = MessageHash(OsEntropy(), scheme_tag(case.parameters, case.public))
        ones = np.ones(600)
        tags = {
            hashed.tag(np.zeros((4, 2), np.uint64), ones[:rows], scaled[:inputs])
            for rows, inputs in ((1, 300), (2, 300), (2, 298), (3, 296))
        }
        assert len(tags) == 4


def other_scheme(what: str) -> tuple[Parameters, PublicMatrix]:
    """The standard one with another public matrix, or another rank, or other weights."""
    parameters, tag = preset("exact"), b""
    if what == "owner's tag":
        tag = b"mine"
    elif what == "weight bits":
        parameters = replace(parameters, weight_bits=7)
    else:
        parameters = preset(what)
    return parameters, PublicMatrix(public_seed(bytes(32), parameters, tag), parameters.rank)


@pytest.mark.parametrize("what", ["owner's tag", "weight bits", "conservative"])
def test_what_encrypts_a_message_changes_every_key(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The same message under another A, or other parameters, when everything else is stuck."""
    case = CASES[300]
    parameters, public = other_scheme(what)
    x = np.random.default_rng(0).standard_normal((256, 300)).astype(np.float32)
    with monkeypatch.context() as patch:
        first = Snapshot(patch, case).next(x)
        other = Snapshot(patch, replace(case, parameters=parameters, public=public))
        # The same scales: what the plan makes of other parameters would be another message.
        amplitude = case.matrix.plan.amplitude(case.parameters)
        patch.setattr(type(case.matrix.plan), "amplitude", lambda *_: amplitude)
        assert unrelated(first, other.next(x))


def test_every_scheme_has_a_tag_of_its_own() -> None:
    """Presets, and public matrices of one preset."""
    schemes = [other_scheme(what) for what in ("owner's tag", "weight bits", *PRESETS)]
    tags = {scheme_tag(*scheme) for scheme in schemes}
    assert len(tags) == len(schemes)
    assert {len(tag) for tag in tags} == {64}
    standard, tagged = other_scheme("exact"), other_scheme("owner's tag")
    same_seed = replace(preset("exact"), weight_bits=7), standard[1]
    assert len({scheme_tag(*scheme) for scheme in (standard, tagged, same_seed)}) == 3


def turning(first: Any, then: Any, at: int) -> Callable[..., Any]:
    """A function that returns `first` until its call number `at`, and `then` from there on."""
    calls = itertools.count()
    return lambda *_: first if next(calls) < at else then


@pytest.mark.parametrize("source", ["clock", "generator", "another thread"])
def test_the_same_secrets_never_meet_other_errors(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Whatever changes in the middle of a request of one life and not of another."""
    with monkeypatch.context() as patch:
        world = Snapshot(patch, CASES[300])
        x = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
        first = world.next(x)
        outcomes = set()
        for at in range(6):
            owner, made = world.owner(), Keystream.__init__
            with monkeypatch.context() as inner:
                if source == "clock":
                    inner.setattr(time, "time_ns", turning(1, 2, at))
                elif source == "generator":
                    inner.setattr(os, "urandom", turning(b"s" * 32, b"t" * 32, at))
                else:
                    draws = turning(False, True, at)

                    def started(
                        stream: Keystream, key: bytearray, owner: MlweOwner = owner,
                        draws: Callable[..., bool] = draws,
                    ) -> None:  # fmt: skip
                        if draws():
                            owner._entropy.fresh_key(b"of another thread")
                        made(stream, key)  # noqa: B023

                    inner.setattr(Keystream, "__init__", started)
                again = encrypt(owner, x, CASES[300].matrix)
            same = np.array_equal(first.payload, again.payload)
            assert same or unrelated(first, again)
            outcomes.add(bool(same))
        assert outcomes == ({True} if source == "another thread" else {True, False})


@pytest.mark.parametrize("differs", ["process", "clock"])
def test_a_session_differs_by_each_of_its_parts(
    monkeypatch: pytest.MonkeyPatch, differs: str
) -> None:
    """Two processes of one snapshot, taken before their start; afterwards all is the same."""
    keys = set()
    for turn in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "urandom", lambda size: b"s" * size)
            patch.setattr(os, "getpid", lambda: turn if differs == "process" else 1)  # noqa: B023
            patch.setattr(time, "time_ns", lambda: turn if differs == "clock" else 1)  # noqa: B023
            entropy = OsEntropy()
            patch.setattr(os, "getpid", lambda: 1)
            patch.setattr(time, "time_ns", lambda: 1)
            keys.add(bytes(entropy.fresh_key()))
    assert len(keys) == 2


def test_the_hashs_key_is_a_secret_of_this_process() -> None:
    """Whoever knew it could look for messages of one tag."""
    one, other = (MessageHash(OsEntropy(), b"").key(600) for _ in range(2))
    assert one is not None
    assert other is not None
    assert np.mean(one == other) < 0.01
    assert len(np.unique(one)) > 0.99 * one.size


@pytest.mark.parametrize("differs", ["generator", "session", "clock", "count"])
def test_each_other_source_is_enough(monkeypatch: pytest.MonkeyPatch, differs: str) -> None:
    """Same message, all the rest stuck."""
    with monkeypatch.context() as patch:
        world = Snapshot(patch, CASES[33])
        x = np.ones((3, 33), np.float32)
        first, owner = world.next(x), world.owner()
        assert isinstance(owner._entropy, OsEntropy)
        if differs == "generator":
            patch.setattr(os, "urandom", lambda size: b"t" * size)
        elif differs == "session":
            owner._entropy._session = bytes(32)
        elif differs == "clock":
            patch.setattr(time, "time_ns", lambda: 2)
        else:
            owner.encrypt(x, CASES[33].matrix)
        assert unrelated(first, encrypt(owner, x, CASES[33].matrix))


@pytest.mark.parametrize("inputs", [1, 2, 7, 8, 33])
def test_the_hash_is_what_its_page_says(inputs: int) -> None:
    """NH by Python's integers, for even and odd widths."""
    rng = np.random.default_rng(inputs)
    half = (inputs + 1) // 2
    words, key = (rng.integers(0, 2**32, shape, np.uint32) for shape in ((3, inputs), (2, 2, half)))
    sums = np.empty((3, 2), np.uint64)
    hash_rows(words, key, sums, 0, 3)
    whole = inputs // 2
    for t, i in np.ndindex(3, 2):
        total = 0
        for j in range(half):
            left = int(words[t, j]) if j < whole else int(words[t, -1])
            right = int(words[t, whole + j]) if j < whole else 0
            k, l = (int(part[j]) for part in key[i])  # noqa: E741
            total += ((left + k) % 2**32) * ((right + l) % 2**32)
        assert int(sums[t, i]) == total % 2**64


def test_simulated_keys_stay_what_they_were() -> None:
    """A seed gives the same keys whatever is encrypted, and no tag is computed for them."""
    seeded = SeededEntropy(3)
    hashed = MessageHash(seeded, b"")
    assert hashed.key(2) is None
    assert hashed.tag(np.ones((1, 2), np.uint64), np.ones(1), np.ones(2, np.float32)) == b""
    assert seeded.fresh_key(b"tag") == SeededEntropy(3).fresh_key()
