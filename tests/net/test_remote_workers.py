"""Owners and workers over real TLS connections: answers, cut lines, liars known by their key."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he.interface import Payload, WorkerCipher
from backends.he.manifest import PreparationError
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import preset
from backends.he.store import PreparedModel, WorkerPart
from backends.ledger import WorkerLedger
from backends.net import remote
from backends.net.addresses import AddressError, address_of
from backends.net.devices import OneDevice
from backends.net.dialling import WorkerUnreachableError
from backends.net.owner import OwnerClient, RemoteLinearError
from backends.net.remote import connected
from backends.net.serving import Service, serving
from backends.net.tls import CertificateError, Tls
from protocol.events import Deliver
from protocol.owner_memory import OwnerConfig
from scenarios.certs import Authority
from tests.net.test_inprocess import expected, make

PATIENT = OwnerConfig(hello_timeout_s=0.5, request_timeout_s=20, greetings_max=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An owner's certificate, and those of three workers."""
    place, authority = tmp_path_factory.mktemp("certs"), Authority()
    authority.issue(place / "owner")
    for name in ("w0", "w1", "w2"):
        authority.issue(place / name, ["localhost"])
    return place


class Slow(MlweWorker):
    """Multiplies when it is told to."""

    multiply_many = WorkerCipher.multiply_many  # one by one

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        self.asked.set()
        assert self.go.wait(10)
        return super().multiply(payload, tokens, matrix)


class Liar(MlweWorker):
    """Another product of the right size."""

    multiply_many = WorkerCipher.multiply_many  # one by one

    def multiply(self, payload: Payload, tokens: int, matrix: Any) -> NDArray[np.uint8]:
        return np.roll(super().multiply(payload, tokens, matrix), 2)


@contextmanager
def line(
    model: PreparedModel, certs: Path, *workers: tuple[str, MlweWorker],
    ledger: WorkerLedger | None = None, config: OwnerConfig = PATIENT, lanes: int = 2,
) -> Iterator[tuple[OwnerClient, list[Service], MlweOwner]]:  # fmt: skip
    """An owner and workers (certificate, cipher), each with the worker's part alone."""
    with ExitStack() as stack:
        part = WorkerPart.open(model.directory)
        services = [
            stack.enter_context(
                serving(
                    OneDevice.holding(part, cipher),
                    "127.0.0.1",
                    0,
                    Tls(certs / name),
                )
            )
            for name, cipher in workers
        ]
        owner = MlweOwner(preset("exact"), model.public_matrix())
        model.guard(owner)
        addresses = [f"localhost:{service.port}" for service in services]
        client = stack.enter_context(
            connected(model, owner, addresses, Tls(certs / "owner"), config, lanes, ledger=ledger)
        )
        yield client, services, owner


def right(model: PreparedModel, client: OwnerClient, rows: int = 3) -> bool:
    x = np.random.default_rng(rows).standard_normal((rows, 24)).astype(np.float32)
    return bool(np.allclose(client.linear(0, x), expected(model, x), rtol=1e-2, atol=1e-2))


def test_products_over_the_line(model: PreparedModel, certs: Path) -> None:
    """Forward and backward, several lanes; the worker opened no file of an owner's."""
    with line(model, certs, ("w0", MlweWorker())) as (client, (service,), owner):
        results: list[bool] = []
        lanes = [
            threading.Thread(target=lambda n=n: results.append(right(model, client, n)))  # type: ignore[misc]
            for n in range(1, 9)
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        assert results == [True] * 8
        assert client.linear(1, np.ones((2, 40), np.float32)).shape == (2, 24)
        assert service.server.meter.tasks == {"MultiplyCiphertext": 9}
        assert owner.blocks == owner.secrets_drawn == 9


def copy_worker_part(model: PreparedModel, place: Path) -> None:
    """As the end of `python -m scenarios.prepare` says."""
    (place / "worker").mkdir(parents=True)
    for file in (model.directory / "worker").iterdir():
        (place / "worker" / file.name).write_bytes(file.read_bytes())
    (place / "manifest.json").write_bytes((model.directory / "manifest.json").read_bytes())


def test_a_worker_needs_no_file_of_the_owners(model: PreparedModel, tmp_path: Path) -> None:
    """manifest.json and worker/ are enough."""
    copy_worker_part(model, tmp_path)
    part = WorkerPart.open(tmp_path)
    assert part.catalogue == model.catalogue()
    assert np.array_equal(part.weights[0], model.worker_weights()[0])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "a worker needs manifest"),
    "a weight is missing": (lambda place: next((place / "worker").iterdir()).unlink(), "No such"),
    "a weight has one wrong bit": (
        lambda place: _flip(next((place / "worker").iterdir())), "its SHA-256 differs"),
    "a weight is cut short": (
        lambda place: os.truncate(next((place / "worker").iterdir()), 200), "is damaged"),
    "the manifest has one wrong digit": (
        lambda place: (place / "manifest.json").write_text(
            (place / "manifest.json").read_text().replace('"seed": "', '"seed": "0')),
        "is no manifest"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_worker_part_is_named_with_what_to_do(
    how: str, model: PreparedModel, tmp_path: Path
) -> None:
    """The file, and that it is to be copied again: nobody can prepare anew over there."""
    spoil, said = SPOILT[how]
    copy_worker_part(model, tmp_path)
    spoil(tmp_path)
    with pytest.raises(PreparationError, match=said) as raised:
        WorkerPart.open(tmp_path)
    assert "anew" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "manifest.json and worker/ of" in str(raised.value)


def test_a_cut_line_is_survived_by_the_only_worker(model: PreparedModel, certs: Path) -> None:
    """In mid-request: the same bytes go out over the next connection, nothing is encrypted anew."""
    slow = Slow()
    with line(model, certs, ("w0", slow)) as (client, (service,), owner):
        done: list[bool] = []
        lane = threading.Thread(target=lambda: done.append(right(model, client)))
        lane.start()
        assert slow.asked.wait(10)
        for link in list(service.listener._links.values()):
            link.close("cut")
        slow.go.set()
        lane.join(20)
        assert done == [True]
        assert owner.blocks == owner.secrets_drawn == 1
        assert right(model, client)


def test_a_restarted_worker_is_found_again(model: PreparedModel, certs: Path) -> None:
    """At the same address, with an empty memory."""
    part, cipher = WorkerPart.open(model.directory), MlweWorker()
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    with ExitStack() as stack:
        first = ExitStack()
        service = first.enter_context(
            serving(OneDevice.holding(part, cipher), "127.0.0.1", 0, Tls(certs / "w0"))
        )
        client = stack.enter_context(
            connected(model, owner, [f"localhost:{service.port}"], Tls(certs / "owner"), PATIENT)
        )
        assert right(model, client)
        first.close()
        stack.enter_context(
            serving(
                OneDevice.holding(part, cipher),
                "127.0.0.1",
                service.port,
                Tls(certs / "w0"),
            )
        )
        assert right(model, client)


def test_workers_restart_one_after_another_without_a_lost_call(
    model: PreparedModel, certs: Path
) -> None:
    """Each drains, ends and comes back at its address while lanes ask: no call of theirs fails."""
    part = WorkerPart.open(model.directory)
    names = ("w0", "w1")
    with ExitStack() as stack:

        def start(name: str, port: int = 0) -> tuple[ExitStack, Service]:
            life = stack.enter_context(ExitStack())
            tls = Tls(certs / name)
            return life, life.enter_context(
                serving(OneDevice.holding(part, MlweWorker()), "127.0.0.1", port, tls)
            )

        lives = {name: start(name) for name in names}
        owner = MlweOwner(preset("exact"), model.public_matrix())
        model.guard(owner)
        addresses = [f"localhost:{lives[name][1].port}" for name in names]
        client = stack.enter_context(
            connected(model, owner, addresses, Tls(certs / "owner"), PATIENT, 3)
        )
        over = threading.Event()
        results: list[bool] = []

        def lane(rows: int) -> None:
            while not over.is_set():
                try:
                    results.append(right(model, client, rows))
                except RemoteLinearError:
                    results.append(False)

        lanes = [threading.Thread(target=lane, args=(rows,)) for rows in (1, 2, 3)]
        for thread in lanes:
            thread.start()
        for name in names:
            life, service = lives[name]
            assert service.drain(10)
            life.close()
            before = len(results)
            _until(lambda before=before: len(results) > before + 20)  # type: ignore[misc]
            lives[name] = start(name, service.port)
            _until(lambda name=name: lives[name][1].server.counts.products > 5)  # type: ignore[misc]
        over.set()
        for thread in lanes:
            thread.join()
        assert all(results)


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_liar_is_known_by_its_key(model: PreparedModel, certs: Path, tmp_path: Path) -> None:
    """At another address, in another session: refused before a request reaches it."""
    path = tmp_path / "retired-workers.json"
    ledger = WorkerLedger(path)
    with (
        line(model, certs, ("w0", Liar()), ledger=ledger) as (client, _, _),
        pytest.raises(RemoteLinearError, match="not the product"),
    ):
        right(model, client)
    (identity,) = ledger.retired
    assert len(identity) == 64
    honest = ("w0", MlweWorker()), ("w1", MlweWorker())
    ledger = WorkerLedger(path)
    with line(model, certs, *honest, ledger=ledger) as (client, services, _):
        assert all(right(model, client, n) for n in range(1, 5))
        assert services[0].server.meter.tasks == {}
        assert ledger.served != {identity}


def test_an_unbelievable_worker_ends_the_run_with_the_reason(
    model: PreparedModel, certs: Path, tmp_path: Path
) -> None:
    """What, where and what to do, instead of a time-out."""
    Authority().issue(tmp_path / "stranger", ["localhost"])
    (tmp_path / "stranger" / "ca.pem").write_bytes((certs / "owner" / "ca.pem").read_bytes())
    with (
        _stranger(model, certs, tmp_path / "stranger") as client,
        pytest.raises(RemoteLinearError, match=r"localhost.*is not believed.*ca\.pem"),
    ):
        right(model, client)


@contextmanager
def _stranger(model: PreparedModel, certs: Path, stranger: Path) -> Iterator[OwnerClient]:
    part, cipher = WorkerPart.open(model.directory), MlweWorker()
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    with (
        serving(OneDevice.holding(part, cipher), "127.0.0.1", 0, Tls(stranger)) as service,
        connected(
            model, owner, [f"localhost:{service.port}"], Tls(certs / "owner"), PATIENT
        ) as client,
    ):
        yield client


def test_a_closed_session_answers_at_once(model: PreparedModel, certs: Path) -> None:
    """Asking after the end is an error, not a wait for ever."""
    with line(model, certs, ("w0", MlweWorker())) as (client, _, _):
        assert right(model, client)
    with pytest.raises(RemoteLinearError, match="closed"):
        right(model, client)


@pytest.mark.parametrize(
    "text", ["", "gpu", "gpu:", ":7", "gpu:0", "gpu:65536", "gpu:x", "::1:7", "gpu:٣"]
)
def test_what_is_no_address(text: str) -> None:
    """The text says what one looks like."""
    with pytest.raises(AddressError, match=r"gpu\.example:7443"):
        address_of(text)
    assert address_of("[::1]:7") == ("::1", 7)


@pytest.mark.parametrize("host", ["gpu.example", "10.0.0.1"])
def test_a_worker_elsewhere_needs_tls(model: PreparedModel, host: str) -> None:
    """Said before anything is dialled."""
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    with (
        pytest.raises(CertificateError, match="needs TLS"),
        connected(model, owner, [f"{host}:1"], None),
    ):
        pass


def test_a_key_caught_at_one_address_serves_at_none(model: PreparedModel, certs: Path) -> None:
    """In the same session: all its links are closed at once, and it is asked nothing more."""
    liars = [("w0", Liar()), ("w0", Liar())]
    with line(model, certs, *liars, lanes=1) as (client, services, _):
        with pytest.raises(RemoteLinearError, match="not the product"):
            right(model, client)
        assert len(client._ledger.retired) == 1
        assert sum(len(service.server.meter.tasks) for service in services) == 1
        until = time.monotonic() + 10
        while any(service.listener._links for service in services) and time.monotonic() < until:
            time.sleep(0.01)
        assert [len(service.listener._links) for service in services] == [0, 0]


def test_an_address_keeps_its_key_for_a_session(model: PreparedModel, certs: Path) -> None:
    """Another believable one there is refused, so whoever is caught is who gave the answer."""
    part, cipher = WorkerPart.open(model.directory), MlweWorker()
    owner = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(owner)
    first = ExitStack()
    service = first.enter_context(
        serving(OneDevice.holding(part, cipher), "127.0.0.1", 0, Tls(certs / "w0"))
    )
    address = f"localhost:{service.port}"
    with connected(model, owner, [address], Tls(certs / "owner"), PATIENT) as client:
        assert right(model, client)
        identity = client._identity_of(address)
        first.close()
        with (
            serving(
                OneDevice.holding(part, cipher),
                "127.0.0.1",
                service.port,
                Tls(certs / "w1"),
            ) as other,
            pytest.raises(RemoteLinearError, match="answers under another key than before"),
        ):
            right(model, client)
        assert client._identity_of(address) == identity
        assert other.server.meter.tasks == {}


def test_failing_all_calls_while_answers_come(model: PreparedModel, certs: Path) -> None:
    """Each call ends once, by whoever takes it out."""
    with line(model, certs, ("w0", MlweWorker())) as (client, _, _):
        futures = [Future[Any]() for _ in range(20_000)]
        client._pending.update(enumerate(futures, 1000))
        calls = range(1000, 1000 + len(futures))
        answers = threading.Thread(
            target=lambda: [client._report(Deliver(call, 1)) for call in calls]
        )
        answers.start()
        client._fail_all("enough")
        answers.join()
        assert all(future.done() for future in futures)


def test_workers_that_nobody_can_reach_are_said_before_anything_is_computed(
    model: PreparedModel, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a bound, with the address, the reason and what to do."""
    monkeypatch.setattr(remote, "REACHED_S", 0.5)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    cipher = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(cipher)
    started = time.monotonic()
    with (
        pytest.raises(
            WorkerUnreachableError, match=rf"localhost:{port}.*refused.*scenarios.worker"
        ),
        remote.connected(model, cipher, [f"localhost:{port}"], Tls(certs / "owner")),
    ):
        raise AssertionError("nobody is there")
    assert time.monotonic() - started < 10


def test_a_worker_that_starts_a_little_later_is_waited_for(
    model: PreparedModel, certs: Path
) -> None:
    """Both sides may be started by one script."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    cipher = MlweOwner(preset("exact"), model.public_matrix())
    model.guard(cipher)
    part = WorkerPart.open(model.directory)
    with ExitStack() as stack:

        def start() -> None:
            stack.enter_context(
                serving(OneDevice.holding(part, MlweWorker()), "localhost", port,
                        Tls(certs / "w0"))
            )  # fmt: skip

        timer = threading.Timer(0.7, start)
        timer.start()
        with remote.connected(model, cipher, [f"localhost:{port}"], Tls(certs / "owner")) as client:
            assert (
                client.linear(0, np.ones((1, model.groups[0].in_features), np.float32)).shape[0]
                == 1
            )
        timer.join()
