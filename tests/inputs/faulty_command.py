"""A command with every fault that `benchmarks.inputs` is there to find: `--do WHAT`."""

from __future__ import annotations

import os
import sys
import threading
import time

from backends.options import Parser

WHAT = (
    "well",
    "refuse",
    "raise",
    "thread",
    "mute",
    "wait",
    "work",
    "die",
    "memory",
    "other-status",
)


def main() -> None:
    parser = Parser(__doc__, "tests.inputs.faulty_command")
    parser.add_argument("--do", choices=WHAT, default="well")
    what = parser.parse().do
    if what == "refuse":
        sys.exit("error: this cannot be")
    if what == "raise":
        raise ValueError("nobody said so")
    if what == "thread":
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    if what == "mute":
        sys.exit(1)
    if what == "other-status":
        sys.exit("what happened?")
    if what == "wait":
        time.sleep(600)
    while what == "work":
        pass
    if what == "die":
        os.abort()
    if what == "memory":
        bytearray(64 << 30)
