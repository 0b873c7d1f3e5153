"""One study's run: its table, what it leaves behind, and what is said at its end."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backends.files import replacing, write_json
from scenarios import record
from scenarios.estimate import spoken
from scenarios.simulated import describe_profile
from scenarios.whatif import remedies
from scenarios.whatif.answers import Answer, Row, of
from scenarios.whatif.checks import too_large_to_draw
from scenarios.whatif.knobs import KEYS, Prices, Setting, profile_of, shown
from scenarios.whatif.patience import SAID_FROM_S, TRIALS, TRIED_S, expected_s
from scenarios.whatif.plots import plot_study
from scenarios.whatif.running import prepare, run_all
from scenarios.whatif.study import Study

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
    ("latency", "path_latency", "{:.0%}"),
    ("head", "path_head", "{:.0%}"),
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
            self.prices.rent(setting)
        for name in prepare(self.settings):
            print(f"tracing {name}")
        self.trace_s = time.perf_counter() - start
        expected = expected_s(self.settings, self._processes)
        if expected > SAID_FROM_S:
            print(f"about {spoken(expected)} to simulate")
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

    def advice(self, found: Answer) -> list[str]:
        """What would make the best setting faster, where the answer names one."""
        good = [row for row in self.rows if "error" not in row]
        if self.study.answer.get("kind", "effects") != "effects" or not good:
            return []
        row = next(r for r in good if all(of(r, knob) == v for knob, v in found.mark.items()))
        fields = {name: row[name] for name in Setting.__dataclass_fields__}
        best = replace(Setting(**fields), head=row["head_used"])
        if TRIALS * expected_s([best]) > TRIED_S:
            return []
        return remedies.lines(remedies.remedies(best))

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


def print_answer(sweep: Sweep, found: Answer, advice: Sequence[str] = ()) -> None:
    """The table, the question, the answer, what would help, and what it rests on."""
    study, prices = sweep.study, sweep.prices
    print(table(study, sweep.rows))
    print(f"\n{study.title}: {study.question}" if study.question else f"\n{study.title}")
    print(f"\n  {found.headline}\n\n{found.text}")
    if advice:
        print("\n".join(["From the best setting on,", *advice]))
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
