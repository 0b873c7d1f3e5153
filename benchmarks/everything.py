"""Every measurement that the pages quote, in order: `make benchmark`.

    python -m benchmarks.everything                      about an hour on two cores
    python -m benchmarks.everything --only peers linear  some of it
    python -m benchmarks.everything --list               what there is

Each measurement is a command of its own. What it found lies in OUT/KIND/NAME.json, where KIND is
the kind of machine, and its headline, with the day, the commit and the machine, is a new line of
OUT/KIND/history.jsonl; until it has ended well it lies in OUT/KIND/unfinished. A measurement that
is there already from this commit and this machine is not taken again, so a run that was stopped
goes on where it was; --fresh takes all of them again, and so does a checkout with changes, which is
no commit. Keep other work off the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from backends.machine import commit, cpu_flags, processor
from backends.options import Parser
from backends.places import output_directory
from backends.threads import core_count
from scenarios.cli import clean_exit

Figures = dict[str, Any]
OUT = Path(__file__).parent / "results" / "machines"


@dataclass(frozen=True)
class Measurement:
    """One command.

    headline  a few numbers that stand for all that it found
    """

    module: str
    headline: Callable[[Figures], dict[str, float]]
    arguments: tuple[str, ...] = field(default=())
    minutes: float = 1.0


def _layers(figures: Figures) -> dict[str, float]:
    large = [case for case in figures["cases"] if case["tokens"] >= 256]
    return {
        "worker over clear": fmean(case["worker_over_clear"] for case in large),
        "owner over clear": fmean(case["owner_over_clear"] for case in large),
    }


def _quickstart(figures: Figures) -> dict[str, float]:
    return {
        "private over clear, time": figures["private_s"] / figures["clear_s"],
        "private over clear, held-out loss": figures["private_loss"] / figures["clear_loss"],
    }


def _training(figures: Figures) -> dict[str, float]:
    clear = figures["runs"][0]["final_loss"]
    runs = {run["name"]: run for run in figures["runs"]}
    return {f"loss over clear, {name}": run["final_loss"] / clear for name, run in runs.items()}


def _peers(figures: Figures) -> dict[str, float]:
    wanted = {
        "server seconds of the fastest peer over ours": "server_times_less",
        "bytes over the smallest peer's": "bytes_ratio",
        "server over clear": "server_over_clear",
    }
    return {name: figures[key] for name, key in wanted.items() if key in figures}


def _generation(figures: Figures) -> dict[str, float]:
    exact = figures["exact"]
    return {
        "a token over clear, one process": exact["in_process"]["private_over_clear"],
        "a token over clear, loopback": exact["loopback"]["private_over_clear"],
    }


def _fidelity(figures: Figures) -> dict[str, float]:
    return {key.replace("_", " "): figures[key] for key in ("median_error", "worst_error")}


def _transport(figures: Figures) -> dict[str, float]:
    return {"payload a second over plain text's": (
        figures["goodput_mb_s"] / figures["plain_goodput_mb_s"]
    )}  # fmt: skip


MEASUREMENTS = {
    "linear": Measurement("benchmarks.he_linear", _layers, minutes=6),
    "quickstart": Measurement("scenarios.quickstart", _quickstart,
        ("--fresh", "--out", "runs/benchmark-quickstart"), minutes=5),
    "peers": Measurement("benchmarks.peers", _peers, minutes=12),
    "generation": Measurement("benchmarks.generation", _generation,
        ("--preset", "exact", "--prompts", "8"), minutes=3),
    "transport": Measurement("benchmarks.transport", _transport, ("--seconds", "4"), minutes=2),
    "fidelity": Measurement("benchmarks.fidelity", _fidelity, minutes=10),
    "training": Measurement("benchmarks.training", _training, minutes=20),
}  # fmt: skip


def kind_of_machine(flags: Sequence[str]) -> str:
    """The name of its results' folder: the widest multiplying step that the processor has."""
    kinds = {"amx_int8": "amx", "avx512_vnni": "avx512vnni", "avx_vnni": "avxvnni",
        "avx2": "avx2", "asimddp": "neon"}  # fmt: skip
    for flag, kind in kinds.items():
        if flag in flags:
            return kind
    return "generic"


def known(file: Path) -> Figures | None:
    """What is recorded there; None where nothing is, or nothing whole."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def append(file: Path, line: str) -> None:
    """Add one whole line to a file of lines, also behind one that a crash has cut off."""
    with open(file, "a+b") as lines:
        lines.seek(-min(1, lines.seek(0, os.SEEK_END)), os.SEEK_END)
        torn = lines.read(1) not in (b"", b"\n")
        lines.write((b"\n" if torn else b"") + line.encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def told_before(file: Path) -> list[Figures]:
    """The history so far, the oldest first; but for a line that a crash has cut off."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def is_there(name: str, place: Path, here: str, facts: Figures) -> bool:
    """Whether a measurement of this commit, on this machine, has ended well and been recorded."""
    origin = (known(place / f"{name}.json") or {}).get("origin", {})
    if here == "unknown" or here.endswith("-dirty") or origin.get("commit") != here:
        return False
    recorded = any(
        (each.get("name"), each.get("commit")) == (name, here)
        for each in told_before(place / "history.jsonl")
    )
    return recorded and told_machine(origin.get("machine", {})) == facts


def told_machine(facts: Figures) -> Figures:
    """What figures are compared by: another machine of the same kind is another machine."""
    return {key: facts.get(key) for key in ("processor", "cores")}


def take(name: str, place: Path, here: str) -> str | None:
    """Run one measurement and record it. None when it ended well, or what went wrong."""
    measurement, file = MEASUREMENTS[name], place / "unfinished" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", measurement.module, *measurement.arguments]
    if subprocess.run([*command, "--json", str(file)]).returncode:
        return "failed, see above"
    figures = known(file)
    if figures is None:
        return f"it ended well and left nothing in {file}"
    origin = figures["origin"]
    if origin["commit"] != here:
        return f"the checkout went from {here} to {origin['commit']} meanwhile"
    try:
        headline = measurement.headline(figures)
        told_all = bool(headline) and all(math.isfinite(value) for value in headline.values())
    except (LookupError, TypeError, ValueError, ZeroDivisionError):  # null is what was not finite
        told_all = False
    if not told_all:
        return f"what it found has no headline: {file}"
    told = {
        "name": name, "date": origin["date"], "commit": here,
        "machine": told_machine(origin["machine"]), "headline": headline,
    }  # fmt: skip
    os.replace(file, place / file.name)
    append(place / "history.jsonl", json.dumps(told))
    said = ", ".join(f"{key} {value:.4g}" for key, value in headline.items())
    print(f"{name}: {said}", flush=True)
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.everything")
    add = parser.add_argument
    add("--only", nargs="+", choices=sorted(MEASUREMENTS), metavar="NAME",
        help=f"some of {', '.join(MEASUREMENTS)}")  # fmt: skip
    add("--out", type=output_directory, default=OUT, metavar="DIR",
        help="where results are kept (benchmarks/results/machines)")  # fmt: skip
    add("--fresh", action="store_true", help="take again what is there from this commit")
    add("--list", action="store_true", help="say what there is, and how long it takes")
    return parser.parse(arguments)


def main() -> None:
    args = parse()
    names = args.only or list(MEASUREMENTS)
    if args.list:
        for name in names:
            m = MEASUREMENTS[name]
            command = " ".join([f"python -m {m.module}", *m.arguments])
            print(f"{name:<12}{m.minutes:>5.0f} min  {command}")
        return
    here, failed = commit(), []
    facts = {"processor": processor(), "cores": core_count()}
    where = args.out / kind_of_machine(cpu_flags())
    with clean_exit():
        where.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, 1):
            if not args.fresh and is_there(name, where, here, facts):
                print(f"{name}: is there, of {here}", flush=True)
                continue
            at = time.strftime("%H:%M")
            print(
                f"{at} {number} of {len(names)}: {name}, about {MEASUREMENTS[name].minutes:.0f} "
                f"minutes", flush=True,
            )  # fmt: skip
            wrong = take(name, where, here)
            if wrong is not None:
                print(f"{name}: {wrong}", flush=True)
                failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}; the same command takes only these again")


if __name__ == "__main__":
    main()
