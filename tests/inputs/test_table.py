"""The page of docs/inputs.md, held to the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import generate_inputs


def test_the_page_is_what_the_tables_say() -> None:
    """Stale? Run `python -m docs.generate_inputs`."""
    assert generate_inputs.main(["--check"]) == 0


def test_a_stale_page_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written then."""
    page = tmp_path / "inputs.md"
    page.write_text(generate_inputs.PAGE.read_text().replace("| refused: ", "| works: ", 1))
    before = page.read_bytes()
    monkeypatch.setattr(generate_inputs, "PAGE", page)
    assert generate_inputs.main(["--check"]) == 1
    assert "run python -m docs.generate_inputs" in capsys.readouterr().err
    assert page.read_bytes() == before


def test_rows_fit_a_table() -> None:
    """A cell has no line break and no bar; what is brought is there once, and names a test."""
    rows = [row for part in generate_inputs.PARTS for row in part.rows()]
    assert all(text and not set("|\n") & set(text) for r in rows for text in (r.brings, r.sees))
    assert len({row.brings for row in rows}) == len(rows)
