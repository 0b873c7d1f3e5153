"""The owner on a GPU: the CPU owner's bits, its rules, and its answers to what goes wrong."""

from __future__ import annotations

import threading
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.he import reference
from backends.he.cuda import owner as cuda_owner
from backends.he.cuda import repair, resident
from backends.he.cuda.device import Gpu
from backends.he.cuda.owner import CudaOwner
from backends.he.cuda.resident import Residents
from backends.he.cuda.streams import Flags
from backends.he.entropy import OsEntropy, SeededEntropy
from backends.he.integrity import Judge
from backends.he.interface import Encrypted, NonFiniteInputError, UnguardedError
from backends.he.mlwe_owner import MlweOwner, token_scales
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters, preset
from backends.he.reference import ReferenceWorker
from backends.he.repair import clear_products, unwrap
from backends.he.secret import SecretReuseError
from backends.he.wire import Format
from protocol.errors import WrongAnswerError
from tests.cuda.slow import reference_owner
from tests.he.conftest import Case, make_case

pytestmark = pytest.mark.usefixtures("compiler")
FORMATS = [Format(16, 8), Format(18, 10), Format(20, 12), Format(24, 16)]


def values(tokens: int, inputs: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Heavy-tailed float32[T, K]."""
    x = np.random.default_rng(seed).standard_t(3, size=(tokens, inputs))
    return x.astype(np.float32)


def owner_of(case: Case, gpu: Gpu, seed: int | None = None, **options: Any) -> CudaOwner:
    """Takes answers for matrices that are not guarded, too."""
    entropy = OsEntropy() if seed is None else SeededEntropy(seed)
    options = {"unverified": True} | options
    return CudaOwner(case.parameters, case.public, gpu, entropy, **options)


def answer_to(case: Case, payload: Any, tokens: int) -> np.ndarray[Any, Any]:
    worker = ReferenceWorker()
    return worker.multiply(payload, tokens, case.load(worker))


def thin_case(inputs: int, outputs: int, form: Format, forward: bool = True) -> Case:
    """Values travel in a format of the test's choice."""
    return make_case(inputs, outputs, forward, parameters=preset("thin"), form=form)


@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens", "forward", "parameters"),
    [
        (48, 40, 1, True, preset("exact")),
        (70, 20, 255, False, preset("exact")),
        (33, 100, 256, True, preset("exact")),
        (16, 50, 257, True, preset("exact")),
        # Enough values that an error drawn elsewhere shows: it changes one in fifty of them.
        (40, 3, 600, False, preset("exact")),
        (5, 7, 40, False, preset("paranoid")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_requests_and_results_are_the_slow_owners_bit_for_bit(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, tokens: int,
    forward: bool, parameters: Parameters,
) -> None:  # fmt: skip
    """Same secrets and errors, same bytes, same float32."""
    case = make_case(inputs, outputs, forward, seed=tokens, parameters=parameters)
    same_bits(case, tokens, gpu, monkeypatch)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens", "forward"), [(33, 40, 257, True), (20, 19, 5, False)]
)
def test_so_they_are_in_thin_formats(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, tokens: int,
    forward: bool, form: Format,
) -> None:  # fmt: skip
    """Rows that fill their bytes, and rows that do not."""
    same_bits(thin_case(inputs, outputs, form, forward), tokens, gpu, monkeypatch)


def same_bits(case: Case, tokens: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request through both owners."""
    x = values(tokens, case.matrix.in_features)
    x[tokens // 2] = 0
    fast, slow = owner_of(case, gpu, 7), reference_owner(case, 7, monkeypatch)
    a, b = fast.encrypt(x, case.matrix), slow.encrypt(x, case.matrix)
    assert np.array_equal(a.payload, b.payload)
    assert len(a.payload) == fast.up_bytes(case.matrix, tokens)
    answer = answer_to(case, a.payload, tokens)
    y = fast.decrypt(a.sealed, answer, case.matrix)
    assert y.dtype == np.float32
    assert np.array_equal(y, slow.decrypt(b.sealed, answer, case.matrix))
    assert fast.blocks == fast.secrets_drawn == -(-tokens // 256)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 70),
    tokens=st.sampled_from([1, 2, 15, 17, 64, 255, 256, 257]),
    forward=st.booleans(),
    magnitude=st.floats(-30, 30),
    local=st.booleans(),
    streamed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_round_trip_is_within_the_bound(
    gpu: Gpu, inputs: int, outputs: int, tokens: int, forward: bool, magnitude: float,
    local: bool, streamed: bool, seed: int,
) -> None:  # fmt: skip
    """With the CPU's worker, guarded, any shape and scale."""
    case = make_case(inputs, outputs, forward, seed=seed % 97)
    x = (values(tokens, inputs, seed) * 10.0**magnitude).astype(np.float32)
    owner = owner_of(case, gpu, local=local, hint_bytes=0 if streamed else None)
    owner.guard(case.matrix, case.weight, forward)
    sent = owner.encrypt(x, case.matrix)
    worker = MlweWorker()
    on_host = torch.as_tensor(sent.payload).cpu().numpy()
    answer = worker.multiply(on_host, tokens, case.load(worker))
    payload = torch.from_numpy(answer).to(gpu.device) if local else answer
    y, expected = owner.decrypt(sent.sealed, payload, case.matrix), case.exact(x)
    plan, parameters = case.matrix.plan, case.parameters
    norms = np.linalg.norm(x.astype(np.float64) * case.matrix.in_scale, axis=1)
    worst = plan.margin(parameters) / plan.amplitude(parameters) * norms * (1 + 1e-5)
    bound = worst[:, None] * case.matrix.out_scale + 1e-6 * np.abs(expected) + 1e-44
    assert np.all(np.abs(y - expected) <= bound)


def held(thing: Any) -> list[Any]:
    """Every array and tensor of a sealed value, but for its input and check, which live on."""
    if isinstance(thing, np.ndarray | torch.Tensor):
        return [thing]
    parts = [] if isinstance(thing, Enum) else getattr(thing, "__dict__", {}).items()
    return [found for name, part in parts if name not in ("check", "x") for found in held(part)]


@pytest.mark.parametrize("fate", ["opened", "discarded", "caught"])
def test_nothing_of_a_request_is_left(gpu: Gpu, fate: str) -> None:
    """Secrets, scales, sums and rows are overwritten, on the device as on the host; keys too."""
    case = make_case(48, 40)
    owner = owner_of(case, gpu)
    keys: list[bytearray] = []
    fresh = owner._entropy.fresh_key
    owner._entropy.fresh_key = lambda tag=b"": keys.append(fresh(tag)) or keys[-1]  # type: ignore[func-returns-value, method-assign]
    owner.guard(case.matrix, case.weight, case.forward)
    drawn = len(keys)
    sent = owner.encrypt(values(300, 48), case.matrix)
    assert len(keys) == drawn + 1
    assert not any(any(key) for key in keys[drawn:])
    found = held(sent.sealed)
    assert len(found) == 5
    if fate == "opened":
        owner.decrypt(sent.sealed, answer_to(case, sent.payload, 300), case.matrix)
    elif fate == "caught":
        with pytest.raises(WrongAnswerError):
            owner.decrypt(sent.sealed, bytes(2 * 300 * 40), case.matrix)
        assert all(part.any() for part in found)
    if fate != "opened":
        owner.discard(sent.sealed)
    assert not any(part.any() for part in found)
    assert not len(sent.sealed.x)


@pytest.mark.parametrize("local", [True, False])
def test_tensors_come_back_as_tensors(gpu: Gpu, local: bool) -> None:
    """Values on the device stay there; payloads do when the worker shares it."""
    case = make_case(48, 40)
    owner = owner_of(case, gpu, local=local)
    x = torch.from_numpy(values(30, 48)).to(gpu.device)
    sent = owner.encrypt(x, case.matrix)
    assert isinstance(sent.payload, torch.Tensor if local else np.ndarray)
    assert len(sent.payload) == owner.up_bytes(case.matrix, 30)
    answer = answer_to(case, torch.as_tensor(sent.payload).cpu().numpy(), 30)
    payload = torch.from_numpy(answer).to(gpu.device) if local else answer.tobytes()
    y = owner.decrypt(sent.sealed, payload, case.matrix)
    assert isinstance(y, torch.Tensor)
    assert y.device == gpu.device
    exact = case.exact(x.cpu().numpy())
    assert np.linalg.norm(y.cpu().numpy() - exact) < 0.01 * np.linalg.norm(exact)


def test_streamed_hints_give_the_results_of_resident_ones(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles a slab: odd slabs, both buffers used again."""
    monkeypatch.setattr(resident, "_SLAB_BYTES", 3 * 4 * 5 * 256 * 16)
    case = make_case(48, 200)
    x = values(300, 48)
    results = []
    for room in (None, 0):
        owner = owner_of(case, gpu, 3, hint_bytes=room)
        sent = owner.encrypt(x, case.matrix)
        results.append(owner.decrypt(sent.sealed, answer_to(case, sent.payload, 300), case.matrix))
    assert np.array_equal(*results)


def test_hints_stay_on_the_device_while_they_fit(gpu: Gpu) -> None:
    """The second of two is streamed; a new matrix of a name takes the old one's room."""
    case, other = make_case(16, 40), make_case(17, 40)
    assert case.matrix.hint is not None
    size = case.matrix.hint.nbytes
    residents = Residents(gpu, case.public, size + 1000)
    for matrix in (case.matrix, other.matrix):
        rows = torch.cat([slab.clone() for _, slab in residents.slabs(matrix)])
        assert np.array_equal(rows.cpu().numpy(), matrix.hint)
        assert residents.room_bytes == 1000
    again = make_case(16, 40, seed=5)
    rows = torch.cat([slab for _, slab in residents.slabs(again.matrix)])
    assert np.array_equal(rows.cpu().numpy(), again.matrix.hint)
    assert residents.room_bytes == 1000


def test_one_public_matrix_serves_every_width(gpu: Gpu) -> None:
    """It grows, and narrower requests take its first rows."""
    case = make_case(100, 16)
    residents = Residents(gpu, case.public)
    for count in (20, 100, 7, 33):
        rows = residents.public_rows(count).cpu().numpy()
        assert np.array_equal(rows, case.public.rows(count))


def test_a_request_is_decrypted_once_and_its_secrets_wiped(gpu: Gpu) -> None:
    """As on the CPU; and a fresh secret cannot open."""
    case = make_case(20, 20)
    owner = owner_of(case, gpu)
    sent = owner.encrypt(values(300, 20), case.matrix)
    answer = answer_to(case, sent.payload, 300)
    words = sent.sealed.secrets._words
    assert words.any(dim=2).all()
    with pytest.raises(SecretReuseError):
        sent.sealed.secrets.seal()
    owner.decrypt(sent.sealed, answer, case.matrix)
    assert not words.any()
    with pytest.raises(SecretReuseError, match="spent"):
        owner.decrypt(sent.sealed, answer, case.matrix)


def test_two_threads_cannot_open_one_request(gpu: Gpu) -> None:
    """While one answer is being opened, a second is refused."""
    case = make_case(20, 20)
    owner = owner_of(case, gpu)
    sent = owner.encrypt(values(3, 20), case.matrix)
    answer = answer_to(case, sent.payload, 3)
    with sent.sealed.secrets.opened(), pytest.raises(SecretReuseError, match="being opened"):
        owner.decrypt(sent.sealed, answer, case.matrix)


def test_lanes_share_an_owner(gpu: Gpu) -> None:
    """Several threads encrypt and decrypt at once, hints streamed through the same buffers."""
    case = make_case(40, 90)
    owner = owner_of(case, gpu, hint_bytes=0)
    owner.guard(case.matrix, case.weight, True)
    errors: list[float] = []

    def lane(seed: int) -> None:
        x = values(70, 40, seed)
        for _ in range(3):
            sent = owner.encrypt(x, case.matrix)
            y = owner.decrypt(sent.sealed, answer_to(case, sent.payload, 70), case.matrix)
            exact = case.exact(x)
            errors.append(float(np.linalg.norm(y - exact) / np.linalg.norm(exact)))

    lanes = [threading.Thread(target=lane, args=(seed,)) for seed in range(4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    assert len(errors) == 12
    assert max(errors) < 0.01
    assert owner.blocks == owner.secrets_drawn == 12


@pytest.mark.parametrize("tokens", [1, 256, 257, 1000])
def test_every_block_has_a_secret_of_its_own(gpu: Gpu, tokens: int) -> None:
    """Counted secrets equal counted blocks, and no two are equal."""
    case = make_case(3, 3)
    owner = owner_of(case, gpu)
    drawn = []
    for turn in (1, 2):
        sent = owner.encrypt(values(tokens, 3), case.matrix)
        drawn += [block.tobytes() for block in sent.sealed.secrets._words.cpu().numpy()]
        assert owner.blocks == owner.secrets_drawn == turn * -(-tokens // 256)
    assert len(set(drawn)) == len(drawn) == owner.blocks


def test_ciphertext_bytes_are_uniform(gpu: Gpu) -> None:
    """A chi-square test of each digit plane, for an input of zeros."""
    case = make_case(128, 16)
    planes = owner_of(case, gpu).encrypt(np.zeros((512, 128), np.float32), case.matrix).payload
    for plane in planes.reshape(3, -1):
        counts = np.bincount(plane, minlength=256)
        chi_square = np.sum((counts - plane.size / 256) ** 2) / (plane.size / 256)
        assert chi_square < 255 + 6 * np.sqrt(2 * 255)


def wrong(answer: np.ndarray[Any, Any], how: str) -> np.ndarray[Any, Any]:
    """A changed copy of answer bytes."""
    changed = answer.copy().view(np.uint16)
    if how == "zero":
        changed[:] = 0
    elif how == "two top bits":
        changed[[3, 7]] ^= 1 << 15
    elif how == "one value":
        changed[3] ^= 1 << 12
    else:
        changed[:] = np.roll(changed, 1)
    return changed.view(np.uint8)


@pytest.mark.parametrize("how", ["zero", "one value", "two top bits", "rolled"])
@pytest.mark.parametrize(("tokens", "forward"), [(1, True), (6, False), (257, True)])
def test_a_lying_worker_is_found_and_the_request_stays_usable(
    gpu: Gpu, tokens: int, forward: bool, how: str
) -> None:
    """The complaint is the CPU owner's; the right answer then opens the same request."""
    case = make_case(70, 60, forward)
    owner = owner_of(case, gpu, 1)
    owner.guard(case.matrix, case.weight, forward)
    x = values(tokens, 70)
    sent = owner.encrypt(x, case.matrix)
    answer = answer_to(case, sent.payload, tokens)
    for _ in range(2):
        with pytest.raises(WrongAnswerError, match=r"70x60: .*broken or lying.*stop using"):
            owner.decrypt(sent.sealed, wrong(answer, how), case.matrix)
    y, exact = owner.decrypt(sent.sealed, answer, case.matrix), case.exact(x)
    assert np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact)


def test_flags_are_used_again_unless_they_were_set(gpu: Gpu) -> None:
    """One that a kernel has set does not come back, nor does one that nobody read."""
    flags = Flags(gpu)
    first, unread = flags.take(), flags.take()
    assert first is not unread
    first.fetch()
    assert not first.read()
    assert flags.take() is first
    first.cell.fill_(1)
    first.fetch()
    assert first.read()
    fresh = flags.take()
    assert fresh not in (first, unread)
    fresh.fetch()
    assert not fresh.read()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_refused_with_its_place(gpu: Gpu, bad: float) -> None:
    """The CPU owner's text; nothing is counted."""
    case = make_case(48, 40)
    x = np.ones((4, 48), np.float32)
    x[2, 5] = bad
    owner = owner_of(case, gpu)
    messages = []
    for each in (owner, MlweOwner(case.parameters, case.public)):
        with pytest.raises(NonFiniteInputError, match="48x40: NaN or infinity in token 2") as error:
            each.encrypt(x, case.matrix)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert owner.blocks == owner.secrets_drawn == 0


def test_wrong_shapes_and_sizes_are_refused(gpu: Gpu) -> None:
    """Arrays and tensors, in the CPU owner's words; the request stays usable."""
    case = make_case(48, 40)
    owner = owner_of(case, gpu)
    for x in (np.ones((2, 47), np.float32), torch.ones((2, 47), device=gpu.device)):
        with pytest.raises(ValueError, match=r"48x40: takes \[tokens, 48\], got \[2, 47\]"):
            owner.encrypt(x, case.matrix)
    for x in (np.ones((2, 48)), torch.ones((2, 48), dtype=torch.float64, device=gpu.device)):
        with pytest.raises(ValueError, match=r"contiguous float32, got .*float64"):
            owner.encrypt(x, case.matrix)
    with pytest.raises(ValueError, match="takes a tensor on"):
        owner.encrypt(torch.ones((2, 48), device="meta"), case.matrix)
    sent = owner.encrypt(np.ones((2, 48), np.float32), case.matrix)
    for payload in (bytes(7), torch.zeros(7, dtype=torch.uint8, device=gpu.device)):
        with pytest.raises(ValueError, match="has 160 bytes, this one 7"):
            owner.decrypt(sent.sealed, payload, case.matrix)
    with pytest.raises(ValueError, match=r"uint8\[n\]"):
        owner.decrypt(sent.sealed, torch.zeros(80, dtype=torch.int16), case.matrix)
    owner.decrypt(sent.sealed, bytes(160), case.matrix)


def test_a_matrix_without_a_hint_is_refused(gpu: Gpu) -> None:
    """It can be encrypted for, as on the CPU, but nothing opens."""
    case = make_case(5, 5)
    owner = owner_of(case, gpu)
    matrix = replace(case.matrix, hint=None)
    sent = owner.encrypt(values(2, 5), matrix)
    with pytest.raises(ValueError, match="no hint; run the preparation first"):
        owner.decrypt(sent.sealed, bytes(20), matrix)


def test_an_answer_that_nothing_checks_is_refused(gpu: Gpu) -> None:
    """As on the CPU."""
    case = make_case(5, 5)
    owner = owner_of(case, gpu, unverified=False)
    sent = owner.encrypt(values(2, 5), case.matrix)
    with pytest.raises(UnguardedError, match="5x5: its answers are not checked"):
        owner.decrypt(sent.sealed, bytes(20), case.matrix)


@pytest.mark.parametrize("lie", [0, 1 << 9, 1 << 12, 1 << 15])
def test_verdicts_are_the_cpus(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, lie: int) -> None:
    """The same pool, rows and randomness: the same standardised differences."""
    case = make_case(70, 60)
    judged: list[np.ndarray[Any, Any]] = []

    def seen(self: Judge, rows: Any, differences: Any, worker: str) -> None:
        judged.append(differences / self.honesty.deviation[rows])
        require(self, rows, differences, worker)

    require = Judge.require
    monkeypatch.setattr(Judge, "require", seen)
    x, verdicts = values(40, 70), []
    for owner in (
        owner_of(case, gpu, 5),
        MlweOwner(case.parameters, case.public, SeededEntropy(5)),
    ):
        owner.guard(case.matrix, case.weight, True)
        sent = owner.encrypt(x, case.matrix)
        answer = answer_to(case, sent.payload, 40).copy().view(np.uint16)
        answer[[5, 66]] ^= lie
        try:
            owner.decrypt(sent.sealed, answer.view(np.uint8), case.matrix)
            verdicts.append("")
        except WrongAnswerError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]
    assert bool(verdicts[0]) == bool(lie)
    assert judged[0].shape == (40, 8)
    if lie:  # the noise is another one: of the two sides' own ciphertexts
        wrong = [np.abs(z[[0, 1]]) for z in judged]
        assert np.allclose(*wrong, atol=12.0)


@dataclass
class Wrapped:
    """A guarded request of which many results wrap, because the scale is sixteen times too large.

    right  float32[T, N], what the slow owner makes of it after the CPU's repair
    turns  how often each result had to be moved
    """

    owner: CudaOwner
    sent: Encrypted
    answer: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    turns: np.ndarray[Any, Any]


def wrapped(
    case: Case, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, x: np.ndarray[Any, Any], place: str
) -> Wrapped:
    """x goes in as an array, or as a tensor where `place` is "device"."""
    matrix, local = case.matrix, place == "device"
    owner, slow = owner_of(case, gpu, 7, local=local), reference_owner(case, 7, monkeypatch)
    owner.guard(matrix, case.weight, case.forward)
    slow._entropy = copy(owner._entropy)
    owner._gains.learn(matrix.name, np.full(4000, 0.01), 1.0)

    def scales(norms: Any, matrix: Any, parameters: Any, gain: float, *rest: Any) -> None:
        token_scales(norms, matrix, parameters, 16.0 * gain, *rest)

    monkeypatch.setattr(reference, "token_scales", scales)
    same = slow.encrypt(x, matrix)
    sent = owner.encrypt(torch.from_numpy(x).to(gpu.device) if local else x, matrix)
    assert np.array_equal(torch.as_tensor(sent.payload).cpu().numpy(), same.payload)
    answer = answer_to(case, same.payload, len(x))
    inverse = same.sealed.inverse_alpha.copy()  # it is wiped when the answer was opened
    right, some = slow.decrypt(same.sealed, answer, matrix), np.flatnonzero(inverse)
    scaled = x[some].astype(np.float64) * matrix.in_scale / inverse[some, None]
    products = clear_products(scaled, case.weight, case.forward)
    period, unit = matrix.plan.format.modulus, np.outer(inverse[some], matrix.out_scale)
    return Wrapped(owner, sent, answer, right, unwrap(right, some, products, period, unit))


def fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and rows of the weight: several turns of each."""
    monkeypatch.setattr(cuda_owner, "TOKENS_AT_ONCE", 16)
    monkeypatch.setattr(repair, "_SLAB_VALUES", 400)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize(("form", "forward"), [(FORMATS[0], True), (FORMATS[2], False)], ids=str)
def test_results_that_wrapped_are_repaired_like_the_cpus(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, form: Format, forward: bool, place: str
) -> None:
    """The same bits, wherever the values are; the scale is then one that fits."""
    fewer_at_a_time(monkeypatch)
    case = thin_case(60, 50, form, forward)
    x = values(70, 60)
    x[5] = 0
    made = wrapped(case, gpu, monkeypatch, x, place)
    wraps = np.count_nonzero(made.turns)
    assert wraps > 100
    y = made.owner.decrypt(made.sent.sealed, made.answer, case.matrix)
    assert isinstance(y, torch.Tensor) == (place == "device")
    assert np.array_equal(torch.as_tensor(y).cpu().numpy(), made.right)
    exact = case.exact(x)
    assert np.linalg.norm(made.right - exact) < 0.05 * np.linalg.norm(exact)
    assert made.owner.repairs.wraps == wraps
    assert made.owner._gains.of(case.matrix.name) < 4
    sent = made.owner.encrypt(x, case.matrix)
    payload = torch.as_tensor(sent.payload).cpu().numpy()
    made.owner.decrypt(sent.sealed, answer_to(case, payload, 70), case.matrix)
    assert made.owner.repairs.wraps == wraps


def test_gains_are_learnt_like_the_cpus(gpu: Gpu) -> None:
    """From the same requests: one at the first scale, and one at the scale learnt from it."""
    case, x = thin_case(300, 50, FORMATS[1]), values(300, 300)
    x[7] = 0
    gains = []
    for owner in (
        owner_of(case, gpu, 5),
        MlweOwner(case.parameters, case.public, SeededEntropy(5)),
    ):
        owner.guard(case.matrix, case.weight, True)
        for _ in range(2):
            sent = owner.encrypt(x, case.matrix)
            answer = answer_to(case, sent.payload, 300)
            y = owner.decrypt(sent.sealed, answer, case.matrix)
            gains.append(owner._gains.of(case.matrix.name))
        exact = case.exact(x)
        assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    assert gains[:2] == gains[2:]
    assert gains[0] > 1.5


def test_a_lie_among_wraps_is_found(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value off by a quarter of p; the right answer then opens the same request."""
    case, x = thin_case(60, 50, FORMATS[0]), values(20, 60)
    made = wrapped(case, gpu, monkeypatch, x, "host")
    lie = made.answer.copy()
    lie[3] ^= 1 << 6
    with pytest.raises(WrongAnswerError, match=r"60x50: .*broken or lying"):
        made.owner.decrypt(made.sent.sealed, lie, case.matrix)
    y = made.owner.decrypt(made.sent.sealed, made.answer, case.matrix)
    assert np.array_equal(y, made.right)
    assert not any(part.any() for part in held(made.sent.sealed))
