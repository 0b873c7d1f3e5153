"""Scenarios and benchmarks as a user runs them, in their own process and small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from docs.generate_commands import begun, commands
from scenarios.llama1b import __main__ as llama1b
from tests.scenarios.commands import ROOT, interrupt, readable_by_others, run

TINY = ROOT / "scenarios" / "assets" / "tiny-llama"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared models for the file."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("command", commands())
def test_help_teaches(command: str) -> None:
    """`--help` shows the command and what to expect."""
    text = begun(command.split())[0].format_help()
    assert f"python -m {command}" in text
    assert len(text.splitlines()) > 10


def said_by(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:  # fmt: skip
    """What llama1b says in this process, and that it ends so."""
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["llama1b", *arguments])
    with pytest.raises(SystemExit) as ended:
        llama1b.main()
    written = capsys.readouterr()
    told = isinstance(ended.value.code, str)  # Python prints it, and its status is 1
    assert code == (1 if told else ended.value.code)
    return written.out + written.err + (str(ended.value.code) if told else "")


@pytest.mark.slow
def test_prepare_makes_finds_verifies_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified when it was made, and on request; a tag makes another; damage ends the run."""
    # Whatever ran before in this process may have verified the same model.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    figures = tmp_path / "f.json"
    command = [
        "scenarios.prepare", "--weights", str(TINY), "--cache", str(tmp_path / "cache"),
        "--json", str(figures),
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    for more, said in (
        ([], "preparing the public set-up"),
        (["--verify"], "verifying weights, plans and hints"),
        (["--owner-tag", "mine"], "preparing the public set-up"),
    ):
        assert said in run(*command, *more)
        found.append(json.loads(figures.read_text()))
    shared, verified, tagged = found
    assert all(f["verify_s"] for f in found)
    assert shared["setup_digest"] == verified["setup_digest"] != tagged["setup_digest"]
    assert shared["model_digest"] == tagged["model_digest"]
    assert shared["directory"] == verified["directory"] != tagged["directory"]
    assert shared["hint_bytes"] > 20 * shared["weight_bytes"] > 0
    assert shared["prepare_s"] > 0
    hint = Path(shared["directory"]) / "owner" / "g0003.forward.npy"
    hint.write_bytes(hint.read_bytes()[:-1])
    text = run(*command, code=1)
    assert "error: " in text
    assert "g0003.forward.npy is damaged" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_quickstart_reports_and_agrees_with_clear(tmp_path: Path, cache: Path) -> None:
    """Few steps: every figure of the report is there, and the files are."""
    out, figures = tmp_path / "out", tmp_path / "f.json"
    text = run(
        "scenarios.quickstart", "--steps", "6", "--held-out", "4", "--out", str(out),
        "--cache", str(cache), "--json", str(figures), "--trace", str(out / "trace.json"),
    )  # fmt: skip
    assert "Private fine-tuning report" in text
    assert not readable_by_others(out)
    assert not figures.stat().st_mode & 0o077
    found: dict[str, Any] = json.loads(figures.read_text())
    for key in (
        "base_loss", "clear_loss", "private_loss", "steps", "tokens", "private_s", "clear_s",
        "bytes_per_token_up", "bytes_per_token_down", "adapter_dir", "plot", "origin",
    ):  # fmt: skip
        assert key in found
    assert found["private_loss"] == pytest.approx(found["clear_loss"], rel=5e-3)
    assert found["private_loss"] < found["base_loss"]
    assert Path(found["plot"]).read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert f"of {found['answers_checked']:,} products checked" in page
    assert found["answers_checked"] > 6 * 30
    assert "Steps 2 to 3 of this session" in page
    assert "Its first 512 bytes" in page
    assert str(out) not in page
    adapter = Path(found["adapter_dir"]) / "adapter_model.safetensors"
    with safe_open(adapter, framework="pt") as file:
        assert len(file.keys()) == 2 * 7 * 5


@pytest.mark.slow
def test_llama1b_on_a_small_checkpoint_resumes_after_ctrl_c(tmp_path: Path, cache: Path) -> None:
    """Real loading code, interrupted in the middle and gone on."""
    data = tmp_path / "private.txt"
    data.write_text("The owner keeps the text; the worker sees ciphertexts.\n" * 200)
    command = [
        "scenarios.llama1b", "--real-cpu", "--weights", str(TINY), "--data", str(data),
        "--tokens", "64", "--sequence", "64", "--lanes", "2", "--rank", "4",
        "--out", str(tmp_path / "out"), "--cache", str(cache), "--steps",
    ]  # fmt: skip
    text = interrupt(*command, "400", seen="loss=")
    assert "the same command goes on" in text
    saved = list((tmp_path / "out" / "checkpoints").glob("step-*"))
    # The one it goes on from, and one from before the worker's first answer to go back to.
    assert len(saved) == 2
    assert "step-000000" in {path.name for path in saved}
    assert not readable_by_others(tmp_path / "out")
    text = run(*command, "1")
    assert "nothing is left to train" in text
    text = run(*command, "3", "--fresh", "--json", str(tmp_path / "f.json"))
    found = json.loads((tmp_path / "f.json").read_text())
    assert len(found["losses"]) == 3
    assert "peak memory" in text


@pytest.mark.slow
def test_llama1b_compares_with_clear(tmp_path: Path, cache: Path) -> None:
    """Both sides in one run, and their losses agree."""
    figures = tmp_path / "f.json"
    run(
        "scenarios.llama1b", "--real-cpu", "--weights", str(TINY), "--tokens", "64",
        "--sequence", "64", "--steps", "2", "--compare-clear", "--out", str(tmp_path / "out"),
        "--cache", str(cache), "--json", str(figures), "--learning-rate", "1e-2",
    )  # fmt: skip
    found = json.loads(figures.read_text())
    for key in (
        "weights", "prepare_s", "private_step_s", "clear_step_s", "owner_s", "worker_s",
        "bytes_per_token_up", "bytes_per_token_down", "peak_rss_mb", "losses", "clear_losses",
    ):  # fmt: skip
        assert key in found
    assert found["losses"] == pytest.approx(found["clear_losses"], rel=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real-gpu", "--real-cpu"], "not both"),
        (["--real-cpu", "--steps", "0"], "--steps: '0' is no whole number from 1"),
    ],
)
def test_llama1b_says_what_it_cannot_do(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In one line, with what to do instead."""
    assert message in said_by(arguments, 2, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_llama1b_says_why_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with what to install or to look at."""
    assert "CUDA" in said_by(["--real-gpu", "--out", str(tmp_path)], 1, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nobody/nothing"], "neither a directory here nor a model"),
        (["--weights", str(TINY), "--data", "nowhere.txt"], "no such file or directory"),
        (["--weights", str(TINY), "--tokens", "100"], "must be a multiple of --sequence"),
    ],
)
def test_llama1b_explains_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--real-cpu", "--out", str(tmp_path), *arguments]
    assert message in said_by(words, 1, monkeypatch, capsys)
