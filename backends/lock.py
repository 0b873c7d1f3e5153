"""One process at a time, where two would spoil each other's work.

A lock is the operating system's (flock) on a file that says who holds it. It ends with its process,
however that ends, so that nobody who is gone is waited for; what the file says is for people.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from backends.errors import UserError
from backends.files import WriteError

log = logging.getLogger(__name__)

_POLL_S = 0.2
_TEXT_BYTES_MAX = 4096
_HELD = (errno.EAGAIN, errno.EACCES)  # the latter by some network file systems


class HeldError(UserError):
    """Another process holds a lock; the text says which, since when, and what to do."""


@contextmanager
def alone(
    path: Path,
    mend: str,
    on_wait: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Iterator[bool]:
    """Alone among processes that ask for the lock file `path`; whether that is certain.

    A file system without locks cannot tell: `warn` is told in a line, and the work goes on, as
    nothing else would be possible there. The file is gone at the end.

    mend     what to do when another process holds it
    on_wait  is told in a line who holds it, and it is waited for; None does not wait

    Raises HeldError when another process holds it and is not waited for, WriteError when there can
    be no such file.
    """
    descriptor, certain = _acquire(path, mend, on_wait, warn)
    try:
        if certain:
            _sign(descriptor)
        yield certain
    finally:
        if certain:  # before it is let go: whoever waits for it looks whether it is still there
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _acquire(
    path: Path, mend: str, on_wait: Callable[[str], None] | None, warn: Callable[[str], None]
) -> tuple[int, bool]:
    """(open lock file, whether it is locked)."""
    told = False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise WriteError(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor, True
        except OSError as error:
            if error.errno not in _HELD:
                warn(
                    f"{path.parent} is on a file system without locks ({error.strerror}): nothing "
                    "keeps a second process out of it; see to that yourself"
                )
                return descriptor, False
            who = _holder(descriptor)
            if on_wait is None:
                os.close(descriptor)
                raise HeldError(f"{path.parent} is in use by {who}; {mend}") from error
            if not told:
                told = True
                on_wait(f"{path.parent} is in use by {who}; waiting until it has ended")
        os.close(descriptor)
        time.sleep(_POLL_S if told else 0.0)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether this is the file of that name: its last holder may have deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say who holds it. A full disk is no reason to do without the lock."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds it, as the file says, which anyone may have written."""
    try:
        told = json.loads(os.pread(descriptor, _TEXT_BYTES_MAX, 0))
        pid, host, since = told["pid"], told["host"], told["since"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    texts = type(host) is str and type(since) is str and len(host) <= 255 and len(since) <= 40
    if type(pid) is not int or not texts or not f"{host}{since}".isprintable():
        return "another process"
    where = "this machine" if host == socket.gethostname() else host
    return f"process {pid} on {where} since {since}"
