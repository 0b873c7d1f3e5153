"""Whether a study's [answer] and [plot] can be used with what it varies, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from scenarios.whatif.knobs import KEYS, SettingError, key_called, require_elsewhere, values_of
from scenarios.whatif.study import VALUES, Study, varying

SETTINGS_MOST = 20_000
CELLS_MOST = 2_500
"""Of one panel of a picture: what can still be read, and drawn within seconds."""

Check: TypeAlias = Callable[[Study, Any], str | None]
"""What is wrong with an option's value; None when nothing is."""


def _figure(study: Study, value: Any) -> str | None:
    known = isinstance(value, str) and value in VALUES
    return None if known else f"it is one of {', '.join(VALUES)}"


def _varies(study: Study, value: Any) -> str | None:
    knobs = varying(study)
    known = isinstance(value, str) and value in knobs
    return None if known else f"it is a knob that varies, which {', '.join(knobs) or 'none'} does"


def _doubles(study: Study, value: Any) -> str | None:
    wrong = _varies(study, value)
    if wrong is None and not all(_above_zero(v) for v in study.sweep[value]):
        wrong = "it is a knob of numbers above 0"
    return wrong


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _factor(study: Study, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 1 < value < math.inf else "it is a finite number above 1"


def _text(study: Study, value: Any) -> str | None:
    return None if isinstance(value, str) else "it is a text"


def _standing(study: Study, value: Any) -> str | None:
    """A table of knobs that vary, and one of its values for each."""
    if not isinstance(value, dict):
        return "it is a table of knobs and their values"
    for knob, given in value.items():
        wrong = _varies(study, knob)
        if wrong:
            return f"{knob}: {wrong}"
        if values_of(knob, str(given)) not in [[v] for v in study.sweep[knob]]:
            return f"{knob}={given!r} is none of the values the study tries"
    return None


def _listed(study: Study, value: Any) -> str | None:
    knob = study.plot.get("panels")
    if not isinstance(value, list) or not value:
        return "it is a list of values"
    if knob is None:
        return "it needs panels, the knob whose values they are"
    for given in value:
        if values_of(knob, str(given)) not in [[v] for v in study.sweep[knob]]:
            return f"{knob} is never {given!r}"
    return None


def _knob(study: Study, value: Any) -> str | None:
    return None if isinstance(value, str) and value in KEYS else "it is no knob"


def _several(study: Study, value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "it is a list of knobs"
    return next((f"{knob!r} is no knob" for knob in value if _knob(study, knob)), None)


_ANSWERS: Mapping[str, tuple[Mapping[str, Check], tuple[str, ...]]] = {
    "effects": ({"value": _figure, "at": _standing}, ()),
    "until": ({"knob": _varies, "value": _figure, "factor": _factor}, ("knob",)),
    "cheaper": ({"one": _doubles, "other": _doubles, "value": _figure}, ("one", "other")),
    "against": (
        {"knob": _varies, "value": _figure, "what": _text, "remedy": _varies}, ("knob",),
    ),
    "worth": ({}, ()),
    "buy": (
        {"knobs": _several, "per": _knob, "value": _figure, "least": _factor}, ("knobs", "per"),
    ),
}  # fmt: skip
"""Options of each kind of answer, and those that it cannot do without."""
_PLOT: Mapping[str, Check] = {
    "value": _figure, "x": _varies, "y": _varies, "panels": _varies, "against": _varies,
    "at": _standing, "show": _listed,
}  # fmt: skip


def require_sound(study: Study) -> None:
    """Raise SettingError for a study that is too large, or whose answer or picture cannot be made
    of what it varies; the text names the option."""
    for knob, values in study.sweep.items():
        if not values:
            raise SettingError(f"[sweep] {knob}: no values")
    count = math.prod(len(values) for values in study.sweep.values())
    if count > SETTINGS_MOST:
        raise SettingError(f"{count} settings are too many; at most {SETTINGS_MOST}")
    for knob in [*study.sweep, *study.fixed]:
        key_called(knob)
    if set(study.sweep.get("worker", [study.fixed.get("worker")])) == {"here"}:
        require_elsewhere([*study.sweep, *study.fixed])
    kind = study.answer.get("kind", "effects")
    if not isinstance(kind, str) or kind not in _ANSWERS:
        raise SettingError(f"[answer] kind={kind!r}: it is one of {', '.join(_ANSWERS)}")
    checks, needed = _ANSWERS[kind]
    options = {name: value for name, value in study.answer.items() if name != "kind"}
    missing = [name for name in needed if name not in options]
    if missing:
        raise SettingError(f"[answer] of kind {kind!r} needs {missing[0]}")
    _check(study, f"[answer] of kind {kind!r}", options, checks)
    if kind == "cheaper" and sorted((options["one"], options["other"])) != sorted(varying(study)):
        raise SettingError("[answer] of kind 'cheaper': one and other are the two knobs that vary")
    if kind == "worth" and "bandwidth" not in varying(study):
        raise SettingError("[answer] of kind 'worth': bandwidth must vary")
    if kind == "buy":
        others = set(varying(study)) - {*options["knobs"], options["per"]}
        if others:
            raise SettingError(
                f"[answer] of kind 'buy': {min(others)} varies too; put it among knobs"
            )
    _check(study, "[plot]", study.plot, _PLOT)
    _check_axes(study)


def _check(
    study: Study, section: str, options: Mapping[str, Any], checks: Mapping[str, Check]
) -> None:
    for name, value in options.items():
        if name not in checks:
            raise SettingError(f"{section} has no {name}; there are {', '.join(checks)}")
        wrong = checks[name](study, value)
        if wrong is not None:
            raise SettingError(f"{section} {name}={value!r}: {wrong}")


def _check_axes(study: Study) -> None:
    axes = [study.plot[name] for name in ("x", "y", "panels", "against") if name in study.plot]
    if len(set(axes)) < len(axes):
        raise SettingError("[plot] x, y, panels and against are different knobs")
    if "against" in study.plot and len(varying(study)) < 3:
        raise SettingError("[plot] against: two more knobs must vary, for the axes")


def too_large_to_draw(study: Study) -> bool:
    """Whether a picture of all values would be more than anybody could look at."""
    longest = sorted((len(study.sweep[knob]) for knob in varying(study)), reverse=True)
    return math.prod(longest[:2]) > CELLS_MOST
