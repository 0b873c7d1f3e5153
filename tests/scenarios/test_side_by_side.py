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
from docs import comparison_figures
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


class Bench:
    """`benchmarks.everything` over made-up measurements, on a made-up machine and commit.

    found   what each writes: figures, and how it ends
    taken   what was run, in order
    """

    HERE = {"processor": "one", "cores": 2}  # noqa: RUF012
    NAMES = ("transport", "peers", "fidelity")

    def __init__(self, patch: pytest.MonkeyPatch, place: Path) -> None:
        self.found: dict[str, tuple[dict[str, Any] | None, int]] = {
            "transport": ({"goodput_mb_s": 450.0, "plain_goodput_mb_s": 900.0}, 0),
            "peers": ({"bytes_ratio": 0.3}, 0),
            "fidelity": ({"median_error": 0.1, "worst_error": 0.2}, 0),
        }  # fmt: skip
        self.taken: list[str] = []
        self.place, self._patch = place, patch
        patch.setattr(everything.subprocess, "run", self._run)
        patch.setattr(everything, "cpu_flags", lambda: ["avx2"])
        self.move("abc")

    def move(self, commit: str, cores: int = 2, measured: str | None = None) -> None:
        """To another commit, or machine; `measured` is what measurements find to be checked out."""
        self._measured, self._machine = measured or commit, self.HERE | {"cores": cores}
        self._patch.setattr(everything, "commit", lambda: commit)
        self._patch.setattr(everything, "processor", lambda: "one")
        self._patch.setattr(everything, "core_count", lambda: cores)

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        name = command[2].partition(".")[2]
        self.taken.append(name)
        figures, status = self.found[name]
        machine = self._machine | {"torch": "1", "memory_gb": len(self.taken)}
        origin = {"date": "2026-01-01", "commit": self._measured, "machine": machine}
        if figures is not None:
            Path(command[-1]).write_text(json.dumps(figures | {"origin": origin}))
        return subprocess.CompletedProcess(command, status)

    def go(self, *more: str) -> str:
        """Run it; the names of what was taken, then of what failed."""
        before = len(self.taken)
        arguments = ["x", "--out", str(self.place), "--only", *self.NAMES, *more]
        self._patch.setattr(sys, "argv", arguments)
        failed = ""
        try:
            everything.main()
        except SystemExit as end:
            failed = str(end).removeprefix("error: failed: ").partition(";")[0]
        return f"{' '.join(self.taken[before:])} / {failed}"

    def history(self) -> list[dict[str, Any]]:
        return everything.told_before(self.place / "avx2" / "history.jsonl")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


ALL = "transport peers fidelity / "
NONE = " / "


def test_what_is_there_from_this_commit_is_not_measured_again(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another commit or machine it is, and of changed files; a line of history for each."""
    assert bench.go() == ALL
    assert bench.go() == NONE
    assert "transport: is there, of abc" in capsys.readouterr().out
    assert bench.go("--fresh") == ALL
    bench.move("def")
    assert bench.go() == ALL
    bench.move("def", cores=4)
    assert bench.go() == ALL
    assert bench.go() == NONE
    told = bench.history()
    assert len(told) == 12
    assert told[0] == {
        "name": "transport", "date": "2026-01-01", "commit": "abc", "machine": Bench.HERE,
        "headline": {"payload a second over plain text's": 0.5},
    }  # fmt: skip
    for nameless in ("def-dirty", "unknown"):
        bench.move(nameless)
        assert bench.go() == bench.go() == ALL


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({"median_error": 0.1, "worst_error": 0.2}, 1), (None, 0), ({}, 0),
        ({"median_error": 0.1}, 0), ({"median_error": None, "worst_error": 0.2}, 0),
        ({"median_error": float("nan"), "worst_error": 0.2}, 0),
    ],
)  # fmt: skip
def test_what_failed_is_measured_again_and_nothing_else(
    bench: Bench, figures: dict[str, Any] | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it left: figures of a part of it, none, or some that say nothing. What was there
    before stays."""
    assert bench.go() == ALL
    before = (bench.place / "avx2" / "fidelity.json").read_text()
    bench.move("def")
    right = bench.found["fidelity"]
    bench.found["fidelity"] = (figures, status)
    assert bench.go() == ALL + "fidelity"
    assert bench.go() == "fidelity / fidelity"
    assert "fidelity: " in capsys.readouterr().out
    assert (bench.place / "avx2" / "fidelity.json").read_text() == before
    bench.found["fidelity"] = right
    assert bench.go() == "fidelity / "
    assert len(bench.history()) == 6


def test_nobody_measured_is_no_measurement(bench: Bench) -> None:
    """Where no other library is installed, there is nothing to be set against."""
    bench.found["peers"] = ({"rows": [], "left_out": {"desilo": "not installed"}}, 0)
    assert bench.go() == ALL + "peers"


def test_a_checkout_that_moves_meanwhile_is_told(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is measured then is of no one commit."""
    bench.move("abc", measured="def")
    assert bench.go() == ALL + "transport, peers, fidelity"
    assert "the checkout went from abc to def meanwhile" in capsys.readouterr().out
    assert not bench.history()


def test_what_a_kill_has_cut_off_is_measured_again(bench: Bench) -> None:
    """Between its figures and its line of history, or in the middle of that."""
    bench.go()
    file = bench.place / "avx2" / "history.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    assert bench.go() == "fidelity / "
    file.write_text("".join(lines[:2]) + lines[2][:40])
    assert bench.go() == "fidelity / "
    assert bench.go() == NONE
    assert [each["name"] for each in bench.history()] == list(Bench.NAMES)


def test_a_page_sets_each_machine_against_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of more cores has another table, and is no earlier figure of this one."""
    for commit, cores, speed in (("abc", 2, 0.5), ("abc", 4, 0.75), ("def", 2, 0.625)):
        bench.move(commit, cores)
        bench.found["transport"] = ({"goodput_mb_s": speed, "plain_goodput_mb_s": 1.0}, 0)
        bench.go()
    monkeypatch.setattr(comparison_figures, "MACHINES", bench.place)
    two, four = comparison_figures.machines().split("4 cores of one")
    assert "2 cores of one" in two
    assert "| 0.625 | `def`, 2026-01-01 | 0.5 (`abc`, 2026-01-01) |" in two
    assert "| 0.75 | `abc`, 2026-01-01 | none |" in four


def test_a_library_that_says_a_lot_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More than a pipe holds; the reason of one that fails is its last line."""
    file = tmp_path / "python"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nprint('warning\\n' * 40000, file=sys.stderr)\n"
        "print('{\"name\": \"one\"}', flush=True)\nsys.exit('no memory left')\n"
    )
    file.chmod(0o755)
    monkeypatch.setattr(peers, "home", lambda peer: file)
    rows = peers.rows_of("desilo")
    assert next(rows) == {"name": "one"}
    with pytest.raises(RuntimeError, match=r"^no memory left$"):
        next(rows)


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
            assert everything.told_machine(figures["origin"]["machine"]) == last["machine"]
