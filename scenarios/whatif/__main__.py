"""What if? Sweeps the knobs of a simulated world and answers in a sentence and a picture.

    python -m scenarios.whatif --study home-office
    python -m scenarios.whatif --sweep bandwidth=10Mb/s,100Mb/s,1Gb/s --sweep lanes=1..8
    python -m scenarios.whatif --sweep "rtt=1ms..100ms x5" --set gpu=l4 --set lanes=2

Nothing is computed and nothing is sent: the real protocol runs on a modelled network, modelled
GPUs and a modelled owner. A study is a TOML file in scenarios/studies, or one of your own; --sweep
and --set turn its knobs. 200 settings of a 1B model and one owner take two minutes; with hundreds
of owners one setting takes minutes, and it says before how long all of them will.

It ends with a table (every setting), the answer, and, in runs/whatif/NAME: rows.csv, rows.json and
picture.png. Columns: p50 and p99 of the step time over all owners' steps, tokens/s of an owner and
of a GPU, GPU utilisation, traffic, cost, what a step waits for on its critical path, and the speed
over that of the same training in clear on the owner's own machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backends.options import PROCESSES, Number, Parser
from backends.places import output_directory
from backends.threads import core_count
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.whatif.checks import require_sound
from scenarios.whatif.knobs import KEYS, PRICE_MOST, Prices, SettingError, profile_of
from scenarios.whatif.study import Study, load_study, study_names
from sim.device import ProfileError

PRICE = Number(0, PRICE_MOST)
"""US dollars."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    knobs = "\n".join(f"  {name:<16}{key.meaning}" for name, key in KEYS.items())
    parser = Parser(__doc__, "scenarios.whatif")
    parser.epilog = f"knobs:\n{knobs}\n\nstudies: {', '.join(study_names())}"
    add = parser.add_argument
    add("--study", metavar="NAME|FILE", help="a study of the project, or a TOML file")
    add("--sweep", action="append", default=[], metavar="KNOB=VALUES", help="a,b,c or a range")
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="a knob that stays")
    add("--price-gpu-hour", type=PRICE, metavar="USD", help="rent of a GPU (typical rents)")
    add("--price-gb", type=PRICE, metavar="USD", help="a GB out of the GPUs' site (0.05)")
    add("--price-mbps-month", type=PRICE, metavar="USD", help="an owner's line (0.10)")
    add("--processes", type=PROCESSES, default=core_count(), help="worlds at once (all cores)")
    add("--out", type=output_directory, help="where to write (runs/whatif/NAME)")
    record.add_json_option(parser)
    return parser.parse(argv)


def study_from(args: argparse.Namespace) -> Study:
    """The study of a command line. Raises SettingError."""
    if not args.study and not args.sweep:
        raise SettingError(f"say what to sweep: --study {study_names()[0]}, or --sweep lanes=1,2,4")
    study = load_study(args.study) if args.study else Study("sweep", "", {}, {})
    study = study.with_sweeps(args.sweep, args.set)
    try:
        require_sound(study)
    except SettingError as error:
        if not args.study:
            raise
        text = f"{args.study}: {error}"
        if args.sweep or args.set:
            text += "; its own question needs that knob: leave --set or --sweep of it out"
        raise SettingError(text) from None
    return study


def prices_from(args: argparse.Namespace, prices: Prices) -> Prices:
    """Prices of the command line over those of the study."""
    given = {"gpu_hour": args.price_gpu_hour, "gb_out": args.price_gb,
             "mbps_month": args.price_mbps_month}  # fmt: skip
    return replace(prices, **{name: value for name, value in given.items() if value is not None})


def main() -> None:
    with clean_exit(SettingError, ProfileError):
        args = parse(sys.argv[1:])
        study = study_from(args)
        prices = prices_from(args, study.prices)
        for setting in study.settings():
            prices.rent(setting)
            for device in (setting.gpu, setting.owner_device):
                profile_of(device)
        name = Path(args.study).stem if args.study else "sweep"
        out = args.out or output_directory(Path("runs/whatif") / name)
    from scenarios.whatif.answers import answer  # these take seconds to load
    from scenarios.whatif.setting import MENDABLE
    from scenarios.whatif.sweep import Sweep, print_answer

    with clean_exit(*MENDABLE):
        sweep = Sweep(study, prices, args.processes, out)
        print(f"{study.title}: {len(sweep.settings)} settings")
        try:
            sweep.run()
        except KeyboardInterrupt:
            sweep.write(None)
            print(
                f"\ninterrupted: {len(sweep.rows)} of {len(sweep.settings)} settings are in {out}"
            )
            sys.exit(130)
        found = answer(study, sweep.rows)
        figures = sweep.write(found)
        print_answer(sweep, found, sweep.advice(found))
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
