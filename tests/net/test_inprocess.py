"""The real driver: encoded bytes, retries of the same bytes, refusals that help."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends.he.clear import ClearOwner
from backends.he.entropy import SeededEntropy
from backends.he.interface import OwnerCipher, Payload, WorkerCipher
from backends.he.manifest import GroupSpec
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.preparation import prepare
from backends.he.reference import ReferenceOwner
from backends.he.store import PreparedModel
from backends.ledger import WorkerLedger
from backends.net.audit import Audit
from backends.net.devices import OneDevice
from backends.net.inprocess import in_process
from backends.net.loop import Hooks
from backends.net.owner import (
    OwnerClient,
    RemoteLinearError,
    SimulatedRandomnessError,
    UnsafeCipherError,
)
from backends.net.worker import WorkerServer
from protocol.messages import Multiply, Product, decode
from protocol.owner_memory import OwnerConfig
from protocol.owner_tables import State

FAST = OwnerConfig(hello_timeout_s=1.0, request_timeout_s=0.3, attempts_max=6)


def make(directory: Path, seed: int = 0) -> PreparedModel:
    """One group of 24 -> 40."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed))
    groups = [GroupSpec("layer", ("layer",), 24, (40,))]
    return prepare(directory, groups, lambda m: weight, preset("exact"), lambda label, n: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """Shared by the tests of this file."""
    return make(tmp_path_factory.mktemp("model"))


def expected(model: PreparedModel, x: np.ndarray) -> np.ndarray:
    scale = model.owner_matrices()[0].out_scale
    return x @ (model.worker_weights()[0].astype(np.float32) * scale[:, None]).T


class Wire:
    """Owner and worker joined by a wire that can lose or change frames, and remembers them."""

    def __init__(self, model: PreparedModel, config: OwnerConfig = FAST) -> None:
        assert model.parameters is not None
        self.cipher = MlweOwner(model.parameters, model.public_matrix())
        model.guard(self.cipher)
        catalogue = model.catalogue()
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.drop_products = 0
        self.server = WorkerServer(
            OneDevice(catalogue, MlweWorker(), model.worker_matrices()), self._down
        )
        self.client = OwnerClient(
            catalogue, model.owner_matrices(), self.cipher, ["worker"], self._up, config
        )

    def _up(self, peer: str, frame: bytes) -> None:
        self.up.append(frame)
        self.server.deliver("owner", frame)

    def _down(self, peer: str, frame: bytes) -> None:
        self.down.append(frame)
        if isinstance(decode(frame), Product) and self.drop_products > 0:
            self.drop_products -= 1
            return
        self.client.deliver("worker", frame)

    def __enter__(self) -> Wire:
        self.server.start()
        self.client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.stop()


def test_products_from_several_lanes(model: PreparedModel) -> None:
    """Each lane gets its own answer."""
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    worker = MlweWorker()
    with in_process(model, owner, [worker], lanes=4) as (client, (server,)):
        results: dict[int, bool] = {}

        def lane(number: int) -> None:
            x = np.random.default_rng(number).standard_normal((number + 1, 24)).astype(np.float32)
            y = client.linear(0, x)
            results[number] = np.allclose(y, expected(model, x), rtol=1e-2, atol=1e-2)

        threads = [threading.Thread(target=lane, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == dict.fromkeys(range(12), True)
        assert owner.blocks == owner.secrets_drawn == 12
        assert server.meter.tasks == {"MultiplyCiphertext": 12}


def test_a_retry_after_a_lost_answer_sends_the_same_bytes(model: PreparedModel) -> None:
    """And encrypts nothing anew."""
    with Wire(model) as wire:
        wire.drop_products = 2
        x = np.ones((3, 24), np.float32)
        assert np.allclose(wire.client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)
        requests = [f for f in wire.up if isinstance(decode(f), Multiply)]
        assert len(requests) == 3
        assert len(set(requests)) == 1
        assert wire.cipher.blocks == wire.cipher.secrets_drawn == 1


def test_garbage_frames_change_nothing(model: PreparedModel) -> None:
    """They are dropped and counted on both sides."""
    with Wire(model) as wire:
        for junk in (b"", b"x" * 28, b"PFTL" + bytes(60), wire.up[0][:-1] if wire.up else b"y"):
            wire.client.deliver("worker", junk)
            wire.server.deliver("owner", junk)
        x = np.ones((1, 24), np.float32)
        assert np.allclose(wire.client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)
        assert wire.client.meter.dropped >= 4
        # One of them reads as a frame of another version, which is answered.
        assert wire.server.meter.dropped >= 3


def test_frame_sizes_depend_on_public_shapes_only(model: PreparedModel) -> None:
    """Whatever the values."""
    with Wire(model) as wire:
        for scale in (0.0, 1e-20, 1e20):
            wire.client.linear(0, np.full((5, 24), scale, np.float32))
        assert len({len(f) for f in wire.up if isinstance(decode(f), Multiply)}) == 1
        assert len({len(f) for f in wire.down if isinstance(decode(f), Product)}) == 1


def test_no_plaintext_in_any_frame(model: PreparedModel) -> None:
    """Neither inputs nor results, in float32 or bfloat16, nor the token scale."""
    x = np.random.default_rng(0).standard_normal((4, 24)).astype(np.float32)
    with Wire(model) as wire:
        y = wire.client.linear(0, x)
        traffic = b"".join(wire.up + wire.down)
    for values in (x, y, expected(model, x).astype(np.float32), np.linalg.norm(x, axis=1)):
        raw = values.astype(np.float32)
        for value in raw.reshape(-1):
            assert value.tobytes() not in traffic


def test_simulated_randomness_is_refused(model: PreparedModel) -> None:
    """There is no switch for it."""
    cipher = MlweOwner(preset("exact"), model.public_matrix(), SeededEntropy(1))
    with pytest.raises(SimulatedRandomnessError, match="OsEntropy"):
        OwnerClient(model.catalogue(), model.owner_matrices(), cipher, ["w"], lambda p, f: None)


@pytest.mark.parametrize(
    ("cipher", "why"),
    [
        (lambda model: ClearOwner(), "does not encrypt"),
        (lambda model: ClearOwner(unverified=True), "does not encrypt"),
        (
            lambda model: MlweOwner(preset("exact"), model.public_matrix(), unverified=True),
            "answers that nothing checks",
        ),
        (
            lambda model: MlweOwner(preset("exact"), model.public_matrix()),
            "nothing guards layer forward",
        ),
        (
            lambda model: ReferenceOwner(preset("exact"), model.public_matrix()),
            "nothing guards layer forward",
        ),
    ],
)
def test_a_cipher_that_protects_too_little_never_leaves_the_process(
    model: PreparedModel, cipher: Callable[[PreparedModel], OwnerCipher], why: str
) -> None:
    """Whatever words it was made with; and one matrix of many without its check is enough."""
    made = cipher(model)
    facts = model.catalogue(), model.owner_matrices(), made, ["w"], lambda p, f: None
    with pytest.raises(UnsafeCipherError, match=why):
        OwnerClient(*facts)  # type: ignore[arg-type]
    matrices, weight = model.owner_matrices(), model.worker_weights()[0]
    made.guard(matrices[0], weight, forward=True)
    with pytest.raises(UnsafeCipherError):
        OwnerClient(*facts)  # type: ignore[arg-type]
    OwnerClient(*facts, workers_here=True)  # type: ignore[arg-type]


def test_a_guarded_cipher_may_serve_workers_elsewhere(model: PreparedModel) -> None:
    """The one kind that may."""
    made = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(made)
    OwnerClient(model.catalogue(), model.owner_matrices(), made, ["w"], lambda p, f: None)


def test_a_worker_of_another_model_is_refused_with_a_reason(
    model: PreparedModel, tmp_path: Path
) -> None:
    """The handshake pins the model; waiting calls fail with what to check."""
    other = make(tmp_path, seed=1)
    wire = Wire(model)
    wire.server = WorkerServer(
        OneDevice(other.catalogue(), MlweWorker(), other.worker_matrices()),
        wire._down,
    )  # fmt: skip
    with wire, pytest.raises(RemoteLinearError, match=r"holds another model.*--weights"):
        wire.client.linear(0, np.ones((1, 24), np.float32))


def test_a_lying_worker_ends_the_call_with_its_name_and_the_layer(model: PreparedModel) -> None:
    """Wrong products are never delivered."""
    wire = Wire(model)
    honest = wire._down

    def lie(peer: str, frame: bytes) -> None:
        answer = isinstance(decode(frame), Product)
        honest(peer, frame[:-40] + bytes(40) if answer else frame)

    wire.server = WorkerServer(
        OneDevice(model.catalogue(), MlweWorker(), model.worker_matrices()), lie
    )
    with wire, pytest.raises(RemoteLinearError, match=r"layer forward.*broken or lying"):
        wire.client.linear(0, np.ones((1, 24), np.float32))


class Liar(MlweWorker):
    """Answers in the right shape, with another product."""

    multiply_many = WorkerCipher.multiply_many  # one by one

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        return np.roll(super().multiply(payload, tokens, matrix), 2)


def greeted(client: OwnerClient, *workers: str) -> None:
    """Wait until these are in service: who is asked first depends on it."""
    machine: Any = client._loop._machine
    deadline = time.monotonic() + 10
    while any(machine.state(worker) is not State.READY for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_lying_worker_is_retired_and_its_work_done_elsewhere(model: PreparedModel) -> None:
    """The same ciphertext goes to the honest worker; nothing is encrypted anew."""
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    ciphers = [Liar(), MlweWorker()]
    ledger = WorkerLedger()
    with in_process(model, owner, ciphers, ledger=ledger) as (client, (liar, honest)):
        greeted(client, "worker0", "worker1")
        for _ in range(3):
            x = np.ones((2, 24), np.float32)
            assert np.allclose(client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)
        assert list(ledger.retired) == ["worker0"]
        assert "layer forward" in ledger.retired["worker0"]
        assert ledger.served == {"worker1"}
        assert liar.meter.tasks == {"MultiplyCiphertext": 1}
        assert honest.meter.tasks == {"MultiplyCiphertext": 3}
        assert owner.blocks == owner.secrets_drawn == 3


def test_a_caught_liar_has_no_second_life(model: PreparedModel, tmp_path: Path) -> None:
    """After a restart of the owner it is refused by identity, though it would be honest now."""
    x = np.ones((2, 24), np.float32)
    path = tmp_path / "retired-workers.json"
    for first in (Liar, MlweWorker):
        owner = MlweOwner(preset("exact"), model.public_matrix())
        model.guard(owner)
        ciphers = [first(), MlweWorker()]
        with in_process(model, owner, ciphers, ledger=WorkerLedger(path)) as (client, servers):
            greeted(client, *["worker0", "worker1"][first is not Liar :])
            assert np.allclose(client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)
            heard = servers[0].meter.tasks
        assert heard == ({"MultiplyCiphertext": 1} if first is Liar else {})
    with (
        in_process(model, owner, ciphers[:1], ledger=WorkerLedger(path)) as (client, _),
        pytest.raises(RemoteLinearError, match=r"worker0.*not the product.*retired-workers"),
    ):
        client.linear(0, x)


def test_a_lie_that_cannot_be_written_down_ends_the_session(
    model: PreparedModel, tmp_path: Path
) -> None:
    """Nothing goes on while a restart would trust the liar again."""
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    ciphers = [Liar()]
    (tmp_path / "run").write_text("a file where the run's directory should be")
    ledger = WorkerLedger()
    ledger._path = tmp_path / "run" / "retired-workers.json"
    with (
        in_process(model, owner, ciphers, ledger=ledger) as (client, _),
        pytest.raises(RemoteLinearError, match=r"worker0.*cannot be written down"),
    ):
        client.linear(0, np.ones((2, 24), np.float32))
    with pytest.raises(RemoteLinearError, match=r"closed|cannot be written down"):
        client.linear(0, np.ones((2, 24), np.float32))


def test_a_lie_is_written_down_whatever_has_become_of_its_call(
    model: PreparedModel, tmp_path: Path
) -> None:
    """The session closes while the answer is decrypted: the lane has gone, the lie counts."""
    ledger = WorkerLedger(tmp_path / "retired-workers.json")
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    entered, gate, decrypt = threading.Event(), threading.Event(), owner.decrypt

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert gate.wait(10)
        return decrypt(*arguments)

    owner.decrypt = slow  # type: ignore[method-assign]
    with in_process(model, owner, [Liar()], ledger=ledger) as (client, _):
        lane = threading.Thread(target=lambda: _fails(client))
        lane.start()
        assert entered.wait(10)
        closing = threading.Thread(target=client.close)
        closing.start()
        lane.join()
        gate.set()
        closing.join()
    assert "not the product" in WorkerLedger(tmp_path / "retired-workers.json").retired["worker0"]


def _fails(client: OwnerClient) -> None:
    with pytest.raises(RemoteLinearError):
        client.linear(0, np.ones((2, 24), np.float32))


def test_asking_after_the_end_is_an_error(model: PreparedModel) -> None:
    """Not a wait for ever."""
    with Wire(model) as wire:
        wire.client.linear(0, np.ones((1, 24), np.float32))
    with pytest.raises(RemoteLinearError, match="closed"):
        wire.client.linear(0, np.ones((1, 24), np.float32))


class Nudger(MlweWorker):
    """Changes the last bit of one result: less than the cipher's own noise."""

    multiply_many = WorkerCipher.multiply_many  # one by one

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        answer = super().multiply(payload, tokens, matrix)
        answer[2 * 7] ^= 1
        return answer


def test_an_audit_finds_what_no_tolerance_could(model: PreparedModel) -> None:
    """One bit of noise passes the check; an exact recomputation leaves it no room."""
    x = np.ones((3, 24), np.float32)
    for one_in, caught in ((10**12, False), (1, True)):
        owner = MlweOwner(preset("exact"), model.public_matrix())
        model.guard(owner)
        ciphers = [Nudger(), MlweWorker()]
        audit = Audit(MlweWorker(), model.worker_matrices(), one_in)
        ledger = WorkerLedger()
        with in_process(model, owner, ciphers, audit=audit, ledger=ledger) as (client, _):
            greeted(client, "worker0", "worker1")
            for matrix, width in ((0, 24), (1, 40)):
                client.linear(matrix, np.ones((3, width), np.float32))
            assert np.allclose(client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2)
        assert list(ledger.retired) == (["worker0"] if caught else [])
        if caught:
            assert "bit for bit" in ledger.retired["worker0"]


def test_audits_are_as_rare_as_was_asked() -> None:
    """Drawn for each request by itself; 200 expected, within six standard deviations."""
    audit = Audit(MlweWorker(), [], one_in=50)
    kept = sum(audit.keep(memoryview(b"request")) is not None for _ in range(10_000))
    assert abs(kept - 200) < 6 * 14
    assert audit.keep(torch.zeros(1)) is None
    with pytest.raises(ValueError, match="at least 1"):
        Audit(MlweWorker(), [], one_in=0)


def test_a_silent_worker_is_given_up(model: PreparedModel) -> None:
    """Bounded attempts, then every call fails, the next one at once."""
    wire = Wire(model, OwnerConfig(hello_timeout_s=0.02, greetings_max=3))
    wire.server.deliver = lambda peer, frame: None  # type: ignore[method-assign]
    with wire:
        with pytest.raises(RemoteLinearError, match="no answer"):
            wire.client.linear(0, np.ones((1, 24), np.float32))
        start = time.perf_counter()
        with pytest.raises(RemoteLinearError):
            wire.client.linear(0, np.ones((1, 24), np.float32))
        assert time.perf_counter() - start < 5


def test_incarnations_differ(model: PreparedModel) -> None:
    """Two starts of the same owner never share a session id."""
    sessions = set()
    for _ in range(2):
        with Wire(model) as wire:
            wire.client.linear(0, np.ones((1, 24), np.float32))
        sessions |= {decode(frame).session for frame in wire.up}
    assert len(sessions) == 2


@pytest.mark.parametrize(("lanes", "of_a_pool"), [(1, False), (2, True)])
def test_one_token_is_handed_to_no_other_thread(
    model: PreparedModel, lanes: int, of_a_pool: bool
) -> None:
    """Each side computes on its loop's thread, but an owner whose lanes may compute at once."""
    threads: dict[str, list[str]] = {"owner": [], "worker0": []}

    def hooks(side: str) -> Hooks:
        return Hooks(on_task=lambda *_: threads[side].append(threading.current_thread().name))

    cipher = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(cipher)
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    with in_process(model, cipher, [MlweWorker()], lanes=lanes, hooks=hooks) as (client, _):
        found = [client.linear(0, row[None]) for row in x]
        assert np.allclose(np.concatenate(found), expected(model, x), rtol=0.05, atol=0.05)
        assert all(name == "worker-loop" for name in threads["worker0"])
        assert len(threads["owner"]) == 6
        assert all(("task" in name) == of_a_pool for name in threads["owner"])
        client.linear(0, x)
    assert "task" in threads["worker0"][3]
