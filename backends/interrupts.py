"""Ctrl-C while a command is still loading: its imports take seconds, and can be anywhere."""

from __future__ import annotations

import os
import signal
import stat
import threading
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130
"""The status of a command that was ended by Ctrl-C."""


def end_while_loading() -> None:
    """Until `main` of the command has begun, Ctrl-C ends this process at once, with a line.

    From then on it is a KeyboardInterrupt, as ever. Where Ctrl-C is ignored, or somebody else's, it
    stays so.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def leave_terminal() -> None:
    """Have nothing written to a terminal that is gone: every print would raise."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _in_main(frame):
        signal.default_int_handler(number, frame)
    os.write(2, b"\ninterrupted while it was loading; nothing was begun\n")
    os._exit(INTERRUPTED)


def _in_main(frame: FrameType | None) -> bool:
    """Whether `main` of the command is among the callers."""
    while frame is not None:
        if frame.f_code.co_name == "main" and frame.f_globals.get("__name__") == "__main__":
            return True
        frame = frame.f_back
    return False
