"""`--preview`: what would be trained on, without training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.nn.base import open_base
from scenarios import llama1b
from scenarios.texts import load_texts

TINY = Path(__file__).parents[2] / "scenarios" / "assets" / "tiny-llama"


def preview(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`python -m scenarios.llama1b --preview ...`, in this process."""
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["llama1b", "--preview", *arguments])
    llama1b.main()


def test_a_preview_shows_texts_and_tokens_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read and left out, then 200 tokens apart; signs of several tokens stay whole."""
    data, out = tmp_path / "texts", tmp_path / "texts" / "run"
    out.mkdir(parents=True)
    (out / "report.md").write_text("own")
    (data / "a.txt").write_text("def f(x):\n    return '日本'\x1b[0m\n" * 50)
    preview(
        monkeypatch, "--weights", str(TINY), "--data", str(data), "--out", str(out),
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "read 1 file, " in said
    assert "left out 1: 1 under --out" in said
    assert "the first 200 tokens" in said
    assert "日" in said
    assert "\ufffd" not in said.rsplit("|", 1)[0]
    assert "\x1b" not in said
    assert "\\n\n" in said
    assert [path.name for path in out.iterdir()] == ["report.md"]


def test_a_preview_of_nothing_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte a token without a model, and Python's own library without a text."""
    preview(monkeypatch)
    said = capsys.readouterr().out
    assert "one token a byte" in said
    assert "Python's own library" in said
    assert "the first 200 tokens" in said


def test_what_cannot_be_trained_on_is_refused_in_a_preview_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same line."""
    (tmp_path / "a.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"error: .*not UTF-8"):
        preview(monkeypatch, "--data", str(tmp_path))


def test_sequences_are_kept_in_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And unknown tokens are said; here there are none."""
    (tmp_path / "a.txt").write_text("The owner keeps the text.\n" * 50)
    args = llama1b.parse(
        ["--real-cpu", "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"),
         "--sequence", "32"]
    )  # fmt: skip
    data = load_texts(args, open_base(TINY), apart=True, held_out=0.0)
    assert data.train.shape[1] == 32
    assert data.held_out is None
    assert (tmp_path / "out" / "corpus" / "tokens.int32").exists()
    assert "warning" not in capsys.readouterr().out
