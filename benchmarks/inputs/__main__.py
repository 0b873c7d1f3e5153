"""What do the commands do with whatever people type and bring?

    python -m benchmarks.inputs --cases 2000 --json FILE

Draws command lines for every scenario and benchmark from their own parsers (an option that is new
is tried without being named here), with ordinary values and with those that nobody should type, and
with files and folders as people bring them: whole, damaged, foreign, misplaced. Each case is a
process of its own, with a bound on its time and its memory, and goes as far as there is anything to
check: where only work would be left, it ends. Nothing needs the network.

Counted, and expected to be 0:
  tracebacks   an exception reached the user, or the process died of a signal
  unsaid       a command failed, and its last line does not say why
  hangs        it waited for what never comes
  silent       it would have gone on, or ended well, with a value that can never be right, or with
               an option of another mode, by a list that shares nothing with what is tried

    python -m benchmarks.inputs --only scenarios.llama1b --cases 200
    python -m benchmarks.inputs --case 1234 --seed 0             one case again, with what it says

Expected: a quarter of an hour on two cores for 2,000 cases.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backends.options import ALL, PROCESSES, SEED, Modes, Number, Parser, Whole
from backends.threads import core_count
from benchmarks.inputs import bring, made
from benchmarks.inputs.cases import Case, Drawer
from benchmarks.inputs.children import BAD, FINE, Child, Verdict, as_json
from benchmarks.inputs.entries import ENTRIES, Entry
from scenarios import record
from scenarios.cli import clean_exit

_POLL_S = 0.005
_COUNTED = {"traceback": "tracebacks", "unsaid": "unsaid", "hang": "hangs", "silent": "silent"}

MODES = Modes(
    {"many": "many cases (without --case)"},
    lambda args: ("many",) if args.case is None else (),
    {"--case": ALL, "--seed": ALL, "--limit-s": ALL, "--only": ALL}
    | dict.fromkeys(("--cases", "--processes", "--json"), ("many",)),
)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, "benchmarks.inputs", MODES)
    add = parser.add_argument
    add("--cases", type=Whole(1, 1_000_000), default=2000, metavar="N", help="how many (2000)")
    add("--case", type=Whole(0, 1_000_000), metavar="K", help="only this one, and what it prints")
    add("--seed", type=SEED, default=0, metavar="S", help="what they are drawn from (0)")
    add("--only", nargs="+", default=[], metavar="COMMAND",
        choices=sorted({entry.name.split()[0] for entry in ENTRIES}),
        help="only cases of these")  # fmt: skip
    add("--limit-s", type=Number(1, 600), default=15.0, metavar="S", help="of one case (15)")
    add("--processes", type=PROCESSES, default=core_count(), help="cases at once (all cores)")
    record.add_json_option(parser)
    return parser.parse(words)


@contextmanager
def pool() -> Iterator[tuple[Path, Path]]:
    """(what people bring, where cases live), made now and deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="inputs-") as name:
        place = Path(name)
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(place / "state"),
            "XDG_CACHE_HOME": str(place / "cache-home"), "HF_HOME": str(place / "hub"),
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        bring.make(place / "pool")
        made.certificates(place / "pool")
        made.runs(place / "pool")
        _figures(place / "pool")
        _prepared(place / "pool")
        made.damaged_models(place / "pool")
        (place / "cases").mkdir()
        yield place / "pool", place / "cases"


def _figures(where: Path) -> None:
    source = Path(__file__).parents[1] / "results" / "gpu-h100.json"
    text = source.read_text()
    (where / "figures.json").write_text(text)
    (where / "figures-nan.json").write_text('{"step": {"private_step_s": NaN}, "origin": {}}')
    (where / "figures-words.json").write_text('{"step": {"private_step_s": "long"}, "origin": 1}')


def _prepared(where: Path) -> None:
    """`pool/cache` with the good checkpoint in it, made and verified by the command itself."""
    arguments = ["--weights", str(where / "weights" / "good"), "--cache", str(where / "cache")]
    child = os.fork()
    if child == 0:  # a process of its own: what it computes with must not be forked
        from scenarios.prepare import __main__ as prepare

        status = 1
        try:
            sys.stdout = (where / "prepare.log").open("w")
            sys.argv = ["scenarios.prepare", *arguments]
            prepare.main()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the good checkpoint could not be prepared: see {where}")


def verdicts(
    cases: Iterator[Case], where: tuple[Path, Path], processes: int, limit_s: float
) -> Iterator[Verdict]:
    """Of all cases, as they end. Ends what is under way when it is closed."""
    running: list[Child] = []
    left = True
    try:
        while left or running:
            while left and len(running) < processes:
                case = next(cases, None)
                if case is None:
                    left = False
                    break
                running.append(Child(case, where[0], where[1] / str(case.number)))
            for child in list(running):
                found = child.verdict(limit_s)
                if found is not None:
                    running.remove(child)
                    yield found
            time.sleep(_POLL_S)
    finally:
        for child in running:
            child.end()


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Verdict]]:
    """All cases: the figures, and what was found."""
    start = time.monotonic()
    tqdm.monitor_interval = 0  # no thread: this process is forked
    entries = [e for e in ENTRIES if not args.only or e.name.split()[0] in args.only]
    drawer = Drawer(args.seed)
    count: Counter[str] = Counter()
    by_command: dict[str, Counter[str]] = {entry.name: Counter() for entry in entries}
    found: list[Verdict] = []
    long: list[str] = []
    with (
        pool() as where,
        tqdm(total=args.cases, unit="case", dynamic_ncols=True) as bar,
        suppress(KeyboardInterrupt),  # what was found by then is told
    ):
        for verdict in verdicts(
            drawer.cases(args.cases, entries), where, args.processes, args.limit_s
        ):
            count[verdict.kind] += 1
            by_command[verdict.case.entry.name][verdict.kind] += 1
            if verdict.kind in BAD:
                found.append(verdict)
            elif verdict.kind == "long":
                long.append(str(verdict.case))
            bar.set_postfix({_COUNTED[kind]: count[kind] for kind in BAD}, refresh=False)
            bar.update()
    found.sort(key=lambda verdict: verdict.case.number)
    figures: dict[str, Any] = {
        "cases": count.total(),
        **{_COUNTED[kind]: count[kind] for kind in BAD},
        **{kind: count[kind] for kind in FINE},
        "seed": args.seed,
        "commands": {name: dict(kinds) for name, kinds in by_command.items()},
        "seconds": round(time.monotonic() - start, 1),
        "found": [as_json(verdict) for verdict in found],
        "long_list": long,
    }
    return figures, found


def one(args: argparse.Namespace) -> Verdict:
    """The case of a number, again."""
    entries: list[Entry] = [e for e in ENTRIES if not args.only or e.name.split()[0] in args.only]
    case = Drawer(args.seed).case(args.case, entries)
    with pool() as where:
        (verdict,) = verdicts(iter([case]), where, 1, args.limit_s)
    return verdict


def print_report(figures: dict[str, Any], found: Sequence[Verdict]) -> None:
    """A table of what every command did, and the findings, each cause once."""
    kinds = (*FINE, *BAD)
    print(f"{'':30}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, counts in figures["commands"].items():
        print(f"{name:30}" + "".join(f"{counts.get(kind, 0):>10}" for kind in kinds))
    told: Counter[tuple[str, str, str]] = Counter()
    for verdict in found:
        cause = (verdict.case.entry.name, verdict.kind, verdict.cause)
        told[cause] += 1
        if told[cause] == 1:
            print(f"\n{verdict.kind} in case {verdict.case.number}: {verdict.case}")
            if verdict.case.nonsense:
                print(f"    never right: {', '.join(verdict.case.nonsense)}")
            print(f"    {verdict.cause}")
    counted = ", ".join(f"{figures[name]} {name}" for name in ("cases", *_COUNTED.values()))
    print(f"\n{counted}, in {figures['seconds']:.0f} s")


def main() -> None:
    args = parse()
    with clean_exit():
        if args.case is not None:
            verdict = one(args)
            print(f"{verdict.case}\n\n{verdict.text}\n{verdict.kind}, status {verdict.status}")
            sys.exit(int(verdict.kind in BAD))
        figures, found = run(args)
    print_report(figures, found)
    record.write(args.json, figures)
    sys.exit(int(bool(found)))


if __name__ == "__main__":
    main()
