"""The ring's inner product at its bounds, against exact integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from backends.he.params import NTT_PRIME as Q
from backends.he.params import RING_DEGREE
from backends.he.ring import first_coefficient_kernel, inverse_tables, mask_tile_kernel
from backends.he.vector import LANES, slot_product

HALF = Q // 2
INVERSE = pow(1 << 32, -1, Q)
RANKS = (1, 5, 6, 8)


def kernel(rank: int) -> Any:
    """`slot_product` for every slot of one tile, as compiled code calls it."""
    product = slot_product(rank)

    @njit
    def run(matrix: Any, secret: Any, out: Any) -> None:
        for slot in range(RING_DEGREE):
            product(matrix, 0, secret, slot, out)

    return run


KERNELS = {rank: kernel(rank) for rank in RANKS}


def products(rank: int, rows: np.ndarray, secret: np.ndarray) -> np.ndarray:
    """uint32[256, 16] from int32[rank, 256, 16] and int32[rank, 256]."""
    out = np.zeros(RING_DEGREE * LANES, np.uint32)
    KERNELS[rank](rows.reshape(-1), secret.reshape(-1), out)
    return out.reshape(RING_DEGREE, LANES)


def exact(rows: np.ndarray, secret: np.ndarray) -> np.ndarray:
    """The same in unbounded integers."""
    total = (rows.astype(object) * secret.astype(object)[:, :, None]).sum(axis=0)
    return (total * INVERSE % Q).astype(np.uint32)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_reduced(rank: int, sign: int) -> None:
    """All residues near the edge: sums as large as they can be, with any low half.

    Found by a chaos run: the reduction was off by 2^32 mod q about once in 2*10^9 products.
    """
    draw = np.random.default_rng(rank).integers
    rows = (HALF - draw(0, 1000, (rank, RING_DEGREE, LANES))).astype(np.int32)
    secret = (sign * (HALF - draw(0, 1000, (rank, RING_DEGREE)))).astype(np.int32)
    assert np.array_equal(products(rank, rows, secret), exact(rows, secret))


edges = st.sampled_from([-HALF, 1 - HALF, -1, 0, 1, HALF - 1, HALF])
residues = edges | st.integers(-HALF, HALF)


@settings(max_examples=60, deadline=None)
@given(rank=st.sampled_from(RANKS), data=st.data())
def test_any_residues_are_reduced(rank: int, data: st.DataObject) -> None:
    """Edges and anything between, a few at a time, over all lanes and slots."""
    few = st.lists(residues, min_size=7, max_size=7)
    rows = np.resize(np.array(data.draw(few), np.int32), (rank, RING_DEGREE, LANES))
    secret = np.resize(np.array(data.draw(few), np.int32)[:5], (rank, RING_DEGREE))
    assert np.array_equal(products(rank, rows, secret), exact(rows, secret))


@pytest.mark.parametrize("rank", [5, 8])
def test_the_first_coefficient_alone_is_that_of_the_whole_mask(rank: int) -> None:
    """Of every row of a tile that is not the first, and of residues near the edge too."""
    draw = np.random.default_rng(rank).integers
    rows = draw(-HALF, HALF + 1, (2, rank, RING_DEGREE, LANES)).astype(np.int32)
    rows[1, :, :, : LANES // 2] = HALF
    secret = draw(HALF - 1000, HALF + 1, (rank, RING_DEGREE)).astype(np.int32)
    flat = rows.reshape(-1), 1, secret.reshape(-1)
    whole, alone = (np.zeros(RING_DEGREE * LANES, np.uint32) for _ in range(2))
    mask_tile_kernel(rank)(*flat, whole, *inverse_tables())
    first_coefficient_kernel(rank)(*flat, alone)
    assert np.array_equal(whole[:LANES], alone[:LANES])
    assert len(np.unique(alone[:LANES])) > LANES // 2
