"""Preparing a model: the public set-up, once per model. `store.py` has the files' layout.

Two passes, because A's seed is bound to the digest of all quantised weights: first quantise,
then build hints. Each file appears whole or not at all, and a second run goes on where an
interrupted one stopped.

Both passes read ahead and write behind on background threads: on a GPU, reading, SHA-256 and the
disk are expected to take longer than the arithmetic. An H100 prepares Llama-3.2-1B in 4.5 s; how
much of that is arithmetic is unmeasured. What is computed is computed in order, in the caller's
thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from backends.defaults import OWNER_TAG_BYTES
from backends.files import WriteError, end_replacing, require_own, write_array, write_json
from backends.he.descriptors import require_descriptors
from backends.he.interface import Float32Array
from backends.he.manifest import (
    QUANTISED,
    GroupEntry,
    GroupSpec,
    Manifest,
    PreparationError,
    Wanted,
    array_form,
    group_record,
    is_finished,
    read_group_record,
    read_hint_record,
)
from backends.he.params import Parameters
from backends.he.plan import MatrixPlan, plan_directions
from backends.he.public import HintBuilder, PublicMatrix
from backends.he.quantise import channel_scales, quantise
from backends.he.ring import tiles_of
from backends.he.store import PreparedModel, array_path, map_stored
from backends.he.vector import LANES
from backends.he.verification import Progress, Trust, open_trusted
from backends.lock import alone
from backends.places import PlaceError, require_room, taken_bytes
from backends.threads import Job, core_count, run_ahead

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Quantised: TypeAlias = tuple[NDArray[np.int8], Float32Array, Float32Array]
"""int8[N, K], float32[N] scales and float32[K] c of a group (`quantise.py`), as QUANTISED names."""
_CPU = torch.device("cpu")
HINT_SLAB = 4096
"""Rows of a hint built at a time."""

_WRITERS = 8  # threads that hash and write, on a machine with as many cores
_AHEAD_BYTES = 1 << 30  # that may wait to be computed, and as much to be written
_LOCK = "preparing.lock"


class BuildsHints(Protocol):
    """What `HintBuilder` does, wherever it does it."""

    rank: int

    def build(self, weight: NDArray[np.int8], forward: bool) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Arithmetic:
    """Where a preparation is computed. What is written is the same, byte for byte.

    device   where weights are quantised and summed
    hints    the builder of hints against one A
    readers  threads that call `load_weight` ahead; with one, modules are read in order
    """

    device: torch.device = _CPU
    hints: Callable[[PublicMatrix], BuildsHints] = HintBuilder
    readers: int = 1


def disk_bytes(groups: Sequence[GroupSpec], parameters: Parameters | None) -> int:
    """Bytes a prepared model takes on disk (no hints when `parameters` is None)."""
    total = 0
    for group in groups:
        total += group.in_features * group.total_out + 4 * (group.total_out + group.in_features)
        if parameters is not None:
            rows = LANES * (tiles_of(group.total_out) + tiles_of(group.in_features))
            total += rows * parameters.dimension * 4
    return total


def work_units(groups: Sequence[GroupSpec], parameters: Parameters | None) -> int:
    """Units that `prepare` reports in all: int8 weights quantised, plus hint rows * inputs."""
    weights = sum(group.in_features * group.total_out for group in groups)
    return weights * (1 if parameters is None else 3)


def prepare(
    directory: Path,
    groups: Sequence[GroupSpec],
    load_weight: Callable[[str], torch.Tensor],
    parameters: Parameters | None,
    progress: Progress,
    owner_tag: bytes = b"",
    arithmetic: Arithmetic | None = None,
    trust: Trust | None = None,
    on_wait: Callable[[str], None] = log.warning,
) -> PreparedModel:
    """Quantise the groups' weights and build their hints, keeping what a former run finished.

    load_weight  the floating weight [out, in] of one module, by name; called in a thread of
                 its own, or in several when `arithmetic` has several readers
    parameters   None prepares for the `clear` backend: no hints
    progress     called in this thread, when a part is on the disk
    owner_tag    gives the owner a public matrix A, and hints, of its own; public
    arithmetic   where to compute; None is the CPU
    trust        how what this process did not compute is trusted; None verifies it every time
    on_wait      is told in a line when another process is making it, which is waited for

    The whole is verified at the end, whoever made which part of it, unless this owner has done that
    before: what is on the disk by then is what will be used.

    Raises PreparationError when the disk has no room or refuses, or when what lies there is
    damaged, wrong, or prepared otherwise than asked for.
    """
    if len(owner_tag) > OWNER_TAG_BYTES:
        raise PreparationError(f"an owner tag has at most {OWNER_TAG_BYTES} bytes")
    trust = trust or Trust()
    wanted = Wanted(tuple(groups), parameters, owner_tag)
    if not is_finished(directory):
        require_descriptors(len(groups) * (4 if parameters else 2))
        try:
            _make_alone(directory, wanted, load_weight, progress, arithmetic, on_wait)
        except PlaceError as error:
            raise PreparationError(str(error)) from error
        except OSError as error:
            what = error.strerror if isinstance(error, WriteError) else error
            where = error.path if isinstance(error, WriteError) else directory
            raise PreparationError(
                f"preparing in {where} failed: {what}; mend that and run it again: it goes on with "
                "the file after the last finished one"
            ) from error
    return open_trusted(directory, wanted, trust)


def _make_alone(
    directory: Path,
    wanted: Wanted,
    load_weight: Callable[[str], torch.Tensor],
    progress: Progress,
    arithmetic: Arithmetic | None,
    on_wait: Callable[[str], None],
) -> None:
    """Make what is missing, while no other process does."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = (directory, directory / "worker", directory / "owner")
    require_own(*parts)
    with alone(directory / _LOCK, "", on_wait) as certain:
        if is_finished(directory):
            return  # by the one that was waited for
        if certain:
            for part in filter(Path.is_dir, parts):
                end_replacing(part)
        needed = disk_bytes(wanted.groups, wanted.parameters) - taken_bytes(directory)
        require_room(directory, needed, "preparation", "choose another place with --cache")
        _make(directory, wanted, load_weight, progress, arithmetic or Arithmetic())


def _make(
    directory: Path,
    wanted: Wanted,
    load_weight: Callable[[str], torch.Tensor],
    progress: Progress,
    arithmetic: Arithmetic,
) -> None:
    """Write every file that is missing, and the manifest."""
    groups, parameters = wanted.groups, wanted.parameters
    entries = _quantise_all(directory, groups, parameters, load_weight, progress, arithmetic)
    seed = Manifest(parameters, wanted.owner_tag, tuple(entries)).seed
    if seed is not None and parameters is not None:
        builder = arithmetic.hints(PublicMatrix(seed, parameters.rank))
        with closing(_build_hints(directory, entries, builder, seed)) as hints:
            for index, direction, sha256 in hints:
                entry = entries[index]
                entries[index] = replace(entry, sha256=entry.sha256 | {direction: sha256})
                group = groups[index]
                progress(f"hint {group.name} {direction}", group.in_features * group.total_out)
    Manifest(parameters, wanted.owner_tag, tuple(entries)).write(directory)


def _write_behind(jobs: Iterator[Job[_T]]) -> closing[Generator[_T, None, None]]:
    return closing(run_ahead(jobs, min(_WRITERS, core_count()), _AHEAD_BYTES))


def _read_ahead(jobs: Iterator[Job[_T]], readers: int = 1) -> closing[Generator[_T, None, None]]:
    return closing(run_ahead(jobs, readers, _AHEAD_BYTES))


def _quantise_all(
    directory: Path,
    groups: Sequence[GroupSpec],
    parameters: Parameters | None,
    load_weight: Callable[[str], torch.Tensor],
    progress: Progress,
    arithmetic: Arithmetic,
) -> list[GroupEntry]:
    """The manifest entries of all groups, from their files where a former run left them."""
    found_of = partial(_finished_group, directory, parameters)
    entries = {index: found_of(index, group) for index, group in enumerate(groups)}
    missing = [index for index, entry in entries.items() if entry is None]

    def reading() -> Iterator[Job[list[torch.Tensor]]]:
        for index in missing:
            group = groups[index]
            size = 4 * group.in_features * group.total_out
            yield Job(size, partial(_load_group, group, load_weight))

    def writing() -> Iterator[Job[GroupEntry]]:
        with _read_ahead(reading(), arithmetic.readers) as weights:
            for index, parts in zip(missing, weights, strict=True):
                group = groups[index]
                limit = weight_limit(group, parameters)
                made = _quantise_group(group, parts, limit, arithmetic.device)
                codes, scales, channels = made
                plans = plan_directions(
                    codes, scales, parameters, group.precise, arithmetic.device, channels
                )
                write = partial(_write_group, directory, index, group, made, plans, parameters)
                yield Job(codes.nbytes, write)

    found = []
    with _write_behind(writing()) as written:
        for index, group in enumerate(groups):
            found.append(entries[index] or next(written))
            progress(f"quantise {group.name}", group.in_features * group.total_out)
    return found


def _record_path(directory: Path, index: int) -> Path:
    return directory / "owner" / f"g{index:04d}.json"


def weight_limit(group: GroupSpec, parameters: Parameters | None) -> int:
    """The largest absolute value of the group's quantised weights."""
    return 127 if parameters is None or group.precise else parameters.weight_limit


def _finished_group(
    directory: Path, parameters: Parameters | None, index: int, group: GroupSpec
) -> GroupEntry | None:
    """What a former run recorded of a group, if its files have the right shape too."""
    entry = read_group_record(_record_path(directory, index), parameters)
    if entry is None or entry.spec != group:
        return None
    try:
        for kind in entry.sha256:
            map_stored(directory, index, entry, kind, 0)
    except PreparationError:
        return None
    return entry


def _load_group(group: GroupSpec, load_weight: Callable[[str], torch.Tensor]) -> list[torch.Tensor]:
    """The floating weight of each member. Raises PreparationError for one of another shape."""
    weights = []
    for module, outputs in zip(group.members, group.out_features, strict=True):
        weight = load_weight(module)
        if tuple(weight.shape) != (outputs, group.in_features):
            raise PreparationError(
                f"{module}: the checkpoint's weight is {list(weight.shape)}, the model's config "
                f"says [{outputs}, {group.in_features}]"
            )
        weights.append(weight)
    return weights


def _quantise_group(
    group: GroupSpec, weights: Sequence[torch.Tensor], limit: int, device: torch.device
) -> Quantised:
    """All members, one below the other."""
    parts = []
    channels = channel_scales(weights, device)
    for module, weight in zip(group.members, weights, strict=True):
        try:
            parts.append(quantise(weight, limit, device, channels))
        except ValueError as error:
            raise PreparationError(f"{module}: {error}") from error
    if len(parts) == 1:
        return *parts[0], channels
    codes, scales = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(scales), channels


def _write_group(
    directory: Path,
    index: int,
    group: GroupSpec,
    made: Quantised,
    plans: tuple[MatrixPlan, MatrixPlan],
    parameters: Parameters | None,
) -> GroupEntry:
    """Write a group's arrays, then the record that it is finished; returns its entry."""
    digests = {}
    arrays: dict[str, NDArray[Any]] = dict(zip(QUANTISED, made, strict=True))
    for kind, array in arrays.items():
        dtype, shape = array_form(group, kind, 0)
        digests[kind] = write_array(array_path(directory, index, kind), shape, dtype, [array])
    entry = GroupEntry(group, *plans, digests)
    write_json(_record_path(directory, index), group_record(entry, parameters))
    return entry


def _build_hints(
    directory: Path, entries: Sequence[GroupEntry], builder: BuildsHints, seed: bytes
) -> Generator[tuple[int, str, str], None, None]:
    """(group, direction, SHA-256) of every hint, made now or by a former run."""
    order = _hint_order([entry.spec for entry in entries])
    finished = {
        hint: _finished_hint(directory, entries[hint[0]], *hint, builder.rank, seed)
        for hint in order
    }
    missing = [hint for hint in order if finished[hint] is None]
    quantised = list(entries)  # the caller adds hints to its own

    def reading() -> Iterator[Job[NDArray[np.int8]]]:
        for index, _ in missing:
            entry = quantised[index]
            stored = map_stored(directory, index, entry, "weight", 0)
            yield Job(stored.values.nbytes, partial(np.array, stored.values))

    def writing() -> Iterator[Job[str]]:
        with _read_ahead(reading()) as weights:
            for (index, direction), weight in zip(missing, weights, strict=True):
                slabs = _hint_slabs(builder, weight, direction == "forward")
                size = sum(slab.nbytes for slab in slabs)
                yield Job(size, partial(_write_hint, directory, index, direction, slabs, seed))

    with _write_behind(writing()) as written:
        for hint in order:
            yield *hint, finished[hint] or next(written)


def _hint_order(groups: Sequence[GroupSpec]) -> list[tuple[int, str]]:
    """(group, direction), forward first, widest input first: equal widths share A's planes."""
    widths = {
        "forward": [group.in_features for group in groups],
        "backward": [group.total_out for group in groups],
    }
    return [
        (index, direction)
        for direction, width in widths.items()
        for index in sorted(range(len(groups)), key=width.__getitem__, reverse=True)
    ]


def _finished_hint(
    directory: Path, entry: GroupEntry, index: int, direction: str, rank: int, seed: bytes
) -> str | None:
    """The SHA-256 of a hint that a former run finished, if its file has the right shape too."""
    record = read_hint_record(array_path(directory, index, direction).with_suffix(".json"))
    if record is None or record[0] != seed.hex():
        return None
    try:
        map_stored(directory, index, replace(entry, sha256={direction: record[1]}), direction, rank)
    except PreparationError:
        return None
    return record[1]


def _hint_slabs(
    builder: BuildsHints, weight: NDArray[np.int8], forward: bool
) -> list[NDArray[np.int32]]:
    """The hint of int8[N, K] in parts of HINT_SLAB rows, each int32[tiles, rank, 256, 16]."""
    matrix = weight if forward else weight.T
    slabs = []
    for start in range(0, len(matrix), HINT_SLAB):
        rows = matrix[start : start + HINT_SLAB]
        slabs.append(builder.build(rows if forward else rows.T, forward))
    return slabs


def _write_hint(
    directory: Path, index: int, direction: str, slabs: list[NDArray[np.int32]], seed: bytes
) -> str:
    """Write a hint, then the record that it is finished; returns its SHA-256."""
    path = array_path(directory, index, direction)
    shape = (sum(map(len, slabs)), *slabs[0].shape[1:])
    sha256 = write_array(path, shape, np.int32, slabs)
    write_json(path.with_suffix(".json"), {"seed": seed.hex(), "sha256": sha256})
    return sha256
