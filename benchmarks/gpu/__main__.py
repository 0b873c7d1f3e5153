"""Everything there is to know of the CUDA backend on this machine's GPU, in one command.

    python -m benchmarks.gpu --json gpu.json                  all of it
    python -m benchmarks.gpu --json gpu.json --quick          the essentials, in four minutes
    python -m benchmarks.gpu --json gpu.json --parts suite    what that left out

First the tensor cores alone are measured, then every shape of Llama-3.2-1B is compared with the
CPU bit for bit, then speeds are measured, both sides of every ratio in one run, a whole training
step among them; last the tests that need a device run on it. A table sets the figures against
what was asked for. With --profile FILE it also writes the device profile that the simulator runs
on.

Every part is a process of its own with a deadline, after which it is killed, as when this command
is. A part that fails, hangs, crashes or ends early is named in the JSON under `failed`, with its
error and what it had found until then, and the next one runs. The file is tried before the first
part and written after every one. A tiling of the worker's kernel
that fails is left out and named under `warnings`; one that takes its process with it is named
under `left_out`, and that part is run again without it.

Environment variables:
    PRIVATE_LORA_SKIP_TILINGS   tilings not to try: kinds (async, bulk, pointers), names
                                (async-64x256x128-3) or shell patterns, with commas between them
    PRIVATE_LORA_COMMIT         the commit, for a copy of the tree without its .git

With --quick it is over after four minutes, by force; without, after half an hour at most, but for
parts that run again. On an H100 --quick took two minutes and the whole, without the peer, three and
a half. Its figures are in benchmarks/results/gpu-h100.json.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from backends.files import WriteError
from backends.he.params import PRESETS, Parameters, preset
from backends.machine import commit
from backends.options import Parser
from backends.places import output_file
from benchmarks.gpu.parts import DEVICE, ESSENTIALS, PARTS, QUICK_LIMIT_S
from benchmarks.gpu.runner import Plan, measure, run_part
from benchmarks.gpu.scale import FULL
from benchmarks.gpu.table import all_well, print_table
from benchmarks.gpu.task import Figures
from scenarios import record

_OF_A_PROFILE = ("library", "layers", "throughput", "launch", "owner")


def known_figures(path: Path | None, gpu: str, preset_name: str) -> Figures:
    """What FILE holds of the same commit, GPU and preset; nothing when it is of another.

    Nothing either when it is of no single state of the code: an unknown commit, or one with
    changes, which may be others by now.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        origin = found.pop("origin")
        theirs = (found["gpu"], found["preset"], origin["commit"])
        for notes in ("failed", "warnings", "left_out", "seconds"):
            found.get(notes, {}).items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        print(f"nothing of {path} is kept: it holds no figures of this benchmark")
        return {}
    ours = commit()
    if ours == "unknown" or ours.endswith("-dirty"):
        print(f"nothing of {path} is kept: this code's commit is {ours}")
        return {}
    return dict(found) if theirs == (gpu, preset_name, ours) else {}


def saved(path: Path | None, figures: Figures, quiet: bool, machine: dict[str, Any]) -> bool:
    """Write FILE. One that cannot be written now is said, and is no reason to stop measuring."""
    try:
        if path is not None:
            record.save(path, figures, machine)
    except OSError as error:
        print(f"error: figures are not written to {path}: {error.strerror or error}", flush=True)
        return False
    if path is not None and not quiet:
        print(f"figures written to {path}")
    return True


def heed_signals() -> None:
    """End as after Ctrl-C when told to, or when the terminal goes, unless that is ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def find_device(plan: Plan) -> Figures:
    """The GPU's name and the machine's facts. Exits when there is no GPU that will do."""
    found = run_part(DEVICE, plan, {})
    if found.error:
        mendable = re.search(r"GpuError: (.*)$", found.error)
        sys.exit(f"error: {mendable[1] if mendable else found.error}")
    device: Figures = found.figures
    return device


def write_profile(
    path: Path, machine: dict[str, Any], figures: Figures, parameters: Parameters
) -> None:
    """The simulator's profile of this GPU. Exits when a part that it needs is missing."""
    missing = [n for n in _OF_A_PROFILE if n not in figures or n in figures["failed"]]
    if missing:
        sys.exit(f"error: a device profile needs the parts {', '.join(missing)} as well")
    from benchmarks.gpu.profile import profile  # loads the simulator, which nothing else needs

    where = f"{figures['gpu']}, torch {machine['torch']}, CUDA {machine.get('cuda')}"
    try:
        profile(path.stem, where, figures, parameters, FULL).save(path)
    except WriteError as error:
        sys.exit(f"error: {error}")
    print(f"device profile written to {path}")


def options() -> Parser:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.gpu")
    names = [part.name for part in PARTS]
    parser.add_argument("--preset", default="exact", choices=sorted(PRESETS))
    parser.add_argument(
        "--quick", action="store_true",
        help=f"five rounds, three ragged token counts, one token count for the owner, and only "
        f"{', '.join(part.name for part in ESSENTIALS)} unless --parts says otherwise; ends after "
        f"{QUICK_LIMIT_S:.0f} s whatever happens",
    )  # fmt: skip
    parser.add_argument(
        "--parts", nargs="+", choices=names, metavar="PART",
        help=f"run only some of {', '.join(names)}; what FILE holds of the others is kept when it "
        "is of the same commit, known and without changes",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=output_file, metavar="FILE", help="write a device profile"
    )
    record.add_json_option(parser)
    return parser


def main() -> None:
    heed_signals()
    args = options().parse()
    limit_s = QUICK_LIMIT_S if args.quick else float("inf")
    plan = Plan(args.preset, args.quick, time.monotonic() + limit_s)
    chosen = ESSENTIALS if args.quick else PARTS
    wanted = [p for p in PARTS if p.name in args.parts] if args.parts else chosen
    try:
        device = find_device(plan)

        def save(figures: Figures) -> None:
            saved(args.json, figures, True, device["machine"])

        known = known_figures(args.json, device["gpu"], args.preset)
        figures = measure(device["gpu"], wanted, plan, save, known)
    except KeyboardInterrupt:
        print("\ninterrupted; the figures of the parts that ended are kept")
        sys.exit(130)
    print_table(figures)
    kept = saved(args.json, figures, False, device["machine"])
    if args.profile:
        write_profile(args.profile, device["machine"], figures, preset(args.preset))
    sys.exit(0 if all_well(figures) and kept else 1)


if __name__ == "__main__":
    main()
