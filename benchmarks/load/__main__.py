"""Many owners at one live worker: how fast together, how even, and does each get what is its own?

    python -m benchmarks.load --owners 16 --json FILE          three minutes
    python -m benchmarks.load --owners 16 --churn --json FILE  and owners that die, and new ones
    python -m benchmarks.load --owners 16 --soak 1800 --json FILE
    python -m benchmarks.load --ray --kill --json FILE          a cluster of this machine instead

The worker is a process as a user starts it, over mutual TLS 1.3 on loopback, with one layer of a
small Llama, of random weights. An owner has a link and a certificate of its own, and sends
ciphertexts that were encrypted before, so that the processor is the worker's; several owners share
a process. It asks for one product after the other, of a few tokens, where a
product costs what it takes to read the weight; and compares every answer, bit for bit, with the one
that the worker's cipher gives to it alone. Then --encrypting owners of this process join them that
really encrypt, and compare what they decrypt with the product in clear.

    aggregate_ratio       products a second of all owners together, until the last has finished,
                          over those of one owner alone: the medians of --repeats turns
    slowest_over_fastest  time to finish the same work, among owners that begin at once, median
    wrong, lost           answers that differ; requests that were never answered
    rss_growth_mb         the worker's private memory: at the soak's end over after its first fifth
    errors                of a soak: answers that differ, or never came to owners that lived
    ray_ratio             a step with one shard on Ray, over a step with the worker itself: layers
                          of the 1B; ray_ratio_half of a model half as wide
    ray_pause_s           longest time without a byte after a node, and its shard, was killed
    ray_same_adapter      that training's adapter is as near to undisturbed ones as those are
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from backends.he.mlwe_owner import MlweOwner
from backends.he.store import PreparedModel
from backends.net.remote import connected
from backends.net.tls import Tls
from backends.options import ALL, TOKENS, Modes, Number, Parser, Whole
from benchmarks.load import cluster
from benchmarks.load.live import Group, LiveWorker, live_worker
from benchmarks.load.made import clear_product, make_place
from scenarios import record
from scenarios.cli import clean_exit

PROCESSES = 4
"""That owners share. One of them is killed, with all of its owners, where owners die."""
CLOSE = 0.2
"""Relative error that a product may have. The preset has up to 0.06 over 16,384 inputs, and another
owner's answer is off by more than 1."""
CYCLES = 2
"""Times that owners die and others come."""
RAY_STEPS, KILL_STEPS = 4, 20
DYING, WITHOUT_END = 0.25, 10**6
"""Of a soak's groups, those that die, and rounds that none of these gets to the end of."""


class Load:
    """A place, a live worker, and what is asked of it."""

    def __init__(self, args: argparse.Namespace, place: Path, worker: LiveWorker) -> None:
        self._args, self._place, self._worker = args, place, worker

    def groups(self, names: list[str], rounds: int) -> list[Group]:
        """These owners over the processes, welcomed."""
        count = min(PROCESSES, len(names))
        found = [self._group(names[i::count], rounds) for i in range(count)]
        for group in found:
            group.ready()
        return found

    def _group(self, names: list[str], rounds: int) -> Group:
        args, worker = self._args, self._worker
        return Group(self._place, worker.address, names, args.tokens, rounds)

    def together(self, names: list[str]) -> tuple[float, float, list[dict[str, Any]]]:
        """(products a second, slowest over fastest, results) of owners that begin at once."""
        groups = self.groups(names, self._args.rounds)
        for group in groups:
            group.begin()
        results = [one for group in groups for one in group.results()]
        times = [one["seconds"] for one in results]
        rate = sum(one["right"] for one in results) / max(times)
        return rate, max(times) / min(times), results

    def speed(self) -> dict[str, Any]:
        """One alone and all together, in turns."""
        names = [f"owner{i}" for i in range(self._args.owners)]
        alone, many, uneven, results = [], [], [], []
        joined = []
        for turn in range(self._args.repeats):
            rate, _, found = self.together(names[turn % len(names) :][:1])
            alone.append(rate)
            results += found
            before = [self._worker.count(f"{n}_total") for n in ("products", "launches")]
            rate, ratio, found = self.together(names)
            products, launches = (
                self._worker.count(f"{n}_total") - b
                for n, b in zip(("products", "launches"), before, strict=True)
            )
            joined.append(products / launches)
            many.append(rate)
            uneven.append(ratio)
            results += found
            print(f"turn {turn + 1}: alone {alone[-1]:.0f}/s, together {rate:.0f}/s", flush=True)
        return {
            "aggregate_ratio": median(many) / median(alone),
            "slowest_over_fastest": median(uneven),
            "alone_per_s": alone,
            "together_per_s": many,
            "slowest_over_fastest_each": uneven,
            "requests_a_product": joined,
        } | tally(results)

    def churn(self) -> dict[str, Any]:
        """Again and again a process dies while its owners work, and others come in their place."""
        owners, rounds = self._args.owners, self._args.rounds
        results, memory = [], []
        for _ in range(CYCLES):
            groups = self.groups([f"owner{i}" for i in range(owners)], rounds)
            victim, *others = groups
            for group in groups:
                group.begin()
            time.sleep(self._args.rounds / 100)
            victim.kill()
            names = [f"owner{owners + i}" for i in range(len(victim.names))]
            new = self._group(names, rounds)
            new.ready()
            new.begin()
            results += [one for group in [*others, new] for one in group.results()]
            memory.append(self._worker.own_mb())
        found = tally(results)
        return {
            "churn_killed": CYCLES * len(victim.names),
            "churn_finished": len(results),
            "churn_wrong": found["wrong"],
            "churn_lost": found["lost"],
            "churn_memory_mb": memory,
        }

    def soak(self) -> dict[str, Any]:
        """For so many seconds: groups that work for a while, then leave or die, and new ones."""
        seconds = self._args.soak
        begin, memory, results = time.monotonic(), [], []
        spare = [f"owner{i}" for i in range(self._args.owners)]
        each = max(1, len(spare) // PROCESSES)
        running: list[tuple[Group, float]] = []
        killed = came = 0
        while (now := time.monotonic() - begin) < seconds:
            while len(spare) >= each:
                names, spare = spare[:each], spare[each:]
                running.append(self._soaking(names, now))
                came += each
            for group, dies_s in list(running):
                if group.running() and now < dies_s:
                    continue
                if group.running():
                    group.kill()
                    killed += len(group.names)
                else:
                    results += group.results()
                spare += group.names
                running.remove((group, dies_s))
            memory.append((now, self._worker.own_mb()))
            time.sleep(0.2)
        for group, dies_s in running:
            if dies_s < math.inf:
                group.kill()
            else:
                results += group.results()
        found = tally(results)
        settled = [mb for at, mb in memory if 0.1 * seconds <= at < 0.2 * seconds]
        settled = settled or [memory[0][1]]
        last = [mb for at, mb in memory if at >= 0.9 * seconds] or [memory[-1][1]]
        return {
            "soak_s": seconds,
            "rss_growth_mb": median(last) - median(settled),
            "errors": found["wrong"] + found["lost"],
            "soak_products": found["right"],
            "soak_came": came,
            "soak_killed": killed,
            "soak_memory_mb": [memory[i * (len(memory) - 1) // 20][1] for i in range(21)],
        }

    def _soaking(self, names: list[str], now: float) -> tuple[Group, float]:
        """A group that has begun, and when it is to die: never, if it is to finish."""
        draw, rounds = random.Random(), self._args.rounds
        dies_s = now + draw.uniform(1, 20) if draw.random() < DYING else math.inf
        enough = draw.randint(rounds // 2, 2 * rounds) if dies_s == math.inf else WITHOUT_END
        group = self._group(names, enough)
        group.ready()
        group.begin()
        return group, dies_s


def tally(results: list[dict[str, Any]]) -> dict[str, int]:
    """Sums over owners."""
    return {what: sum(one[what] for one in results) for what in ("right", "wrong", "lost")}


class Encrypting:
    """Owners of this process that really encrypt, asking for as long as others work."""

    def __init__(self, model: PreparedModel, place: Path, names: list[str], tokens: int) -> None:
        self._model, self._place, self._names, self._tokens = model, place, names, tokens
        self._stop = threading.Event()
        self.right = self.wrong = 0
        self.worst = 0.0
        self._stack = ExitStack()

    def start(self, worker: str) -> None:
        """Connect, and begin."""
        assert self._model.parameters is not None
        for name in self._names:
            cipher = MlweOwner(self._model.parameters, self._model.public_matrix())
            self._model.guard(cipher)
            tls = Tls(self._place / name)
            client = self._stack.enter_context(connected(self._model, cipher, [worker], tls))
            thread = threading.Thread(target=self._ask, args=(client,))
            thread.start()
            self._stack.callback(thread.join)

    def stop(self) -> None:
        """After the round that they are in."""
        self._stop.set()
        self._stack.close()

    def _ask(self, client: Any) -> None:
        draw = np.random.default_rng()
        pairs = list(zip(self._model.owner_matrices(), self._model.worker_matrices(), strict=True))
        while not self._stop.is_set():
            for index, (matrix, at_worker) in enumerate(pairs):
                x = draw.standard_normal((self._tokens, matrix.in_features), np.float32)
                expected = clear_product(matrix, at_worker, x)
                try:
                    off = np.linalg.norm(client.linear(index, x) - expected)
                except RuntimeError:
                    self.wrong += 1
                    return
                error = float(off / np.linalg.norm(expected))
                self.worst = max(self.worst, error)
                self.right, self.wrong = self.right + (error < CLOSE), self.wrong + (error >= CLOSE)
            self._stop.wait(1.0)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    with tempfile.TemporaryDirectory(prefix="load-") as directory:
        place = Path(directory)
        extra = -(-args.owners // PROCESSES)
        print("preparing a model, certificates and ciphertexts", flush=True)
        model = make_place(place, args.width, args.tokens, args.owners + extra + args.encrypting)
        figures: dict[str, Any] = {
            "owners": args.owners,
            "width": args.width,
            "tokens": args.tokens,
            "rounds": args.rounds,
        }
        with live_worker(place / "model", place / "worker") as worker:
            load = Load(args, place, worker)
            figures |= load.speed()
            names = [f"owner{args.owners + extra + i}" for i in range(args.encrypting)]
            real = Encrypting(model, place, names, args.tokens)
            real.start(worker.address)
            try:
                _, _, found = load.together([f"owner{i}" for i in range(args.owners)])
                if args.churn:
                    figures |= load.churn()
            finally:
                real.stop()
            more = tally(found)
            figures |= {what: figures[what] + more[what] for what in more}
            figures |= {
                "wrong": figures["wrong"] + real.wrong,
                "encrypted_right": real.right,
                "encrypted_wrong": real.wrong,
                "encrypted_worst_error": real.worst,
            }
            if args.soak:
                figures |= load.soak()
    return figures


def measure_cluster(args: argparse.Namespace) -> dict[str, Any]:
    """What Ray costs, and what a node that dies does."""
    figures = cluster.ratio(RAY_STEPS, args.repeats)
    return figures | (cluster.kill(KILL_STEPS) if args.kill else {})


MODES = Modes(
    {"ray": "--ray", "load": "a run without --ray"},
    lambda args: ("ray",) if args.ray else ("load",),
    {"--kill": ("ray",)}
    | dict.fromkeys(
        ("--owners", "--width", "--tokens", "--rounds", "--encrypting", "--churn",
         "--soak"), ("load",)
    )
    | dict.fromkeys(("--repeats", "--ray", "--json"), ALL),
)  # fmt: skip


def main() -> None:
    parser = Parser(__doc__, "benchmarks.load", MODES)
    add = parser.add_argument
    add("--owners", type=Whole(1, 64), default=16, help="at once (16)")
    add("--width", type=Whole(64, 8192), default=4096,
        help="of the layer (4096, whose weights no cache holds)")  # fmt: skip
    add("--tokens", type=TOKENS, default=1, help="of a request (1)")
    add("--rounds", type=Whole(1, 100_000), default=40, help="times each matrix is asked for (40)")
    add("--repeats", type=Whole(1, 100), default=3, help="turns of alone and together (3)")
    add("--encrypting", type=Whole(1, 8), default=2, help="owners that really encrypt (2)")
    add("--churn", action="store_true", help="owners die while they work, and new ones come")
    add("--soak", type=Number(10, 86_400), metavar="SECONDS", help="and so long of it")
    add("--ray", action="store_true", help="what shards on a Ray cluster cost, and nothing else")
    add("--kill", action="store_true", help="and what happens when a node of it dies")
    record.add_json_option(parser)
    args = parser.parse()
    with clean_exit():
        figures = measure_cluster(args) if args.ray else measure(args)
    for name, value in figures.items():
        print(f"{name:<24}{value}")
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
