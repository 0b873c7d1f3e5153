"""The line between two namespaces that fidelity is measured over: its delay, its rate, its end."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.shaped_line import ADDRESSES, NoLineError, Shape, require_line, shaped_line

_LISTEN = f"""
import socket
with socket.create_server(("{ADDRESSES[1]}", 7000)) as s:
    print("ready", flush=True)
    c, _ = s.accept()
    c.sendall(b"!")
    while c.recv(1 << 20):
        pass
    print("done", flush=True)
"""
_SEND = f"""
import socket, time
start = time.perf_counter()
c = socket.create_connection(("{ADDRESSES[1]}", 7000))
c.recv(1)
print(time.perf_counter() - start, flush=True)
c.sendall(bytes(1 << 20))
c.close()
"""


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_a_line_delays_and_shapes_and_goes() -> None:
    """Two round trips of 40 ms, then a megabyte at 40 Mb/s: never faster than that."""
    try:
        require_line()
        with shaped_line(Shape(40e6, 0.040)) as line:
            names = line.namespaces
            listener = line.start(1, [sys.executable, "-c", _LISTEN])
            assert listener.stdout is not None
            assert listener.stdout.readline() == "ready\n"
            sender = line.start(0, [sys.executable, "-c", _SEND])
            assert sender.stdout is not None
            connecting_s = float(sender.stdout.readline())
            start = time.perf_counter()
            assert listener.stdout.readline() == "done\n"
            taken_s = time.perf_counter() - start
    except NoLineError as error:
        pytest.skip(f"no line here: {error}")
    assert connecting_s >= 0.079
    assert taken_s >= 8 * (1 << 20) / 40e6 * 0.9
    assert not set(names) & set(_namespaces().split())
