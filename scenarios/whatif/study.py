"""What-if studies: which settings to try, and where that is written.

A study is a TOML file:

    title = "Home office"
    question = "How fast ...?"
    [fixed]                        # knobs that stay; names as in `scenarios.whatif.knobs.KEYS`
    bandwidth = "100Mb/s"
    [sweep]                        # knobs that vary: a range, or a list
    lanes = "1..8 x4"
    rtt = ["5ms", "20ms"]
    [prices]                       # optional: gpu-hour, gb-out, mbps-month
    [answer]                       # optional: how rows become an answer, see answers.py
    kind = "effects"
    [plot]                         # optional: value, x, y, panels, show, at, against
    value = "tokens_per_s_owner"
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.files import read_bounded
from scenarios.whatif.knobs import (
    PRICE_MOST,
    Prices,
    Setting,
    SettingError,
    changed,
    values_of,
)
from scenarios.whatif.quantities import Value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STUDIES = Path(__file__).resolve().parents[1] / "studies"
_STUDY_BYTES_MAX = 1 << 20
_SECTIONS = ("title", "question", "fixed", "sweep", "prices", "answer", "plot")
_PRICES = {"gpu-hour": "gpu_hour", "gb-out": "gb_out", "mbps-month": "mbps_month"}


# What can be asked for: (words, unit, whether more is better, format)
VALUES: dict[str, tuple[str, str, bool, str]] = {
    "tokens_per_s_owner": ("speed of an owner", "tokens/s", True, ".3g"),
    "tokens_per_s_gpu": ("speed of a GPU", "tokens/s", True, ".3g"),
    "step_p50_s": ("median step", "s", False, ".3g"),
    "step_p99_s": ("slowest steps (p99)", "s", False, ".3g"),
    "gpu_utilisation": ("GPU busy", "of the time", True, ".1%"),
    "gb_per_million_tokens": ("traffic", "GB per million tokens", False, ".4g"),
    "cost_per_million_tokens": ("cost", "$ per million tokens", False, ".3g"),
    "path_up": ("part of a step that is upload", "", False, ".0%"),
    "path_latency": ("part of a step that is latency", "", False, ".0%"),
    "private_over_clear": ("speed, private over clear here", "times", True, ".2g"),
}


@dataclass(frozen=True)
class Study:
    """A question and the settings that answer it.

    sweep   values by knob; the first varies slowest
    answer  options of the answer, "kind" among them; plot likewise of the picture
    """

    title: str
    question: str
    fixed: Mapping[str, Value]
    sweep: Mapping[str, Sequence[Value]]
    prices: Prices = field(default_factory=Prices)
    answer: Mapping[str, Any] = field(default_factory=dict)
    plot: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> list[Setting]:
        """All of them, the whole product. Raises SettingError."""
        base = Setting()
        return [
            changed(base, {**self.fixed, **dict(zip(self.sweep, values, strict=True))})
            for values in itertools.product(*self.sweep.values())
        ]

    def with_sweeps(self, sweeps: Sequence[str], fixed: Sequence[str]) -> Study:
        """The study with `knob=values` and `knob=value` of a command line put over its own."""
        swept, kept = dict(self.sweep), dict(self.fixed)
        given: set[str] = set()

        def once(name: str) -> None:
            if name in given:
                raise SettingError(f"{name} is given twice; say it in one --sweep or one --set")
            given.add(name)

        for text in sweeps:
            name, values = assignment(text)
            once(name)
            kept.pop(name, None)
            swept[name] = values
        for text in fixed:
            name, values = assignment(text)
            if len(values) != 1:
                raise SettingError(f"--set {text}: one value; --sweep {text} takes several")
            once(name)
            swept.pop(name, None)
            kept[name] = values[0]
        return replace(self, sweep=swept, fixed=kept)


def varying(study: Study) -> list[str]:
    """The knobs that really vary."""
    return [knob for knob, values in study.sweep.items() if len(values) > 1]


def assignment(text: str) -> tuple[str, list[Value]]:
    """("lanes", [1, 2]) of "lanes=1,2". Raises SettingError."""
    name, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise SettingError(f"{text!r}: write KNOB=VALUES, for instance lanes=1,2,4")
    return name.strip(), values_of(name.strip(), values)


def study_names() -> list[str]:
    """The studies that come with the project."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load_study(name: str) -> Study:
    """A study of the project by name, or of a TOML file. Raises SettingError, naming the file."""
    path = Path(name) if name.endswith(".toml") else STUDIES / f"{name}.toml"
    if not name.endswith(".toml") and name not in study_names():
        raise SettingError(
            f"no study {name!r}; there are {', '.join(study_names())}, or give a .toml file"
        )
    try:
        facts = tomllib.loads(read_bounded(path, _STUDY_BYTES_MAX).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingError(f"{path}: {why}") from None
    try:
        return _study(path.stem, facts)
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from None


def _study(name: str, facts: dict[str, Any]) -> Study:
    for section in facts:
        if section not in _SECTIONS:
            raise SettingError(f"unknown section {section!r}; there are {', '.join(_SECTIONS)}")
    for section in _SECTIONS[2:]:
        if not isinstance(facts.get(section, {}), dict):
            raise SettingError(f"[{section}] is a table")
    sweep = {name: _listed(name, given) for name, given in facts.get("sweep", {}).items()}
    fixed = {}
    for knob, given in facts.get("fixed", {}).items():
        values = _listed(knob, given)
        if len(values) != 1:
            raise SettingError(f"[fixed] {knob}: one value, got {given!r}")
        if knob in sweep:
            raise SettingError(f"{knob} is in [fixed] and in [sweep]; leave it in one of them")
        fixed[knob] = values[0]
    return Study(
        str(facts.get("title", name)),
        str(facts.get("question", "")),
        fixed,
        sweep,
        _prices(facts.get("prices", {})),
        facts.get("answer", {}),
        facts.get("plot", {}),
    )


def _listed(knob: str, given: object) -> list[Value]:
    parts = given if isinstance(given, list) else [given]
    return [value for part in parts for value in values_of(knob, str(part))]


def _prices(given: Mapping[str, Any]) -> Prices:
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in _PRICES or not number or not 0 <= value <= PRICE_MOST:
            raise SettingError(
                f"[prices] {name} = {value!r}: prices are numbers from 0 to {PRICE_MOST:g} called "
                f"{', '.join(_PRICES)}"
            )
    return Prices(**{_PRICES[name]: float(value) for name, value in given.items()})


# --- running ------------------------------------------------------------------------------------
