"""The options of differential privacy, and what a report says of it."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from backends.he.params import preset
from backends.nn.dp import DifferentialPrivacy, DpError
from backends.options import Parser
from scenarios.dp import dp_line, dp_of
from scenarios.options import add_dp_options
from scenarios.page import content_of, page


def parsed(*words: str, cipher: str = "exact") -> argparse.Namespace:
    parser = Parser(None, "scenarios.none")
    add_dp_options(parser)
    parser.set_defaults(preset=cipher)
    return parser.parse(words)


def test_options_are_a_budget() -> None:
    """None without an epsilon; defaults where nothing else is said."""
    pytest.importorskip("dp_accounting")
    assert dp_of(parsed(cipher="thin")) is None
    assert dp_of(parsed("--dp-epsilon", "8")) == DifferentialPrivacy(8.0)
    words = ("--dp-epsilon", "2", "--dp-delta", "1e-6", "--dp-clip", "0.3")
    assert dp_of(parsed(*words)) == DifferentialPrivacy(2.0, 1e-6, 0.3)
    least = parsed("--dp-epsilon", "2", "--dp-delta", "1e-10")
    assert dp_of(least) == DifferentialPrivacy(2.0, 1e-10)


def test_options_that_promise_nothing_are_refused() -> None:
    """Without an epsilon, and where one sequence has a part in another's gradient."""
    with pytest.raises(DpError, match="do nothing without --dp-epsilon"):
        dp_of(parsed("--dp-clip", "1"))
    for cipher in ("thin", "thin-6bit"):
        with pytest.raises(DpError, match=f"does not go with --preset {cipher},.*--preset exact"):
            dp_of(parsed("--dp-epsilon", "8", cipher=cipher))


@pytest.mark.parametrize("words", [("--dp-epsilon", "0"), ("--dp-epsilon", "inf"),
                                   ("--dp-delta", "0.5"), ("--dp-delta", "1e-12"),
                                   ("--dp-delta", "0"), ("--dp-clip", "nan")])  # fmt: skip
def test_numbers_that_are_no_budget_are_refused(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert "is no number from" in capsys.readouterr().err


def test_a_page_says_what_was_spent() -> None:
    """Epsilon, delta, and of what; nothing of it without."""
    figures: dict[str, Any] = {"losses": [3.0, 2.5], "dp_epsilon": 7.98712, "dp_delta": 1.23e-5}
    text = page(content_of("A run", figures, preset("exact")))
    assert "epsilon 7.99" in text
    assert "delta 1.2e-05, per sequence, of the adapter alone" in text
    assert dp_line(figures).endswith(
        "epsilon 7.99, delta 1.2e-05, per sequence, of the adapter alone"
    )
    del figures["dp_epsilon"]
    assert "differential privacy" not in page(content_of("A run", figures, preset("exact")))
