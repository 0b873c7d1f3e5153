"""Training checkpoints: whole or absent, without pickle, and without anything random.

    DIR/step-000040/adapter.safetensors     the adapter's parameters
    DIR/step-000040/optimizer.safetensors   AdamW's moments
    DIR/step-000040/state.json              step, losses, the run's configuration
    DIR/data.key                            32 random bytes: the configuration holds a tag of the
                                            private data, which nobody can try data against
                                            without them

The learning rate and the data order are pure functions of the step, so the step restores them.
Cipher randomness is never saved: a resumed run starts a new incarnation.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from backends.files import replacing_directory, write_json, write_secret

_NAME = re.compile(r"step-(\d{6})")
_KEPT = 2
_KEY_FILE = "data.key"
_KEY_BYTES = 32


class ResumeError(ValueError):
    """A checkpoint cannot be resumed by this run; the text says what differs."""


@dataclass
class Progress:
    """How far a run has come: steps applied, and the mean loss of each."""

    step: int
    losses: list[float]


def data_tag(directory: Path, sequences: torch.Tensor) -> str:
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
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ResumeError(f"{path} is no key of this program; start over with --fresh")
    return hmac.digest(key, sequences.contiguous().numpy().tobytes(), "sha256").hex()


def save(
    directory: Path,
    progress: Progress,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint and drop all but the newest two."""
    moments = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}::{key}"] = torch.as_tensor(value).contiguous()
    with replacing_directory(directory / f"step-{progress.step:06d}") as aside:
        weights = {name: p.detach().contiguous() for name, p in parameters.items()}
        save_file(weights, aside / "adapter.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        state = {"step": progress.step, "losses": progress.losses, "run": run}
        write_json(aside / "state.json", state)
    for old in _found(directory)[:-_KEPT]:
        shutil.rmtree(old)


def restore(
    directory: Path,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Progress | None:
    """Load the newest checkpoint into the parameters and the optimiser; None without one.

    Raises ResumeError when it belongs to a run with another configuration.
    """
    found = _found(directory)
    if not found:
        return None
    newest = found[-1]
    state = json.loads((newest / "state.json").read_text())
    differing = [key for key in run if state["run"].get(key) != run[key]]
    if differing:
        raise ResumeError(
            f"{newest} was made with other settings ({', '.join(differing)}); use the same ones, "
            "another --out, or start over with --fresh"
        )
    weights = load_file(newest / "adapter.safetensors")
    moments = load_file(newest / "optimizer.safetensors")
    if set(weights) != set(parameters):
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
    return Progress(state["step"], state["losses"])


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
