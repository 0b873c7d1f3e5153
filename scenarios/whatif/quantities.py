"""Quantities as people write them: 100Mb/s, 20ms, 0.1%, and ranges of them.

    100Mb/s,1Gb/s         these two
    1..8                  every whole number (counts only)
    1ms..100ms x5         five values, each as many times the one before (geometric)
    0ms..100ms x5 lin     five values at equal distances

Every reader raises ValueError that says what was read and what it can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from backends.options import shown

Value: TypeAlias = str | int | float

MOST_VALUES = 10_000
"""Values of one knob."""
_BPS = (1e3, 1e15)
_SECONDS_MOST = 3600.0
_COUNT_MOST = 1 << 20
_LONGEST = 4096  # characters of a value: a path, at most

_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(.*)", re.IGNORECASE)
_RANGE = re.compile(r"(.+?)\.\.(.+?)(?:\s*x\s*(\d+)(?:\s+(lin|log))?)?", re.IGNORECASE)
_RATES = {"kb/s": 1e3, "Mb/s": 1e6, "Gb/s": 1e9, "Tb/s": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def bandwidth_bps(text: str) -> float:
    """Bits per second of "100Mb/s", 1 kb/s to 1000 Tb/s. Bytes per second (MB/s) are refused, not
    guessed at."""
    return _with_unit(text, _RATES, "bandwidth in bits per second", *_BPS)


def duration_s(text: str) -> float:
    """Seconds of "20ms", an hour at most."""
    return _with_unit(text, _TIMES, "duration", 0.0, _SECONDS_MOST)


def fraction(text: str) -> float:
    """A number from 0 up to, not including, 1, of "0.001" or "0.1%"."""
    found = _NUMBER.fullmatch(text.strip())
    if found and found[2] in ("", "%"):
        value = float(found[1]) / (100 if found[2] else 1)
        if value < 1:
            return value
    raise ValueError(f"{shown(text)} is no fraction; write 0.001 or 0.1%, less than 1")


def count(text: str) -> int:
    """A whole number from 1 to 2^20."""
    digits = text.strip().lstrip("0")
    if re.fullmatch(r"[0-9]{1,7}", digits) and int(digits) <= _COUNT_MOST:
        return int(digits)
    raise ValueError(f"{shown(text)} is no whole number of at least 1 and at most {_COUNT_MOST}")


def show_bandwidth(bps: float) -> str:
    """100 Mb/s."""
    return _shown(bps, _RATES)


def show_duration(seconds: float) -> str:
    """20 ms."""
    return _shown(seconds, _TIMES)


def show_fraction(value: float) -> str:
    """0.1 %."""
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class Form:
    """How values of one kind are read and shown.

    whole   only whole numbers, so that `1..8` means all of them
    """

    read: Callable[[str], Value]
    show: Callable[[Value], str] = str
    numeric: bool = True
    whole: bool = False

    def values(self, text: str) -> list[Value]:
        """The values of "a,b,c" or of a range, in order, each once."""
        found: list[Value] = []
        for part in text.split(","):
            if len(part) > _LONGEST:
                raise ValueError(f"{shown(part)} is longer than any value")
            if len(found) > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values")
            numeric = self.numeric and len(part) < 100
            span = _RANGE.fullmatch(part.strip()) if numeric else None
            found += self._range(span, part.strip()) if span else [self.read(part.strip())]
        return list(dict.fromkeys(found))

    def _range(self, span: re.Match[str], text: str) -> list[Value]:
        first, last = self.read(span[1].strip()), self.read(span[2].strip())
        assert not isinstance(first, str)
        assert not isinstance(last, str)
        if first >= last:
            raise ValueError(f"{text!r}: a range goes upwards")
        if span[3] is None:
            if self.whole:
                if last - first >= MOST_VALUES:
                    raise ValueError(f"{text!r}: a range has at most {MOST_VALUES} values")
                return list(range(int(first), int(last) + 1))
            raise ValueError(f"{text!r}: say how many values, {text} x5")
        steps = int(span[3]) if len(span[3]) < 9 else MOST_VALUES + 1
        if not 2 <= steps <= MOST_VALUES:
            raise ValueError(f"{text!r}: a range has 2 to {MOST_VALUES} values")
        if span[4] != "lin" and first <= 0:
            raise ValueError(f"{text!r}: from 0 only in equal distances, {text} lin")
        return list(dict.fromkeys(self._spaced(first, last, steps, span[4] == "lin")))

    def _spaced(self, first: float, last: float, steps: int, linear: bool) -> Sequence[Value]:
        values: list[float] = []
        for step in range(steps):
            part = step / (steps - 1)
            value = first + (last - first) * part if linear else first * (last / first) ** part
            # Three digits are enough, and round values stay round.
            inner = 0 < step < steps - 1
            values.append(float(f"{value:.3g}") if inner else (first, last)[step > 0])
        return [round(value) for value in values] if self.whole else values


def _with_unit(text: str, units: dict[str, float], what: str, least: float, most: float) -> float:
    found = _NUMBER.fullmatch(text.strip())
    unit = found[2].strip() if found else ""
    value = float(found[1]) * units[unit] if found and unit in units else math.nan
    if least <= value <= most:
        return value
    names = ", ".join(units)
    if math.isnan(value):
        raise ValueError(f"{shown(text)} is no {what}; write a number and one of {names}")
    raise ValueError(
        f"{shown(text)} is no {what} from {_shown(least, units)} to {_shown(most, units)}"
    )


def _shown(value: float, units: dict[str, float]) -> str:
    names = list(units)
    name = next((n for n in reversed(names) if value >= 0.9995 * units[n]), names[0])
    if value == 0:
        name = names[min(1, len(names) - 1)]
    return f"{value / units[name]:.3g} {name}"
