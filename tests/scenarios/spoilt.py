"""Places that can no longer be written to when a run comes to it."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

SPOILT = ["gone", "a file above", "a directory", "a loop"]
if os.geteuid():  # root may write anywhere
    SPOILT.append("read-only")


def spoilt_later(monkeypatch: pytest.MonkeyPatch, module: str, place: Path, kind: str) -> None:
    """Once the run of that module has saved its adapter, `place` is spoilt."""
    run: Any = importlib.import_module(module)
    save = getattr(run.save_adapter, "unspoilt", run.save_adapter)

    def saved(*args: Any) -> None:
        save(*args)
        if kind == "gone":
            shutil.rmtree(place.parent, ignore_errors=True)
        elif kind == "a file above":
            place.parent.write_text("here")
        elif kind == "a directory":
            (place / "below").mkdir(parents=True)
        elif kind == "read-only":
            place.parent.mkdir(0o500, exist_ok=True)
        else:
            place.parent.symlink_to(place.parent)

    saved.unspoilt = save  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "save_adapter", saved)
