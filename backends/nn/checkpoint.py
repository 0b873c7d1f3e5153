"""Training checkpoints: whole or absent, without pickle, and without anything random.

    DIR/step-000040/adapter.safetensors     the adapter's parameters
    DIR/step-000040/optimizer.safetensors   AdamW's moments
    DIR/step-000040/state.json              step, losses, the run's configuration, who computed
    DIR/data.key                            32 random bytes: the configuration holds a tag of the
                                            private data, which nobody can try data against
                                            without them

The learning rate and the data order are pure functions of the step, so the step restores them.
Cipher randomness is never saved: a resumed run starts a new incarnation.

A checkpoint names the workers it rests on: those of whom an answer is in it. When one of them turns
out to be lying, the newest checkpoint that does not rest on it is the one to go back to, so that
one is kept for each worker; the others are set aside as `distrusted-...`.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from backends.errors import UserError
from backends.files import (
    end_replacing,
    read_bounded,
    remove_directory,
    replacing_directory,
    sync_directory,
    write_json,
    write_secret,
)
from backends.nn.corpus import Sequences

_NAME = re.compile(r"step-(\d{6})")
_KEPT = 2
_STATE_BYTES_MAX = 64 << 20
_KEY_FILE = "data.key"
_KEY_BYTES = 32
_BLOCK_TOKENS = 1 << 20


class ResumeError(UserError, ValueError):
    """A checkpoint cannot be resumed by this run; the text says what differs."""


class SaveError(UserError, RuntimeError):
    """A checkpoint cannot be written; those before it are whole. The text says what to do."""


@dataclass
class Progress:
    """How far a run has come: steps applied, the mean loss of each, and the workers it rests on."""

    step: int
    losses: list[float]
    served: frozenset[str] = frozenset()


def data_tag(directory: Path, sequences: Sequences) -> str:
    """HMAC-SHA256 of int64[n, S] under the directory's key, in hex digits.

    The key is drawn when there is none. Raises ResumeError when there are checkpoints without it.
    """
    path = directory / _KEY_FILE
    if not path.exists():
        if _found(directory):
            raise ResumeError(
                f"{path} is missing, so nobody can tell whether the checkpoints beside it are of "
                "this data; put it back, use another --out, or start over with --fresh"
            )
        write_secret(path, os.urandom(_KEY_BYTES))
    key = read_bounded(path, _KEY_BYTES) if path.stat().st_size == _KEY_BYTES else b""
    if len(key) != _KEY_BYTES:
        raise ResumeError(f"{path} is no key of this program; start over with --fresh")
    if path.stat().st_mode & 0o077:
        raise ResumeError(
            f"{path} can be read by other users, who can try data against it; "
            "make it yours alone (chmod 600), or start over with --fresh"
        )
    tag = hmac.new(key, json.dumps(list(sequences.shape)).encode(), "sha256")
    rows = max(1, _BLOCK_TOKENS // sequences.shape[1])
    for start in range(0, len(sequences), rows):
        tag.update(sequences[start : start + rows].contiguous().numpy().tobytes())
    return tag.hexdigest()


def save(
    directory: Path,
    progress: Progress,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint. Kept are the newest two, and for each worker one to go back to.

    Raises SaveError when it cannot be written; nothing of it is left then.
    """
    moments = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}::{key}"] = torch.as_tensor(value).contiguous()
    weights = {name: p.detach().contiguous() for name, p in parameters.items()}
    served = sorted(progress.served)
    state = {"step": progress.step, "losses": progress.losses, "served": served, "run": run}
    try:
        with replacing_directory(directory / f"step-{progress.step:06d}") as aside:
            save_file(weights, aside / "adapter.safetensors")
            save_file(moments, aside / "optimizer.safetensors")
            write_json(aside / "state.json", state)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SaveError(
            f"the checkpoint of step {progress.step} cannot be written in {directory} ({why}); "
            "those before it are whole: make room, and the same command goes on from the newest"
        ) from error
    _drop_old(directory, progress.served)


def _drop_old(directory: Path, served: frozenset[str]) -> None:
    found = _found(directory)
    rests_on = {path: _state(path)["served"] for path in found}
    kept = set(found[-_KEPT:])
    for worker in served:
        before = [path for path in found if worker not in rests_on[path]]
        kept |= set(before[-1:])
    for old in set(found) - kept:
        remove_directory(old)


def _state(checkpoint: Path) -> dict[str, Any]:
    """What its state.json says. Raises ResumeError when that is not what `save` wrote."""
    path = checkpoint / "state.json"
    try:
        state: dict[str, Any] = json.loads(read_bounded(path, _STATE_BYTES_MAX))
        served, losses = state["served"], state["losses"]
        names = type(served) is list and all(type(name) is str for name in served)
        numbers = type(losses) is list and all(type(loss) is float for loss in losses)
        if not (names and numbers and type(state["run"]) is dict):
            raise ValueError("an entry of another form")
        if state["step"] != len(losses) or checkpoint.name != f"step-{len(losses):06d}":
            raise ValueError("losses of another number of steps")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"{path} is damaged ({error}); delete {checkpoint} to resume from the one before"
        ) from error
    return state


def restore(
    directory: Path,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    distrusted: Collection[str] = (),
) -> Progress | None:
    """Load the newest checkpoint into the parameters and the optimiser; None without one.

    What a crash has left of unfinished ones is cleared away: one process at a time saves here.

    distrusted  workers on whose answers it must not rest; newer ones that do are set aside

    Raises ResumeError when it belongs to a run with another configuration, is damaged, or when all
    of them rest on a distrusted worker.
    """
    if directory.is_dir():
        end_replacing(directory)
    found = _found(directory)
    if not found:
        return None
    set_aside(directory, distrusted)
    left = _found(directory)
    if not left:
        raise ResumeError(
            f"every checkpoint in {directory} rests on answers of a worker that was caught giving "
            f"wrong ones ({', '.join(sorted(distrusted))}); start over with --fresh"
        )
    newest = left[-1]
    state = _state(newest)
    differing = [key for key in run if state["run"].get(key) != run[key]]
    if differing:
        raise ResumeError(
            f"{newest} was made with other settings ({', '.join(differing)}); use the same ones, "
            "another --out, or start over with --fresh"
        )
    weights = _load(newest / "adapter.safetensors")
    moments = _load(newest / "optimizer.safetensors")
    if {name: p.shape for name, p in parameters.items()} != {
        n: w.shape for n, w in weights.items()
    }:
        raise ResumeError(f"{newest} holds another adapter; start over with --fresh")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            # AdamW's step count stays on the CPU, its moments go where the parameter is.
            optimizer.state[parameter] = {
                key.rpartition("::")[2]: value.to(parameter.device) if value.dim() else value
                for key, value in moments.items()
                if key.rpartition("::")[0] == name
            }
    return Progress(state["step"], state["losses"], frozenset(state["served"]))


def set_aside(directory: Path, distrusted: Collection[str]) -> None:
    """Rename the checkpoints that rest on these workers: no run goes on from them any more."""
    for path in _found(directory):
        if set(distrusted).isdisjoint(_state(path)["served"]):
            continue
        aside = path.with_name(f"distrusted-{path.name}")
        while aside.exists() or aside.is_symlink():
            aside = aside.with_name(f"{aside.name}-again")
        path.rename(aside)
        sync_directory(directory)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(
            f"{path} is damaged ({error}); delete {path.parent} to resume from the one before"
        ) from error


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
