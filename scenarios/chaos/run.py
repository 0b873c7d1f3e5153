"""One seed, many seeds, or looking for defects: run, told, recorded."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from backends.he.openfhe.library import openfhe
from backends.machine import commit
from scenarios import record
from scenarios.chaos import mutants
from scenarios.chaos.log import EventLog
from scenarios.chaos.options import draw_options
from scenarios.chaos.planted import hunt
from scenarios.chaos.search import Bench, Result, scratch, search
from sim.trace import write_perfetto


def tell(result: Result, scheme: str | None) -> None:
    """A violation, and how to see it again."""
    under = "" if scheme is None else f" --scheme {scheme}"
    print(
        f"VIOLATION at seed {result.seed}, commit {commit()}: {result.violation}\n"
        f"  drawn: {draw_options(result.seed, scheme)}\n"
        f"  injected: {faults(result.injected)}\n"
        f"  replay: python -m scenarios.chaos --seed {result.seed}{under} --trace run.json"
    )


def faults(injected: Counter[str]) -> str:
    """Counts by kind, by name."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(injected.items())) or "none"


def figures(
    seeds: int, broken: list[Result], injected: Counter[str], wraps: Counter[str], elapsed_s: float
) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "seeds": seeds,
        "violations": len(broken),
        "violation_list": [{"seed": r.seed, "violation": r.violation} for r in broken],
        "elapsed_s": round(elapsed_s, 2),
        "faults_injected": dict(sorted(injected.items())),
        "wraps": dict(sorted(wraps.items())),
    }


def many(options: argparse.Namespace) -> int:
    """Run the seeds; returns the exit status."""
    injected: Counter[str] = Counter()
    wraps: Counter[str] = Counter()
    broken: list[Result] = []
    done = 0
    start = time.perf_counter()
    results = search(
        options.first, options.seeds, options.stop_at_first, options.processes, options.scheme
    )
    interrupted = False
    try:
        with tqdm(total=options.seeds, desc="seeds", unit="seed", dynamic_ncols=True) as bar:
            for result in results:
                done += 1
                injected += result.injected
                wraps += result.wraps
                if result.violation:
                    broken.append(result)
                    with tqdm.external_write_mode():
                        tell(result, options.scheme)
                bar.set_postfix(violations=len(broken), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; what was found so far:")
    finally:
        results.close()
    elapsed_s = time.perf_counter() - start
    print(f"{done} seeds in {elapsed_s:.1f} s: {len(broken)} violations")
    print(f"injected: {faults(injected)}")
    print(f"results: {faults(wraps)}")
    record.write(options.json, figures(done, broken, injected, wraps, elapsed_s))
    return 130 if interrupted else int(bool(broken))


def single(options: argparse.Namespace) -> int:
    """Run one seed; returns the exit status."""
    log = EventLog() if options.trace or options.trace_hash else None
    start = time.perf_counter()
    with scratch() as directory:
        result = Bench(directory, options.scheme).run(options.seed, log)
    if log is not None and options.trace_hash:
        print(log.sha256())
    else:
        print(f"drawn: {draw_options(options.seed, options.scheme)}")
    if log is not None and options.trace:
        print("\n".join(log.lines))
    if result.violation:
        tell(result, options.scheme)
    elif not options.trace_hash:
        print(
            f"no violation; trained at {result.trained_s:.2f} simulated seconds, last fault by "
            f"{draw_options(options.seed).plan.stop_s:.2f}, stated bound {result.bound_s:.2f} later"
            f"\ninjected: {faults(result.injected)}\nresults: {faults(result.wraps)}"
        )
    broken = [result] if result.violation else []
    elapsed_s = time.perf_counter() - start
    record.write(options.json, figures(1, broken, result.injected, result.wraps, elapsed_s))
    if log is not None and options.trace:
        write_perfetto(options.trace, log.spans, f"chaos, seed {options.seed}")
        print(f"trace written to {options.trace}: open it at ui.perfetto.dev")
    return int(bool(result.violation))


def chosen(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if options.scheme:
        openfhe()  # one line here, and not one of every process
    if options.planted:
        return hunt(options.json, options.processes, options.only)
    if options.mutants:
        return mutants.hunt(
            options.json, options.seed or 0, options.count, options.processes,
            options.chaos_seeds,
        )  # fmt: skip
    return single(options) if options.seed is not None else many(options)
