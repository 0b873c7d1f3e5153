"""The real driver wipes every secret of every call, however it and the owner end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backends.he.interface import Encrypted, OwnerMatrix
from backends.he.mlwe_owner import MlweOwner
from backends.he.store import PreparedModel
from backends.net.owner import RemoteLinearError
from protocol.messages import Multiply, Product, decode
from protocol.owner_memory import OwnerConfig
from tests.he.test_wiping import arrays
from tests.net.test_inprocess import FAST, Wire, make

X = np.ones((3, 24), np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """Shared by the tests of this file."""
    return make(tmp_path_factory.mktemp("model"))


class Secretive(Wire):
    """A wire whose owner's sealed handles are remembered; encryption waits for `go`."""

    def __init__(self, model: PreparedModel, config: OwnerConfig = FAST) -> None:
        super().__init__(model, config)
        self.sealed: list[Any] = []
        self.go = threading.Event()
        self.go.set()
        encrypt = self.cipher.encrypt

        def watched(x: Any, matrix: OwnerMatrix) -> Encrypted:
            made = encrypt(x, matrix)
            self.sealed.append(made.sealed)
            self.go.wait(10)
            return made

        self.cipher.encrypt = watched  # type: ignore[method-assign]

    def lanes(self, count: int) -> list[threading.Thread]:
        """Start lanes that ask once each, and do not mind failing."""

        def ask() -> None:
            with pytest.raises(RemoteLinearError):
                self.client.linear(0, X)

        threads = [threading.Thread(target=ask) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something to happen on other threads."""
        deadline = time.monotonic() + 10
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def readable(self) -> int:
        """Sealed handles of which anything is left."""
        return sum(any(array.any() for array in arrays(sealed)) for sealed in self.sealed)


def lie(wire: Secretive) -> None:
    """The only worker answers wrongly."""
    honest = wire.client.deliver
    wire.client.deliver = (
        lambda peer, frame: honest(  # type: ignore[method-assign]
            peer, frame[:-40] + bytes(40) if isinstance(decode(frame), Product) else frame
        )
    )
    for lane in wire.lanes(3):
        lane.join()


def silence(wire: Secretive) -> None:
    """The only worker does not answer requests."""
    wire.drop_products = 1 << 30
    for lane in wire.lanes(3):
        lane.join()


def close(wire: Secretive) -> None:
    """The owner closes with requests in flight."""
    wire.drop_products = 1 << 30
    lanes = wire.lanes(3)
    wire.until(lambda: len([f for f in wire.up if isinstance(decode(f), Multiply)]) >= 3)
    wire.client.close()
    for lane in lanes:
        lane.join()


def late(wire: Secretive) -> None:
    """An encryption ends after the owner has closed."""
    wire.go.clear()
    lanes = wire.lanes(1)
    wire.until(lambda: len(wire.sealed) == 1)
    closing = threading.Thread(target=wire.client.close)
    closing.start()
    for lane in lanes:
        lane.join()
    wire.go.set()
    closing.join()


def crash(wire: Secretive) -> None:
    """The machine itself fails, while a request is in flight and one is being encrypted."""
    wire.drop_products = 1 << 30
    lanes = wire.lanes(1)
    wire.until(lambda: any(isinstance(decode(f), Multiply) for f in wire.up))
    wire.go.clear()
    lanes += wire.lanes(1)
    wire.until(lambda: len(wire.sealed) == 2)
    wire.client.lost("nobody", "gone")
    for lane in lanes:
        lane.join()
    wire.go.set()


@pytest.mark.parametrize("how", [lie, silence, close, late, crash], ids=lambda how: how.__name__)
def test_no_secret_outlives_its_call(
    model: PreparedModel, how: Callable[[Secretive], None]
) -> None:
    """Failed, given up, closed over, late or left behind by a crash."""
    wire = Secretive(model, OwnerConfig(0.2, 0.1, 0.2, attempts_max=2))
    with wire:
        how(wire)
    assert wire.sealed
    assert wire.readable() == 0


def test_secrets_are_there_as_long_as_they_are_needed(model: PreparedModel) -> None:
    """And wiped before the result is delivered."""
    with Secretive(model) as wire:
        wire.go.clear()
        got: list[Any] = []
        lane = threading.Thread(target=lambda: got.append(wire.client.linear(0, X)))
        lane.start()
        wire.until(lambda: len(wire.sealed) == 1)
        assert wire.readable() == 1
        wire.go.set()
        lane.join()
        assert wire.readable() == 0
        assert len(got) == 1
        assert isinstance(wire.cipher, MlweOwner)
