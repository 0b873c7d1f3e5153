"""What if? Sweeps the knobs of a simulated world and answers in a sentence and a picture.

    python -m scenarios.whatif --study home-office
    python -m scenarios.whatif --sweep bandwidth=10Mb/s,100Mb/s,1Gb/s --sweep lanes=1..8
    python -m scenarios.whatif --sweep "rtt=1ms..100ms x5" --set gpu=l4 --set lanes=2

Nothing is computed and nothing is sent: the real protocol runs on a modelled network, modelled
GPUs and a modelled owner. A study is a TOML file in scenarios/studies, or one of your own; --sweep
and --set turn its knobs. On all cores a sweep of 200 settings of a 1B model takes under a minute.

It ends with a table (every setting), the answer, and, in runs/whatif/NAME: rows.csv, rows.json and
picture.png. Columns: p50 and p99 of the step time over all owners' steps, tokens/s of an owner and
of a GPU, GPU utilisation, traffic, cost, what a step waits for on its critical path, and the speed
over that of the same training in clear on the owner's own machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backends.files import replacing, write_json
from backends.options import PROCESSES, Number, Parser
from backends.places import output_directory
from backends.threads import core_count
from scenarios import record
from scenarios.cli import clean_exit
from scenarios.simulated import describe_profile
from scenarios.whatif.answers import Answer, Row, answer
from scenarios.whatif.checks import require_sound, too_large_to_draw
from scenarios.whatif.plots import plot_study
from scenarios.whatif.setting import (
    KEYS,
    MENDABLE,
    PRICE_MOST,
    Prices,
    SettingError,
    profile_of,
    shown,
)
from scenarios.whatif.study import Study, load_study, prepare, run_all, study_names

PRICE = Number(0, PRICE_MOST)
"""US dollars."""

COLUMNS = (
    ("p50 s", "step_p50_s", "{:.3g}"),
    ("p99 s", "step_p99_s", "{:.3g}"),
    ("tok/s owner", "tokens_per_s_owner", "{:.4g}"),
    ("tok/s GPU", "tokens_per_s_gpu", "{:.4g}"),
    ("GPU busy", "gpu_utilisation", "{:.2%}"),
    ("GB/step", "gb_per_step", "{:.3g}"),
    ("GB/Mtok", "gb_per_million_tokens", "{:.4g}"),
    ("$/Mtok", "cost_per_million_tokens", "{:.3g}"),
    ("owner", "path_owner", "{:.0%}"),
    ("up", "path_up", "{:.0%}"),
    ("worker", "path_worker", "{:.0%}"),
    ("down", "path_down", "{:.0%}"),
    ("idle", "path_idle", "{:.0%}"),
    ("/clear", "private_over_clear", "{:.2g}"),
)


def table(study: Study, rows: Sequence[Row]) -> str:
    """All rows, the knobs that vary first."""
    knobs = [name for name, values in study.sweep.items() if len(values) > 1]
    lines = [[*knobs, *(head for head, _, _ in COLUMNS)]]
    for row in rows:
        cells = [shown(knob, row[KEYS[knob].field]) for knob in knobs]
        if "error" in row:
            cells.append(str(row["error"]))
        else:
            cells += [form.format(row[name]) for _, name, form in COLUMNS]
        lines.append(cells)
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in whole) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False))
        for line in lines
    )


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV; every figure a row may have is a column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Sweep:
    """One study's run and what it leaves behind."""

    def __init__(self, study: Study, prices: Prices, processes: int, out: Path) -> None:
        self.study = study
        self.prices = prices
        self.out = out
        self.settings = study.settings()
        self.elapsed_s = 0.0
        self.trace_s = 0.0
        self._processes = min(processes, len(self.settings))
        self._rows: dict[int, Row] = {}

    @property
    def rows(self) -> list[Row]:
        """Rows so far, in the order of the settings."""
        return [self._rows[index] for index in sorted(self._rows)]

    @property
    def complete(self) -> bool:
        """Whether every setting has its row."""
        return len(self._rows) == len(self.settings)

    def run(self) -> None:
        """Simulate all settings. After Ctrl-C the rows so far are kept; it raises on."""
        start = time.perf_counter()
        try:
            self._run()
        finally:
            self.elapsed_s = time.perf_counter() - start

    def _run(self) -> None:
        start = time.perf_counter()
        for setting in self.settings:
            self.prices.of_gpu(setting.gpu)
        for name in prepare(self.settings):
            print(f"tracing {name}")
        self.trace_s = time.perf_counter() - start
        results = run_all(self.settings, self.prices, self._processes)
        with tqdm(total=len(self.settings), unit="world", dynamic_ncols=True) as bar:
            try:
                for index, row in results:
                    self._rows[index] = row
                    bar.update()
            finally:
                results.close()

    def figures(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "title": self.study.title,
            "question": self.study.question,
            "complete": self.complete,
            "configurations": len(self.settings),
            "elapsed_s": self.elapsed_s,
            "trace_s": self.trace_s,
            "processes": self._processes,
            "prices": {name: getattr(self.prices, name) for name in Prices.__dataclass_fields__},
            "profiles": sorted(
                {describe_profile(profile_of(c)) for s in self.settings
                 for c in (s.gpu, s.owner_device)}
            ),
            "rows": self.rows,
        }  # fmt: skip

    def write(self, found: Answer | None) -> dict[str, Any]:
        """CSV, JSON and, with an answer, the picture; returns the figures."""
        figures = record.told_finite(self.figures())
        with replacing(self.out / "rows.csv") as file:
            file.write(csv_text(self.rows).encode())
        if found is not None:
            figures |= {"headline": found.headline, "answer": found.text, **found.facts}
        write_json(self.out / "rows.json", figures)
        if found is not None:
            self._draw(found)
        return figures

    def _draw(self, found: Answer) -> None:
        """The picture, where there is anything to see in one."""
        if too_large_to_draw(self.study):
            print("no picture: it would have more values than anybody can look at")
            return
        failed = sum("error" in row for row in self.rows)
        try:
            plot_study(self.out / "picture.png", self.study, self.rows, found)
        except (ValueError, LookupError, ArithmeticError):
            if not failed:
                raise
            print(f"no picture: {failed} of {len(self.rows)} settings could not be trained")


def print_answer(sweep: Sweep, found: Answer) -> None:
    """The table, the question, the answer, and what it rests on."""
    study, prices = sweep.study, sweep.prices
    print(table(study, sweep.rows))
    print(f"\n{study.title}: {study.question}" if study.question else f"\n{study.title}")
    print(f"\n  {found.headline}\n\n{found.text}")
    rent = "typical rents" if prices.gpu_hour is None else f"${prices.gpu_hour:g}"
    print(
        f"\nPrices: {rent} a GPU hour, rented whole; ${prices.gb_out:g} a GB out of the GPUs' "
        f"site; ${prices.mbps_month:g} per Mb/s and month of an owner's line."
    )
    for profile in sweep.figures()["profiles"]:
        print(f"Profile {profile}")
    print(
        f"{len(sweep.rows)} settings in {sweep.elapsed_s:.1f} s "
        f"(of it {sweep.trace_s:.1f} s to trace the models)"
    )
    print(f"See {sweep.out / 'picture.png'}, rows.csv, rows.json")


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
        raise SettingError(f"{args.study}: {error}" if args.study else str(error)) from None
    return study


def prices_from(args: argparse.Namespace, prices: Prices) -> Prices:
    """Prices of the command line over those of the study."""
    given = {"gpu_hour": args.price_gpu_hour, "gb_out": args.price_gb,
             "mbps_month": args.price_mbps_month}  # fmt: skip
    return replace(prices, **{name: value for name, value in given.items() if value is not None})


def main() -> None:
    args = parse(sys.argv[1:])
    with clean_exit(*MENDABLE):
        study = study_from(args)
        name = Path(args.study).stem if args.study else "sweep"
        out = args.out or output_directory(Path("runs/whatif") / name)
        sweep = Sweep(study, prices_from(args, study.prices), args.processes, out)
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
        print_answer(sweep, found)
    record.write(args.json, figures)


if __name__ == "__main__":
    main()
