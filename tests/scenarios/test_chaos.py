"""Chaos: a few seeds keep every promise, a seed is a whole run, and the command tells of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from backends.he.openfhe.library import openfhe
from scenarios.chaos.__main__ import main
from scenarios.chaos.log import EventLog
from scenarios.chaos.options import draw_options
from scenarios.chaos.search import Bench, Result, _collect
from tests.scenarios import commands

ROOT = Path(__file__).resolve().parents[2]

# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One bench for the file: models are made once."""
    return Bench(tmp_path_factory.mktemp("bench"))


def clear_seeds(count: int) -> list[int]:
    """The first seeds that draw the small model in clear: a tenth of a second each."""
    fitting = (s for s in range(1000) if _quick(s))
    return [next(fitting) for _ in range(count)]


def _quick(seed: int) -> bool:
    options = draw_options(seed)
    return (options.cipher, options.kind) == ("clear", "plain")


def test_seeds_keep_every_promise(bench: Bench) -> None:
    """Faults are injected, and nothing is broken; training ends within the bound."""
    results = [bench.run(seed) for seed in clear_seeds(15)]
    assert [result.violation for result in results] == [""] * 15
    assert sum(sum(result.injected.values()) for result in results) > 200
    for result in results:
        stop_s = draw_options(result.seed).plan.stop_s
        assert 0 < result.trained_s <= stop_s + result.bound_s


@pytest.mark.slow
def test_encrypted_and_llama_seeds_keep_every_promise(bench: Bench) -> None:
    """Both models under real encryption."""
    wanted = {("mlwe", "plain"), ("mlwe", "llama"), ("clear", "llama"), ("thin", "llama")}
    for kind in sorted(wanted):
        seeds = [s for s in range(300) if (draw_options(s).cipher, draw_options(s).kind) == kind]
        assert bench.run(seeds[0]).violation == ""


def test_planted_wraps_are_repaired(bench: Bench) -> None:
    """As many as there must be, by the count of those that go beyond; with a liar and without."""
    seeds = [s for s in range(300) if _thin(s)]
    liars = [s for s in seeds if draw_options(s).plan.liars]
    for result in map(bench.run, [seeds[0], liars[0]]):
        assert result.violation == ""
        wraps = result.wraps
        assert 100 < wraps["wrapped"] <= wraps["repaired"] <= wraps["wrapped, or nearly"]


def _thin(seed: int) -> bool:
    options = draw_options(seed)
    return (options.cipher, options.kind, options.steps) == ("thin", "plain", 3)


def test_a_seed_is_a_run(bench: Bench) -> None:
    """The same seed twice gives the same events; another seed others."""
    seeds = clear_seeds(2)

    def history(seed: int) -> tuple[Result, str]:
        log = EventLog()
        return bench.run(seed, log), log.sha256()

    assert history(seeds[0]) == history(seeds[0])
    assert history(seeds[0])[1] != history(seeds[1])[1]


def test_options_are_drawn_from_the_seed_and_fit_a_line() -> None:
    """Every choice occurs."""
    many = [draw_options(seed) for seed in range(200)]
    assert many == [draw_options(seed) for seed in range(200)]
    for choice in ("kind", "cipher", "workers", "steps", "lanes", "checkpoint_every"):
        assert len({getattr(options, choice) for options in many}) >= 2
    assert all("\n" not in str(options) for options in many)
    assert "seed=3 " in str(many[3])


def test_a_broken_machine_is_a_violation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a machine raises is found, with the place."""

    def broken(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("protocol.worker.Worker._fault_of", broken)
    result = bench.run(clear_seeds(1)[0])
    assert "KeyError" in result.violation


def test_a_process_that_dies_does_not_leave_the_search_waiting() -> None:
    """Its results will never come; the error says what to do."""
    children = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=1)]
    with pytest.raises(RuntimeError, match="--processes 1"):
        list(_collect(children, queue.Queue(), 5, stop_at_first=False))


# --- the command ----------------------------------------------------------------------------------


def run(*args: str, hash_seed: str = "0", code: int = 0) -> str:
    """Output of `python -m scenarios.chaos ...`; checks the exit status."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "scenarios.chaos", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` shows the command and what to expect."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m scenarios.chaos --seeds 10000" in text
    assert "Expected" in text


@pytest.mark.slow
def test_the_trace_hash_does_not_depend_on_the_process() -> None:
    """Two processes, two hash seeds, one history."""
    seed = str(clear_seeds(1)[0])
    hashes = {run("--seed", seed, "--trace-hash", hash_seed=h).strip() for h in ("0", "1")}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


@pytest.mark.slow
def test_many_seeds_write_their_figures(tmp_path: Path) -> None:
    """The keys others read; seeds from --first on."""
    figures = tmp_path / "f.json"
    text = commands.run(
        "scenarios.chaos", "--seeds", "3", "--first", "40", "--processes", "1",
        "--json", str(figures),
    )  # fmt: skip
    assert "3 seeds" in text
    assert "0 violations" in text
    found = json.loads(figures.read_text())
    assert found["seeds"] == 3
    assert found["violations"] == 0
    assert found["violation_list"] == []
    assert found["elapsed_s"] > 0
    assert sum(found["faults_injected"].values()) > 0
    assert "origin" in found


def test_one_seed_tells_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--trace` prints the events and writes a timeline."""
    trace = tmp_path / "t.json"
    monkeypatch.setattr("scenarios.cli.private_process", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["--seed", str(clear_seeds(1)[0]), "--trace", str(trace)])
    finally:
        signal.signal(signal.SIGTERM, before)
    text = capsys.readouterr().out
    assert "drawn: seed=" in text
    assert "send Hello" in text
    assert "Deliver(call=1)" in text
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_scheme_that_cannot_be_had_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any seed runs; and a hash that no run would have twice is refused."""
    monkeypatch.setattr("scenarios.chaos.run.search", None)
    monkeypatch.setattr("scenarios.chaos.run.Bench", None)
    monkeypatch.setitem(sys.modules, "openfhe", None)
    openfhe.cache_clear()
    try:
        for more in ([], ["--seed", "1"]):
            with pytest.raises(SystemExit) as ended:
                main(["--scheme", "openfhe-bfv", *more])
            said = str(ended.value.code) + capsys.readouterr().err
            assert "OpenFHE does not load in this interpreter" in said
            assert "Traceback" not in said
    finally:
        openfhe.cache_clear()
    with pytest.raises(SystemExit):
        main(["--scheme", "openfhe-ckks", "--seed", "1", "--trace-hash"])
    assert "OpenFHE takes no seed" in capsys.readouterr().err
