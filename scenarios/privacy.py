"""What a process that holds private data tells the rest of its machine: nothing.

Every scenario and benchmark comes through here at its start (`cli.clean_exit`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>
_OWNER_ONLY = 0o077


def private_process() -> None:
    """For the rest of this process: no core dump, no debugger of the same user, files to itself.

    Files and directories that it makes are readable by their owner only: reports, records, traces,
    adapters and checkpoints tell of private data. What exists keeps its mode. Processes it starts
    inherit the limit and the mask; a program that one of them executes may be attached to again,
    until it comes through here itself.

    On other systems than Linux a debugger is not kept out. Warns when Linux refuses.
    """
    os.umask(_OWNER_ONLY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # Refused by a sandbox at most, and then the sandbox is what stands between processes.
        if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
            print("warning: this process can be attached to by a debugger", file=sys.stderr)
