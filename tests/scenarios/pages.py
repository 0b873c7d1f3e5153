"""A run's page with all of its parts, its texts as hostile as a model may write them."""

from __future__ import annotations

import os
import random

from backends.he.params import preset
from scenarios.page import Checks, Content, Curve, Part, Request, Sample, Traffic
from sim.trace import Span

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "</pre></style><img src=http://127.0.0.1:9/x onerror='window.pwned = 1'>",
    "<!--<script>",
    "\"'><svg onload=window.pwned=1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; \x00\x1b[31m \ud800 \u202edcba \u2028 end",
)


def spans(steps: int, layers: int) -> list[Span]:
    """Steps of a second, each with so many layers of five spans."""
    found, part = [], 1 / layers / 5
    for step in range(steps):
        found.append(Span("owner0/steps", f"step {step}", step, step + 1, kind="step"))
        for layer in range(layers):
            at = step + layer / layers
            for i, (track, kind) in enumerate((
                ("owner0/lane 0", "owner"), ("owner0/cipher", "owner"), ("owner0->worker0", "up"),
                ("worker0/gpu", "worker"), ("worker0->owner0", "down"),
            )):  # fmt: skip
                name = HOSTILE[layer % len(HOSTILE)]
                found.append(Span(track, name, at + i * part, at + (i + 1) * part, kind=kind))
    return found


def whole() -> Content:
    """Every part there is."""
    noise = random.Random(0)
    losses = [5 - i / 40 + noise.random() / 5 for i in range(60)]
    return Content(
        title=f"Private fine-tuning of {HOSTILE[0]}",
        steps=60,
        base_loss=5.0,
        private_loss=3.6,
        clear_loss=3.61,
        samples=[Sample(text, text * 20, text) for text in HOSTILE],
        curves=[
            Curve("private", losses, [(0, 5.0), (30, 4.1), (60, 3.6)]),
            Curve("clear", [v + 0.01 for v in losses], [(0, 5.0), (60, 3.61)]),
        ],
        parts=[Part("model", HOSTILE[1], 3.0), Part("cipher", "cipher", 2.0),
               Part("wire", "wire", 0.5), Part("worker", "worker", 4.5)],
        private_s=8.0,
        clear_s=9.0,
        spans=spans(3, 40),
        traffic=Traffic(4e8, 2e8, 10_000),
        parameters=preset("thin"),
        request=Request(os.urandom(1 << 16), 1 << 16, 256, HOSTILE[3]),
        checks=Checks(117, 0, 468, 0.016, 0.065, HOSTILE[4], 48, 1.004),
        environment={HOSTILE[0]: HOSTILE[1], "Python": "3"},
    )  # fmt: skip
