"""A generator that repeats: two different messages share no key all the same."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he.entropy import OsEntropy, SeededEntropy
from backends.he.hedge import MessageHash, hash_rows
from backends.he.interface import Encrypted, OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from tests.he.conftest import Case, make_case

CASES = {inputs: make_case(inputs, 20) for inputs in (1, 2, 33, 300)}


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

    def next(self, x: NDArray[np.float32], matrix: OwnerMatrix | None = None) -> Encrypted:
        """The next request of a life."""
        return self.owner().encrypt(x, matrix or self.case.matrix)


def secrets(made: Encrypted) -> NDArray[np.int32]:
    return np.stack([secret._ntt for secret in made.sealed.secrets])


def unrelated(a: Encrypted, b: Encrypted) -> bool:
    """Bytes agree about as often as independent ones do, and no secret's row agrees."""
    equal, size = np.sum(a.payload == b.payload), a.payload.size
    often = size / 256 + 8 * np.sqrt(size / 256) + 8
    return bool(equal < often and np.mean(secrets(a) == secrets(b)) < 0.01)


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
        hashed = MessageHash(OsEntropy())
        ones = np.ones(600)
        tags = {
            hashed.tag(np.zeros((4, 2), np.uint64), ones[:rows], scaled[:inputs])
            for rows, inputs in ((1, 300), (2, 300), (2, 298), (3, 296))
        }
        assert len(tags) == 4


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
        assert unrelated(first, owner.encrypt(x, CASES[33].matrix))


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
    hashed = MessageHash(seeded)
    assert hashed.key(2) is None
    assert hashed.tag(np.ones((1, 2), np.uint64), np.ones(1), np.ones(2, np.float32)) == b""
    assert seeded.fresh_key(b"tag") == SeededEntropy(3).fresh_key()
