"""What the commands themselves have made, whole and damaged: certificates, models, checkpoints.

Below `pool/mine`, of which a case gets a copy of its own, but for the whole ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scenarios.certs import Authority


def certificates(pool: Path) -> None:
    """Of both sides, good and bad, in `pool/tls`."""
    folder = pool / "tls"
    authority = Authority()
    authority.issue(folder / "owner")
    authority.issue(folder / "worker", ["localhost", "127.0.0.1"])
    Authority(days=-0.5).issue(folder / "expired")
    other = Authority()
    other.issue(folder / "other")
    for name, damage in {
        "no-key": lambda f: (f / "key.pem").unlink(),
        "open-key": lambda f: (f / "key.pem").chmod(0o644),
        "garbage": lambda f: (f / "cert.pem").write_bytes(os.urandom(500)),
        "empty-ca": lambda f: (f / "ca.pem").write_text(""),
        "other-key": lambda f: shutil.copy(folder / "other" / "key.pem", f / "key.pem"),
        "not-base64": lambda f: (f / "cert.pem").write_text(
            "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"
        ),
    }.items():
        shutil.copytree(folder / "owner", folder / name)
        damage(folder / name)
    shutil.rmtree(folder / "other")
    (folder / "nothing").mkdir()


def damaged_models(pool: Path) -> None:
    """Prepared models, from the one in `pool/cache`, each in a cache of its own in `pool/mine`."""
    model = next(path for path in (pool / "cache").iterdir() if path.is_dir())
    (pool / "model").symlink_to(model)
    for name, damage in MODELS.items():
        copy = pool / "mine" / f"cache-{name}" / model.name
        shutil.copytree(model, copy)
        damage(copy)
        (pool / "mine" / f"model-{name}").symlink_to(copy)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def _weight(folder: Path) -> Path:
    return sorted((folder / "worker").iterdir())[0]


MODELS: dict[str, Callable[[Path], object]] = {
    "manifest-cut": lambda f: os.truncate(f / "manifest.json", 200),
    "manifest-list": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest-binary": lambda f: (f / "manifest.json").write_bytes(b"\x80\xff" * 50),
    "manifest-deep": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "manifest-old": _manifest(lambda r: r.update(format=1)),
    "manifest-nan": _manifest(lambda r: r["groups"][0]["forward_plan"].update(margin=float("nan"))),
    "manifest-negative": _manifest(lambda r: r["groups"][0]["spec"].update(in_features=-1)),
    "manifest-outside": _manifest(lambda r: r["groups"][0]["spec"].update(name="../../x")),
    "weight-cut": lambda f: os.truncate(_weight(f), 50),
    "weight-gone": lambda f: _weight(f).unlink(),
    "weight-folder": lambda f: [_weight(f).unlink(), (f / "worker" / "g0000.weight.npy").mkdir()],
    "owner-gone": lambda f: shutil.rmtree(f / "owner"),
    "worker-file": lambda f: [shutil.rmtree(f / "worker"), (f / "worker").write_text("")],
}
"""What is done to a prepared model."""
STILL_A_WORKERS_PART = ("owner-gone",)
"""Damages that a worker need not know of."""


def runs(pool: Path) -> None:
    """Directories of runs in `pool/mine`, for `--out`: none of them can be gone on from."""
    for name, damage in RUNS.items():
        folder = pool / "mine" / f"run-{name}"
        # Of llama1b, and of the quickstart.
        for checkpoints in (folder / "checkpoints", folder / "checkpoints-private"):
            _checkpoint(checkpoints)
        damage(folder)
    (pool / "mine" / "run-file").write_text("held")


def _checkpoint(folder: Path) -> None:
    step = folder / "step-000002"
    step.mkdir(parents=True)
    (folder / "data.key").write_bytes(bytes(32))
    (folder / "data.key").chmod(0o600)
    state = {"step": 2, "losses": [4.0, 3.9], "served": [], "run": {}}
    (step / "state.json").write_text(json.dumps(state))
    for name in ("adapter", "optimizer"):
        (step / f"{name}.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


def _each(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Done to both folders of checkpoints of a run."""
    return lambda folder: [change(path) for path in folder.glob("checkpoints*")]


def _state(text: str) -> Callable[[Path], object]:
    return _each(lambda f: (f / "step-000002" / "state.json").write_text(text))


def _ledger(text: str) -> Callable[[Path], object]:
    return lambda f: (f / "retired-workers.json").write_text(text)


RUNS: dict[str, Callable[[Path], object]] = {
    "of-another": lambda f: None,
    "state-cut": _state('{"step": 2, "lo'),
    "state-nan": _state('{"step": 2, "losses": [NaN, 1.0], "served": [], "run": {}}'),
    "state-list": _state("[]"),
    "state-deep": _state("[" * 100_000),
    "state-gone": _each(lambda f: (f / "step-000002" / "state.json").unlink()),
    "key-short": _each(lambda f: (f / "data.key").write_bytes(b"x")),
    "key-open": _each(lambda f: (f / "data.key").chmod(0o644)),
    "key-folder": _each(lambda f: [(f / "data.key").unlink(), (f / "data.key").mkdir()]),
    "key-gone": _each(lambda f: (f / "data.key").unlink()),
    "step-file": _each(
        lambda f: [shutil.rmtree(f / "step-000002"), (f / "step-000002").write_text("")]
    ),
    "checkpoints-file": _each(lambda f: [shutil.rmtree(f), f.write_text("")]),
    "ledger-cut": _ledger('{"format": 1, "wor'),
    "ledger-list": _ledger("[1]"),
    "ledger-deep": _ledger("[" * 100_000),
    "ledger-folder": lambda f: (f / "retired-workers.json").mkdir(),
    "ledger-fifo": lambda f: os.mkfifo(f / "retired-workers.json"),
}
"""What is done to a run's directory."""
