"""Two network namespaces joined by a line of a given rate and round trip, for measuring.

The line is a small program (`line_forwarder.c`, compiled with the machine's C compiler when it is
needed) between two tun devices. It takes packets from one, lets them wait for their turn and for
the delay, and gives them to the other; a packet that finds a full queue is dropped. Kernel TCP with
ordinary segments runs over it, on Linux's usual settings, whatever this machine's are.

Needs root, for the namespaces. They, and all that runs in them, are gone at the end;
where this process is killed, what runs dies with it, and the next line removes the namespaces.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = ("10.231.7.1", "10.231.7.2")
SETTINGS = {
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.tcp_slow_start_after_idle": "1",
}
"""Linux's own, where nobody has changed them."""
QUEUE_S = 0.05
"""The queue at each end of the line holds what it carries in a round trip, or in this time."""
_SOURCE = Path(__file__).with_name("line_forwarder.c")
_PREFIX = "pl-line"
_COUNT = itertools.count()


class NoLineError(RuntimeError):
    """This machine cannot make such a line; the text says what it lacks."""


@dataclass(frozen=True)
class Shape:
    """rate in bits/s, each direction, Ethernet's overhead included; round trip in s."""

    bits_per_s: float
    rtt_s: float

    @property
    def queue_bytes(self) -> int:
        """Room for packets that wait for their turn."""
        return int(self.bits_per_s / 8 * max(self.rtt_s, QUEUE_S))


@dataclass
class ShapedLine:
    """A line that is up.

    namespaces  names of its two ends, at ADDRESSES
    pid         of the forwarder
    dropped, busy_s  known once it is down: packets lost, and processor seconds of the forwarder
    """

    namespaces: tuple[str, str]
    pid: int = 0
    dropped: int = 0
    busy_s: float = 0.0
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, end: int, command: Sequence[str], core: int | None = None
    ) -> subprocess.Popen[str]:
        """Start a command at an end (0 or 1), on one core of this process's if it is said which.

        It reads and writes text through pipes, and is killed when the line goes down.
        """
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[end], *pinned, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=_end_with_this_process,
        )  # fmt: skip
        self._processes.append(process)
        return process


def _end_with_this_process() -> None:
    """For a child: killed when its parent is, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _run(*words: str) -> None:
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise NoLineError(f"`{' '.join(words)}` failed: {found.stderr.strip()}")


def require_line() -> None:
    """Raise NoLineError, in one line, when this machine cannot have one."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise NoLineError("a shaped line needs root: it makes network namespaces")
    if not os.path.exists("/dev/net/tun"):
        raise NoLineError("a shaped line needs /dev/net/tun: load the kernel module tun")
    for tool in ("ip", "sysctl", "taskset", "cc"):
        if shutil.which(tool) is None:
            raise NoLineError(f"a shaped line needs the command {tool!r}, which is not installed")


def _remove_stale() -> None:
    """Namespaces of a process that was killed before it could."""
    for entry in Path("/run/netns").glob(f"{_PREFIX}-*"):
        owner = entry.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "netns", "del", entry.name], capture_output=True)


@contextmanager
def shaped_line(shape: Shape, congestion: str = "cubic") -> Iterator[ShapedLine]:
    """A line of that shape until the end of the `with`. Raises NoLineError."""
    require_line()
    _remove_stale()
    names = tuple(f"{_PREFIX}-{os.getpid()}-{next(_COUNT)}{end}" for end in "ab")
    line = ShapedLine((names[0], names[1]))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="line-")))
        program = folder / "forwarder"
        _run("cc", "-O2", "-pthread", "-o", str(program), str(_SOURCE))
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
        stack.callback(_end, line._processes)
        forwarder = subprocess.Popen(
            [program, *names, f"{shape.bits_per_s:.0f}", f"{shape.rtt_s / 2 * 1e6:.0f}",
             str(shape.queue_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(_finish, line, forwarder)
        line.pid = forwarder.pid
        assert forwarder.stdout is not None
        assert forwarder.stderr is not None
        if forwarder.stdout.readline().strip() != "ready":
            raise NoLineError(f"the forwarder did not start: {forwarder.stderr.read().strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            _configure(name, address, congestion)
        yield line


def _configure(name: str, address: str, congestion: str) -> None:
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "line")
    _run("ip", "-n", name, "link", "set", "line", "mtu", "1500", "up")
    # By its route: a namespace may choose among the algorithms that the machine lets users have.
    network = ["route", "replace", "10.231.7.0/30", "dev", "line", "src", address]
    _run("ip", "-n", name, *network, "congctl", congestion)
    for key, value in SETTINGS.items():
        _run("ip", "netns", "exec", name, "sysctl", "-qw", f"{key}={value}")


def _finish(line: ShapedLine, forwarder: subprocess.Popen[str]) -> None:
    """End the forwarder and note what it says."""
    try:
        said, _ = forwarder.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        forwarder.kill()
        said, _ = forwarder.communicate()
    words = said.replace(",", " ").split()
    if len(words) >= 4 and words[-4] == "dropped":
        line.dropped, line.busy_s = int(words[-3]), float(words[-1])


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
