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


def test_every_command_with_a_private_session_goes_through_there() -> None:
    """Whatever runs a real owner calls `clean_exit` in its main."""
    found = []
    for name, path in modules().items():
        text = path.read_text()
        if "scenarios.session.private_session" in imports(path) and '"__main__"' in text:
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
            found.append(name)
    assert {"scenarios.quickstart", "scenarios.llama1b"} <= set(found)
