"""Starts the project's commands in processes that can be killed: cold, or from a warm zygote.

`Cold` starts `python -m MODULE` as a user would; importing torch and the rest takes seconds.

`Zygote` is one process that has imported everything and forks a child for each command, which then
is what `python -m MODULE` would be after its imports. It has opened no session, drawn no key, read
no private text and started no thread: there is nothing secret that a child could inherit. A child
draws from the operating system's generator anew (`os.urandom` is a system call, OpenSSL reseeds
after a fork, a cipher's `OsEntropy` is made by the child), so children share no randomness; that
they do not is one of the things that the wire is watched for.

Children are killed by number with SIGKILL, and a zygote that ends takes its children with it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
LOADED = ("scenarios.worker.run", "scenarios.crashes.owner")
_POLL_S = 0.005
_ENDING_S = 120.0
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Child(Protocol):
    """A process that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status once it has ended; minus the signal's number where one killed it."""
        ...


class Starter(Protocol):
    """What starts commands."""

    def start(self, module: str, arguments: Sequence[str], log: Path) -> Child:
        """`python -m module arguments`; what it says is appended to `log`."""
        ...


def wait(child: Child, timeout_s: float) -> int | None:
    """Its exit status, or None where it has not ended in time."""
    until = time.monotonic() + timeout_s
    while (status := child.poll()) is None and time.monotonic() < until:
        time.sleep(_POLL_S)
    return status


def kill(child: Child) -> int:
    """SIGKILL, and wait until it is gone; its exit status, -9 unless it had ended by itself."""
    status = child.poll()
    if status is None:
        os.kill(child.pid, signal.SIGKILL)
        status = wait(child, 30.0)
        if status is None:
            raise RuntimeError(f"process {child.pid} does not die")
    return status


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Cold:
    """`python -m`, as users do."""

    def start(self, module: str, arguments: Sequence[str], log: Path) -> Child:
        descriptor = os.open(log, _LOG_FLAGS, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, env=_environment(),
                stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor,
            )  # fmt: skip
        finally:
            os.close(descriptor)


class _Forked:
    """A child of a zygote. Its number is nobody else's until `poll` has told of its end."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self._status: int | None = None
        self.pid = pid

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._zygote.ask({"poll": self.pid})["status"]
        return self._status


class Zygote:
    """A warm process to fork from; ends with its `with`.

    loaded  modules that it imports, so that commands that need them start at once
    """

    def __init__(self, log: Path, loaded: Sequence[str] = LOADED) -> None:
        self._lock = threading.Lock()
        self._asked = 0
        descriptor = os.open(log, _LOG_FLAGS, 0o600)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scenarios.crashes.zygote", *loaded], cwd=ROOT,
            env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=descriptor,
        )  # fmt: skip
        os.close(descriptor)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer. Raises RuntimeError when the zygote is gone."""
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._asked += 1
            numbered = json.dumps(request | {"number": self._asked}).encode() + b"\n"
            with suppress(OSError):
                self._process.stdin.write(numbered)
                self._process.stdin.flush()
                while line := self._process.stdout.readline():
                    answer: dict[str, Any] = json.loads(line)
                    if answer["number"] == self._asked:  # not one that an interrupt left unread
                        return answer
        raise RuntimeError("the process that starts the others has ended; see zygote.log")

    def start(self, module: str, arguments: Sequence[str], log: Path) -> Child:
        told = self.ask({"start": module, "arguments": list(arguments), "log": str(log)})
        return _Forked(self, told["pid"])

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _become(request: dict[str, Any]) -> int:
    """In a child: run the command to its end; its exit status."""
    log = os.open(request["log"], _LOG_FLAGS, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    sys.argv = [request["start"], *request["arguments"]]
    try:
        _main_of(request["start"])()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main_of(module: str) -> Callable[[], None]:
    """What `python -m module` runs, of a module or a package."""
    found: Any = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    main: Callable[[], None] = found.main
    return main


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = _become(request)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    """The zygote itself: requests on standard input until it ends, answers on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness ends it
    for module in sys.argv[1:]:
        importlib.import_module(module)
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = _fork(request)
            children.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(pid)
            answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        answer["number"] = request["number"]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
