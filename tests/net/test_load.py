"""The load benchmark's owners: they ask a real worker over TLS, and notice a wrong answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backends.he.mlwe_worker import MlweWorker
from backends.he.store import WorkerPart
from backends.net.devices import OneDevice
from backends.net.serving import serving
from backends.net.tls import Tls
from benchmarks.load.made import load_recordings, make_place, save_recordings
from benchmarks.load.owners import owners_at, work_all


def test_owners_find_their_own_answers_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three at once; one of them expects another bit than it will get."""
    make_place(tmp_path, 64, 2, 3)
    recordings = load_recordings(tmp_path / "owner1.npz")
    changed = recordings[3].answer.copy()
    changed[5] ^= 1
    recordings[3] = replace(recordings[3], answer=changed)
    save_recordings(tmp_path / "owner1.npz", recordings)
    part = WorkerPart.open(tmp_path / "model")
    with serving(
        OneDevice.holding(part, MlweWorker()),
        "localhost",
        0,
        Tls(tmp_path / "worker"),
    ) as service:
        names = [f"owner{i}" for i in range(3)]
        with owners_at(tmp_path, f"localhost:{service.port}", names, 2) as owners:
            work_all(owners, rounds=2)
        assert [(o.right, o.wrong, o.lost) for o in owners] == [(16, 0, 0), (14, 2, 0), (16, 0, 0)]
        assert service.server.counts.products == 3 * 16 + 3
        assert service.server.counts.launches <= service.server.counts.products
    assert len(capsys.readouterr().out.splitlines()) == 3
