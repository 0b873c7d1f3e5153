"""Options of another mode are refused, and no option is of no mode."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import pytest

from backends.options import Modes, Number, Parser, Whole
from benchmarks.inputs.entries import ENTRIES, Entry
from benchmarks.inputs.values import FOREIGN

ROOT = Path(__file__).resolve().parents[2]
UNTYPED = (int, float, complex, bool)
"""Types that take NaN, a negative seed and digits of any script."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """Of every command."""
    return {entry.name: entry.parser() for entry in ENTRIES}


def commands() -> set[str]:
    """Every module of the project that parses a command line when it is run."""
    found = set()
    for room in ("scenarios", "benchmarks", "sim"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            if '__name__ == "__main__"' not in text:
                continue
            names = {getattr(n.func, "id", getattr(n.func, "attr", "")) for n in ast.walk(
                ast.parse(text)) if isinstance(n, ast.Call)}  # fmt: skip
            if names & {"Parser", "ArgumentParser"}:
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_every_command_is_among_those_that_are_tried() -> None:
    """A new one is not forgotten, here nor by the fuzzer."""
    tried = {entry.module for entry in ENTRIES} | {"scenarios.crashes.__main__"}
    assert commands() == tried


def test_every_option_has_its_mode(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """In the table of its command, and the table names no other."""
    with_modes = 0
    for name, parser in parsers.items():
        modes: Modes | None = getattr(parser, "modes", None)
        if modes is None:
            continue
        with_modes += 1
        options = {text for action in parser._actions for text in action.option_strings}
        assert options - {"-h", "--help"} == set(modes.of), name
        assert {mode for of in modes.of.values() for mode in of} <= set(modes.named), name
    assert with_modes >= len(FOREIGN)


def test_every_number_is_checked(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """By a type that knows what can be; defaults are among it."""
    numbers = 0
    for name, parser in parsers.items():
        for action in parser._actions:
            where = f"{name} {action.option_strings}"
            assert action.type not in UNTYPED, where
            if isinstance(action.type, Whole | Number):
                numbers += 1
                given = (
                    action.default if isinstance(action.default, list | tuple) else [action.default]
                )
                for value in given:
                    if value not in (None, argparse.SUPPRESS):
                        assert action.type.least <= value <= action.type.most, where
    assert numbers > 40


def entry(name: str) -> Entry:
    """The command of that name."""
    return next(entry for entry in ENTRIES if entry.name == name)


VALUES = {
    "--weights": "nowhere", "--gpu": "l4", "--network": "home", "--model": "gpt2",
    "--kernel": "generic",
    "--preset": "exact", "--worker": "localhost:1", "--tls": "nowhere", "--owner-tag": "mine",
    "--learning-rate": "1e-3", "--bandwidth": "1Gb/s", "--rtt": "1ms", "--loss": "0",
    "--jitter": "1ms",
    "--held-out": "0.1", "--owner-device": "h100", "--only": "x", "--steps": "9", "--minutes": "1",
}  # fmt: skip
NEEDED = {"scenarios.worker": ["--model=m"], "scenarios.crashes.owner": ["--model=m"]}
CASES = [
    (name, needed, option)
    for name, rules in FOREIGN.items()
    for needed, _, options in rules
    for option in options
]


@pytest.mark.parametrize(("name", "needed", "option"), CASES)
def test_an_option_of_another_mode_is_refused(
    name: str, needed: tuple[str, ...], option: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    parsers: dict[str, argparse.ArgumentParser],
) -> None:  # fmt: skip
    """By its name, with what it is for, and before anything is done."""
    monkeypatch.chdir(tmp_path)
    parser = parsers[name]
    (action,) = (a for a in parser._actions if option in a.option_strings)
    words = [
        *NEEDED.get(name, []),
        *(f"{n}=x" if n in ("--weights", "--check") else n for n in needed),
    ]
    words.append(option if action.nargs == 0 else f"{option}={VALUES.get(option, '8')}")
    assert isinstance(parser, Parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse(words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {option} is for " in said or f"{option}: not allowed with" in said


def test_an_option_at_its_default_is_out_of_place_too(
    parsers: dict[str, argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever types it expects something of it."""
    parser = parsers["scenarios.llama1b"]
    assert isinstance(parser, Parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse(["--real-cpu", "--network=default"])
    assert "--network is for a simulated run" in capsys.readouterr().err
    for words in (
        ["--real-cpu", "--seed=3"],
        ["--gpu=l4", "--seed=3"],
        ["--real-gpu", "--host-frames"],
    ):
        assert parser.parse(words).seed in (0, 3)


def test_options_are_written_out(
    parsers: dict[str, argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is short for one option today may be short for another tomorrow."""
    monkeypatch.setattr(sys, "argv", ["quickstart", "--learn", "1"])
    parser = parsers["scenarios.quickstart"]
    assert isinstance(parser, Parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse()
