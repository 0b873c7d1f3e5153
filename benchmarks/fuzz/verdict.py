"""What is counted: inputs by kind, and what went wrong, with the first few of each in words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OWN = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)
TOLD = 10
"""Findings of one sort that are kept in words; all are counted."""


@dataclass
class Verdict:
    """Counts of one run. crash, hang, memory: see the package's docstring."""

    inputs: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def crash(self, what: str) -> None:
        """Something ended or raised that must not."""
        self._note("crashes", what)

    def hang(self, what: str) -> None:
        """A good peer did not get its right answer in time."""
        self._note("hangs", what)

    def memory(self, what: str) -> None:
        """More memory than the stated bound."""
        self._note("memory_over_bound", what)

    def _note(self, sort: str, what: str) -> None:
        self.found[sort] += 1
        if self.found[sort] <= TOLD:
            self.told.append(f"{sort}: {what}")

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.found

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        return {
            "inputs": self.inputs.total(),
            "crashes": self.found["crashes"],
            "hangs": self.found["hangs"],
            "memory_over_bound": self.found["memory_over_bound"],
            "findings": self.told,
            "inputs_by_kind": dict(sorted(self.inputs.items())),
            **self.figures,
        }


def memory_bytes(pid: int | str = "self") -> int:
    """Memory that is a process's own, resident or swapped out; no files, which the system may drop.

    Raises OSError when the process has ended.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * sum(int(number) for number in _OWN.findall(status))
