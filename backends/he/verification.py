"""Whether a prepared model that lies on a disk is what it says: the owner takes nothing on trust.

A wrong hint makes answers garbage; a plan with too small a norm lets results wrap; a scale that is
not finite poisons training. Digests find none of this when whoever made the files recorded the
digests too. So, from the weights alone:

  * weights are within the quantiser's -127..127, scales finite and positive, channels' factors
    powers of two within its bounds;
  * plans are made again and compared: norms exactly, the error forecast to its rounding;
  * a hint H of M (N x K) must be M*A mod q. For c uniform in [0, q)^N, drawn from the operating
    system's entropy when verification begins,

        c*H = (c*M)*A   mod q,  in all rank*256 slots,

    always holds for the right hint. If H differs from M*A in any slot, then c times the difference
    is zero there for one c in q: a wrong hint passes with probability 1/q (Freivalds 1977);
  * a hint's values are centred, |h| <= q/2, as the kernels' bounds need, and the rows that fill up
    its last tile are zero.

Everything is exact. With centred factors, |c| <= q/2 and |h| <= q/2: eight products stay below
8*(q/2)^2 < 2^63 for every q < 2^31, and each such sum is cut into 32-bit halves before halves are
summed (fewer than 2^30 of them). A weight's column sums, of at most 2^20 products below 2^37, stay
below 2^57. A is expanded tile by tile, once for all matrices.

What this does not show: that the weights are those of the model you have in mind. Who made all the
files could have quantised another model. The model digest names the weights, and a worker must have
the same ones; compare it with one you trust, or prepare the model yourself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isclose
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends import jit
from backends.he.manifest import QUANTISED, PreparationError, Wanted
from backends.he.params import NTT_PRIME
from backends.he.plan import Norms, plans_from
from backends.he.public import expand_tile
from backends.he.quantise import MOST_DOUBLINGS
from backends.he.ring import centre, tiles_of
from backends.he.store import PreparedModel, Stored
from backends.he.vector import LANES
from backends.he.verdict import Verdicts
from backends.threads import Job, core_count, run_ahead, run_split

_Q = NTT_PRIME
_FACTORS = np.ldexp(np.float32(1), np.arange(-MOST_DOUBLINGS, MOST_DOUBLINGS + 1))
_FORECAST = 1e-9  # relative: sums of floats may be taken in another order on another processor


class Progress(Protocol):
    """What long work on a prepared model tells of its advance: a label and units done."""

    def __call__(self, label: str, done: int) -> None: ...


def _unwatched(reason: str, total: int) -> AbstractContextManager[Progress]:
    return nullcontext(lambda label, done: None)


@dataclass(frozen=True)
class Trust:
    """How a prepared model comes to be trusted.

    verdicts  what this owner found before; None believes nothing and keeps nothing
    anew      verify whatever was found before
    watch     told in a line why a verification begins, and its bytes; what is entered is told of
              its advance
    """

    verdicts: Verdicts | None = None
    anew: bool = False
    watch: Callable[[str, int], AbstractContextManager[Progress]] = _unwatched

    def reason(self, model: PreparedModel) -> str | None:
        """Why a model must be verified; None when this owner has."""
        if self.anew:
            return "as asked"
        if self.verdicts is None or not self.verdicts.holds(model.setup_digest):
            return "this user has not done so before"
        return None

    def keep(self, model: PreparedModel) -> None:
        """From now on the model is trusted, here and in later runs."""
        if self.verdicts is not None:
            self.verdicts.keep(model.setup_digest)
        model.trusted = True


def open_trusted(directory: Path, wanted: Wanted | None, trust: Trust) -> PreparedModel:
    """Open a prepared model of unknown origin: verified, unless this owner's verdict is there.

    Every file is compared with its digest either way.

    wanted  what it must be; None takes what it says it is

    Raises PreparationError when it is damaged, wrong or not what is wanted.
    """
    model = PreparedModel.open(directory, wanted)
    reason = trust.reason(model)
    if reason is None:
        check_digests(model)
        model.trusted = True
        return model
    start = time.perf_counter()
    size = sum(s.values.nbytes for group in model.stored for s in group)
    with trust.watch(reason, size) as progress:
        verify(model, progress)
    model.verification_s = time.perf_counter() - start
    trust.keep(model)
    return model


def check_digests(model: PreparedModel) -> None:
    """Raise PreparationError unless every array has the digest that the manifest states."""

    def jobs() -> Iterator[Job[None]]:
        for stored in (stored for group in model.stored for stored in group):
            yield Job(stored.values.nbytes, stored.read)

    _each(jobs(), lambda found: None)


def _each(jobs: Iterator[Job[Any]], take: Callable[[Any], None]) -> None:
    """Hand over the results of jobs on all cores; maps are pages, so nothing bounds the bytes."""
    with closing(run_ahead(jobs, core_count(), 1 << 62)) as results:
        for result in results:
            take(result)


@jit.kernel
def _combine_tiles(tiles: Any, factors: Any, low: Any, high: Any) -> None:
    """Add sum_j factors[j] * row j of int32[n, slots, 16] to low + 2^32*high, int64[slots]."""
    for tile in range(tiles.shape[0]):
        for slot in range(tiles.shape[1]):
            a = np.int64(0)
            b = np.int64(0)
            for lane in range(LANES // 2):
                a += np.int64(factors[tile, lane]) * np.int64(tiles[tile, slot, lane])
            for lane in range(LANES // 2, LANES):
                b += np.int64(factors[tile, lane]) * np.int64(tiles[tile, slot, lane])
            low[slot] += (a & np.int64(0xFFFFFFFF)) + (b & np.int64(0xFFFFFFFF))
            high[slot] += (a >> np.int64(32)) + (b >> np.int64(32))


@jit.kernel
def _combine_codes(codes: Any, down: Any, across: Any, columns: Any, rows: Any) -> None:
    """Of int8[n, K]: columns += down*codes, int64[K]; rows = codes*across, int64[n]."""
    for j in range(codes.shape[0]):
        factor = np.int64(down[j])
        total = np.int64(0)
        for k in range(codes.shape[1]):
            code = np.int64(codes[j, k])
            columns[k] += factor * code
            total += np.int64(across[k]) * code
        rows[j] = total


@jit.kernel
def _sum_norms(codes: Any, rows: Any, columns: Any) -> None:
    """Squares and absolute values of int8[n, K]: rows = int64[2, n], columns += int64[2, K]."""
    for j in range(codes.shape[0]):
        square = np.int64(0)
        absolute = np.int64(0)
        for k in range(codes.shape[1]):
            code = np.int32(codes[j, k])
            square += code * code
            absolute += abs(code)
            columns[0, k] += code * code
            columns[1, k] += abs(code)
        rows[0, j] = square
        rows[1, j] = absolute


def draw_challenge(count: int) -> NDArray[np.int32]:
    """Centred int32[count], uniform mod q, from the operating system's entropy."""
    found = np.empty(0, np.uint32)
    mask = np.uint32((1 << _Q.bit_length()) - 1)
    while len(found) < count:  # at least half are below q
        words = np.frombuffer(os.urandom(8 * (count - len(found))), np.uint32) & mask
        found = np.concatenate([found, words[words < _Q]])
    return centre(found[:count])


def _by_tiles(vector: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32[n] as int32[tiles, 16], filled up with zeros."""
    padded = np.zeros((tiles_of(len(vector)), LANES), np.int32)
    padded.reshape(-1)[: len(vector)] = vector
    return padded


def _residues(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """low + 2^32 * high mod q, in [0, q)."""
    return (low % _Q + high % _Q * ((1 << 32) % _Q)) % _Q


@dataclass
class _Claim:
    """One hint: the challenge c for its rows, and what came of it.

    combined  c*M mod q, centred, by tiles
    sums      c*H mod q, int64[slots]
    """

    hint: Stored
    challenge: NDArray[np.int32]
    combined: NDArray[np.int32] | None = None
    sums: NDArray[np.int64] | None = None


def verify(model: PreparedModel, progress: Progress) -> None:
    """Raise PreparationError unless every file follows from the weights, as the module says.

    Digests are compared on the way. Nothing larger than A's tile and a vector per matrix is held.

    progress  is told of bytes of arrays
    """
    claims: list[_Claim] = []

    def jobs() -> Iterator[Job[list[Stored]]]:
        for group in model.stored:
            stored = {s.kind: s for s in group}
            outputs, inputs = stored["weight"].values.shape
            challenges = draw_challenge(outputs), draw_challenge(inputs)
            hints = [stored[kind] for kind in ("forward", "backward") if kind in stored]
            made = [_Claim(*pair) for pair in zip(hints, challenges, strict=False)]
            claims.extend(made)
            yield Job(0, partial(_verify_weights, model, stored, challenges, made))
            for claim in made:
                yield Job(0, partial(_verify_values, claim))

    def told(done: list[Stored]) -> None:
        for stored in done:
            progress(f"verify {stored.path.stem}", stored.values.nbytes)

    _each(jobs(), told)
    seed = model.manifest.seed
    if seed is not None:
        _verify_products(claims, seed, model.manifest.rank)


def _verify_weights(
    model: PreparedModel,
    stored: dict[str, Stored],
    challenges: tuple[NDArray[np.int32], NDArray[np.int32]],
    claims: Sequence[_Claim],
) -> list[Stored]:
    """Weights, scales and plans of a group; sets the claims' combinations. Returns the arrays."""
    weight, scale, channels = (stored[kind] for kind in QUANTISED)
    codes: NDArray[np.int8] = weight.values
    columns = np.zeros(codes.shape[1], np.int64)
    rows = np.zeros(len(codes), np.int64)

    row_norms = np.zeros((2, len(codes)), np.int64)
    column_norms = np.zeros((2, codes.shape[1]), np.int64)
    least = 0

    def visit(start: int, slab: NDArray[np.int8]) -> None:
        nonlocal least
        least = min(least, int(slab.min()))
        part = slice(start, start + len(slab))
        _sum_norms(slab, row_norms[:, part], column_norms)
        _combine_codes(slab, challenges[0][part], challenges[1], columns, rows[part])

    weight.read(visit)
    scale.read()
    channels.read()
    if least < -127:
        raise weight.fail("holds -128, which no quantised weight is")
    if not (np.isfinite(scale.values).all() and (scale.values > 0).all()):
        raise scale.fail("holds a scale that is not finite and positive")
    if not np.isin(channels.values, _FACTORS).all():
        raise channels.fail("holds a factor that is no power of two, or none that is chosen")
    entry = model.manifest.groups[weight.group]
    plans = plans_from(
        Norms(*row_norms), Norms(*column_norms), scale.values, model.parameters,
        entry.spec.precise, channels.values,
    )  # fmt: skip
    for direction, right, stated in zip(
        ("forward", "backward"), plans, (entry.forward_plan, entry.backward_plan), strict=True
    ):
        exact = all(
            getattr(right, name) == getattr(stated, name)
            for name in ("max_norm", "max_l1", "up_bits", "down_bits")
        )
        if not exact or not isclose(right.noise_gain, stated.noise_gain, rel_tol=_FORECAST):
            raise PreparationError(
                f"{model.directory}: the {direction} plan of {entry.spec.name} in the manifest is "
                "not that of its weights; delete the directory and prepare anew"
            )
    for claim, combined in zip(claims, (columns, rows), strict=False):
        claim.combined = _by_tiles(centre(combined % _Q))
    return [weight, scale, channels]


def _verify_values(claim: _Claim) -> list[Stored]:
    """A hint's range and filling; sets the claim's sums. Returns the array."""
    hint = claim.hint
    slots = hint.values[0].size // LANES
    low, high = np.zeros((2, slots), np.int64)
    factors = _by_tiles(claim.challenge)
    least = most = 0

    def visit(start: int, slab: NDArray[np.int32]) -> None:
        nonlocal least, most
        least, most = min(least, int(slab.min())), max(most, int(slab.max()))
        tiles = slab.reshape(len(slab), slots, LANES)
        _combine_tiles(tiles, factors[start : start + len(slab)], low, high)

    hint.read(visit)
    if max(-least, most) > _Q // 2:
        raise hint.fail("holds a value that is not centred mod q")
    last = len(claim.challenge) - LANES * (len(hint.values) - 1)
    if hint.values[-1, :, :, last:].any():
        raise hint.fail("does not end in rows of zeros")
    claim.sums = _residues(low, high)
    return [hint]


def _verify_products(claims: Sequence[_Claim], seed: bytes, rank: int) -> None:
    """Raise PreparationError unless c*H = (c*M)*A mod q for every claim."""
    vectors = [claim.combined for claim in claims if claim.combined is not None]
    for claim, right in zip(claims, times_public(vectors, seed, rank), strict=True):
        if claim.sums is None or not np.array_equal(right, claim.sums):
            raise claim.hint.fail("is not the hint of its weights")


def times_public(
    vectors: Sequence[NDArray[np.int32]], seed: bytes, rank: int
) -> list[NDArray[np.int64]]:
    """v*A mod q, int64[slots] in [0, q), of centred vectors int32[tiles, 16] of any lengths."""
    tiles = max(map(len, vectors))
    sums = []

    def part(first: int, last: int) -> None:
        # A part of A's tiles, and sums of its own: nothing is shared until the end.
        slots = len(expand_tile(seed, 0, rank).reshape(-1)) // LANES
        low, high = np.zeros((2, len(vectors), slots), np.int64)
        for tile in range(first, last):
            matrix = expand_tile(seed, tile, rank).reshape(1, slots, LANES)
            for index, vector in enumerate(vectors):
                if tile < len(vector):
                    _combine_tiles(matrix, vector[tile : tile + 1], low[index], high[index])
        sums.append((low, high))

    run_split(part, tiles)
    lows, highs = (np.sum(halves, axis=0) for halves in zip(*sums, strict=True))
    return [_residues(low, high) for low, high in zip(lows, highs, strict=True)]
