"""Train a small real model while everything goes wrong, thousands of times, and watch the promises.

Each seed draws a model, a cipher (`clear`, real `mlwe` encryption, or `thin`: the same at scales so
large that results wrap, with a format of its own for each matrix), workers, lanes and patience, and
a plan of faults: frames that are dropped, doubled, overtaken, damaged or late; partitions; slow
workers; workers that lose their memory, lie, answer twice or refuse; an owner that dies and
resumes; clocks that jump. The real trainer trains on the real protocol through all of it, in
simulated time. Checked from outside, by code that shares nothing with the protocol:

  safety    every step applied once and in order; with `clear` every bit of every step's weights as
            without faults; with `thin` every result that wrapped repaired, by the count of those
            that must; no secret used twice or left in memory; nothing private on the wire; no
            stale, foreign or wrong answer accepted; a worker found lying never asked again
  liveness  within a stated bound after the last fault, training has ended, every honest worker
            serves again and the sessions close

The command:
    python -m scenarios.chaos --seeds 10000 --json chaos.json
Expected: `0 violations`, and how often each kind of fault was injected, within 15 minutes on two
cores. A violation prints its seed, the commit and the drawn options; the exit status is then 1.

    python -m scenarios.chaos --seed 7 --trace run.json    replays it, event by event
    python -m scenarios.chaos --seed 7 --trace-hash        is the same in every process
    python -m scenarios.chaos --planted --json planted.json

The last one checks the checks: it plants known defects (tests/planted/) in a copy of this source
tree, one at a time, and tells how many seeds each took to be found. Expected: all of them.

    python -m scenarios.chaos --mutants --json mutants.json            200 of them, 20 minutes
    python -m scenarios.chaos --mutants --count 0 --json mutants.json  all of them

checks the tests: small changes of protocol/, made by machine, one at a time in a copy of the tree
(a cell of a table, a comparison, a constant, a condition, a statement). Each should be killed by
tests/protocol, or by the chaos run that follows for those that live (`--chaos-seeds`, 0 for none).
Expected: at least 95 % of those that change what is promised. `--seed` draws another sample. An
interrupted hunt goes on from its file.

None of this is real but the arithmetic. For processes that are really killed, over a line that is
really cut, say --processes (without a number; it has options of its own):

    python -m scenarios.chaos --processes --kills 200 --json kills.json
    python -m scenarios.chaos --processes --quickstart --json quickstart.json
    python -m scenarios.chaos --processes --help
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from backends.he.openfhe import NAMES as OPENFHE
from backends.options import ALL, PROCESSES, SEED, Modes, Parser, Whole
from backends.places import output_file
from scenarios import record
from scenarios.cli import clean_exit


def _active(options: argparse.Namespace) -> tuple[str, ...]:
    """The mode that a command line asks for."""
    if options.planted:
        return ("planted",)
    if options.mutants:
        return ("mutants",)
    return ("one",) if options.seed is not None else ("many",)


MODES = Modes(
    {
        "many": "many seeds (without --seed)", "one": "--seed", "planted": "--planted",
        "mutants": "--mutants",
    },
    _active,
    {
        "--planted": ALL, "--mutants": ALL, "--json": ALL,
        "--seeds": ("many",), "--first": ("many",), "--stop-at-first": ("many",),
        "--seed": ("one", "mutants"), "--trace": ("one",), "--trace-hash": ("one",),
        "--scheme": ("many", "one"), "--only": ("planted",), "--count": ("mutants",),
        "--chaos-seeds": ("mutants",),
        "--processes": ("many", "planted", "mutants"),
    },
)  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "scenarios.chaos", MODES)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=Whole(1, 100_000_000), metavar="N",
        help="run so many seeds (200)")  # fmt: skip
    what.add_argument("--planted", action="store_true", help="look for every planted defect")
    what.add_argument("--mutants", action="store_true", help="look for changes nobody planted")
    parser.add_argument(
        "--seed", type=SEED, metavar="S",
        help="run one seed in this process; with --mutants: what they are drawn from (0)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=Whole(0, 1_000_000), default=200, metavar="N",
        help="with --mutants: so many; 0 for all",
    )  # fmt: skip
    parser.add_argument(
        "--chaos-seeds", type=Whole(0, 1_000_000), default=100, metavar="N",
        help="with --mutants: seeds for each that the tests let live (100)",
    )  # fmt: skip
    parser.add_argument("--first", type=Whole(0, 2**62), default=0, metavar="K",
        help="first of the seeds")  # fmt: skip
    parser.add_argument(
        "--processes", type=PROCESSES, metavar="P",
        help="run seeds on so many cores (all); without a number, see above",
    )  # fmt: skip
    parser.add_argument("--stop-at-first", action="store_true", help="end at the first violation")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="with --planted: these defects only"
    )
    parser.add_argument(
        "--trace",
        type=output_file,
        metavar="FILE",
        help="with --seed: print every event, write a timeline for ui.perfetto.dev",
    )
    parser.add_argument(
        "--trace-hash", action="store_true", help="with --seed: print the SHA-256 of all events"
    )
    parser.add_argument(
        "--scheme", choices=OPENFHE,
        help="every run under this scheme of OpenFHE, seconds each, in place of what is drawn",
    )  # fmt: skip
    record.add_json_option(parser)
    options = parser.parse(arguments)
    if options.scheme and options.trace_hash:
        parser.error("--trace-hash with --scheme: OpenFHE takes no seed, so it is never the same")
    options.seeds = 200 if options.seeds is None else options.seeds
    return options


def for_crashes(arguments: Sequence[str]) -> list[str] | None:
    """The rest of a command line that has `--processes` without a number; None for any other."""
    places = [n for n, argument in enumerate(arguments) if argument == "--processes"]
    for n in places:
        if not arguments[n + 1 : n + 2] or arguments[n + 1].startswith("-"):
            return [*arguments[:n], *arguments[n + 1 :]]
    return None


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    rest = for_crashes(sys.argv[1:] if arguments is None else arguments)
    if rest is not None:
        # Only here: it shares nothing with what is simulated.
        from scenarios.crashes.__main__ import main as crash

        crash(rest)
        return
    options = parse(arguments)
    from scenarios.chaos.mutants import MutantError  # these take seconds to load
    from scenarios.chaos.planted import PatchError
    from scenarios.chaos.run import chosen

    # A polite request to end is taken like Ctrl-C: processes and scratch files are cleared away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with clean_exit(MutantError, PatchError):
        sys.exit(chosen(options))


if __name__ == "__main__":
    main()
