"""How fast the simulator simulates: one training step of Llama-3.2-1B, four lanes, no maths.

    python -m benchmarks.sim_speed --json benchmarks/results/sim_speed.json
    python -m benchmarks.sim_speed --owners 1000 --workers 16 --json FILE      a whole site, once

The step is one of the default what-if world: 4 lanes of 256 tokens, one owner, one H200 behind a
1 Gb/s line, real protocol machines, spans recorded. `step_s` is the median of a world's whole life
(built, sessions opened, one step), in wall time; the quickest is shown beside it, because other
programs on the machine only ever add. Tracing the model's layers, done once per model and shared
by a whole sweep, is timed by itself (`trace_s`).

With --owners it is one step of so many owners, a lane of 256 tokens each, on --workers H200s of one
site behind 10 Gb/s, every owner behind 1 Gb/s; the first owner's spans are recorded.

Expected: a tenth of a second on one core of a 2023 server, some 4,500 events.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

from backends.options import TIMES, Parser, Whole
from scenarios import record
from scenarios.whatif.knobs import Setting
from scenarios.whatif.setting import workload_for, world_of
from sim.world import simulate


def measure(repeats: int) -> dict[str, Any]:
    """The figures of the report."""
    setting = Setting(lanes=4, steps=1)
    start = time.perf_counter()
    workload_for(setting)
    trace_s = time.perf_counter() - start
    config = replace(world_of(setting), warmup=0)
    simulate(config)
    walls, processors, events = [], [], 0
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        events = simulate(config).events
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    step_s = median(walls)
    return {
        "step_s": step_s,
        "step_s_quickest": min(walls),
        "step_processor_s": median(processors),
        "steps_s": walls,
        "events": events,
        "events_per_s": events / step_s,
        "trace_s": trace_s,
        "repeats": repeats,
        "model": setting.model,
        "lanes": setting.lanes,
        "tokens": setting.tokens,
    }


def measure_site(owners: int, workers: int) -> dict[str, Any]:
    """One step of every owner of a site."""
    setting = Setting(owners=owners, workers=workers, lanes=1, steps=1, site_bps=10e9)
    config = replace(world_of(setting), warmup=0)
    wall, processor = time.perf_counter(), time.process_time()
    result = simulate(config)
    wall_s = time.perf_counter() - wall
    return {
        "owners": owners,
        "workers": workers,
        "site_s": wall_s,
        "site_processor_s": time.process_time() - processor,
        "events": result.events,
        "events_per_s": result.events / wall_s,
        "simulated_s": result.elapsed_s,
        "model": setting.model,
        "lanes": setting.lanes,
        "tokens": setting.tokens,
    }


def main() -> None:
    parser = Parser(__doc__, "benchmarks.sim_speed")
    parser.add_argument("--repeats", type=TIMES, default=21, help="worlds simulated (21)")
    parser.add_argument("--owners", type=Whole(1, 10_000), help="a whole site of so many, once")
    parser.add_argument("--workers", type=Whole(1, 1000), default=16, help="GPUs of it (16)")
    record.add_json_option(parser)
    args = parser.parse()
    if args.owners is not None:
        f = measure_site(args.owners, args.workers)
        print(
            f"one step of {f['owners']:,} owners on {f['workers']} GPUs: {f['site_s']:.1f} s, "
            f"{f['events']:,} events, {f['events_per_s']:,.0f} a second"
        )
        record.write(args.json, f)
        return
    f = measure(args.repeats)
    print(f"one step of {f['model']}, {f['lanes']} lanes of {f['tokens']} tokens:")
    print(
        f"  simulated in {1e3 * f['step_s']:.0f} ms (median of {f['repeats']}; quickest "
        f"{1e3 * f['step_s_quickest']:.0f} ms; processor time {1e3 * f['step_processor_s']:.0f} ms)"
    )
    print(f"  {f['events']:,} events, {f['events_per_s']:,.0f} a second")
    print(f"  tracing the model, once: {f['trace_s']:.2f} s")
    record.write(args.json, f)


if __name__ == "__main__":
    main()
