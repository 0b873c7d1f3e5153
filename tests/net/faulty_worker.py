"""A worker with every fault that the fuzz looks for: `python -m tests.net.faulty_worker ...`.

It sleeps over a request, keeps what nobody asked it to, and has a thread that dies of an error.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from backends.net.worker import WorkerServer
from scenarios.worker.__main__ import main

_HOARD: list[bytes] = []
_deliver = WorkerServer.deliver


def _fails() -> None:
    raise KeyError("planted")


def _faulty(self: WorkerServer, peer: str, frame: Any) -> None:
    _HOARD.append(b"x" * (4 << 20))
    if len(_HOARD) == 8:
        threading.Thread(target=_fails).start()
    if len(_HOARD) % 20 == 0:
        time.sleep(1.5)
    _deliver(self, peer, frame)


WorkerServer.deliver = _faulty  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
