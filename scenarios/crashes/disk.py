"""What lies in a run's directory, seen from outside: complete checkpoints, and their bits.

A reading of its own of what the project's documents promise: a checkpoint is the directory
`step-NNNNNN`, which appears whole or not at all, with an adapter and the loss of every step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

_COMPLETE = re.compile(r"step-(\d{6})")
_ASIDE = re.compile(r"\.step-\d{6}\..*")


class DamageError(Exception):
    """Something that was promised to be whole is not; the text says what."""


def kept(checkpoints: Path) -> dict[int, Path]:
    """The complete checkpoints by step."""
    if not checkpoints.is_dir():
        return {}
    found = (_COMPLETE.fullmatch(name) for name in os.listdir(checkpoints))
    return {int(name[1]): checkpoints / name[0] for name in found if name}


def newest(checkpoints: Path) -> int:
    """The last step of which a complete checkpoint lies there; 0 without any."""
    return max(kept(checkpoints), default=0)


def being_written(checkpoints: Path) -> set[str]:
    """Names of what is not complete, or was left so by a kill."""
    try:
        return {name for name in os.listdir(checkpoints) if _ASIDE.fullmatch(name)}
    except FileNotFoundError:
        return set()


def adapter_of(directory: Path) -> NDArray[np.float64]:
    """All numbers of the one adapter in a directory, float64[P], tensors in the order of names.

    Raises DamageError when it is missing or unreadable.
    """
    try:
        (path,) = directory.glob("adapter*.safetensors")
        tensors = load_file(path)
    except Exception as error:
        raise DamageError(f"no readable adapter in {directory.name}: {error}") from error
    parts = [tensors[name].astype(np.float64).reshape(-1) for name in sorted(tensors)]
    return np.concatenate(parts)


def losses_of(checkpoint: Path) -> list[float]:
    """The mean loss of every step so far, in nats per token, as a checkpoint has them.

    Raises DamageError when it has them not.
    """
    try:
        losses: list[float] = json.loads((checkpoint / "state.json").read_text())["losses"]
        return [float(loss) for loss in losses]
    except Exception as error:
        raise DamageError(f"no losses in {checkpoint.name}: {error}") from error


def save_copy(checkpoint: Path, target: Path) -> bool:
    """Copy a checkpoint that its owner may delete any moment; whether it was there throughout."""
    try:
        shutil.copytree(checkpoint, target)
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True
