"""How long a command takes to say anything: --help, and what is typed wrong.

    python -m benchmarks.startup --json benchmarks/results/startup.json

Each command runs in a process of its own, several times, in turns with `python -c pass`, which is
what no command can be quicker than; medians of the clock. What other programs on the machine do is
in the figures, so that idle and busy machines give different ones: `over_python` is what is ours.

Expected: well under a second each on two cores.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from backends.options import TIMES, Parser
from scenarios import record

ROOT = Path(__file__).resolve().parent.parent
BAR_S = 1.0
"""What a person takes for at once."""
PYTHON = "python"
COMMANDS: dict[str, tuple[str, ...]] = {
    PYTHON: ("-c", "pass"),
    "llama1b --help": ("-m", "scenarios.llama1b", "--help"),
    "llama1b, a number that is none": ("-m", "scenarios.llama1b", "--lanes", "four"),
    "llama1b, an unknown option": ("-m", "scenarios.llama1b", "--lane", "4"),
    "llama1b, a unit that is none": ("-m", "scenarios.llama1b", "--bandwidth", "10MB/s"),
    "llama1b, an unknown profile": ("-m", "scenarios.llama1b", "--gpu", "h2000"),
    "whatif --help": ("-m", "scenarios.whatif", "--help"),
    "whatif, an unknown study": ("-m", "scenarios.whatif", "--study", "home-ofice"),
    "whatif, a knob given twice": (
        "-m", "scenarios.whatif", "--sweep", "lanes=2,4", "--set", "lanes=4",
    ),
    "finetune --help": ("-m", "scenarios.finetune", "--help"),
    "finetune, an unknown option": ("-m", "scenarios.finetune", "--modle", "x"),
    "prepare --help": ("-m", "scenarios.prepare", "--help"),
    "prepare, an unknown option": ("-m", "scenarios.prepare", "--verfiy"),
    "merge --help": ("-m", "scenarios.merge", "--help"),
    "merge, an option that is missing": ("-m", "scenarios.merge", "--into", "merged"),
    "quickstart --help": ("-m", "scenarios.quickstart", "--help"),
    "quickstart, a number that is none": ("-m", "scenarios.quickstart", "--steps", "many"),
    "quickstart, an unknown scheme": ("-m", "scenarios.quickstart", "--scheme", "bgv"),
    "generate --help": ("-m", "scenarios.generate", "--help"),
    "generate, an unknown option": ("-m", "scenarios.generate", "--promt", "x"),
    "endpoint --help": ("-m", "scenarios.endpoint", "--help"),
    "endpoint, an address of others": ("-m", "scenarios.endpoint", "--listen", "0.0.0.0:8420"),
    "worker --help": ("-m", "scenarios.worker", "--help"),
    "worker, an option that is missing": ("-m", "scenarios.worker", "--listen", "localhost:7443"),
    "certs --help": ("-m", "scenarios.certs", "--help"),
    "certs, an unknown option": ("-m", "scenarios.certs", "--nmae", "x"),
    "params --help": ("-m", "scenarios.params", "--help"),
    "params, an unknown preset": ("-m", "scenarios.params", "--preset", "thick"),
    "chaos --help": ("-m", "scenarios.chaos", "--help"),
    "chaos, an option of another mode": ("-m", "scenarios.chaos", "--planted", "--trace-hash"),
    "chaos --processes --help": ("-m", "scenarios.chaos", "--processes", "--help"),
    "chaos --processes, no kills": ("-m", "scenarios.chaos", "--processes", "--kills", "0"),
    "make_tiny_llama --help": ("-m", "scenarios.make_tiny_llama", "--help"),
    "make_tiny_llama, two lengths": (
        "-m", "scenarios.make_tiny_llama", "--steps", "9", "--minutes", "1",
    ),
    "calibrate --help": ("-m", "sim.calibrate", "--help"),
    "calibrate, an unknown option": ("-m", "sim.calibrate", "--output", "x"),
}  # fmt: skip


def seconds(words: Sequence[str]) -> float:
    """That a command takes in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, Any]:
    """Medians by command, and of all the slowest but Python itself."""
    for words in COMMANDS.values():
        seconds(words)  # the first time reads its files from the disk
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, words in COMMANDS.items():
            times[name].append(seconds(words))
    medians = {name: median(found) for name, found in times.items()}
    slowest = max((name for name in medians if name != PYTHON), key=medians.__getitem__)
    return {
        "repeats": repeats,
        "seconds": times,
        "median_s": medians,
        "over_python": {name: found / medians[PYTHON] for name, found in medians.items()},
        "slowest": slowest,
        "slowest_s": medians[slowest],
        "bar_s": BAR_S,
    }


def main() -> None:
    parser = Parser(__doc__, "benchmarks.startup")
    parser.add_argument("--repeats", type=TIMES, default=7, help="runs of each command (7)")
    record.add_json_option(parser)
    args = parser.parse()
    f = measure(args.repeats)
    for name, found in f["median_s"].items():
        print(f"{name:<34}{found:6.2f} s  x{f['over_python'][name]:.1f} of python alone")
    print(f"slowest: {f['slowest']}, {f['slowest_s']:.2f} s (wanted: at most {BAR_S:g} s)")
    record.write(args.json, f)


if __name__ == "__main__":
    main()
