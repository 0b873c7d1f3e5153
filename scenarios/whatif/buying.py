"""The answer of kind "buy": for every number of owners, what a site should buy next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scenarios.whatif.answers import Answer, Row, groups, limit_of, of, say, words_of
from scenarios.whatif.knobs import shown
from scenarios.whatif.study import Study, varying


def bought(
    study: Study,
    rows: Sequence[Row],
    knobs: Sequence[str],
    per: str,
    value: str = "step_p50_s",
    least: float = 1.05,
) -> Answer:
    """From the first value of every knob on, the one knob that helps most, again and again.

    knobs  what can be bought: each has more in later values
    per    the knob that tells one case from another, owners say
    value  what is to become better, at least `least` times for every purchase
    """
    knobs = [knob for knob in knobs if knob in varying(study)]  # a command line may have fixed some
    cases = [
        _case(study, group, knobs, per, value, least) for group in groups(rows, (per,)).values()
    ]
    heads = [
        f"{shown(per, case[per])} {per}: {_first(case)}"
        for case in cases
    ]  # fmt: skip
    words = words_of(value)[0]
    text = (
        f"What makes the {words} at least {100 * (least - 1):.0f} % better, best first, whatever "
        "it costs:\n"
    )
    text += "\n".join(_told(case, per, value) for case in cases)
    return Answer("Buy next: " + "; ".join(heads), text, {}, {"purchases": cases})


def _case(
    study: Study, rows: Sequence[Row], knobs: Sequence[str], per: str, value: str, least: float
) -> dict[str, Any]:
    by_knobs = {tuple(of(row, knob) for knob in knobs): row for row in rows}
    now = start = by_knobs[tuple(study.sweep[knob][0] for knob in knobs)]
    steps = []
    while True:
        offers = list(_offers(study, by_knobs, now, knobs, value))
        best = max(offers, key=lambda offer: offer[0], default=None)
        if best is None or best[0] < least:
            break
        gain, knob, now = best
        steps.append({
            "buy": knob,
            "to": of(now, knob),
            "better": gain,
            value: now[value],
            "then": limit_of(now),
            "cost_per_million_tokens": now["cost_per_million_tokens"],
        })  # fmt: skip
    left = [{"buy": knob, "to": of(row, knob), "better": gain} for gain, knob, row in offers]
    return {
        per: of(start, per), value: start[value], "limit": limit_of(start), "steps": steps,
        "not_worth": left,
    }  # fmt: skip


def _offers(
    study: Study, by_knobs: Mapping[tuple[Any, ...], Row], now: Row, knobs: Sequence[str],
    value: str,
) -> Iterator[tuple[float, str, Row]]:  # fmt: skip
    """(how many times better, knob, the row with it): of each knob one size more."""
    more = words_of(value)[2]
    for place, knob in enumerate(knobs):
        values = study.sweep[knob]
        for further in values[values.index(of(now, knob)) + 1 :]:
            at = [of(now, other) for other in knobs]
            at[place] = further
            row = by_knobs.get(tuple(at))
            if row is not None:
                yield row[value] / now[value] if more else now[value] / row[value], knob, row
                break


def _first(case: Mapping[str, Any]) -> str:
    if not case["steps"]:
        return "nothing"
    step = case["steps"][0]
    return f"{step['buy']} {shown(step['buy'], step['to'])} (x{step['better']:.2g})"


def _told(case: Mapping[str, Any], per: str, value: str) -> str:
    lines = [f"  {shown(per, case[per])} {per}: {say(value, case[value])}, {case['limit']}"]
    for step in case["steps"]:
        lines.append(
            f"    {step['buy']} {shown(step['buy'], step['to'])}: x{step['better']:.3g}, "
            f"{say(value, step[value])}; then {step['then']}"
        )
    if case["not_worth"]:
        rest = [
            f"{x['buy']} {shown(x['buy'], x['to'])} x{x['better']:.3g}" for x in case["not_worth"]
        ]
        lines.append(f"    not worth it: {', '.join(rest)}")
    return "\n".join(lines)
