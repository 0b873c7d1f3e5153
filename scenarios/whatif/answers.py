"""Answers to what-if questions, computed from a study's rows and said in a sentence.

effects   how much each knob matters, and the best setting                     (the default)
until     how far a knob can go until a figure has grown by a factor
cheaper   which of two knobs buys speed for less
against   what one choice costs against another, over everything else that varies
worth     from which line on private is faster than clear on the owner's own machine
buy       for each value of one knob, which of the others to turn up next (`buying.py`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, TypeAlias

from scenarios.timeline import WORDS
from scenarios.whatif.clear import ASSUMED, memory_gb
from scenarios.whatif.knobs import KEYS, SettingError, shown, values_of
from scenarios.whatif.quantities import Value
from scenarios.whatif.study import VALUES, Study, varying
from sim.trace import PARTS

Row: TypeAlias = Mapping[str, Any]

FULL = 0.8
"""From this load on a line or a device counts as full."""


MATTERS = 1.05
"""What a knob makes of a figure at least, to be called a cause."""


@dataclass(frozen=True)
class Answer:
    """headline: one line, for the picture. text: some more lines. mark: knobs to point out.

    facts  more for --json
    """

    headline: str
    text: str
    mark: Mapping[str, Value]
    facts: Mapping[str, Any] = field(default_factory=dict)


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
    except (ValueError, LookupError, ArithmeticError, StopIteration):
        if len(good) == len(rows):
            raise
        failed = f"{len(rows) - len(good)} of {len(rows)} settings could not be trained"
        return Answer(f"no answer: {failed}, and too few are left", "", {})


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


def waits_for(row: Row) -> str:
    """'81 % upload'."""
    most = max(PARTS, key=lambda part: row[f"path_{part}"])
    return f"{100 * row[f'path_{most}']:.0f} % {WORDS[most]}"


def limit_of(row: Row) -> str:
    """What is full, or what a step waits for when nothing is."""
    loads = {
        "the owner's line is {} full upwards": row["line_up_busy"],
        "the owner's line is {} full downwards": row["line_down_busy"],
        "the site's line is {} full": row["site_busy"],
        "the GPU is {} busy": row["gpu_utilisation"],
    }
    text = max(loads, key=lambda name: loads[name])
    if loads[text] >= FULL:
        return text.format(f"{100 * loads[text]:.0f} %")
    return f"nothing is full, a step waits {waits_for(row).replace('%', '% for', 1)}"


def doublings(rows: Sequence[Row], knob: str, others: Sequence[str], value: str) -> list[float]:
    """What doubling a knob makes of a figure: a factor for each pair of neighbours."""
    factors = []
    for group in groups(rows, others).values():
        line = sorted(group, key=lambda row: of(row, knob))
        for a, b in pairwise(line):
            octaves = math.log2(float(of(b, knob)) / float(of(a, knob)))
            factors.append(float((b[value] / a[value]) ** (1 / octaves)))
    return factors


# --- kinds of answers ----------------------------------------------------------------------------


def _effects(
    study: Study,
    rows: Sequence[Row],
    value: str = "tokens_per_s_owner",
    at: Mapping[str, str] | None = None,
) -> Answer:
    """The best setting, and what each knob changes.

    With `at` the best is looked for where these knobs stand there, and what they themselves
    change is told from there on.
    """
    words, _, more, _ = words_of(value)
    focus = {knob: _read(study, knob, text) for knob, text in (at or {}).items()}
    near = [row for row in rows if all(of(row, k) == v for k, v in focus.items())]
    best = (max if more else min)(near, key=lambda row: row[value])
    knobs = varying(study)
    if not knobs:
        return Answer(f"{say(value, best[value])}; {limit_of(best)}", "", {})
    ratios = {knob: _effect(study, rows, near, knob, value, focus) for knob in knobs}
    order = sorted((k for k in knobs if k not in focus), key=lambda knob: -ratios[knob])
    there = " with " + named(best, list(focus)) if focus else ""
    head = f"At best {say(value, best[value])}{there}: {limit_of(best)}. "
    told = {knob: knob for knob in order}
    told |= {knob: f"{knob} {shown(knob, study.sweep[knob][-1])}" for knob in focus}
    matter = [f"{told[k]} x{ratios[k]:.2g}" for k in told if ratios[k] >= MATTERS]
    hardly = [f"{told[k]} x{ratios[k]:.3g}" for k in told if ratios[k] < MATTERS]
    head += "; ".join(
        f"{words}: {', '.join(found)}"
        for words, found in (("What matters", matter), ("what hardly does", hardly)) if found
    )  # fmt: skip
    lines = []
    for knob in [*order, *focus]:
        begin = focus.get(knob, study.sweep[knob][0])
        span = f"from {shown(knob, begin)} to {shown(knob, study.sweep[knob][-1])}"
        lines.append(f"  {knob:<16} x{ratios[knob]:.2f}   {span}")
    text = (
        f"Best{there}: {say(value, best[value])} with {named(best, knobs)}; {limit_of(best)}, "
        f"and a step is {waits_for(best)}.\n"
        f"What each knob changes, best against worst, others kept ({words}, median):\n"
        + "\n".join(lines)
    )
    return Answer(head, text, {knob: of(best, knob) for knob in knobs})


def _effect(
    study: Study, rows: Sequence[Row], near: Sequence[Row], knob: str, value: str,
    focus: Mapping[str, Value],
) -> float:  # fmt: skip
    """Best against worst along a knob; for one in focus, its last value against the one there."""
    others = [k for k in varying(study) if k != knob]
    ratios = []
    for group in groups(rows if knob in focus else near, others).values():
        if knob in focus:
            ends = (focus[knob], study.sweep[knob][-1])
            by_value = {of(row, knob): row[value] for row in group}
            found = [by_value[end] for end in ends if end in by_value]
        else:
            found = [row[value] for row in group]
        ratios.append(max(found) / max(min(found), 1e-300))
    return median(ratios)


def _read(study: Study, knob: str, text: str) -> Value:
    """A value of a knob that varies. Raises SettingError."""
    found = values_of(knob, str(text))
    if len(found) == 1 and found[0] in study.sweep.get(knob, ()):
        return found[0]
    raise SettingError(f"{knob}={text!r} is none of the values the study tries")


def _until(
    study: Study, rows: Sequence[Row], knob: str, value: str = "step_p99_s", factor: float = 2.0
) -> Answer:
    """The last value of a knob before a figure has grown by the factor, and what limits then."""
    words, _, _, _ = words_of(value)
    line = sorted(rows, key=lambda row: of(row, knob))
    first, limit = line[0], factor * line[0][value]
    after = next((row for row in line if row[value] > limit), None)
    last = line[-1] if after is None else line[line.index(after) - 1]
    text = (
        f"{words}: {say(value, first[value])} with {named(first, [knob])}, "
        f"{say(value, last[value])} (x{last[value] / first[value]:.2f}) with {named(last, [knob])}"
    )
    busy = f"the GPU is {100 * last['gpu_utilisation']:.2g} % busy"
    reached = f"until the {words} take x{factor:g}"
    if after is None:
        head = f"{shown(knob, of(last, knob))} {knob} and more {reached}; {limit_of(last)}, {busy}"
    else:
        text += (
            f", {say(value, after[value])} (x{after[value] / first[value]:.2f}) with "
            f"{named(after, [knob])}"
        )
        head = f"{shown(knob, of(last, knob))} {knob} {reached}: then {limit_of(last)}, {busy}"
    text += f".\nThere {limit_of(last)}; a step is {waits_for(last)}."
    return Answer(head, text, {knob: of(last, knob)})


def _cheaper(
    study: Study, rows: Sequence[Row], one: str, other: str,
    value: str = "cost_per_million_tokens",
) -> Answer:  # fmt: skip
    """What doubling each of two knobs makes of the cost, and where which is the better move."""
    knobs = (one, other)
    best = min(rows, key=lambda row: row[value])
    start = min(rows, key=lambda row: (of(row, one), of(row, other)))
    moves = list(_first_moves(rows, one, other, value))
    typical = {
        knob: median(doublings(rows, knob, [k for k in varying(study) if k != knob], value))
        for knob in knobs
    }
    cut = {knob: f"{100 * (1 - typical[knob]):.0f} %" for knob in knobs}
    head = (
        f"{_order_of(moves, one, other)}; doubling {other} takes {cut[other]} off the cost, "
        f"doubling {one} {cut[one]}; cheapest: {say(value, best[value])} with {named(best, knobs)}"
    )
    lines = [
        f"From {named(start, knobs)}: {say(value, start[value])}, a step is {waits_for(start)}."
    ]
    for row, better, gain, lesser in moves:
        lines.append(
            f"  with {named(row, [other])}: first {better} ({100 * (gain - 1):+.0f} %, the other "
            f"{100 * (lesser - 1):+.0f} %)"
        )
    speed = say("tokens_per_s_owner", best["tokens_per_s_owner"])
    lines.append(
        f"Cheapest: {say(value, best[value])}, {speed}, with {named(best, knobs)}: "
        f"GPU ${best['cost_gpu']:.2f}, traffic ${best['cost_traffic']:.2f}, line "
        f"${best['cost_line']:.2f}; {limit_of(best)}."
    )
    return Answer(head, "\n".join(lines), {knob: of(best, knob) for knob in knobs})


def _order_of(moves: Sequence[tuple[Row, str, float, float]], one: str, other: str) -> str:
    """Which of two knobs to turn first, and from where on."""
    first = [better for _, better, _, _ in moves]
    if len(set(first)) == 1:
        return f"First more {first[0]}"
    turn = next(i for i, better in enumerate(first) if better != first[0])
    return (
        f"First more {first[0]} up to {shown(other, of(moves[turn][0], other))}, then more "
        f"{first[turn]}"
        if first[0] == other
        else f"First more {one}, from {shown(other, of(moves[turn][0], other))} on more {other}"
    )


def _first_moves(
    rows: Sequence[Row], one: str, other: str, value: str
) -> Iterator[tuple[Row, str, float, float]]:
    """(row, better, what that makes of the figure, what the lesser does) at each `other`.

    Each row has the least of `one`; doubling either knob is tried from there.
    """
    least = min(of(row, one) for row in rows)
    line = sorted((r for r in rows if of(r, one) == least), key=lambda row: of(row, other))
    for row, more in pairwise(line):
        ahead = [r for r in rows if of(r, other) == of(row, other)]
        by_one = doublings(sorted(ahead, key=lambda r: of(r, one))[:2], one, [other], value)[0]
        by_other = doublings([row, more], other, [one], value)[0]
        better = one if by_one < by_other else other
        yield row, better, min(by_one, by_other), max(by_one, by_other)


def _against(
    study: Study, rows: Sequence[Row], knob: str, value: str = "step_p50_s", what: str = "",
    remedy: str = "",
) -> Answer:  # fmt: skip
    """The last value of a knob against its first, for each setting of the others.

    With a `remedy`, a knob that varies too: how much is left at its last value.
    """
    words, _, _, _ = words_of(value)
    first, last = study.sweep[knob][0], study.sweep[knob][-1]
    others = [k for k in varying(study) if k != knob]
    changes = [
        (row[value], row) for row in relative(study, rows, knob, value) if of(row, knob) == last
    ]
    least, most = (f(changes, key=lambda c: abs(c[0])) for f in (min, max))
    what = what or f"{knob} {shown(knob, last)} instead of {shown(knob, first)}"
    head = f"{what}: {words} {_percent(most[0])} at worst"
    if remedy:
        last = study.sweep[remedy][-1]
        left = max((c for c in changes if of(c[1], remedy) == last), key=lambda c: abs(c[0]))
        head += f", only {_percent(left[0])} with {named(left[1], [remedy])}"
    lines = [
        f"  {label:<7}{_percent(change):>7}  {named(row, others)}; a step is {waits_for(row)}"
        for label, (change, row) in (("least", least), ("most", most))
    ]
    halves = [change for change, _ in changes if abs(change) < 0.05]
    lines.append(f"  less than 5 % in {len(halves)} of {len(changes)} settings")
    return Answer(head, f"{what}, {words}:\n" + "\n".join(lines), {})


def relative(study: Study, rows: Sequence[Row], knob: str, value: str) -> list[Row]:
    """Rows with a figure replaced by its change against the knob's first value: 0.1 for +10 %."""
    first = study.sweep[knob][0]
    found: list[Row] = []
    for group in groups(rows, [k for k in varying(study) if k != knob]).values():
        base = next((row[value] for row in group if of(row, knob) == first), None)
        found += [{**row, value: row[value] / base - 1} for row in group if base]
    return found


def _percent(change: float) -> str:
    return f"{100 * change:+.0f} %" if abs(change) >= 0.01 else f"{100 * change:+.1f} %"


def _worth(study: Study, rows: Sequence[Row]) -> Answer:
    """Private against clear on the owner's own machine, for each model and machine.

    What else varies stands at its best for each bandwidth.
    """
    cases = [worth(group) for group in groups(rows, ("model", "owner-device")).values()]
    found: dict[str, list[str]] = {}
    for case in cases:
        device = shown("owner-device", case["owner_device"])
        found.setdefault(device, []).append(f"{case['model']} {_verdict(case)}")
    head = "Private is faster: " + "; ".join(
        f"on {device}: {', '.join(told)}" for device, told in found.items()
    )
    text = "\n".join(_told(case) for case in cases) + f"\nAssumed {ASSUMED}."
    return Answer(head, text, {}, {"worth": cases, "assumed": ASSUMED})


def worth(rows: Sequence[Row]) -> dict[str, Any]:
    """One model on one machine.

    verdict         only: clear does not fit the memory; never, always: at all bandwidths tried;
                    from: from `break_even_bps` on, read off between two of them in proportion
    private_most    tokens/s over the fastest line tried
    """
    best: dict[float, Row] = {}
    for row in rows:
        held = best.get(row["bandwidth_bps"], row)
        best[row["bandwidth_bps"]] = max(held, row, key=lambda r: r["tokens_per_s_owner"])
    line = [best[bps] for bps in sorted(best)]
    first, last = line[0], line[-1]
    even = None
    if not first["clear_fits"]:
        verdict = "only"
    elif first["private_over_clear"] >= 1:
        verdict = "always"
    else:
        even = next((_even(a, b) for a, b in pairwise(line) if b["private_over_clear"] >= 1), None)
        verdict = "never" if even is None else "from"
    return {
        "model": first["model"],
        "owner_device": first["owner_device"],
        "verdict": verdict,
        "break_even_bps": even,
        "clear_tokens_per_s": first["clear_tokens_per_s"],
        "clear_memory_gb": first["clear_memory_gb"],
        "memory_gb": memory_gb(first["owner_device"]),
        "private_most": last["tokens_per_s_owner"],
        "private_most_bps": last["bandwidth_bps"],
        "limit": limit_of(last),
    }


def _even(below: Row, above: Row) -> float:
    """The bandwidth at which the ratio is 1, on a straight line of logarithms."""
    bps = [math.log(row["bandwidth_bps"]) for row in (below, above)]
    ratios = [math.log(row["private_over_clear"]) for row in (below, above)]
    part = -ratios[0] / (ratios[1] - ratios[0])
    return math.exp(bps[0] + part * (bps[1] - bps[0]))


def _verdict(case: Mapping[str, Any]) -> str:
    if case["verdict"] == "from":
        return f"from {shown('bandwidth', case['break_even_bps'])} on"
    return {"only": "always (clear does not fit)", "always": "always", "never": "never"}[
        case["verdict"]
    ]


def _told(case: Mapping[str, Any]) -> str:
    """One case in a line."""
    needs = f"{case['clear_memory_gb']:.3g} of {case['memory_gb']:.3g} GB"
    clear = "does not fit" if case["verdict"] == "only" else f"{_rate(case['clear_tokens_per_s'])}"
    over = shown("bandwidth", case["private_most_bps"])
    return (
        f"  {case['model']} on {shown('owner-device', case['owner_device'])}: {_verdict(case)}; "
        f"clear {clear} ({needs}), private {_rate(case['private_most'])} over {over}, where "
        f"{case['limit']}"
    )


def _rate(tokens_per_s: float) -> str:
    return (
        f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 100 else f"{tokens_per_s:.3g} tokens/s"
    )


def _buy(study: Study, rows: Sequence[Row], knobs: Sequence[str], per: str, **more: Any) -> Answer:
    """What to buy next."""
    from scenarios.whatif.buying import bought  # which is made of what is above

    return bought(study, rows, knobs, per, **more)


_KINDS: Mapping[str, Callable[..., Answer]] = {
    "effects": _effects,
    "until": _until,
    "cheaper": _cheaper,
    "against": _against,
    "worth": _worth,
    "buy": _buy,
}
