"""Writes docs/cipher-vectors.json, the test vectors of docs/cipher.md, with the slow reference.

python -m docs.generate_vectors           rewrite the file
python -m docs.generate_vectors --check   exit 1 when the file is stale, write nothing
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy, Keystream, RequestKeys
from backends.he.interface import OwnerMatrix
from backends.he.mlwe_owner import token_scales
from backends.he.params import NTT_PRIME, RING_DEGREE, Parameters, preset
from backends.he.plan import plan_matrix
from backends.he.public import PublicMatrix, expand_tile, public_seed
from backends.he.reference import (
    ReferenceOwner,
    ReferenceWorker,
    _errors,
    evaluation_matrix,
    matmul_mod,
    rows_of_tiles,
)
from backends.he.ring import EVALUATION_EXPONENTS, PSI, centre, tiles_of
from backends.he.secret import ternary
from backends.he.vector import LANES
from backends.he.wire import EXACT, Format

FILE = Path(__file__).with_name("cipher-vectors.json")
SEED = bytes(range(32))
KEY = bytes(range(32, 64))
"""What the secrets and the errors of a request follow from."""
_THIN = (Format(16, 8), Format(18, 10), Format(20, 12))
"""Formats of the requests under `thin`, their gain being 1."""
REJECTING_TILE = 3
"""The first tile of A under SEED, at rank 5, that has a word to replace."""


class VectorsKey(Entropy):
    """Hands out the key of the vectors."""

    simulated = True

    def fresh_key(self, tag: bytes = b"") -> bytearray:
        return bytearray(KEY)


def sha256(array: NDArray[Any]) -> str:
    """Of an array's little-endian bytes."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def large_case() -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """(x float32[300, 200], weight int8[40, 200], out_scale float32[40]), by simple rules."""
    t, k, j = np.arange(300)[:, None], np.arange(200)[None, :], np.arange(40)[:, None]
    x = (((7919 * t + 104729 * k) % 2001 - 1000) / 64).astype(np.float32)
    weight = ((31 * j + 17 * k + j * k) % 255 - 127).astype(np.int8)
    return x, weight, (2.0 ** -(np.arange(40) % 5)).astype(np.float32)


def matrix_of(
    weight: NDArray[np.int8], in_scale: NDArray[np.float32], out_scale: NDArray[np.float32],
    public: PublicMatrix, form: Format | None = None,
) -> OwnerMatrix:  # fmt: skip
    """The forward direction of a weight int8[N, K]; in the format of `exact` unless told."""
    plan = plan_matrix(weight, out_scale)
    if form is not None:
        plan = replace(plan, up_bits=form.up_bits, down_bits=form.down_bits)
    return OwnerMatrix("vectors", in_scale, out_scale, plan, slow_hint(weight, public))


def slow_hint(weight: NDArray[np.int8], public: PublicMatrix) -> NDArray[np.int32]:
    """int32[tiles, rank, 256, 16]: Wq*A mod q in 64-bit integers, centred; zeros fill the tile."""
    outputs, inputs = weight.shape
    rows = rows_of_tiles(public.rows(inputs), inputs).reshape(inputs, -1)
    hint = np.zeros((LANES * tiles_of(outputs), rows.shape[1]), np.int64)
    hint[:outputs] = weight.astype(np.int64) @ rows % NTT_PRIME
    tiles = hint.reshape(-1, LANES, public.rank, RING_DEGREE).transpose(0, 2, 3, 1)
    return centre(np.ascontiguousarray(tiles))


def seed_of_a(parameters: Parameters) -> dict[str, Any]:
    """How the seed of A follows from a model's digest and an owner's tag."""
    text = json.dumps({"scheme": "mlwe-int8-v2"} | asdict(parameters), sort_keys=True)
    model, tag = bytes(range(96, 128)), b"an owner's tag"
    return {
        "parameters": text,
        "parameters_digest": parameters.digest().hex(),
        "model_digest": model.hex(),
        "owner_tag": tag.hex(),
        "seed": public_seed(model, parameters, tag).hex(),
    }


def public_matrix(rank: int) -> dict[str, Any]:
    """Tiles of A under a stated seed."""
    tiles = {tile: expand_tile(SEED, tile, rank) for tile in (0, 1, REJECTING_TILE)}
    return {
        "seed": SEED.hex(),
        "rank": rank,
        "tile_0_polynomial_0_slot_0": tiles[0][0, 0].tolist(),
        "tile_0_polynomial_0_slot_1": tiles[0][0, 1].tolist(),
        "tiles_sha256": {str(tile): sha256(values) for tile, values in tiles.items()},
    }


def transform() -> dict[str, Any]:
    """The transform of the polynomial with coefficients n^2 + 1."""
    coefficients = np.arange(RING_DEGREE, dtype=np.int64)[None, :] ** 2 + 1
    slots = matmul_mod(coefficients, evaluation_matrix().T.copy())[0]
    return {
        "psi": PSI,
        "first_exponents": EVALUATION_EXPONENTS[:8],
        "slots_of_n_squared_plus_1": slots[:8].tolist(),
        "sha256": sha256(slots.astype(np.uint32)),
    }


def block(parameters: Parameters) -> dict[str, Any]:
    """One block of two tokens with everything that happens to it."""
    x = np.array([[1.5, -0.25, 3.0], [0.0, 100.0, -7.75]], np.float32)
    weight = np.array([[127, -3, 0], [-64, 25, 101]], np.int8)
    in_scale, out_scale = np.float32([1.0, 0.5, 2.0]), np.float32([0.25, 0.125])
    public = PublicMatrix(SEED, parameters.rank)
    matrix = matrix_of(weight, in_scale, out_scale, public)
    owner = ReferenceOwner(parameters, public, VectorsKey(), unverified=True)
    sent = owner.encrypt(x, matrix)
    worker = ReferenceWorker()
    answer = worker.multiply(sent.payload, 2, worker.load(weight, True, matrix.plan.format))
    secret = sent.sealed.secrets[0]
    masks = {
        name: owner._mask(tiles, rows, secret)[:2]
        for name, tiles, rows in (("u", public.rows(3), 3), ("h", matrix.hint, 2))
    }
    result = owner.decrypt(sent.sealed, answer, matrix)
    form = matrix.plan.format
    p, wide = form.modulus, x.astype(np.float64) * in_scale
    factor, inverse = np.empty(2), np.empty(2)
    token_scales(np.sqrt(np.sum(wide**2, axis=1)), matrix, parameters, 1.0, factor, inverse)
    message = np.rint(wide * factor[:, None]).astype(np.int64)
    keys = RequestKeys(VectorsKey())
    errors = _errors(Keystream(keys.errors), 2, 3)
    plain = ternary(Keystream(keys.secrets), parameters.dimension).reshape(parameters.rank, -1)
    planes = sent.payload.view(np.int8).reshape(form.limbs, 2, 3)
    digits = planes.astype(np.int64)
    values = answer.view("<u2").reshape(2, 2).astype(np.int64)
    opened = values * 2**form.dropped_bits - owner._rounded(masks["h"], form.up_bits)
    y = (opened + p // 2) % p - p // 2
    return {
        "seed": SEED.hex(),
        "key": KEY.hex(),
        "key_of_secrets": keys.secrets.hex(),
        "key_of_errors": keys.errors.hex(),
        "x": x.tolist(),
        "in_scale": in_scale.tolist(),
        "out_scale": out_scale.tolist(),
        "weight": weight.tolist(),
        "amplitude": matrix.plan.amplitude(parameters).hex(),
        "factor": [value.hex() for value in factor.tolist()],
        "inverse": [value.hex() for value in inverse.tolist()],
        "secret": ["".join("-0+"[value + 1] for value in row) for row in plain.tolist()],
        "errors": errors.tolist(),
        "message": message.tolist(),
        "u": ((masks["u"] + errors + message) % NTT_PRIME).tolist(),
        "b": (sum(256**n * digits[n] for n in range(form.limbs)) % p).tolist(),
        "planes": planes.tolist(),
        "answer": values.tolist(),
        "h": masks["h"].tolist(),
        "y": y.tolist(),
        "result": result.tolist(),
    }


def request(parameters: Parameters, form: Format = EXACT) -> dict[str, Any]:
    """Two blocks of 300 tokens, digests only."""
    x, weight, out_scale = large_case()
    public = PublicMatrix(SEED, parameters.rank)
    matrix = matrix_of(weight, np.ones(200, np.float32), out_scale, public, form)
    owner = ReferenceOwner(parameters, public, VectorsKey(), unverified=True)
    sent = owner.encrypt(x, matrix)
    worker = ReferenceWorker()
    answer = worker.multiply(sent.payload, len(x), worker.load(weight, True, matrix.plan.format))
    assert matrix.hint is not None
    return {
        "preset": parameters.name,
        "up_bits": form.up_bits,
        "down_bits": form.down_bits,
        "x": "((7919 t + 104729 k) mod 2001 - 1000) / 64, t < 300, k < 200",
        "weight": "((31 j + 17 k + j k) mod 255) - 127, j < 40",
        "in_scale": "1",
        "out_scale": "2^-(j mod 5)",
        "hint_sha256": sha256(matrix.hint),
        "request_sha256": sha256(sent.payload),
        "answer_sha256": sha256(answer),
        "result_sha256": sha256(owner.decrypt(sent.sealed, answer, matrix)),
    }


def fresh() -> str:
    """The file's text."""
    standard = preset("exact")
    vectors = {
        "seed_of_a": seed_of_a(standard),
        "public_matrix": public_matrix(standard.rank),
        "transform": transform(),
        "block": block(standard),
        "requests": [
            request(standard),
            request(preset("paranoid")),
            *(request(preset("thin"), form) for form in _THIN),
        ],
    }
    return _pretty(vectors) + "\n"


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for every entry of an object, and lists of numbers on one line."""
    if isinstance(value, dict):
        inner = indent + "  "
        lines = [f'{inner}"{name}": {_pretty(part, inner)}' for name, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        inner = indent + "  "
        return "[\n" + ",\n".join(inner + _pretty(part, inner) for part in value) + f"\n{indent}]"
    return json.dumps(value)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the file, or check it; the exit status."""
    text = fresh()
    if "--check" in arguments:
        if FILE.exists() and FILE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{FILE.name} is stale: run python -m docs.generate_vectors", file=sys.stderr)
        return 1
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
