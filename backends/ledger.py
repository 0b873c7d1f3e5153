"""What a run knows of its workers: who has served it, and who was caught, across restarts.

    RUN/retired-workers.json     one entry a worker that gave a wrong answer

A worker is known by its identity: the name that the owner's transport gives it. The file is written
before the run goes on without the worker, and read at every start: a liar has no second life. Only
a person deletes it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from backends.errors import UserError
from backends.files import locked, read_bounded, write_json

FORMAT = 1
_FILE_BYTES_MAX = 1 << 20
_TEXT_MAX = 2000


class LedgerError(UserError, ValueError):
    """The file of caught workers cannot be used, or leaves none; the text says what to do."""


class TaintedError(UserError, RuntimeError):
    """A result rests on answers of a worker that was caught; the text says what to do."""


class WorkerLedger:
    """Who served and who was caught. Safe to use from several threads.

    path  the file of caught workers; None keeps them for this process only

    Raises LedgerError when the file is there and is not one of ours.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._served: set[str] = set()
        self._caught: dict[str, dict[str, str]] = {} if path is None else _read(path)

    @property
    def retired(self) -> dict[str, str]:
        """Identity of every worker that was caught, and what was found when."""
        with self._lock:
            return {
                worker: f"{entry['found']} ({entry['when']}{self._where()})"
                for worker, entry in self._caught.items()
            }

    @property
    def served(self) -> frozenset[str]:
        """Workers of whom an answer has passed since the start, or since `start_over`."""
        with self._lock:
            return frozenset(self._served)

    def accepted(self, worker: str) -> None:
        """An answer of this worker has passed its check."""
        with self._lock:
            self._served.add(worker)

    def retire(self, worker: str, found: str) -> None:
        """This worker was caught. On the disk when the call returns."""
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._lock:
            shown = "".join(c if c.isprintable() else " " for c in found[:_TEXT_MAX])
            self._caught.setdefault(worker, {"found": shown, "when": when})
            if self._path is not None:
                with locked(self._path):  # another run in this directory may have caught others
                    self._caught = {**self._caught, **_read(self._path)}
                    write_json(self._path, {"format": FORMAT, "workers": self._caught})

    def tainting(self) -> list[str]:
        """Workers that were caught after answers of theirs had been used."""
        return sorted(self.served & self.retired.keys())

    @contextmanager
    def untainted(self, advice: str) -> Iterator[None]:
        """Raise TaintedError at the end when what was computed within rests on one that was caught.

        Also in the place of the error that ends it: the last worker may be the one that was caught.

        advice  what was computed, and what to do
        """
        try:
            yield
        except TaintedError:  # whoever raised it knows more of what to do
            raise
        except (Exception, SystemExit) as error:
            self.require_untainted(advice, error)
            raise
        self.require_untainted(advice)

    def require_untainted(self, advice: str, cause: BaseException | None = None) -> None:
        """Raise TaintedError, for this cause, when what was computed rests on a liar."""
        caught = self.tainting()
        if caught:
            raise TaintedError(
                f"{', '.join(caught)} gave wrong answers, and earlier ones that passed may be in "
                f"{advice}"
            ) from cause

    def start_over(self) -> None:
        """What was computed so far has been given up: nobody has served what follows."""
        with self._lock:
            self._served.clear()

    def require_one_of(self, workers: Sequence[str]) -> None:
        """Raise LedgerError when each of these workers was caught."""
        retired = self.retired
        if workers and all(worker in retired for worker in workers):
            told = "; ".join(f"{worker!r}: {retired[worker]}" for worker in workers)
            raise LedgerError(
                f"no worker left that was not caught giving wrong answers: {told}. What was "
                "trained on its answers is set aside. Use another worker, or delete that file "
                "when you have found out what was wrong"
            )

    def _where(self) -> str:
        return "" if self._path is None else f", {self._path}"


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        raw = read_bounded(path, _FILE_BYTES_MAX)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return {}
        why = error.strerror or error
        raise LedgerError(f"{path} cannot be read ({why}); {_ADVICE}") from error
    try:
        stored = json.loads(raw)
        if stored.keys() != {"format", "workers"} or stored["format"] != FORMAT:
            raise ValueError("another format")
        for worker, entry in stored["workers"].items():
            right = entry.keys() == {"found", "when"} and all(map(_is_text, entry.values()))
            if not (worker and right):
                raise ValueError("an entry of another form")
        caught: dict[str, dict[str, str]] = stored["workers"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"{path} is damaged ({error}); {_ADVICE}") from error
    return caught


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT_MAX and value.isprintable()


_ADVICE = (
    "it lists workers that this run must not use again: restore it, or delete it to trust them all"
)
