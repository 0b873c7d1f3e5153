"""The training in clear that `scenarios.llama1b --compare-clear` takes turns with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from backends.defaults import FLOATS
from backends.he.manifest import GroupSpec

DTYPES = dict(zip(FLOATS, (torch.float32, torch.bfloat16), strict=True))
"""What a run in clear may compute in."""

_FEW_TOKENS = 4
_HOPELESS = 8  # times the fastest, at a few tokens


def clear_times_ms(groups: Sequence[GroupSpec], tokens: int, rounds: int = 5) -> dict[str, float]:
    """Milliseconds that each of DTYPES takes on this CPU for the model's largest linear.

    Forward and input gradient of `tokens` tokens, as a training step multiplies them; medians. One
    of DTYPES that is hopeless at a few tokens is left out: where a processor has no bf16, torch may
    take minutes.
    """
    few = _times_ms(groups, min(tokens, _FEW_TOKENS), 3, min)
    able = [name for name in DTYPES if few[name] < _HOPELESS * min(few.values())]
    return _times_ms(groups, tokens, rounds, median, able)


def _times_ms(
    groups: Sequence[GroupSpec],
    tokens: int,
    rounds: int,
    summary: Callable[[list[float]], float],
    names: Sequence[str] = tuple(DTYPES),
) -> dict[str, float]:
    group = max(groups, key=lambda g: g.in_features * g.total_out)
    weight = torch.randn(group.total_out, group.in_features)
    x, dy = torch.randn(tokens, group.in_features), torch.randn(tokens, group.total_out)
    sides = {name: tuple(t.to(DTYPES[name]) for t in (x, dy, weight)) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, (values, gradients, matrix) in sides.items():
            start_s = time.perf_counter()
            torch.nn.functional.linear(values, matrix)
            torch.matmul(gradients, matrix)
            if turn:  # the first round allocates
                times[name].append(1e3 * (time.perf_counter() - start_s))
    return {name: summary(found) for name, found in times.items()}


class ClearStep(NamedTuple):
    """A step in clear: seconds of the clock, loss, seconds of processors, and the gradient's norm
    before clipping."""

    seconds: float
    loss: float
    cpu_s: float
    gradient_norm: float


class ClearPeer:
    """The same training in clear, in a process of its own, one step at a time.

    Its own process, so that its 4 GB of float weights are not counted as the private run's, and
    so that the two sides can take turns on the same cores.
    """

    def __init__(self, argv: list[str], dtype: str) -> None:
        command = [sys.executable, "-m", "scenarios.llama1b", *argv, "--clear-peer", dtype]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process; the other ends with its input
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

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def step(self) -> ClearStep:
        """One more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._reply("seconds")
        return ClearStep(**{name: answer[name] for name in ClearStep._fields})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
