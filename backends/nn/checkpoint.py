"""Training checkpoints: whole or absent, without pickle, and without anything random.

    DIR/step-000040/adapter_model.safetensors   the adapter's parameters, as `peft` names them
    DIR/step-000040/adapter_config.json         with it plain `peft` loads a checkpoint
    DIR/step-000040/optimizer.safetensors       AdamW's moments
    DIR/step-000040/state.json                  step, losses, the run's configuration, who computed,
                                                how much noise was added, SHA-256 of the two files
                                                of tensors
    DIR/data.key                                32 random bytes: the configuration holds a tag of
                                                the private data, which nobody can try data against
                                                without them

The learning rate and the data order are pure functions of the step, so the step restores them.
Cipher randomness is never saved: a resumed run starts a new incarnation.

A checkpoint names the workers it rests on: those of whom an answer is in it. When one of them turns
out to be lying, the newest checkpoint that does not rest on it is the one to go back to, so that
one is kept for each worker; the others are set aside as `distrusted-...`. One that is damaged is
never gone on from: the newest whole one is, and those after it are set aside as `damaged-...`.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from backends.errors import UserError
from backends.files import (
    digest_of,
    end_replacing,
    read_bounded,
    remove_directory,
    replacing_directory,
    sync_directory,
    write_json,
    write_secret,
)
from backends.nn.adapters import CONFIG_FILE, WEIGHTS_FILE, stored_name
from backends.nn.corpus import Sequences

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_KEPT = 2
_STATE_BYTES_MAX = 64 << 20
_KEY_FILE = "data.key"
_KEY_BYTES = 32
_MOMENTS_FILE = "optimizer.safetensors"
_TENSOR_FILES = (WEIGHTS_FILE, _MOMENTS_FILE)
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SCHEDULE = ("steps", "warmup_steps")
"""What may change between the runs of one directory, where the number of steps does."""
_BLOCK_TOKENS = 1 << 20


class ResumeError(UserError, ValueError):
    """A checkpoint cannot be resumed by this run; the text says what differs."""


class DamagedError(ResumeError):
    """A checkpoint is not what `save` wrote."""


class SaveError(UserError, RuntimeError):
    """A checkpoint cannot be written; those before it are whole. The text says what to do."""


@dataclass
class Progress:
    """How far a run has come: steps applied, what they were like, and the workers it rests on.

    losses          mean loss of each step
    gradient_norms  of each step, before clipping
    noise           of differential privacy, over the clip norm, the same in all steps; None without
    """

    step: int
    losses: list[float]
    gradient_norms: list[float]
    served: frozenset[str] = frozenset()
    noise: float | None = None


def place_of(directory: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return directory / f"step-{step:06d}"


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint there, whole or not; 0 without any."""
    names = [path.name for path in _found(directory)[-1:]]
    return int(names[0].removeprefix("step-")) if names else 0


def room_bytes(parameters: int) -> int:
    """Disk that the checkpoints of so many float32 parameters take, and an adapter beside them.

    One is kept from before any worker's answer, two are the newest, one is being written; each has
    two moments a parameter.
    """
    return (3 * (_KEPT + 2) + 1) * 4 * parameters


def data_tag(directory: Path, sequences: Sequences) -> str:
    """HMAC-SHA256 of int64[n, S] under the directory's key, in hex digits.

    The key is drawn when there is none. Raises ResumeError when there are checkpoints without it,
    or no place for it.
    """
    path = directory / _KEY_FILE
    if directory.exists() and not directory.is_dir():
        raise ResumeError(f"{directory} is a file where checkpoints would be; use another --out")
    if not path.exists():
        if _found(directory):
            raise ResumeError(
                f"{path} is missing, so nobody can tell whether the checkpoints beside it are of "
                "this data; put it back, use another --out, or start over with --fresh"
            )
        write_secret(path, os.urandom(_KEY_BYTES))
    try:
        key = read_bounded(path, _KEY_BYTES) if path.stat().st_size == _KEY_BYTES else b""
    except OSError as error:
        raise ResumeError(f"{path} cannot be read ({error.strerror or error})") from error
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
    adapter_config: bytes | None = None,
) -> None:
    """Write a checkpoint. Kept are the newest two, and for each worker one to go back to.

    adapter_config  what lets `peft` load it as an adapter (`adapters.config_text`)

    Raises SaveError when it cannot be written; nothing of it is left then.
    """
    moments = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{stored_name(name)}::{key}"] = torch.as_tensor(value).contiguous()
    weights = {stored_name(name): p.detach().contiguous() for name, p in parameters.items()}
    served = sorted(progress.served)
    state = {
        "step": progress.step, "losses": progress.losses,
        "gradient_norms": progress.gradient_norms, "served": served, "noise": progress.noise,
        "run": run,
    }  # fmt: skip
    try:
        with replacing_directory(place_of(directory, progress.step)) as aside:
            save_file(weights, aside / WEIGHTS_FILE, {"format": "pt"})
            save_file(moments, aside / _MOMENTS_FILE)
            state["sha256"] = {name: digest_of([aside / name]) for name in _TENSOR_FILES}
            if adapter_config is not None:
                (aside / CONFIG_FILE).write_bytes(adapter_config)
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
    rests_on = {path: _rests_on(path) for path in found}
    kept = set(found[-_KEPT:])
    for worker in served:
        before = [path for path, who in rests_on.items() if who is not None and worker not in who]
        kept |= set(before[-1:])
    for old in set(found) - kept:
        remove_directory(old)


def _rests_on(checkpoint: Path) -> list[str] | None:
    """The workers that it rests on; None for a damaged one, of which nobody knows."""
    try:
        served: list[str] = _state(checkpoint)["served"]
    except DamagedError:
        return None
    return served


def _state(checkpoint: Path) -> dict[str, Any]:
    """What its state.json says. Raises DamagedError when that is not what `save` wrote."""
    path = checkpoint / "state.json"
    try:
        state: dict[str, Any] = json.loads(read_bounded(path, _STATE_BYTES_MAX))
        served, losses, norms = state["served"], state["losses"], state["gradient_norms"]
        names = type(served) is list and all(type(name) is str for name in served)
        numbers = all(
            type(values) is list and all(type(value) is float for value in values)
            for values in (losses, norms)
        )
        if not (names and numbers and type(state["run"]) is dict):
            raise ValueError("an entry of another form")
        noise, private = state.get("noise"), state["run"].get("dp_clip") is not None
        if private != (noise is not None):
            raise ValueError("noise of another kind of run")
        if private and not (type(noise) is float and 0 < noise < math.inf):
            raise ValueError("noise that is none")
        steps = len(losses)
        if not steps == state["step"] == len(norms):
            raise ValueError("losses of another number of steps")
        if checkpoint != place_of(checkpoint.parent, steps):
            raise ValueError("of another step")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    return state


@dataclass
class _Whole:
    """A checkpoint in memory, every part of it read."""

    state: dict[str, Any]
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def restore(
    directory: Path,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    distrusted: Collection[str] = (),
    say: Callable[[str], None] = log.warning,
) -> Progress | None:
    """Load the newest whole checkpoint into the parameters and the optimiser; None without any.

    What a crash has left of unfinished ones is cleared away: one process at a time saves here.
    Newer ones that are damaged are set aside. The number of steps may be another than before; the
    schedule is that of the new one, from the first step on.

    distrusted  workers on whose answers it must not rest; newer ones that do are set aside
    say         is told in a line what is not as expected: damage, another number of steps

    Raises ResumeError when it belongs to a run with another configuration, or when all of them are
    damaged or rest on a distrusted worker.
    """
    if directory.is_dir():
        end_replacing(directory)
    if not _found(directory):
        return None
    set_aside(directory, distrusted)
    newest, whole = _newest_whole(directory, distrusted, say)
    state, weights, moments = whole.state, whole.weights, whole.moments
    _require_settings(newest, state["run"], run)
    if {stored_name(name): p.shape for name, p in parameters.items()} != {
        n: w.shape for n, w in weights.items()
    }:
        raise ResumeError(f"{newest} holds another adapter; start over with --fresh")
    _say_steps(state, run, say)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[stored_name(name)])
            # AdamW's step count stays on the CPU, its moments go where the parameter is.
            optimizer.state[parameter] = {
                key.rpartition("::")[2]: value.to(parameter.device) if value.dim() else value
                for key, value in moments.items()
                if key.rpartition("::")[0] == stored_name(name)
            }
    served, norms = frozenset(state["served"]), state["gradient_norms"]
    return Progress(state["step"], state["losses"], norms, served, state.get("noise"))


def _newest_whole(
    directory: Path, distrusted: Collection[str], say: Callable[[str], None]
) -> tuple[Path, _Whole]:
    """The newest one that can be read; those after it are set aside.

    Raises ResumeError when there is none. Then all stay where they are: whoever tries again must
    not be taken for somebody who starts.
    """
    damaged: dict[Path, DamagedError] = {}
    for path in reversed(_found(directory)):
        try:
            whole = _read(path)
        except DamagedError as error:
            damaged[path] = error
            continue
        for other, what in damaged.items():
            say(f"{what}: going on from {path.name} instead; {_put_aside(other, 'damaged')}")
        return path, whole
    if damaged:
        raise ResumeError(
            f"no checkpoint in {directory} is whole ({next(iter(damaged.values()))}); put back a "
            "whole one, or start over with --fresh"
        )
    raise ResumeError(
        f"every checkpoint in {directory} rests on answers of a worker that was caught giving "
        f"wrong ones ({', '.join(sorted(distrusted))}); start over with --fresh"
    )


def _read(path: Path) -> _Whole:
    """All of a checkpoint. Raises DamagedError when a part is missing, cut, or of another one."""
    state, weights = _state(path), _load(path / WEIGHTS_FILE)
    moments = _load(path / _MOMENTS_FILE)
    if state.get("sha256") != {n: digest_of([path / n]) for n in _TENSOR_FILES}:
        raise DamagedError(f"{path} is damaged (its tensors are not those that were saved)")
    names = {f"{name}::{key}" for name in weights for key in _MOMENTS if state["step"]}
    if moments.keys() != names or any(
        moments[f"{name}::{key}"].shape != weight.shape
        for name, weight in weights.items() for key in _MOMENTS[1:] if state["step"]
    ):  # fmt: skip
        raise DamagedError(f"{path / _MOMENTS_FILE} is damaged (not of this adapter)")
    return _Whole(state, weights, moments)


def require_same_run(directory: Path, run: dict[str, Any], sequences: Sequences) -> None:
    """Raise ResumeError where `restore` will, as far as settings tell, and change nothing.

    run  what is known of the settings so far; of those that are missing nothing is said
    """
    for path in reversed(_found(directory)):
        try:
            found = _state(path)["run"]
        except DamagedError:
            continue  # the one before it is gone on from
        _require_settings(path, found, run | {"data": data_tag(directory, sequences)})
        return


def _require_settings(checkpoint: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = _differing(found, wanted)
    if differing:
        raise ResumeError(
            f"{checkpoint} was made with other settings ({'; '.join(differing)}); use the same "
            "ones, another --out, or start over with --fresh"
        )


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings that may not differ and do, a phrase each, with both values."""
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    if "steps" in keys:
        keys = [key for key in keys if key not in _SCHEDULE]
    return [
        "data: another text, or read otherwise" if key == "data"
        else f"{key} {_shown(found.get(key))}, not {_shown(wanted[key])}"
        for key in keys
    ]  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _say_steps(state: dict[str, Any], run: dict[str, Any], say: Callable[[str], None]) -> None:
    before, now, done = state["run"].get("steps"), run.get("steps"), state["step"]
    if before == now:
        return
    if now is not None and done >= now:
        say(
            f"{done} steps are done, and {now} are asked for: nothing is left to train; the "
            f"adapter is that of step {done}"
        )
    else:
        say(
            f"this run was to have {_shown(before)} steps and has {now} now: from step {done + 1} "
            f"on the learning rate is that of a run of {now} steps"
        )


def set_aside(directory: Path, distrusted: Collection[str]) -> None:
    """Rename the checkpoints that rest on these workers: no run goes on from them any more.

    Of a damaged one nobody knows on whom it rests; no run goes on from it either.
    """
    for path in _found(directory):
        if set(distrusted).isdisjoint(_rests_on(path) or ()):
            continue
        _put_aside(path, "distrusted")


def _put_aside(checkpoint: Path, why: str) -> str:
    """Rename a checkpoint, for good; says so."""
    aside = checkpoint.with_name(f"{why}-{checkpoint.name}")
    while aside.exists() or aside.is_symlink():
        aside = aside.with_name(f"{aside.name}-again")
    try:
        checkpoint.rename(aside)
        sync_directory(checkpoint.parent)
    except OSError as error:
        raise ResumeError(
            f"{checkpoint} is not to be used any more ({why}), and cannot be renamed "
            f"({error.strerror}); delete it"
        ) from error
    return f"it is kept as {aside.name}"


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in directory.iterdir()}
    steps = {path: int(name[1]) for path, name in found.items() if name}
    return sorted(steps, key=steps.__getitem__)
