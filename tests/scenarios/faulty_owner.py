"""`scenarios.crashes.owner` with a defect, so that the harness can be seen to find it.

Defects of the history come into effect where a run is resumed; those of the wire at once. Whoever
starts it gives their names first: `FAULT,FAULT --model ...`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from backends.he.entropy import OsEntropy
from backends.net.dialling import Dialler
from backends.nn import checkpoint
from backends.nn.checkpoint import Progress
from backends.nn.trainer import Trainer
from protocol.messages import Multiply, decode, encode
from scenarios.crashes import owner


def step_doubled() -> None:
    """A resumed run applies the last step that was kept once more."""
    real = checkpoint.restore

    def restore(*args: Any) -> Progress | None:
        found = real(*args)
        if found is None or not found.step:
            return found
        norms = found.gradient_norms[:-1]
        return Progress(found.step - 1, found.losses[:-1], norms, found.served)

    checkpoint.restore = restore


def newest_forgotten() -> None:
    """A run is resumed from the checkpoint before the newest."""
    real = checkpoint.restore

    def restore(directory: Path, *args: Any) -> Progress | None:
        found = sorted(directory.glob("step-*"))
        if len(found) > 1:
            shutil.rmtree(found[-1])
        return real(directory, *args)

    checkpoint.restore = restore


def update_lost() -> None:
    """A checkpoint holds the adapter as it was before its step."""
    before: list[Any] = []
    real = Trainer._step

    def step(self: Trainer, pool: Any) -> float:
        before[:] = [{n: p.detach().clone() for n, p in self._parameters.items()}]
        return real(self, pool)

    save = checkpoint.save

    def saved(
        directory: Path, progress: Any, run: Any, parameters: Any, optimizer: Any, *more: Any
    ) -> None:
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data.copy_(before[0][name] if before else kept[name])
        save(directory, progress, run, parameters, optimizer, *more)
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])

    Trainer._step = step  # type: ignore[method-assign]
    checkpoint.save = saved


def bytes_differ() -> None:
    """A request goes out twice under one number, with other bytes."""
    real = Dialler.send

    def send(self: Dialler, worker: str, frame: Any) -> None:
        real(self, worker, frame)
        message = decode(frame)
        if isinstance(message, Multiply) and message.request == 5:
            other = bytes(message.payload[:-1]) + bytes([message.payload[-1] ^ 1])
            again = Multiply(message.session, 5, message.matrix, message.tokens, other)
            real(self, worker, encode(again))

    Dialler.send = send  # type: ignore[method-assign]


def randomness_resumed() -> None:
    """Every life of the owner draws the keys of the one before it."""
    count = iter(range(1 << 40))
    OsEntropy.fresh_key = (  # type: ignore[method-assign]
        lambda self, tag=b"": bytearray(next(count).to_bytes(32, "big"))
    )


def main() -> None:
    for name in sys.argv.pop(1).split(","):
        globals()[name.replace("-", "_")]()
    owner.main()
