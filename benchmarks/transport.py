"""How fast do frames travel between two processes, and what do they cost?

    python -m benchmarks.transport --json FILE              a minute
    python -m benchmarks.transport --llama1b --json FILE    a training step, ten minutes on 2 cores

Two processes of this machine, joined by loopback: an owner sends requests of the size of a
2048x2048 layer over 256 tokens, eight under way at once, and a worker answers each with as many
bytes as a product has. Nothing is computed. Mutual TLS 1.3, as between machines; plain TCP beside
it shows what encryption costs.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import queue
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from backends.net.dialling import Dialler
from backends.net.listening import Listener
from backends.net.tls import Tls
from benchmarks import two_processes
from protocol.messages import Multiply, Product, decode, encode
from scenarios import record
from scenarios.certs import Authority
from scenarios.cli import clean_exit, positive

TOKENS, WIDTH = 256, 2048
UP_BYTES, DOWN_BYTES = 3 * TOKENS * WIDTH, 2 * TOKENS * WIDTH
WINDOW = 8
_FRAME_MAX = UP_BYTES + 1024
SESSION = bytes(16)


def serve(certs: str | None, pipe: Connection) -> None:
    """The worker's process: answers every request with the bytes of a product."""
    answer = os.urandom(DOWN_BYTES)

    def on_frame(peer: str, frame: bytearray) -> None:
        message = decode(frame)
        assert isinstance(message, Multiply)
        listener.send(peer, encode(Product(SESSION, message.request, answer)))

    tls = Tls(Path(certs)) if certs else None
    listener = Listener("127.0.0.1", 0, tls, _FRAME_MAX, on_frame, lambda peer: None)
    listener.start()
    pipe.send(listener.port)
    while pipe.recv() == "cpu":
        pipe.send(time.process_time())
    listener.close()


def measure(certs: Path | None, seconds: float) -> dict[str, Any]:
    """Goodput of payload both ways together, and processor seconds of both sides, per GB."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(
        target=serve, args=(str(certs / "worker") if certs else None, there), daemon=True
    )
    worker.start()
    port: int = here.recv()
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    lost = threading.Event()
    dialler = Dialler(
        {"worker": ("localhost" if certs else "127.0.0.1", port)},
        Tls(certs / "owner") if certs else None, _FRAME_MAX,
        lambda name, frame: arrived.put(len(frame)),
        lambda name: lost.set(), lambda name, why: lost.set(),
    )  # fmt: skip
    request = os.urandom(UP_BYTES)

    def ask(number: int) -> None:
        dialler.send("worker", encode(Multiply(SESSION, number, 0, TOKENS, request)))

    def cpu_s() -> float:
        here.send("cpu")
        return float(here.recv()) + time.process_time()

    for number in range(WINDOW):  # opens the link, and fills it
        ask(number)
    for _ in range(2 * WINDOW):
        arrived.get(timeout=30)
        ask(number := number + 1)
    count, before, start = 0, cpu_s(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        arrived.get(timeout=30)
        count += 1
        ask(number := number + 1)
    elapsed, used = time.perf_counter() - start, cpu_s() - before
    assert not lost.is_set(), "the link broke"
    dialler.close()
    here.send("stop")
    worker.join(10)
    gigabytes = count * (UP_BYTES + DOWN_BYTES) / 1e9
    return {"goodput_mb_s": 1000 * gigabytes / elapsed, "cpu_s_per_gb": used / gigabytes}


def run(seconds: float, rounds: int) -> dict[str, Any]:
    """Both kinds in turn, several times; medians."""
    found: dict[str, list[dict[str, Any]]] = {"tls": [], "plain": []}
    with tempfile.TemporaryDirectory() as directory:
        certs, authority = Path(directory), Authority()
        authority.issue(certs / "owner")
        authority.issue(certs / "worker", ["localhost", "127.0.0.1"])
        for _ in range(rounds):
            found["tls"].append(measure(certs, seconds))
            found["plain"].append(measure(None, seconds))
    figures: dict[str, Any] = {"seconds": seconds, "rounds": rounds}
    for kind, prefix in (("tls", ""), ("plain", "plain_")):
        for key in ("goodput_mb_s", "cpu_s_per_gb"):
            figures[prefix + key] = median(one[key] for one in found[kind])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=5, help="of each measurement (5)")
    parser.add_argument("--rounds", type=positive, default=3, help="medians over these (3)")
    parser.add_argument("--llama1b", action="store_true", help="a training step of the 1B's shape")
    record.add_json_option(parser)
    args = parser.parse_args()
    if args.llama1b:
        with clean_exit():
            figures = two_processes.measure(two_processes.Size())
        for name in ("step_ratio", "owner_cpu_ratio", "owner_rss_ratio"):
            print(f"{name:16s} {figures[name]:.2f}")
        record.write(args.json, figures)
        return
    with clean_exit():
        figures = run(args.seconds, args.rounds)
    for prefix, name in (("", "mutual TLS 1.3"), ("plain_", "plain TCP")):
        speed, cost = figures[f"{prefix}goodput_mb_s"], figures[f"{prefix}cpu_s_per_gb"]
        print(f"{name:16s} {speed:7.0f} MB/s of payload, {cost:.2f} CPU-seconds per GB")
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
