"""Owners that the operator gave a larger share: who they are, and that they have it."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from backends.net.counts import Counts
from backends.net.devices import Queues
from backends.net.tls import CertificateError, identity_in
from protocol.events import MultiplyCiphertext
from protocol.worker import WorkerConfig
from scenarios.certs import Authority
from scenarios.worker import run as worker
from scenarios.worker.__main__ import parsed
from scenarios.worker_log import EventLog


class Catalogue:
    """Of which only sizes are asked."""

    def both_bytes(self, matrix: int, tokens: int) -> int:
        return 1000 * tokens


class OneAtATime:
    """A device that holds all matrices, and has one product at a time."""

    catalogue: Any = Catalogue()
    count, each, here = 1, 1, True

    def of(self, matrix: int) -> int:
        return 0

    def multiply(self, matrix: int, requests: Any) -> Any:
        raise NotImplementedError


def test_a_worker_serves_by_share() -> None:
    """Two who always ask, of matrices of their own: bytes as three to one, request by request."""
    asking: dict[int, str] = {}
    served: Counter[str] = Counter()
    config = WorkerConfig(shares={"ann": 3})
    queues = Queues(config, OneAtATime(), asking.__getitem__, Counts())

    def ask(client: str) -> None:
        task = len(asking)
        asking[task] = client
        queues.put(task, MultiplyCiphertext({"ann": 0, "ben": 1}[client], 4, b""))

    for client in ("ann", "ben"):
        for _ in range(8):
            ask(client)
    # One product has all that waits of a matrix, so both ask for as much as they have had.
    for _ in range(400):
        tasks = queues.take()
        for task in tasks:
            served[asking[task]] += 1
        queues.done(tasks)
        for task in tasks:
            ask(asking[task])
    assert served["ann"] / served["ben"] == pytest.approx(3, rel=0.1)


def certificate(place: Path, authority: Authority | None = None) -> Path:
    (authority or Authority()).issue(place)
    return place / "cert.pem"


def arguments(*shares: tuple[Path, int]) -> argparse.Namespace:
    return argparse.Namespace(share=list(shares))


def test_an_owner_is_known_by_its_certificate(tmp_path: Path) -> None:
    """By the key in it, as the links that it opens are."""
    ann, ben = (certificate(tmp_path / name) for name in ("ann", "ben"))
    shares = worker.shares_of(arguments((ann, 3), (ben, 2)))
    assert shares == {identity_in(ann): 3, identity_in(ben): 2}
    with pytest.raises(worker.ShareError, match="twice"):
        worker.shares_of(arguments((ann, 3), (ann, 2)))


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b"-----BEGIN CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty, binary, cut: one line that names the file."""
    path = tmp_path / "cert.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        worker.shares_of(arguments((path, 2)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CertificateError):
        identity_in(tmp_path)


def test_the_command_hands_shares_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the worker that listens; what names no share never gets so far."""
    path, authority = tmp_path / "ann", Authority()
    ann = certificate(path, authority)
    authority.issue(tmp_path / "worker", ["localhost"])
    words = ["worker", "--model", str(tmp_path), "--listen", "localhost:0"]
    words += ["--tls", str(tmp_path / "worker")]
    seen = []

    class SeenError(Exception):
        pass

    def serving(*arguments: Any, **more: Any) -> Any:
        seen.extend(one for one in arguments if isinstance(one, WorkerConfig))
        raise SeenError

    monkeypatch.setattr(worker, "serving", serving)
    monkeypatch.setattr(worker, "devices_of", lambda *_: (OneAtATime(), "nothing"))
    monkeypatch.setattr(worker.State, "listen_to_signals", lambda self: None)
    monkeypatch.setattr("sys.argv", [*words, "--share", f"{ann}=3"])
    with pytest.raises(SeenError):
        worker.run(parsed(), EventLog("text"))
    assert [config.shares for config in seen] == [{identity_in(ann): 3}]
    for bad in (f"{ann}", f"{ann}=0", f"{ann}=1001", "=2", f"{ann}=two"):
        monkeypatch.setattr("sys.argv", [*words, "--share", bad])
        with pytest.raises(SystemExit):
            parsed()


def test_shares_need_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker of this machine only has owners that it cannot tell apart."""
    words = ["worker", "--model", str(tmp_path), "--share", f"{tmp_path / 'cert.pem'}=2"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        parsed()
    assert "--tls" in capsys.readouterr().err
