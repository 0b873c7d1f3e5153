"""Content to one HTML file that loads nothing. Every value is escaped by the template engine."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from backends.units import human_bytes
from scenarios.page.chart import Points, chart, points
from scenarios.page.content import Content, Request
from scenarios.page.spans import timeline
from scenarios.page.uniform import hex_rows, uniformity
from scenarios.page.words import beside_clear, headline, percent, security
from scenarios.report import write_text

ASSETS = Path(__file__).parent.parent / "assets" / "page"
SHOWN_BYTES = 512
MOST_SAMPLES, MOST_LETTERS = 20, 8000
_SIZES = {"wide": (960, 320), "narrow": (360, 270)}


def write_page(path: Path, content: Content) -> None:
    """Write the page atomically. Raises WriteError when it cannot be written."""
    write_text(path, page(content))


def page(content: Content) -> str:
    """The whole HTML document."""
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    curves = [points(curve) for curve in content.curves]
    charts = {name: chart(curves, *size) for name, size in _SIZES.items()}
    steps = timeline(content.spans)
    data: dict[str, Any] = {
        "curves": [_curve_data(curve) for curve in curves],
        "timeline": steps.data if steps else None,
    }
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "bytes": human_bytes, "visible": visible,
    }  # fmt: skip
    text = environment.get_template("report.html").render(
        content=content, headline=headline(content), beside_clear=beside_clear(content),
        samples=content.samples[:MOST_SAMPLES], left_out=len(content.samples[MOST_SAMPLES:]),
        charts={name: c for name, c in charts.items() if c is not None},
        parts=_shares(content), steps=steps, seen=_seen(content.request),
        security=security(content.parameters) if content.parameters else None,
        style=Markup(style), script=Markup(script), style_hash=_hash(style),
        script_hash=_hash(script), data=data,
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode()


def visible(text: str) -> str:
    """Text of a model as a page can hold it: what is no letter is shown by a sign of its own."""
    cut = text[:MOST_LETTERS]
    shown = "".join(c if c in "\n\t" else _shown(c) for c in cut)
    return shown + (" … (cut)" if len(text) > len(cut) else "")


def _shown(c: str) -> str:
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    # Others that are not seen, or turn what stands around them: controls, formats, surrogates.
    return "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co") else c


def _asset(name: str) -> str:
    """A part of the page that is put into it as it is."""
    return (ASSETS / name).read_text("utf-8")


def _hash(text: str) -> str:
    """By which the page's policy allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _curve_data(curve: Points) -> dict[str, Any]:
    return {
        "name": curve.name,
        "training": [(i, round(v, 4), round(m, 4)) for i, v, m in curve.training],
        "held": [(i, round(v, 4)) for i, v in curve.held_out],
    }


def _shares(content: Content) -> list[dict[str, Any]]:
    """Parts of the time with where each begins in a bar of 1000 units."""
    total = sum(part.seconds for part in content.parts)
    if total <= 0:
        return []
    found, at = [], 0.0
    for part in content.parts:
        share = part.seconds / total
        found.append(
            {"part": part, "share": share, "x": round(1000 * at, 2), "w": round(1000 * share, 2)}
        )
        at += share
    return found


def _seen(request: Request | None) -> dict[str, Any] | None:
    """A request in hex, and how even all of its bytes are."""
    if request is None or not request.payload:
        return None
    found = uniformity(request.payload)
    most = max(found.counts)
    return {
        "request": request,
        "rows": hex_rows(request.payload[:SHOWN_BYTES]),
        "shown": min(SHOWN_BYTES, len(request.payload)),
        "counted": len(request.payload),
        "uniformity": found,
        "expected": len(request.payload) / 256,
        "most": most,
        "bars": [round(100 * count / most, 2) for count in found.counts],
        "level": round(100 * len(request.payload) / 256 / most, 2),
    }
