"""A worker's status pages, for those who mean well and those who do not."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from backends.net.counts import LABELS, Counts
from backends.net.pages import StatusPages


@pytest.fixture
def pages() -> Iterator[StatusPages]:
    made = StatusPages("127.0.0.1", 0, Counts(), lambda: False, lambda: True)
    yield made
    made.close()


def said(pages: StatusPages, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", pages.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while more := connection.recv(1 << 16):
            answer += more
        return answer


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.0", b"200"), (b"GET /metrics?a=b HTTP/1.0", b"200"),
        (b"GET /healthz HTTP/1.0", b"200"), (b"GET /readyz HTTP/1.0", b"503"),
        (b"GET / HTTP/1.0", b"404"), (b"GET /../manifest.json HTTP/1.0", b"404"),
        (b"POST /metrics HTTP/1.0", b"501"), (b"nonsense", b"400"),
    ],
)  # fmt: skip
def test_three_pages_and_nothing_else(
    pages: StatusPages, request_line: bytes, status: bytes
) -> None:
    """Whatever is asked."""
    assert status in said(pages, request_line + b"\r\n\r\n")


def test_metrics_are_in_prometheus_form(pages: StatusPages) -> None:
    """HELP and TYPE before each sample, every reason from the start, a number each."""
    body = said(pages, b"GET /metrics HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2].decode()
    assert body.endswith("\n")
    typed: dict[str, str] = {}
    samples: dict[str, float] = {}
    for line in body.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            typed[name] = kind
        elif not line.startswith("# HELP "):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
            assert typed[name.partition("{")[0]] in ("counter", "gauge")
    assert all((kind == "counter") == name.endswith("_total") for name, kind in typed.items())
    reasons = {name.partition('"')[2].rstrip('"}') for name in samples if "{" in name}
    assert reasons == set(LABELS)


def test_a_connection_has_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a byte of it comes."""
    monkeypatch.setattr("backends.net.pages._PATIENCE_S", 0.4)
    made = StatusPages("127.0.0.1", 0, Counts(), lambda: True, lambda: True)
    slow = [socket.create_connection(("127.0.0.1", made.port)) for _ in range(8)]
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        for one in slow:
            with suppress(OSError):
                one.sendall(b"x")
        time.sleep(0.05)
    assert b"200" in said(made, b"GET /healthz HTTP/1.0\r\n\r\n")
    for one in slow:
        one.close()
    made.close()


def test_the_silent_do_not_keep_others_out(pages: StatusPages) -> None:
    """They are few, and they are hung up on."""
    silent = [socket.create_connection(("127.0.0.1", pages.port)) for _ in range(8)]
    time.sleep(0.3)
    with pytest.raises((OSError, AssertionError)):
        assert said(pages, b"GET /healthz HTTP/1.0\r\n\r\n")
    for one in silent:
        one.close()
    time.sleep(0.5)
    assert b"200" in said(pages, b"GET /healthz HTTP/1.0\r\n\r\n")
