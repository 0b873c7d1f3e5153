"""What the owner keeps on the device: A, scales, and the hints, or as many as fit.

All of it is public. Hints that do not fit are streamed from host memory at every call, in slabs;
a slab serves all blocks of the request before the next one takes its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.cuda.streams import Conveyor
from backends.he.interface import OwnerMatrix
from backends.he.params import RING_DEGREE
from backends.he.public import PublicMatrix
from backends.he.ring import tiles_of
from backends.he.vector import LANES

_SLAB_BYTES = 32 << 20
_SHARE_OF_FREE = 0.5
"""Of the memory free at the start, what hints may take when nobody says."""


@dataclass
class _Entry:
    """One matrix on the device; `hint` is None while it is streamed."""

    matrix: OwnerMatrix
    in_scale: torch.Tensor
    out_scale: torch.Tensor
    hint: torch.Tensor | None


class Residents:
    """The public arrays of one owner.

    hint_bytes  the most device memory hints may take; None: half of what is free now
    """

    def __init__(self, gpu: Gpu, public: PublicMatrix, hint_bytes: int | None = None) -> None:
        self._gpu = gpu
        self._public = public
        share = int(gpu.free_bytes() * _SHARE_OF_FREE)
        self._room = share if hint_bytes is None else hint_bytes
        self._tile_bytes = 4 * public.rank * RING_DEGREE * LANES
        self._slab_tiles = max(1, _SLAB_BYTES // self._tile_bytes)
        self._conveyor: Conveyor | None = None
        self._rows = torch.empty((0, public.rank, RING_DEGREE, LANES), dtype=torch.int32)
        self._parts: dict[int, torch.Tensor] = {}
        self._entries: dict[str, _Entry] = {}
        self._changing = threading.RLock()

    @property
    def room_bytes(self) -> int:
        """Bytes that further hints may take."""
        return self._room

    def public_rows(self, count: int) -> torch.Tensor:
        """int32[tiles, rank, 256, 16] on the device, whose first `count` rows are A's."""
        want = tiles_of(count)
        with self._changing:
            part = self._parts.get(want)
            if part is None:
                if len(self._rows) < want:
                    self._rows = self._upload(self._public.rows(count))
                    self._parts.clear()  # of the smaller matrix, whose memory goes
                part = self._parts[want] = self._rows[:want]
            return part

    def scales(self, matrix: OwnerMatrix) -> tuple[torch.Tensor, torch.Tensor]:
        """(in_scale float32[K], out_scale float32[N]) on the device."""
        entry = self._entry(matrix)
        return entry.in_scale, entry.out_scale

    def slabs(self, matrix: OwnerMatrix) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, int32[tiles, rank, 256, 16] on the device), covering the hint in order.

        A slab is good for what is queued before the next one is asked for.
        """
        assert matrix.hint is not None
        hint = self._entry(matrix).hint
        if hint is not None:
            yield 0, hint
            return
        for first, slab in self._carry(matrix.hint):
            yield first * LANES, slab

    def _entry(self, matrix: OwnerMatrix) -> _Entry:
        with self._changing:
            entry = self._entries.get(matrix.name)
            if entry is None or entry.matrix is not matrix:
                in_scale, out_scale = (
                    torch.from_numpy(np.array(scale, np.float32)).to(self._gpu.device)
                    for scale in (matrix.in_scale, matrix.out_scale)
                )
                if entry is not None and entry.hint is not None:
                    self._room += entry.hint.nbytes
                entry = _Entry(matrix, in_scale, out_scale, self._place(matrix.hint))
                self._entries[matrix.name] = entry
            return entry

    def _place(self, hint: NDArray[np.int32] | None) -> torch.Tensor | None:
        if hint is None or hint.nbytes > self._room:
            return None
        self._room -= hint.nbytes
        return self._upload(hint)

    def _upload(self, tiles: NDArray[np.int32]) -> torch.Tensor:
        out = torch.empty(tiles.shape, dtype=torch.int32, device=self._gpu.device)
        for first, slab in self._carry(tiles):
            out[first : first + len(slab)] = slab
        return out

    def _carry(self, tiles: NDArray[np.int32]) -> Iterator[tuple[int, torch.Tensor]]:
        """(first tile, int32[tiles, rank, 256, 16] on the device) of a host array, in slabs."""
        with self._changing:
            if self._conveyor is None:
                self._conveyor = Conveyor(self._gpu, self._slab_tiles * self._tile_bytes)
        starts = range(0, len(tiles), self._slab_tiles)
        parts = (tiles[start : start + self._slab_tiles] for start in starts)
        for start, raw in zip(starts, self._conveyor.carry(parts), strict=True):
            yield start, raw.view(torch.int32).view(-1, *tiles.shape[1:])
