"""What remains of a secret in memory once nobody needs it: nothing that Python can reach.

Every array and key the cipher makes on the way is recorded where it is made, and looked at later.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.he.clear import ClearOwner
from backends.he.entropy import Keystream, OsEntropy, random_bytes
from backends.he.integrity import Pool
from backends.he.interface import OwnerCipher
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.reference import ReferenceOwner
from backends.he.secret import SecretReuseError
from protocol.errors import WrongAnswerError
from tests.he.conftest import Case, make_case


def arrays(thing: Any) -> Iterator[NDArray[Any]]:
    """Every array that an object holds, but for the check of its matrix, which lives on."""
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from arrays(part)
    elif hasattr(thing, "__dict__") and not isinstance(thing, Enum):
        for name, part in vars(thing).items():
            if name != "check":
                yield from arrays(part)


class Watched(OsEntropy):
    """Remembers every key as the bytearray it gave away."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[bytearray] = []

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        key = super().fresh_key(tag)
        self.keys.append(key)
        return key


class Bench:
    """A guarded owner whose keys, streams and error buffers are all remembered."""

    def __init__(self, case: Case, patch: pytest.MonkeyPatch) -> None:
        self.case = case
        self.entropy = Watched()
        self.owner = MlweOwner(case.parameters, case.public, self.entropy)
        self.owner.guard(case.matrix, case.weight, case.forward)
        self.lasting = len([key for key in self.entropy.keys if any(key)])
        self.taken: list[NDArray[Any]] = []
        take, scratch, rows = Keystream.take, self.owner._scratch, Pool.rows

        def kept_rows(pool: Pool, which: Any) -> NDArray[np.float32]:
            self.taken.append(rows(pool, which))
            return self.taken[-1]

        def kept_take(stream: Keystream, size: int) -> NDArray[np.uint8]:
            self.taken.append(take(stream, size))
            return self.taken[-1]

        def kept_scratch(size: int) -> NDArray[np.uint8]:
            self.taken.append(scratch(size))
            return self.taken[-1]

        self.owner.encrypt(np.ones((1, case.matrix.in_features), np.float32), case.matrix)
        patch.setattr(Keystream, "take", kept_take)
        patch.setattr(self.owner, "_scratch", kept_scratch)
        patch.setattr(Pool, "rows", kept_rows)

    def answer(self, payload: Any, tokens: int) -> NDArray[np.uint8]:
        worker = MlweWorker()
        return worker.multiply(payload, tokens, self.case.load(worker))

    def leaves_nothing(self) -> None:
        """But the keys that live as long as a check, its pool's among them."""
        assert self.taken
        assert not any(array.any() for array in self.taken)
        assert sum(any(key) for key in self.entropy.keys) == self.lasting


CASE = make_case(300, 40)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tokens=st.integers(1, 600), fate=st.sampled_from(["opened", "discarded", "caught", "both"]))
def test_nothing_of_a_request_is_left(
    monkeypatch: pytest.MonkeyPatch, tokens: int, fate: str
) -> None:
    """However the request ends: of what its sealed value holds, its draws, error bits and keys.

    Not of what lives within one function: that nothing there is left, nobody looks for.
    """
    with monkeypatch.context() as patch:
        bench = Bench(CASE, patch)
        owner, matrix = bench.owner, CASE.matrix
        x = np.random.default_rng(tokens).standard_normal((tokens, 300)).astype(np.float32)
        sent = owner.encrypt(x, matrix)
        bench.leaves_nothing()
        # But for the sums of an answer, which has not come.
        # And but for the input, which is the caller's.
        found = [a for a in arrays(sent.sealed) if a.any() and not np.shares_memory(a, x)]
        assert len(found) >= 3
        if fate == "caught":
            with pytest.raises(WrongAnswerError):
                owner.decrypt(sent.sealed, bytes(owner.down_bytes(matrix, tokens)), matrix)
            assert all(array.any() for array in found), "another worker may be asked"
            assert sum(array.any() for array in arrays(sent.sealed)) == len(found) + 1
        if fate in ("opened", "both"):
            owner.decrypt(sent.sealed, bench.answer(sent.payload, tokens), matrix)
        if fate != "opened":
            owner.discard(sent.sealed)
        assert not any(array.any() for array in [*found, *arrays(sent.sealed)])
        bench.leaves_nothing()
        with pytest.raises(SecretReuseError):
            owner.decrypt(sent.sealed, bytes(owner.down_bytes(matrix, tokens)), matrix)


def test_nothing_is_left_of_an_encryption_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its kernel or in its check: whatever it had drawn is overwritten."""
    for broken in ("_encrypt", "_checks"):
        with monkeypatch.context() as patch:
            bench = Bench(CASE, patch)
            drawn: list[Any] = []
            fresh = bench.owner._fresh_secrets
            patch.setattr(
                bench.owner,
                "_fresh_secrets",
                lambda *a: drawn.append(fresh(*a)) or drawn[-1],  # noqa: B023
            )

            def fail(*_: Any) -> None:
                raise MemoryError

            class Broken(dict[str, Any]):
                get = fail

            patch.setattr(bench.owner, broken, fail if broken == "_encrypt" else Broken())
            with pytest.raises(MemoryError):
                bench.owner.encrypt(np.ones((2, 300), np.float32), CASE.matrix)
            assert len(list(arrays(drawn))) == 1
            assert not any(array.any() for array in arrays(drawn))
            bench.leaves_nothing()


def owners() -> list[OwnerCipher]:
    case = CASE
    return [
        MlweOwner(case.parameters, case.public),
        ReferenceOwner(case.parameters, case.public),
        ClearOwner(),
    ]


@pytest.mark.parametrize("owner", owners(), ids=lambda owner: type(owner).__name__)
def test_every_cipher_discards(owner: OwnerCipher) -> None:
    """All that a sealed value holds; twice does no harm."""
    owner.guard(CASE.matrix, CASE.weight, CASE.forward)
    x = np.ones((2, 300), np.float32)
    sent = owner.encrypt(x, CASE.matrix)
    others = sent.payload, x
    ours = [a for a in arrays(sent.sealed) if not any(np.shares_memory(a, o) for o in others)]
    assert ours
    for _ in range(2):
        owner.discard(sent.sealed)
        assert not any(array.any() for array in ours)


def test_a_keystream_keeps_no_copy_of_its_key() -> None:
    """And gives nothing once it is wiped: zeros would be a key everybody knows."""
    key = OsEntropy().fresh_key()
    stream = Keystream(key)
    assert stream._algorithm is not None
    assert stream._algorithm.key is key
    stream.wipe()
    assert not any(key)
    with pytest.raises(ValueError, match="wiped"):
        stream.take(1)
    watched = Watched()
    random_bytes(watched, 5)
    assert not any(watched.keys[0])
