"""The training in clear that `scenarios.llama1b --compare-clear` takes turns with."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class ClearPeer:
    """The same training in clear, in a process of its own, one step at a time.

    Its own process, so that its 4 GB of float weights are not counted as the private run's, and
    so that the two sides can take turns on the same cores.
    """

    def __init__(self, argv: list[str]) -> None:
        command = [sys.executable, "-m", "scenarios.llama1b", *argv, "--clear-peer"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reply("ready")

    def _reply(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if what in answer:
                    return answer
        raise RuntimeError("the clear run beside this one ended early; see its messages above")

    def step(self) -> tuple[float, float]:
        """(seconds, loss) of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._reply("seconds")
        return answer["seconds"], answer["loss"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
