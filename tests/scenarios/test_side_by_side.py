"""The benchmarks that set this project beside others: what they reckon, and that they are fair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.he.matmul.choice import VARIABLE
from backends.nn.base import open_base
from backends.nn.skeleton import build_skeleton
from benchmarks import everything
from benchmarks.peers import PEERS, ours, problem
from benchmarks.peers import __main__ as peers
from benchmarks.quality import Case, NoisyProducts
from benchmarks.training import ACTIVATIONS, RoundedProducts, headline, line
from docs.comparison_figures import MACHINES
from scenarios.options import TINY_LLAMA


def row(name: str, scheme: str, server_s: float, size: float) -> dict[str, Any]:
    """A row with what the summary reads."""
    return {
        "name": name, "scheme": scheme, "server_s_per_token": server_s,
        "up_bytes_per_token": size / 2, "down_bytes_per_token": size / 2,
    }  # fmt: skip


def test_ours_is_set_against_the_best_of_the_others_in_each_respect() -> None:
    """The fastest and the smallest need not be one; clear is no peer; the first kernel counts."""
    rows = [
        row("clear float32", "none", 2e-4, 1), row("clear bfloat16", "none", 1e-4, 1),
        row("ours", "module-LWE, thin", 2e-4, 10), row("ours", "module-LWE, thin", 9e-4, 10),
        row("ours", "module-LWE, exact", 1e-9, 1),
        row("fast", "A", 0.1, 100), row("small", "B", 5.0, 20),
    ]  # fmt: skip
    found = peers.summary(rows)
    assert found["server_times_less"] == pytest.approx(500)
    assert (found["fastest_peer"], found["smallest_peer"]) == ("fast A", "small B")
    assert found["bytes_ratio"] == pytest.approx(0.5)
    assert found["server_over_clear"] == pytest.approx(2)
    assert peers.summary(rows[:5]) == peers.summary(rows[5:]) == {}


@pytest.mark.parametrize("name", ["thin", "exact"])
def test_our_rows_are_of_real_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, on the kernel that every machine has: near the right result, and with every field."""
    monkeypatch.setattr(problem, "SIDE", 256)
    monkeypatch.setattr(ours, "SIDE", 256)
    monkeypatch.setattr(ours, "TOKENS", 8)
    monkeypatch.setenv(VARIABLE, "generic")
    found = ours._ours(name, "generic")
    assert 0 < found.relative_error < 0.05
    assert found.up_bytes_per_token > 256
    assert min(found.server_s_per_token, found.owner_s_per_token) > 0
    clear = list(ours._clear())
    assert [each.name for each in clear] == ["clear float32", "clear bfloat16"]
    assert clear[0].relative_error < 1e-5 < clear[1].relative_error


def test_what_integers_are_made_of_is_near_the_input() -> None:
    """8 bits per token: no value is off by more than half a step of its token."""
    x = problem.inputs(5)
    codes, scale = problem.rounded(x)
    assert np.abs(codes).max() == 127
    assert (np.abs(codes * scale - x) <= scale / 2 * (1 + 1e-9)).all()
    table = problem.weights()[:3]
    assert problem.relative_error(x.astype(float) @ table.T.astype(float), x, table) < 1e-12


def test_every_core_works_and_a_failure_is_told() -> None:
    """One fork for each."""
    assert problem.on_every_core(lambda core: None) > 0
    with pytest.raises(RuntimeError, match="a process of the measurement failed"):
        problem.on_every_core(lambda core: 1 // 0 if core == 0 else None)


def test_a_library_that_is_not_there_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And costs none of the others."""
    monkeypatch.setattr(peers, "home", lambda peer: Path(sys.executable))
    block = "import sys; sys.modules['tenseal'] = None; sys.argv = ['one', 'tenseal_packed'];"
    found = subprocess.run(
        [sys.executable, "-c", f"{block} from benchmarks.peers.one import main; main()"],
        capture_output=True, text=True, cwd=peers.ROOT,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.strip().startswith("not installed: ")
    assert "Traceback" not in found.stderr
    monkeypatch.setattr(peers, "PEERS", (*PEERS, "nobody"))
    with pytest.raises(RuntimeError, match="no peer 'nobody'"):
        list(peers.rows_of("nobody"))


def test_rounded_activations_are_rounded_and_nothing_else() -> None:
    """The products of inputs that are integers of 8 bits already stay what they are."""
    skeleton = build_skeleton(open_base(TINY_LLAMA))
    plain = NoisyProducts(skeleton, Case("plain"), 0)
    coarse = RoundedProducts(skeleton, Case(ACTIVATIONS), 0)
    inputs = plain._weights[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (3, inputs), generator=generator).float()
    whole[:, 0] = 127
    x = torch.randn(3, inputs, generator=generator)
    assert torch.allclose(coarse.linear(0, whole.numpy()), plain.linear(0, whole.numpy()))
    right = plain.linear(0, x.numpy())
    off = (coarse.linear(0, x.numpy()) - right).norm() / right.norm()
    assert 1e-3 < off < 0.05


def test_a_training_is_told_against_clear() -> None:
    """The gap, and the worst of the private runs."""
    runs = [
        {"name": "clear int8", "final_loss": 4.0, "gradient_norm_ratio": 1.0, "seconds": 1.0},
        {"name": "private a", "final_loss": 4.04, "gradient_norm_ratio": 0.99, "seconds": 2.0},
        {"name": "private b", "final_loss": 3.96, "gradient_norm_ratio": 1.01, "seconds": 2.0},
    ]
    assert "(+1.00% against clear int8)" in line(runs[1], runs[0])
    said = headline({"model": "m", "training": {"steps": 3}, "runs": runs})
    assert "within 1.00 % of clear, gradient norms 0.990 to 1.010" in said


def test_what_is_there_from_this_commit_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another commit it is; a line of history for each; one that fails is named."""
    taken: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        taken.append(command[2])
        if command[2] == "benchmarks.fidelity":
            return subprocess.CompletedProcess(command, 1)
        figures = {
            "goodput_mb_s": 900.0, "bytes_ratio": 0.3,
            "origin": {"date": "2026-01-01", "commit": "abc"},
        }  # fmt: skip
        Path(command[-1]).write_text(json.dumps(figures))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(everything, "cpu_flags", lambda: ["avx2"])
    monkeypatch.setattr(everything, "commit", lambda: "abc")
    names = ["transport", "peers", "fidelity"]
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--only", *names])
    with pytest.raises(SystemExit, match="failed: fidelity"):
        everything.main()
    assert len(taken) == 3
    with pytest.raises(SystemExit):
        everything.main()
    assert taken[3:] == ["benchmarks.fidelity"]
    assert "transport: is there, of abc" in capsys.readouterr().out
    monkeypatch.setattr(everything, "commit", lambda: "def")
    with pytest.raises(SystemExit):
        everything.main()
    assert len(taken) == 7
    history = (tmp_path / "avx2" / "history.jsonl").read_text().splitlines()
    assert len(history) == 4
    assert json.loads(history[0])["headline"] == {"MB/s of payload": 900.0}


def test_recorded_results_of_machines_have_their_history() -> None:
    """And the headlines are what the figures say."""
    for file in MACHINES.glob("*/history.jsonl"):
        told = [json.loads(line) for line in file.read_text().splitlines()]
        for name in {each["name"] for each in told}:
            last = [each for each in told if each["name"] == name][-1]
            figures = everything.known(file.parent / f"{name}.json")
            assert figures is not None
            assert everything.MEASUREMENTS[name].headline(figures) == last["headline"]
            assert figures["origin"]["commit"] == last["commit"]
