"""A real training that takes one step when it is told to, so that others can measure between."""

from __future__ import annotations

import threading

from backends.nn.trainer import Trainer


class Steps:
    """A real training that takes one step when it is told to."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._done.acquire()

    def _train(self) -> None:
        try:
            self._trainer.train(self._stepped)
        finally:
            self._done.release()

    def _stepped(self, step: int, loss: float) -> None:
        self._done.release()
        self._go.acquire()

    def take(self) -> float:
        """Seconds of one more step."""
        self._go.release()
        self._done.acquire()
        if not self._thread.is_alive():
            raise RuntimeError("the real training ended early; see the messages above")
        return self._trainer.step_seconds[-1]
