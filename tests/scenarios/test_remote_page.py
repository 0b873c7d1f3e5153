"""docs/remote.md, as somebody types it: both machines are this one, in a directory each."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from scenarios.worker import __main__ as worker
from tests.scenarios.commands import ROOT

PAGE = (ROOT / "docs" / "remote.md").read_text()
TINY = ROOT / "scenarios" / "assets" / "tiny-llama"


def blocks(language: str) -> list[tuple[str, str]]:
    """(words after the language, text) of the page's blocks."""
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [(words.strip(), text) for name, words, text in found if name == language]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def as_here(variables: str, data: Path) -> str:
    """The page's first block with this machine's values; what is left of it is as it stands."""
    values = {
        "WORKER": "localhost", "PORT": free_port(), "METRICS": free_port(), "MODEL": TINY,
        "DATA": data, "STEPS": 2,
    }  # fmt: skip
    for name, value in values.items():
        variables, count = re.subn(
            rf"^{name}=\S+", f"{name}={shlex.quote(str(value))}", variables, flags=re.MULTILINE
        )
        assert count == 1, name
    return variables


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_works_as_it_is_written(tmp_path: Path) -> None:
    """Prepare, certificates, copy, serve, train, watch, a death, a new start, the end."""
    home, there, tools = (tmp_path / name for name in ("home", "there", "tools"))
    for place in (home, there, tools):
        place.mkdir()
    # What ssh does, for a machine that is a directory: the words are one line for a shell.
    program(tools / "ssh", f'shift; cd {shlex.quote(str(there))} && exec sh -c "$*"')
    program(tools / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    data = tmp_path / "private.txt"
    data.write_text("The owner keeps the text; the worker sees ciphertexts.\n" * 100)
    (_, variables), *steps = blocks("sh")
    script = ["set -eu", as_here(variables, data)]
    for where, text in steps:
        assert where in ("", "there")
        inside = there if where else home
        script.append(f"cd {shlex.quote(str(inside))}\n{text}")
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state"),
    }  # fmt: skip
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)], capture_output=True, text=True, timeout=590,
            env=environment,
        )  # fmt: skip
    finally:
        for file in there.glob("worker.pid"):  # where the script has failed half-way
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), 9)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert (home / "runs" / "remote" / "adapter" / "adapter_model.safetensors").is_file()
    counted = re.search(r"^private_lora_worker_requests_total (\d+)$", said, re.MULTILINE)
    assert counted is not None, said
    assert int(counted[1]) > 50
    assert "how=drained" in said
    assert {path.name for path in there.iterdir()} == {"worker.log", "worker.pid"}
    assert not (home / "certs" / "worker").exists()


@pytest.mark.parametrize("kind", ["unit", "container"])
def test_the_unit_and_the_container_start_a_worker(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their options are those of the command."""
    if kind == "unit":
        ((_, text),) = blocks("ini")
        words = shlex.split(next(line for line in text.splitlines() if "ExecStart=" in line))
    else:
        text = (ROOT / "deploy" / "Containerfile").read_text()
        words = shlex.split(" ".join(re.findall(r'"([^"]*)"', text)))
    module = words.index("scenarios.worker")
    monkeypatch.setattr(sys, "argv", ["worker", *words[module + 1 :]])
    args = worker.parsed()
    assert args.listen == "0.0.0.0:7443"
    assert args.metrics.endswith(":9464")
    assert args.log_format == "json"
    limit = re.search(r"TimeoutStopSec=(\d+)", text)
    assert limit is None or int(limit[1]) > args.drain_s
