"""Several owners at one worker: their requests are joined, and nobody gets another's product."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.net.devices import OneDevice
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from tests.nn.conftest import Tiny, make_tiny


class Busy(MlweWorker):
    """A worker whose launches take a while, and that remembers how many requests each had."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.joined: list[int] = []

    def multiply_many(self, requests: Sequence[tuple[Any, int]], matrix: Any) -> list[Any]:
        time.sleep(0.03)
        self.joined.append(len(requests))
        return super().multiply_many(requests, matrix)


def test_requests_of_two_owners_share_launches(tmp_path_factory: Any) -> None:
    """One matrix, two owners of four lanes each, different inputs: every answer is its own."""
    llama: Tiny = make_tiny("llama", tmp_path_factory.mktemp("llama"))
    prepared = llama.prepared["mlwe"]
    parameters = prepared.parameters
    assert parameters is not None
    matrices, weights = prepared.owner_matrices(), prepared.worker_weights()
    cipher = Busy()
    clients: dict[str, OwnerClient] = {}
    owners = {name: MlweOwner(parameters, prepared.public_matrix()) for name in ("ann", "ben")}
    catalogue = prepared.catalogue()
    server = WorkerServer(
        OneDevice(catalogue, cipher, prepared.worker_matrices()),
        reply=lambda peer, frame: clients[peer].deliver("worker", frame),
    )  # fmt: skip
    server.start()
    for name, owner in owners.items():
        prepared.guard(owner)
        clients[name] = OwnerClient(
            catalogue, matrices, owner, ["worker"], threads=4,
            transmit=lambda _, frame, name=name: server.deliver(name, frame),  # type: ignore[misc]
        )  # fmt: skip
        clients[name].start()
    answers: dict[tuple[str, int], NDArray[np.float32]] = {}

    def lane(name: str, number: int) -> None:
        value = number + (10.0 if name == "ben" else 1.0)
        x = np.full((number + 1, matrices[0].in_features), value, np.float32)
        answers[name, number] = clients[name].linear(0, x) / value

    lanes = [threading.Thread(target=lane, args=(n, i)) for n in clients for i in range(4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(60)
    for client in clients.values():
        client.close()
    server.stop()
    expected = weights[0].astype(np.float64).sum(axis=1) * matrices[0].out_scale
    assert len(answers) == 8
    for (_, number), y in answers.items():
        assert y.shape == (number + 1, len(expected))
        assert np.linalg.norm(y - expected) < 0.05 * np.linalg.norm(expected) * len(y) ** 0.5
    assert sum(cipher.joined) == 8
    assert max(cipher.joined) > 1
