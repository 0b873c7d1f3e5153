"""How fast do frames travel between two processes, and what do they cost?

    python -m benchmarks.transport --json FILE              a minute
    python -m benchmarks.transport --grpc                   and the same frames over gRPC
    python -m benchmarks.transport --llama1b --json FILE    a training step, ten minutes on 2 cores

Two processes of this machine, joined by loopback: an owner sends requests of the size of a
2048x2048 layer over 256 tokens, eight under way at once, and a worker answers each with as many
bytes as a product has. Nothing is computed. Mutual TLS 1.3, as between machines; plain TCP beside
it shows what encryption costs. The worker's and the owner's processor seconds count together; those
of others' processes in the meantime are told, because they make speeds, not costs, smaller.
"""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from backends.net.dialling import Dialler
from backends.net.listening import Listener
from backends.net.tls import Tls
from backends.options import ALL, TIMES, Modes, Parser, Whole
from benchmarks import two_processes
from protocol.messages import Bytes, Multiply, Product, decode, encode
from scenarios.certs import Authority
from scenarios.cli import clean_exit

TOKENS, WIDTH = 256, 2048
UP_BYTES, DOWN_BYTES = 3 * TOKENS * WIDTH, 2 * TOKENS * WIDTH
WINDOW = 8
_FRAME_MAX = UP_BYTES + 1024
SESSION = bytes(16)
NAMES = {"tls": "mutual TLS 1.3", "plain": "plain TCP", "grpc": "gRPC, mutual TLS 1.3"}
PREFIX = {"tls": "", "plain": "plain_", "grpc": "grpc_"}

MODES = Modes(
    {"links": "measuring links (without --llama1b)"},
    lambda args: () if args.llama1b else ("links",),
    {"--llama1b": ALL, "--json": ALL}
    | dict.fromkeys(("--seconds", "--rounds", "--grpc"), ("links",)),
)


Send: TypeAlias = Callable[[bytes], object]
Close: TypeAlias = Callable[[], object]


def serve(kind: str, certs: str, pipe: Connection) -> None:
    """The worker's process: answers every request with the bytes of a product."""
    product = os.urandom(DOWN_BYTES)

    def answer(frame: Bytes) -> bytes:
        message = decode(frame)
        assert isinstance(message, Multiply)
        made = encode(Product(SESSION, message.request, product))
        assert isinstance(made, bytes)
        return made

    close: Close
    if kind == "grpc":
        from benchmarks import transport_grpc

        port, close = transport_grpc.serve(Path(certs), answer)
    else:
        tls = Tls(Path(certs)) if kind == "tls" else None
        listener = Listener(
            "127.0.0.1", 0, tls, _FRAME_MAX,
            lambda peer, frame: listener.send(peer, answer(frame)), lambda peer: None,
        )  # fmt: skip
        listener.start()
        port, close = listener.port, listener.close
    pipe.send(port)
    while pipe.recv() == "cpu":
        pipe.send(time.process_time())
    close()


def dialled(
    kind: str, certs: Path, port: int, arrived: Callable[[int], None]
) -> tuple[Send, Close]:
    """(send, close) of a link to the worker; `arrived` is told the bytes of every answer."""
    if kind == "grpc":
        from benchmarks import transport_grpc

        return transport_grpc.dial(certs, port, lambda frame: arrived(len(frame)))
    dialler = Dialler(
        {"worker": ("localhost" if kind == "tls" else "127.0.0.1", port)},
        Tls(certs) if kind == "tls" else None, _FRAME_MAX,
        lambda name, frame: arrived(len(frame)),
        lambda name: arrived(0), lambda name, why: arrived(0),
    )  # fmt: skip
    return lambda frame: dialler.send("worker", frame), dialler.close


def measure(kind: str, certs: Path, seconds: float) -> dict[str, float]:
    """Goodput of payload both ways together, and processor seconds of both sides, per GB."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=serve, args=(kind, str(certs / "worker"), there), daemon=True)
    worker.start()
    port: int = here.recv()
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    send, close = dialled(kind, certs / "owner", port, arrived.put)
    request = os.urandom(UP_BYTES)

    def ask(number: int) -> None:
        made = encode(Multiply(SESSION, number, 0, TOKENS, request))
        assert isinstance(made, bytes)
        send(made)

    def answered() -> None:
        assert arrived.get(timeout=30) > DOWN_BYTES, "the link broke"

    def cpu_s() -> float:
        here.send("cpu")
        return float(here.recv()) + time.process_time()

    for number in range(WINDOW):  # opens the link, and fills it
        ask(number)
    for _ in range(2 * WINDOW):
        answered()
        ask(number := number + 1)
    count, before, start = 0, cpu_s(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        answered()
        count += 1
        ask(number := number + 1)
    elapsed, used = time.perf_counter() - start, cpu_s() - before
    close()
    here.send("stop")
    worker.join(10)
    gigabytes = count * (UP_BYTES + DOWN_BYTES) / 1e9
    return {"goodput_mb_s": 1000 * gigabytes / elapsed, "cpu_s_per_gb": used / gigabytes}


def others_s() -> float:
    """CPU seconds that neither this process nor a worker that has ended took of this machine."""
    from backends.machine import busy_elsewhere_s  # only here, see main

    own = os.times()
    return busy_elsewhere_s() - own.children_user - own.children_system


def run(seconds: float, rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """All kinds in turn, several times; medians."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    elsewhere_s, start = others_s(), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        certs, authority = Path(directory), Authority()
        authority.issue(certs / "owner")
        authority.issue(certs / "worker", ["localhost", "127.0.0.1"])
        for _ in range(rounds):
            for kind, each in found.items():
                each.append(measure(kind, certs, seconds))
    figures: dict[str, Any] = {"seconds": seconds, "rounds": rounds}
    figures["others_busy_cores"] = max(
        0.0, (others_s() - elsewhere_s) / (time.perf_counter() - start)
    )
    for kind, each in found.items():
        for key in ("goodput_mb_s", "cpu_s_per_gb"):
            figures[PREFIX[kind] + key] = median(one[key] for one in each)
    return figures


def main() -> None:
    # Only here: it loads torch, for which every worker's process would have to wait.
    from scenarios import record

    parser = Parser(__doc__, "benchmarks.transport", MODES)
    parser.add_argument(
        "--seconds", type=Whole(1, 86_400), default=5, help="of each measurement (5)"
    )
    parser.add_argument("--rounds", type=TIMES, default=3, help="medians over these (3)")
    parser.add_argument("--llama1b", action="store_true", help="a training step of the 1B's shape")
    parser.add_argument(
        "--grpc", action="store_true",
        help="also over gRPC; needs grpcio, which is no dependency: pip install --target DIR "
        "grpcio, and DIR on PYTHONPATH",
    )  # fmt: skip
    record.add_json_option(parser)
    args = parser.parse()
    if args.llama1b:
        with clean_exit():
            figures = two_processes.measure(two_processes.Size())
        for name in ("step_ratio", "owner_cpu_ratio", "owner_rss_ratio"):
            print(f"{name:16s} {figures[name]:.2f}")
        record.write(args.json, figures)
        return
    kinds = ["tls", "plain"]
    with clean_exit():
        if args.grpc:
            if importlib.util.find_spec("grpc") is None:
                parser.error("--grpc needs grpcio, see --help")
            kinds.append("grpc")
        figures = run(args.seconds, args.rounds, kinds)
    for kind in kinds:
        speed, cost = (figures[PREFIX[kind] + key] for key in ("goodput_mb_s", "cpu_s_per_gb"))
        print(f"{NAMES[kind]:24s} {speed:7.0f} MB/s of payload, {cost:.2f} CPU-seconds per GB")
    print(f"other processes took {figures['others_busy_cores']:.1f} cores meanwhile")
    if args.grpc:
        from benchmarks import transport_grpc

        figures["grpc_version"] = transport_grpc.VERSION
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
