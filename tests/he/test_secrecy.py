"""One secret, one block, one message; ciphertexts that look like noise."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he.entropy import Keystream, OsEntropy, SeededEntropy
from backends.he.mlwe_owner import MlweOwner
from backends.he.params import (
    NTT_PRIME,
    PRESETS,
    InsecureParametersError,
    Parameters,
    max_log2_modulus,
    preset,
)
from backends.he.public import PublicMatrix, expand_tile, public_seed
from backends.he.secret import BlockSecret, SecretReuseError, ternary
from backends.he.vector import LANES
from tests.he.conftest import Case, make_case


def draw() -> BlockSecret:
    return BlockSecret.draw(Keystream(OsEntropy().fresh_key()), 1, 5, 256)[0]


def test_a_secret_seals_one_message_and_opens_one_answer() -> None:
    """Any other use raises."""
    secret = draw()

    def opens() -> bool:
        with secret.opened() as words:
            return bool(np.any(words))

    with pytest.raises(SecretReuseError):
        opens()
    sealed = secret.seal()
    with pytest.raises(SecretReuseError):
        secret.seal()
    with pytest.raises(KeyError), secret.opened():
        raise KeyError("a verdict")
    assert opens(), "an error leaves it sealed"
    assert not np.any(sealed), "the secret is wiped once it has opened its answer"
    for use in (opens, secret.seal):
        with pytest.raises(SecretReuseError):
            use()


def test_an_answer_is_decrypted_once(small: Case) -> None:
    """A second decryption of the same request is refused."""
    owner = MlweOwner(small.parameters, small.public, unverified=True)
    sent = owner.encrypt(np.ones((3, 48), np.float32), small.matrix)
    answer = np.zeros(owner.down_bytes(small.matrix, 3), np.uint8)
    owner.decrypt(sent.sealed, answer, small.matrix)
    with pytest.raises(SecretReuseError):
        owner.decrypt(sent.sealed, answer, small.matrix)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (256, 1), (257, 2), (1000, 4)])
def test_every_block_has_a_secret_of_its_own(small: Case, tokens: int, blocks: int) -> None:
    """Counted secrets equal counted blocks."""
    owner = MlweOwner(small.parameters, small.public)
    for turn in (1, 2):
        owner.encrypt(np.ones((tokens, 48), np.float32), small.matrix)
        assert owner.blocks == owner.secrets_drawn == turn * blocks


def test_two_encryptions_of_the_same_input_share_nothing(small: Case) -> None:
    """Values agree no more often than independent uniform ones would."""
    owner = MlweOwner(small.parameters, small.public)
    x = np.ones((512, 48), np.float32)
    a, b = (owner.encrypt(x, small.matrix).payload for _ in range(2))
    assert abs(np.mean(a == b) - 1 / 256) < 5 * np.sqrt(1 / 256 / a.size)
    # Nor do the two blocks of one request, which carry the same rows.
    first, second = a.reshape(3, 2, 256, 48)[:, 0], a.reshape(3, 2, 256, 48)[:, 1]
    assert abs(np.mean(first == second) - 1 / 256) < 5 * np.sqrt(1 / 256 / first.size)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e20])
def test_ciphertext_bytes_are_uniform(scale: float) -> None:
    """A chi-square test of each digit plane, whatever the message."""
    case = make_case(256, 16)
    owner = MlweOwner(case.parameters, case.public)
    x = np.full((256, 256), scale, np.float32)
    planes = owner.encrypt(x, case.matrix).payload.reshape(3, -1)
    for plane in planes:
        counts = np.bincount(plane, minlength=256)
        chi_square = np.sum((counts - plane.size / 256) ** 2) / (plane.size / 256)
        assert chi_square < 255 + 6 * np.sqrt(2 * 255)


def test_message_sizes_depend_on_shapes_only(small: Case) -> None:
    """Zeros, tiny and huge values give requests of the same size."""
    owner = MlweOwner(small.parameters, small.public)
    for scale in (0.0, 1e-30, 1e30):
        sent = owner.encrypt(np.full((5, 48), scale, np.float32), small.matrix)
        assert len(sent.payload) == owner.up_bytes(small.matrix, 5) == 3 * 5 * 48
    assert owner.down_bytes(small.matrix, 5) == 2 * 5 * 40


def test_ternary_values_are_uniform() -> None:
    """Each of -1, 0, 1 a third of the time."""
    values = ternary(Keystream(OsEntropy().fresh_key()), 90_000)
    assert set(np.unique(values)) == {-1, 0, 1}
    for value in (-1, 0, 1):
        assert abs(np.mean(values == value) - 1 / 3) < 0.01


def test_keystream_parts_are_places_of_one_stream() -> None:
    """Threads that fill parts get what one reader gets, at any offset."""
    key = OsEntropy().fresh_key()
    whole = Keystream(key).take(1000)
    for place, size in ((0, 16), (16, 100), (33, 50), (999, 1)):
        part = np.ones(size, np.uint8)
        Keystream(key).fill(part, place)
        assert np.array_equal(part, whole[place : place + size])


def test_entropy_says_whether_it_is_simulated() -> None:
    """OS keys never repeat; seeded ones are marked."""
    assert not OsEntropy().simulated
    assert SeededEntropy(1).simulated
    assert len({bytes(OsEntropy().fresh_key()) for _ in range(100)}) == 100
    assert SeededEntropy(1).fresh_key() == SeededEntropy(1).fresh_key()


def test_presets_lie_inside_the_security_line() -> None:
    """And parameters outside it cannot be made."""
    assert max_log2_modulus(1280) == pytest.approx(32.75)
    assert max_log2_modulus(1000) == 0.0
    assert {p.dimension for p in PRESETS.values()} == {1280, 1536, 2048}
    with pytest.raises(InsecureParametersError, match="raise the rank"):
        Parameters("weak", rank=4)
    with pytest.raises(ValueError, match="choose one of"):
        preset("fast")


def test_public_matrix_is_a_function_of_its_seed() -> None:
    """Prefixes agree; another model, parameter set or owner tag gives another matrix."""
    parameters = preset("exact")
    seed = public_seed(bytes(32), parameters)
    tall, short = PublicMatrix(seed, 5).rows(100), PublicMatrix(seed, 5).rows(20)
    assert np.array_equal(tall[: len(short)], short)
    assert np.array_equal(tall[3], expand_tile(seed, 3, 5))
    others = {
        public_seed(b"\1" * 32, parameters),
        public_seed(bytes(32), preset("paranoid")),
        public_seed(bytes(32), parameters, b"mine"),
    }
    assert len(others | {seed}) == 4
    assert abs(np.mean(tall / NTT_PRIME)) < 0.002, "centred residues are uniform around zero"


def test_a_slow_lane_does_not_shrink_the_public_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that grew A a little must not undo a wider growth: A would be read past its end."""
    public = PublicMatrix(bytes(32), 5)
    started, wide_is_done = threading.Event(), threading.Event()
    expand = public._expand

    def slow(out: NDArray[np.int32], first: int, last: int) -> None:
        if len(out) == 1:
            started.set()
            wide_is_done.wait(0.3)
        expand(out, first, last)

    monkeypatch.setattr(public, "_expand", slow)
    narrow = threading.Thread(target=public.rows, args=(LANES,))
    narrow.start()
    assert started.wait(10)
    assert len(public.rows(9 * LANES)) == 9
    wide_is_done.set()
    narrow.join()
    assert len(public._tiles) == 9
