"""Answers to what-if questions, computed from a study's rows and said in a sentence.

effects   how much each knob matters, and the best setting                     (the default)
until     how far a knob can go until a figure has grown by a factor
cheaper   which of two knobs buys speed for less
against   what one choice costs against another, over everything else that varies
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

from scenarios.quantities import Value
from scenarios.setting import KEYS, SettingError, shown
from scenarios.study import Study
from scenarios.timeline import WORDS
from sim.trace import PARTS

Row: TypeAlias = Mapping[str, Any]

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
}


@dataclass(frozen=True)
class Answer:
    """headline: one line, for the picture. text: some more lines. mark: knobs to point out."""

    headline: str
    text: str
    mark: Mapping[str, Value]


def answer(study: Study, rows: Sequence[Row]) -> Answer:
    """The study's answer. Raises SettingError for options it does not know."""
    good = [row for row in rows if "error" not in row]
    if not good:
        return Answer("nothing could be trained", str(rows[0]["error"]), {})
    options = dict(study.answer)
    kind = options.pop("kind", "effects")
    if kind not in _KINDS:
        raise SettingError(f"[answer] kind={kind!r}: it is one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](study, good, **options)
    except TypeError as error:
        raise SettingError(f"[answer] of kind {kind!r}: {error}") from None


def words_of(value: str) -> tuple[str, str, bool, str]:
    """Words, unit, direction and format of a figure. Raises SettingError."""
    try:
        return VALUES[value]
    except KeyError:
        raise SettingError(f"no figure {value!r}; there are {', '.join(VALUES)}") from None


def say(value: str, number: float) -> str:
    """A figure as a person reads it: 34.5 tokens/s."""
    _, unit, _, form = words_of(value)
    text = f"{number:{form}}".replace("%", " %")
    return f"${text} {unit[2:]}" if unit.startswith("$ ") else f"{text} {unit}".strip()


def of(row: Row, knob: str) -> Value:
    """A knob's value in a row."""
    value: Value = row[KEYS[knob].field]
    return value


def named(row: Row, knobs: Sequence[str]) -> str:
    """'lanes 4, rtt 20 ms'."""
    return ", ".join(f"{knob} {shown(knob, of(row, knob))}" for knob in knobs)


def groups(rows: Sequence[Row], knobs: Sequence[str]) -> dict[tuple[Value, ...], list[Row]]:
    """Rows that agree in these knobs, in the order of their first."""
    found: dict[tuple[Value, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(of(row, knob) for knob in knobs), []).append(row)
    return found


def varying(study: Study) -> list[str]:
    """The knobs that really vary."""
    return [knob for knob, values in study.sweep.items() if len(values) > 1]


def waits_for(row: Row) -> str:
    """'81 % upload'."""
    most = max(PARTS, key=lambda part: row[f"path_{part}"])
    return f"{100 * row[f'path_{most}']:.0f} % {WORDS[most]}"


def _effects(study: Study, rows: Sequence[Row], value: str = "tokens_per_s_owner") -> Answer:
    words, _, more, _ = words_of(value)
    best = (max if more else min)(rows, key=lambda row: row[value])
    knobs = varying(study)
    if not knobs:
        return Answer(f"{say(value, best[value])}; a step is {waits_for(best)}", "", {})
    ratios: dict[str, float] = {}
    lines = []
    for knob in knobs:
        others = [k for k in knobs if k != knob]
        ratio = median(
            max(r[value] for r in group) / max(min(r[value] for r in group), 1e-300)
            for group in groups(rows, others).values()
        )
        ratios[knob] = ratio
        first, last = (shown(knob, study.sweep[knob][i]) for i in (0, -1))
        lines.append(f"  {knob:<16} x{ratio:.2f}   from {first} to {last}")
    order = sorted(knobs, key=lambda knob: -ratios[knob])
    head = f"{say(value, best[value])} at best; {order[0]} matters most (x{ratios[order[0]]:.2g})"
    if len(order) > 1:
        head += f", {order[-1]} least (x{ratios[order[-1]]:.2g})"
    text = (
        f"Best: {say(value, best[value])} with {named(best, knobs)}; "
        f"a step there is {waits_for(best)}.\n"
        f"What each knob changes, best against worst, others kept ({words}, median):\n"
        + "\n".join(lines)
    )
    return Answer(head, text, {knob: of(best, knob) for knob in knobs})


def _until(
    study: Study, rows: Sequence[Row], knob: str, value: str = "step_p99_s", factor: float = 2.0
) -> Answer:
    words, _, _, _ = words_of(value)
    line = sorted(rows, key=lambda row: of(row, knob))
    limit = factor * line[0][value]
    within = [row for row in line if row[value] <= limit]
    last = within[-1]
    beyond = [row for row in line if of(row, knob) > of(last, knob)]
    start = f"{say(value, line[0][value])} with {named(line[0], [knob])}"
    then = f"{say(value, last[value])} with {named(last, [knob])}"
    busy = f"the GPU is {100 * last['gpu_utilisation']:.2g} % busy"
    text = f"{words}: {start}; {then}, where {busy} and a step is {waits_for(last)}."
    if not beyond:
        head = f"up to {named(last, [knob])} and further: {words} not yet x{factor:g}"
        return Answer(head, text, {knob: of(last, knob)})
    after = beyond[0]
    text += (
        f"\nNext tried: {say(value, after[value])} with {named(after, [knob])} "
        f"(x{after[value] / line[0][value]:.2f}), where a step is {waits_for(after)}."
    )
    head = (
        f"{of(last, knob)} {knob} until {words} reach x{factor:g}; "
        f"{busy} then, a step is {waits_for(after)}"
    )
    return Answer(head, text, {knob: of(last, knob)})


def _cheaper(
    study: Study,
    rows: Sequence[Row],
    one: str,
    other: str,
    value: str = "cost_per_million_tokens",
    speed: str = "tokens_per_s_owner",
) -> Answer:
    """From the smallest of both: the most each of them alone can do, and for what."""
    start = min(rows, key=lambda row: (of(row, one), of(row, other)))
    lines = []
    alone = {}
    for knob, kept in ((one, other), (other, one)):
        line = [row for row in rows if of(row, kept) == of(start, kept)]
        best = min(line, key=lambda row: row[value])
        alone[knob] = best
        lines.append(
            f"  only more {knob:<10} down to {say(value, best[value])} "
            f"(x{best[value] / start[value]:.2f}), {say(speed, best[speed])}, "
            f"with {named(best, [knob])}; a step there is {waits_for(best)}"
        )
    cheapest = min(rows, key=lambda row: row[value])
    winner = min(alone, key=lambda knob: alone[knob][value])
    loser = other if winner == one else one
    head = (
        f"{winner} {'are' if winner.endswith('s') else 'is'} cheaper: alone "
        f"{100 * (1 - alone[winner][value] / start[value]):.0f} % off, {loser} alone "
        f"{100 * (1 - alone[loser][value] / start[value]):.0f} %; cheapest "
        f"{say(value, cheapest[value])} with {named(cheapest, [one, other])}"
    )
    text = (
        f"From {named(start, [one, other])}: {say(value, start[value])}, "
        f"{say(speed, start[speed])}; a step is {waits_for(start)}.\n" + "\n".join(lines) +
        f"\nCheapest of all: {say(value, cheapest[value])}, {say(speed, cheapest[speed])}, with "
        f"{named(cheapest, [one, other])}: GPU ${cheapest['cost_gpu']:.2f}, traffic "
        f"${cheapest['cost_traffic']:.2f}, line ${cheapest['cost_line']:.2f}."
    )  # fmt: skip
    return Answer(head, text, {one: of(cheapest, one), other: of(cheapest, other)})


def _against(
    study: Study,
    rows: Sequence[Row],
    knob: str,
    value: str = "step_p50_s",
) -> Answer:
    """The last value of a knob against its first, for each setting of the others."""
    words, _, _, _ = words_of(value)
    first, last = study.sweep[knob][0], study.sweep[knob][-1]
    others = [k for k in varying(study) if k != knob]
    changes: list[tuple[float, Row]] = []
    for group in groups(rows, others).values():
        by_value = {of(row, knob): row for row in group}
        if first in by_value and last in by_value:
            changes.append((by_value[last][value] / by_value[first][value] - 1, by_value[last]))
    least, most = min(changes, key=lambda c: c[0]), max(changes, key=lambda c: c[0])
    middle = median(change for change, _ in changes)
    head = (
        f"{knob} {shown(knob, last)} instead of {shown(knob, first)}: {words} {middle:+.0%} "
        f"(median), {most[0]:+.0%} at most"
    ).replace("%", " %")
    lines = [
        f"  {what:<6} {100 * change:+6.1f} %  {named(row, others)}; a step is {waits_for(row)}"
        for what, (change, row) in (("least", least), ("most", most))
    ]
    text = f"{words}, {knob} {shown(knob, last)} against {shown(knob, first)}:\n" + "\n".join(lines)
    return Answer(head, text, {})


_KINDS: Mapping[str, Callable[..., Answer]] = {
    "effects": _effects,
    "until": _until,
    "cheaper": _cheaper,
    "against": _against,
}
