"""A process with private data is closed to the rest of its machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scenarios.commands import ROOT
from tests.test_house import imports, modules

ASK = """
import ctypes, os, resource, sys
from pathlib import Path
from scenarios.cli import clean_exit

def told():
    mask = os.umask(0)
    os.umask(mask)
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
    return f"{resource.getrlimit(resource.RLIMIT_CORE)} {mask:03o} {dumpable}"

with clean_exit():
    print(told())
    Path(sys.argv[1], "a").mkdir()
    Path(sys.argv[1], "a", "file").write_text("x")
print(told())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_scenario_leaves_no_core_and_no_file_to_others(tmp_path: Path) -> None:
    """From its start to its end, whatever its parent allows."""
    result = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, umask=0o000,
    )  # fmt: skip
    assert result.stdout.splitlines() == ["(0, 0) 077 0"] * 2, result.stderr
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/file")] == [0o700, 0o600]


EARLY = """
import builtins, ctypes, os, runpy, sys
real, first = builtins.__import__, []

def watched(name, *arguments, **more):
    if name.partition(".")[0] in ("numpy", "torch", "backends") and not first:
        mask = os.umask(0)
        os.umask(mask)
        first.append(f"{name} {mask:03o} {ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)}")
    return real(name, *arguments, **more)

builtins.__import__ = watched
sys.argv = [sys.argv[1], "--help"]
try:
    # As `python -m` does: the package is imported while the first argument is "-m".
    name, sys.argv[0] = sys.argv[0], "-m"
    import scenarios
    sys.argv[0] = name
    runpy.run_module(name, run_name="__main__")
except SystemExit:
    pass
print(first[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("scenario", ["scenarios.quickstart", "scenarios.llama1b"])
def test_nothing_is_imported_before_the_process_is_private(scenario: str) -> None:
    """Imports take seconds: long enough to attach to what will hold the data."""
    result = subprocess.run(
        [sys.executable, "-c", EARLY, scenario], cwd=ROOT, capture_output=True, text=True,
        timeout=120, umask=0o000,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "backends 077 0", result.stderr


def test_python_says_when_it_looks_for_a_module(tmp_path: Path) -> None:
    """What the test before imitates: the package sees "-m", the module its own path."""
    (tmp_path / "looked").mkdir()
    (tmp_path / "looked" / "__init__.py").write_text("import sys; print(sys.argv[0])\n")
    (tmp_path / "looked" / "at.py").write_text("import sys; print(sys.argv[0])\n")
    command = [sys.executable, "-m", "looked.at"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[0] == "-m"
    assert result.stdout.splitlines()[1].endswith("at.py")


def test_every_command_with_a_private_session_goes_through_there() -> None:
    """Whatever runs a real owner calls `clean_exit` in its main."""
    found = []
    for name, path in modules().items():
        text = path.read_text()
        beside = [path, *path.parent.glob("*.py")] if path.name == "__main__.py" else [path]
        private = any("scenarios.session.private_session" in imports(each) for each in beside)
        if private and '"__main__"' in text:
            mains = [
                node for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef) and node.name == "main"
            ]  # fmt: skip
            called = {
                part.func.id
                for main in mains
                for part in ast.walk(main)
                if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
            }
            assert "clean_exit" in called, name
            # All that main does but reading its options is inside.
            outside = {
                part.func.id
                for statement in mains[0].body
                if not isinstance(statement, ast.With)
                for part in ast.walk(statement)
                if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
            }
            assert not outside & {"Quickstart", "Run", "run", "clear_peer"}, name
            found.append(name)
    assert {
        "scenarios.quickstart.__main__",
        "scenarios.llama1b.__main__",
        "scenarios.finetune.__main__",
    } <= set(found)
