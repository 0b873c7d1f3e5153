"""Preparing a model on the GPU: quantisation, plans and hints, the same bytes as on the CPU.

A hint is one integer GEMM on A's NTT values (see `public.py`), here four limb planes of A
against the int8 weights with torch's library product, recombined mod q in 64-bit integers.
All of it is public; nothing here holds a secret.

A chunk's product, recombination and copy to the host follow one another on the current stream.
What overlaps them is the host's share: reading weights ahead, hashing, writing behind. No speed of
this has been measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from backends.he.cuda.device import Gpu
from backends.he.manifest import GroupSpec
from backends.he.params import NTT_PRIME, RING_DEGREE, Parameters
from backends.he.plan import plan_bytes
from backends.he.preparation import HINT_SLAB, Arithmetic
from backends.he.public import PublicMatrix
from backends.he.quantise import quantise_bytes
from backends.he.ring import tiles_of
from backends.he.vector import LANES

LIMBS_OF_A = 4  # signed base-256 digits of a residue
_CHUNK_TILES = 128  # of hint rows recombined at a time, and of A's rows split into limbs
_READERS = 4  # threads that read a checkpoint ahead


def cuda_arithmetic(gpu: Gpu) -> Arithmetic:
    """A preparation's arithmetic on `gpu`. `load_weight` is then called in several threads."""
    return Arithmetic(gpu.device, lambda public: CudaHintBuilder(public, gpu), _READERS)


def preparation_needs(groups: Sequence[GroupSpec], parameters: Parameters | None) -> dict[str, int]:
    """Bytes of device memory that preparing `groups` takes at most, by what they are for."""
    inputs = max(group.in_features for group in groups)
    needs = {"quantisation": quantise_bytes(inputs) + plan_bytes(inputs)}
    if parameters is not None:
        width = LANES * tiles_of(max(inputs, max(group.total_out for group in groups)))
        slots = parameters.dimension
        needs["limb planes of A"] = LIMBS_OF_A * slots * width
        # A slab as it arrived, and padded with its inputs innermost.
        needs["a slab of weights"] = 2 * HINT_SLAB * width
        # Four int32 products, the int64 sum with one operand widened to it, the int32 result.
        needs["products"] = (4 * LIMBS_OF_A + 8 + 8 + 4) * slots * _CHUNK_TILES * LANES
    return needs


class CudaHintBuilder:
    """`HintBuilder` on a GPU, bit for bit. Keeps the limb planes of the tallest A so far."""

    def __init__(self, public: PublicMatrix, gpu: Gpu) -> None:
        self._public = public
        self._gpu = gpu
        self.rank = public.rank
        self._slots = public.rank * RING_DEGREE
        self._planes = self._no_planes()

    def build(self, weight: NDArray[np.int8], forward: bool) -> NDArray[np.int32]:
        """int32[tiles, rank, 256, 16] in page-locked memory: the hint of int8[N, K].

        It has N rows forward, and K rows backward, where the matrix is the transpose.
        """
        outputs, inputs = weight.shape if forward else weight.shape[::-1]
        operand = self._operand(weight, forward)
        planes = self._planes_for(inputs)
        tiles = tiles_of(outputs)
        pinned = self._gpu.pinned(4 * tiles * self._slots * LANES)
        hint = pinned.view(torch.int32).view(tiles, self._slots, LANES)
        for start in range(0, tiles, _CHUNK_TILES):
            rows = operand[start * LANES : (start + _CHUNK_TILES) * LANES]
            products = torch._int_mm(planes, rows.t()).view(LIMBS_OF_A, self._slots, -1)
            part = _recombined(products)
            hint[start : start + len(part)].copy_(part, non_blocking=True)
        self._gpu.synchronize()
        return hint.view(tiles, self.rank, RING_DEGREE, LANES).numpy()

    def _operand(self, weight: NDArray[np.int8], forward: bool) -> torch.Tensor:
        """int8[outputs, inputs] on the device, both padded with zeros to a multiple of LANES.

        The inputs are innermost, the one layout that int8 tensor cores take everywhere; the
        library asks for sizes in multiples of 8, and the padding adds nothing to a product.
        """
        sent = torch.from_numpy(weight).to(self._gpu.device)
        rows = sent if forward else sent.t()
        shape = [LANES * tiles_of(size) for size in rows.shape]
        operand = torch.zeros(shape, dtype=torch.int8, device=self._gpu.device)
        operand[: rows.shape[0], : rows.shape[1]] = rows
        return operand

    def _planes_for(self, inputs: int) -> torch.Tensor:
        """int8[4*r*256, K] on the device, K padded to a multiple of LANES.

        The signed base-256 digits of A's residues. A for fewer inputs is a prefix of A for
        more, so the planes of the tallest serve all; rows of A in the padding meet zeros.
        """
        width = LANES * tiles_of(inputs)
        if self._planes.shape[2] < width:
            self._planes = self._no_planes()  # before there are larger ones
            self._planes = self._split(torch.from_numpy(self._public.rows(inputs)))
        return self._planes.view(LIMBS_OF_A * self._slots, -1)[:, :width]

    def _no_planes(self) -> torch.Tensor:
        return torch.empty((LIMBS_OF_A, self._slots, 0), dtype=torch.int8, device=self._gpu.device)

    def _split(self, tiles: torch.Tensor) -> torch.Tensor:
        """int32[tiles, rank, 256, 16], centred mod q -> its digits int8[4, r*256, tiles*16]."""
        planes = torch.empty(
            (LIMBS_OF_A, self._slots, len(tiles) * LANES),
            dtype=torch.int8,
            device=self._gpu.device,
        )
        for start in range(0, len(tiles), _CHUNK_TILES):
            part = tiles[start : start + _CHUNK_TILES].to(self._gpu.device)
            rest = part.view(-1, self._slots, LANES).transpose(0, 1).reshape(self._slots, -1)
            columns = slice(start * LANES, start * LANES + rest.shape[1])
            for limb in range(LIMBS_OF_A):
                digit = ((rest + 128) & 255) - 128
                planes[limb, :, columns] = digit
                rest = (rest - digit) >> 8
        return planes


def _recombined(products: torch.Tensor) -> torch.Tensor:
    """int32[4, r*256, n] -> int32[n/16, r*256, 16]: the sum of 256^l * products, centred mod q."""
    total = products[3].to(torch.int64).bitwise_left_shift_(24)  # sums stay below 2^56
    for limb in range(LIMBS_OF_A - 1):
        total.add_(products[limb], alpha=1 << (8 * limb))
    half = NTT_PRIME // 2
    total.add_(half).remainder_(NTT_PRIME).sub_(half)
    slots, rows = total.shape
    return (
        total.view(slots, rows // LANES, LANES)
        .transpose(0, 1)
        .to(torch.int32, memory_format=torch.contiguous_format)
    )
