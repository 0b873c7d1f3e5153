"""How fast the simulator simulates: one training step of Llama-3.2-1B, four lanes, no maths.

    python -m benchmarks.sim_speed --json benchmarks/results/sim_speed.json

The step is one of the default what-if world: 4 lanes of 256 tokens, one owner, one H200 behind a
1 Gb/s line, real protocol machines, spans recorded. `step_s` is the median of a world's whole life
(built, sessions opened, one step), in wall time; the quickest is shown beside it, because other
programs on the machine only ever add. Tracing the model's layers, done once per model and shared
by a whole sweep, is timed by itself (`trace_s`).

Expected: a tenth of a second on one core of a 2023 server, some 4,500 events.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

from backends.options import TIMES, Parser
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


def main() -> None:
    parser = Parser(__doc__, "benchmarks.sim_speed")
    parser.add_argument("--repeats", type=TIMES, default=21, help="worlds simulated (21)")
    record.add_json_option(parser)
    args = parser.parse()
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
