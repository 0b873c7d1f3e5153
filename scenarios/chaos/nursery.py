"""A process that runs pytest over and over, each time in a fork of itself that dies of it.

    python -m scenarios.chaos.nursery        in a tree; reads one JSON list of arguments a line

Starting pytest and hypothesis takes longer than most of the tests that find a mutant. They are
imported once, here, and nothing of the tree is: each fork reads it as it is then. For each line
read, one is written: {"status", "seconds", "told"}, status -1 for one that took too long.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

NOT_RUN = 71
"""The status of a run that could not begin: nothing was tested."""
_MEMORY_BYTES = 4 << 30
_TOLD_BYTES = 3000


def run(arguments: list[str], timeout_s: float) -> dict[str, Any]:
    """One pytest run, in a fork; its exit status and last words."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as told:
        # The other end of the pipe closes with the fork and all that it started.
        alive, held = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(alive)
            _child(arguments, told.fileno())
        os.close(held)
        ended, _, _ = select.select([alive], [], [], timeout_s)
        os.close(alive)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, wait_status = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(wait_status) if ended else -1
        size = told.seek(0, os.SEEK_END)
        told.seek(max(0, size - _TOLD_BYTES))
        words = told.read().decode(errors="replace")
    return {"status": status, "seconds": round(time.monotonic() - start, 2), "told": words}


def _child(arguments: list[str], log: int) -> None:
    os.setpgid(0, 0)
    status = NOT_RUN
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        import pytest

        status = 70
        status = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Every process of the run has the pipe open; whoever waits must not wait for them.
        os._exit(status)


def _quiet_hypothesis() -> None:
    """Examples that are the same every time, and no search for a smaller one: failing is enough."""
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None,
        deadline=None,
    )  # fmt: skip
    settings.load_profile("mutants")


def main() -> None:
    """Serve until the input ends."""
    import hypothesis.extra.pytestplugin
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401

    _quiet_hypothesis()
    sys.dont_write_bytecode = True
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(run(order["arguments"], order["timeout_s"])), flush=True)


if __name__ == "__main__":
    main()
