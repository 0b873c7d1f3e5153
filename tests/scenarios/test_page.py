"""A run's page: it loads nothing, keeps text text, does without any part, and says what is so."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import socket
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from backends.he.params import preset
from protocol.events import FrameArrived, LinearWanted, Send
from protocol.messages import Multiply, Product, encode
from scenarios.page import Content, Curve, Watch, content_of, environment, page
from scenarios.page.spans import MOST_SPANS, timeline
from scenarios.page.uniform import uniformity
from scenarios.page.words import beside_clear, headline
from tests.scenarios.pages import HOSTILE, spans, whole

_VOID = {"meta", "img", "br", "hr", "input", "link"}
_SESSION = bytes(16)


class Outline(HTMLParser):
    """Elements with their attributes, and the text of each kind; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture(scope="module")
def outline() -> Outline:
    return Outline(page(whole()))


def test_the_page_loads_nothing(outline: Outline) -> None:
    """No address, no inline handler or style; the policy allows its own style and script alone."""
    for tag, attributes in outline.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "style", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#")[0] == "#"
    (style,), scripts = outline.texts["style"], outline.texts["script"]
    assert not re.search(r"url\(|@import|expression", style)
    assert not re.search(r"fetch|XMLHttp|import\(|eval|innerHTML|document\.write", scripts[1])
    policy = next(a["content"] for _, a in outline.elements if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for text in (style, scripts[1]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_labels_point_at_what_is_there(outline: Outline) -> None:
    """Ids are unique, and every section has a heading of its own."""
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a.get("aria-labelledby") for t, a in outline.elements if t == "section"} <= set(ids)


def test_text_of_a_model_stays_text(outline: Outline) -> None:
    """Whatever it holds, it is shown, and is no element and no template."""
    assert [tag for tag, _ in outline.elements].count("script") == 2
    shown = "".join(outline.texts["pre"])
    for text in HOSTILE[:5]:
        assert text in shown
    assert "\u2400\u241b[31m \ufffd \ufffddcba" in shown
    names = json.loads(outline.texts["script"][0])["timeline"]["names"]
    assert set(names) == set(HOSTILE)


def test_a_title_hides_nothing() -> None:
    """It names a file, whose name may turn what stands around it, or hold a terminal's signs."""
    text = page(Content("on \u202etxt.exe\x1b[31m\u200b"))
    assert text.count("on \ufffdtxt.exe\u241b[31m\ufffd") == 2
    assert not set("\u202e\x1b\u200b") & set(text)


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("samples", "Base and tuned"), ("curves", "Loss"), ("spans", "Owner, wire and worker"),
        ("request", "What the worker saw"), ("parameters", "Parameters"), ("checks", "Checks"),
        ("environment", "Environment"), ("base_loss", ""), ("private_loss", ""), ("clear_loss", ""),
        ("clear_s", ""), ("private_s", ""), ("parts", ""), ("traffic", ""),
    ],
)  # fmt: skip
def test_a_page_does_without_any_part(name: str, heading: str) -> None:
    """What is missing has no heading; the others stay."""
    left = Outline(page(replace(whole(), **{name: getattr(Content(""), name)}))).texts["h2"]
    assert len(left) == len([text for text in HEADINGS if not (heading and heading in text)])
    assert not [text for text in left if heading and text.startswith(heading)]


HEADINGS = (
    "Base and tuned, side by side", "Loss", "Time and traffic", "Owner, wire and worker",
    "What the worker saw", "Parameters and what they promise", "Checks", "Environment",
)  # fmt: skip


def test_a_page_of_a_title_alone() -> None:
    """It says how long was trained, and has no part."""
    found = Outline(page(Content("A run", steps=3)))
    assert found.texts["h1"] == ["Trained privately for 3 steps"]
    assert "h2" not in found.texts


@pytest.mark.parametrize(
    ("base", "private", "said"),
    [
        (5.0, 4.0, "fell by 20.0\xa0%, from 5.000 to 4.000"),
        (4.0, 5.0, "rose by 25.0\xa0%, from 4.000 to 5.000"),
        (4.0, 4.0, "stayed at 4.000"),
        (None, 4.0, "is 4.000"),
    ],
)
def test_the_title_says_how_it_went(base: float | None, private: float, said: str) -> None:
    """Worse is said as plainly as better."""
    content = Content("", base_loss=base, private_loss=private, clear_loss=private * 1.01)
    assert said in headline(content)
    assert "differ by 0.99\xa0%" in beside_clear(content)


def test_losses_that_are_no_numbers_are_left_out() -> None:
    """A curve goes on behind them, and JSON has no NaN."""
    losses = [4.0, math.nan, math.inf, 3.0]
    text = page(Content("", curves=[Curve("private", losses, [(0, math.nan), (4, 3.5)])]))
    (curve,) = json.loads(Outline(text).texts["script"][0])["curves"]
    assert [step for step, *_ in curve["training"]] == [1, 4]
    assert curve["held"] == [[4, 3.5]]


def test_chi_square_is_the_textbooks() -> None:
    """Even bytes, one value only, and the critical value of 255 degrees of freedom at 5 %."""
    even = np.repeat(np.arange(256, dtype=np.uint8), 1024)
    assert uniformity(even.tobytes()).p_value == 1.0
    assert uniformity(bytes(1 << 14)).p_value == 0.0
    off = np.array([34] * 96 + [35] * 32)
    counts = 1024 + np.concatenate([off, -off])
    found = uniformity(np.repeat(np.arange(256, dtype=np.uint8), counts).tobytes())
    assert found.chi_square == pytest.approx(293.25, abs=0.1)
    assert found.p_value == pytest.approx(0.05, abs=1e-3)
    assert found.counts == counts.tolist()


def test_the_timeline_is_bounded_and_skips_the_first_step() -> None:
    """Two whole steps; of a step with too many spans only its beginning, and that is said."""
    found = timeline(spans(4, 40))
    assert found is not None
    assert (found.steps, found.first, found.spans) == (2, 2, 2 * 40 * 5)
    long = timeline(spans(2, 1500))
    assert long is not None
    assert (long.steps, len(long.data["bars"])) == (0, MOST_SPANS)
    assert long.seconds < 0.7
    assert "The first 5,000 spans of a step" in page(Content("", spans=spans(2, 1500)))
    assert timeline([]) is None


def asked(request: int, payload: bytes) -> Send:
    return Send("10.1.2.3:7443", encode(Multiply(_SESSION, request, 0, 4, payload)))


def test_a_watch_keeps_one_request_and_few_steps() -> None:
    """The first large one of training, as it was sent; later steps are not collected."""
    watch = Watch(["layer"], most_steps=1)
    hooks = watch.hooks("owner")
    wanted = LinearWanted(1, 0, 4, None)
    hooks.observe(wanted, [asked(1, b"w" * 8192)])  # before training: it may be anything
    watch.start()
    hooks.observe(wanted, [asked(2, b"s" * 100)])
    hooks.observe(wanted, [asked(3, b"x" * 8192), asked(4, b"y" * 8192)])
    assert watch.request is not None
    assert watch.request.payload == b"x" * 8192
    assert (watch.request.tokens, watch.request.matrix) == (4, "layer forward")
    hooks.observe(FrameArrived("10.1.2.3:7443", encode(Product(_SESSION, 3, b"z"))), [])
    watch.step_ended(1e-6)
    assert not watch.recording
    kept = [span.track for span in watch.spans()]
    hooks.observe(FrameArrived("10.1.2.3:7443", encode(Product(_SESSION, 4, b"z"))), [])
    watch.step_ended(1e-6)
    assert [span.track for span in watch.spans()] == kept


def test_a_worker_elsewhere_is_seen_by_its_answers_and_not_named() -> None:
    """Request to answer is one span; the page numbers workers and has no address of them."""
    watch = Watch(["layer"])
    hooks = watch.hooks("owner")
    watch.start()
    begun = time.perf_counter()
    hooks.observe(LinearWanted(1, 0, 4, None), [asked(1, b"x" * 8192)])
    hooks.observe(FrameArrived("10.1.2.3:7443", encode(Product(_SESSION, 1, b"z"))), [])
    watch.step_ended(time.perf_counter() - begun)
    text = page(content_of("", {"kernel": "k"}, preset("thin"), watch))
    (row,) = json.loads(Outline(text).texts["script"][0])["timeline"]["rows"]
    assert row == {"kind": "away", "label": "wire and worker"}
    assert "10.1.2.3" not in text


def test_figures_that_are_missing_are_left_out() -> None:
    """Those of the quickstart that a run of another kind does not have."""
    figures = {"losses": [3.0, 2.0], "private_loss": 2.5, "held_out": [(0, 3.1), (2, 2.5)]}
    content = content_of("", figures, preset("exact"))
    assert [(c.name, len(c.held_out)) for c in content.curves] == [("private", 2)]
    assert content.traffic is None
    assert "Time and traffic" not in Outline(page(content)).texts["h2"]


def test_a_resumed_run_says_what_its_counts_are_of() -> None:
    """Some steps, or none, are of an earlier process."""
    figures = {"losses": [3.0] * 90, "steps_this_run": 40, "answers_checked": 0}
    text = page(content_of("", figures, preset("thin")))
    assert "counts are of its last 40 steps of 90" in text
    assert "answers in training" not in text
    assert "was interrupted" not in page(replace(whole(), steps_here=60))


def test_the_environment_names_nobody() -> None:
    """No host, no user, no path."""
    found = " ".join(environment("avx2").values())
    assert socket.gethostname() not in found
    assert "/" not in found
    assert str(Path.home()) not in found
