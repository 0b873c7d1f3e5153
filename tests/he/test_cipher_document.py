"""docs/cipher.md and its vectors: the fast code, the slow code, and the document read afresh.

`Document` below is written from the document alone: Python integers, the schoolbook product, and
AES from its library. It shares nothing with `backends/he`, so that a slip in the document, in the
code, or in both generations of the vectors would have to be the same slip.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from backends.he.epilogue import FOLD
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import NTT_PRIME, PRESETS, RING_DEGREE, preset
from backends.he.plan import MatrixPlan, plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, expand_tile, public_seed
from backends.he.ring import PSI, secret_to_ntt
from backends.he.wire import EXACT, Format
from docs import generate_vectors
from docs.generate_vectors import FILE, VectorsKey, large_case, sha256

VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
TEXT = FILE.with_name("cipher.md").read_text(encoding="utf-8")
STANDARD = preset("exact")

Ints = list[int]


class Document:
    """docs/cipher.md in plain integers, for rank 5 and three digits."""

    q, psi, rank, p, delta = 268432897, 23317653, 5, 2**24, 8

    @staticmethod
    def stream(key: bytes, start: bytes, size: int) -> bytes:
        """`size` bytes of AES-256-CTR."""
        return Cipher(algorithms.AES(key), modes.CTR(start)).encryptor().update(bytes(size))

    def tile(self, seed: bytes, number: int) -> list[list[Ints]]:
        """[polynomial][slot][row] of a tile of A, centred."""
        size = self.rank * 256 * 16
        raw = self.stream(seed, struct.pack(">QQ", number, 0), 4 * (size + 64))
        words = [word & 0xFFFFFFF for (word,) in struct.iter_unpack("<I", raw)]
        spare = (word for word in words[size:] if word < self.q)
        kept = [word if word < self.q else next(spare) for word in words[:size]]
        centred = iter([word - self.q if word > self.q // 2 else word for word in kept])
        return [[[next(centred) for _ in range(16)] for _ in range(256)] for _ in range(self.rank)]

    def exponent(self, slot: int) -> int:
        """Slot i evaluates at psi to this."""
        return 2 * int(f"{slot:08b}"[::-1], 2) + 1

    def slots(self, polynomial: Ints) -> Ints:
        """The transform."""
        powers = [pow(self.psi, n, self.q) for n in range(512)]
        return [
            sum(c * powers[self.exponent(i) * n % 512] for n, c in enumerate(polynomial)) % self.q
            for i in range(256)
        ]

    def polynomial(self, slots: Ints) -> Ints:
        """Its inverse."""
        powers = [pow(self.psi, -n, self.q) for n in range(512)]
        scale = pow(256, -1, self.q)
        return [
            sum(v * powers[self.exponent(i) * n % 512] for i, v in enumerate(slots))
            * scale
            % self.q
            for n in range(256)
        ]

    def product(self, a: Ints, b: Ints) -> Ints:
        """In Z_q[X]/(X^256 + 1), schoolbook."""
        out = [0] * 256
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                if i + j < 256:
                    out[i + j] += x * y
                else:
                    out[i + j - 256] -= x * y
        return [value % self.q for value in out]

    def rounded(self, u: int) -> int:
        """From q to p."""
        return (u + (u * 2683331564 >> 48) + 8) >> 4

    def keys(self, key: bytes) -> tuple[bytes, bytes]:
        """Of the secrets and of the errors, from a request's."""
        both = self.stream(key, bytes(16), 64)
        return both[:32], both[32:]

    def secret(self, key: bytes) -> list[Ints]:
        """The first block's secret: `rank` polynomials."""
        values = [b % 3 - 1 for b in self.stream(key, bytes(16), 2000) if b != 255]
        return [values[256 * k : 256 * (k + 1)] for k in range(self.rank)]

    def errors(self, key: bytes, tokens: int, inputs: int) -> list[Ints]:
        """[token][input], up to 128 inputs."""
        raw = self.stream(key, bytes(16), 5 * tokens * inputs)

        def bits(data: bytes) -> int:
            return sum(bin(byte).count("1") for byte in data)

        places = [[t * inputs + k for k in range(inputs)] for t in range(tokens)]
        tail = 4 * tokens * inputs
        return [
            [bits(raw[4 * n : 4 * n + 4]) + bits(raw[tail + n : tail + n + 1]) - 20 for n in row]
            for row in places
        ]

    def amplitude(self, weight: list[Ints]) -> float:
        """(p/2 - margin) / largest norm."""
        l1 = max(sum(map(abs, row)) for row in weight)
        norm = math.sqrt(max(sum(w * w for w in row) for row in weight))
        margin = l1 * (0.5 + 2.0**-24 + 20.5 * (self.p / self.q)) + 2.0**self.delta + 2
        return (self.p / 2 - margin) / norm

    def length(self, values: list[float]) -> float:
        """The norm, rounded up to 20 significant bits."""
        mantissa, exponent = math.frexp(math.sqrt(sum(v * v for v in values)))
        return math.ldexp(math.ceil(mantissa * 2**20), exponent - 20)


DOCUMENT = Document()


@cache
def tile_of_a(number: int) -> list[list[Ints]]:
    return DOCUMENT.tile(bytes.fromhex(VECTORS["public_matrix"]["seed"]), number)


def test_the_vectors_are_those_of_the_slow_reference() -> None:
    """Stale? Run `python -m docs.generate_vectors`, and say in the document what has changed."""
    assert generate_vectors.main(["--check"]) == 0


def test_a_changed_vector_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check compares."""
    monkeypatch.setattr(generate_vectors, "FILE", tmp_path / "vectors.json")
    monkeypatch.setattr(generate_vectors, "fresh", lambda: "{}\n")
    assert generate_vectors.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert generate_vectors.main([]) == 0
    assert generate_vectors.main(["--check"]) == 0


def test_the_seed_of_a_is_bound_as_described() -> None:
    """Length-prefixed parts under one hash: the code, and by hand."""
    stated = VECTORS["seed_of_a"]
    model, tag = bytes.fromhex(stated["model_digest"]), bytes.fromhex(stated["owner_tag"])
    assert public_seed(model, STANDARD, tag).hex() == stated["seed"]
    digest = hashlib.sha256(stated["parameters"].encode()).digest()
    assert digest == STANDARD.digest() == bytes.fromhex(stated["parameters_digest"])
    text = re.search(r"`(public matrix A of .*)`", TEXT)
    assert text is not None
    parts = (text[1].encode(), digest, model, tag)
    body = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    assert hashlib.sha256(body).hexdigest() == stated["seed"]


@pytest.mark.parametrize("number", [0, 1, generate_vectors.REJECTING_TILE])
def test_tiles_of_a(number: int) -> None:
    """By the fast code and by hand, one with a word that was replaced."""
    stated = VECTORS["public_matrix"]
    fast = expand_tile(bytes.fromhex(stated["seed"]), number, stated["rank"])
    assert sha256(fast) == stated["tiles_sha256"][str(number)]
    assert fast.tolist() == tile_of_a(number)
    if number == 0:
        assert fast[0, 0].tolist() == stated["tile_0_polynomial_0_slot_0"]
        assert fast[0, 1].tolist() == stated["tile_0_polynomial_0_slot_1"]


def test_the_transform_and_its_order() -> None:
    """By hand, back again, by the fast code; and products of slots are negacyclic products."""
    stated = VECTORS["transform"]
    a = [n * n + 1 for n in range(256)]
    slots = DOCUMENT.slots(a)
    assert slots[:8] == stated["slots_of_n_squared_plus_1"]
    assert sha256(np.array(slots, np.uint32)) == stated["sha256"]
    assert [DOCUMENT.exponent(i) for i in range(8)] == stated["first_exponents"]
    assert DOCUMENT.polynomial(slots) == a
    b = [(-1) ** n * (n % 3) for n in range(256)]
    q = DOCUMENT.q
    both = [x * y % q for x, y in zip(slots, DOCUMENT.slots(b), strict=True)]
    assert DOCUMENT.polynomial(both) == DOCUMENT.product(a, b)
    ternary = np.array([[n % 3 - 1 for n in range(256)]], np.int8)
    factor = 2**32 * pow(256, -1, q)
    by_hand = [v * factor % q for v in DOCUMENT.slots(ternary[0].tolist())]
    assert (secret_to_ntt(ternary)[0].astype(np.int64) % q).tolist() == by_hand


def test_one_block_by_hand() -> None:
    """From keys to results as the document says, with every value in between."""
    stated, it = VECTORS["block"], DOCUMENT
    weight, tokens, inputs = stated["weight"], 2, 3
    of_secrets, of_errors = it.keys(bytes.fromhex(stated["key"]))
    assert of_secrets.hex() == stated["key_of_secrets"]
    assert of_errors.hex() == stated["key_of_errors"]
    secret = it.secret(of_secrets)
    assert ["".join("-0+"[v + 1] for v in row) for row in secret] == stated["secret"]
    errors = it.errors(of_errors, tokens, inputs)
    assert errors == stated["errors"]
    amplitude = it.amplitude(weight)
    assert amplitude.hex() == stated["amplitude"]
    scaled = [[x * s for x, s in zip(row, stated["in_scale"], strict=True)] for row in stated["x"]]
    lengths = [it.length(row) for row in scaled]
    factors = [amplitude / length * (it.q / it.p) for length in lengths]
    assert [value.hex() for value in factors] == stated["factor"]
    inverses = [length / amplitude for length in lengths]
    assert [value.hex() for value in inverses] == stated["inverse"]
    message = [[round(v * f) for v in row] for row, f in zip(scaled, factors, strict=True)]
    assert message == stated["message"]

    tile = tile_of_a(0)
    a = [
        [it.polynomial([tile[n][i][k] for i in range(256)]) for n in range(it.rank)]
        for k in range(inputs)
    ]
    hint = [
        [
            [sum(w * a[k][n][c] for k, w in enumerate(row)) for c in range(256)]
            for n in range(it.rank)
        ]
        for row in weight
    ]

    def masks(rows: list[list[Ints]]) -> list[Ints]:
        """[token][row]: coefficients of row . s."""
        parts = [[it.product(r, s) for r, s in zip(row, secret, strict=True)] for row in rows]
        return [[sum(p[t] for p in part) % it.q for part in parts] for t in range(tokens)]

    u = [
        [(h + e + m) % it.q for h, e, m in zip(*rows, strict=True)]
        for rows in zip(masks(a), errors, message, strict=True)
    ]
    assert u == stated["u"]
    b = [[it.rounded(value) % it.p for value in row] for row in u]
    assert b == stated["b"]
    digits, planes = b, []
    for _ in range(3):
        low = [[(v + 128) % 256 - 128 for v in row] for row in digits]
        digits = [
            [(v - d) // 256 for v, d in zip(row, cut, strict=True)]
            for row, cut in zip(digits, low, strict=True)
        ]
        planes.append(low)
    assert planes == stated["planes"]
    sums = [
        [
            sum(
                256**n * sum(planes[n][t][k] * row[k] for k in range(inputs)) for n in range(3)
            )
            for row in weight
        ]
        for t in range(tokens)
    ]  # fmt: skip
    answer = [[(y + 128 >> 8) % 2**16 for y in row] for row in sums]
    assert answer == stated["answer"]
    h = masks(hint)
    assert h == stated["h"]
    y = [
        [(256 * v - it.rounded(m) + it.p // 2) % it.p - it.p // 2 for v, m in zip(*r, strict=True)]
        for r in zip(answer, h, strict=True)
    ]
    assert y == stated["y"]
    results = [
        [np.float32(v * inverse * s).item() for v, s in zip(row, stated["out_scale"], strict=True)]
        for row, inverse in zip(y, inverses, strict=True)
    ]
    assert results == stated["result"]
    for t, row in enumerate(results):
        for j, found in enumerate(row):
            true = sum(v * w for v, w in zip(scaled[t], weight[j], strict=True))
            assert abs(found / stated["out_scale"][j] - true) < 0.05 * lengths[t]


def test_one_block_by_the_fast_code() -> None:
    """Planes, answer and result."""
    stated = VECTORS["block"]
    weight = np.array(stated["weight"], np.int8)
    in_scale, out_scale = (np.array(stated[n], np.float32) for n in ("in_scale", "out_scale"))
    public = PublicMatrix(bytes.fromhex(stated["seed"]), STANDARD.rank)
    matrix = generate_vectors.matrix_of(weight, in_scale, out_scale, public)
    matrix = replace(matrix, hint=HintBuilder(public).build(weight, True))
    owner = MlweOwner(STANDARD, public, VectorsKey(), unverified=True)
    sent = owner.encrypt(np.array(stated["x"], np.float32), matrix)
    assert sent.payload.view(np.int8).reshape(3, 2, 3).tolist() == stated["planes"]
    worker = MlweWorker()
    answer = worker.multiply(sent.payload, 2, worker.load(weight, True, EXACT))
    assert answer.view("<u2").reshape(2, 2).tolist() == stated["answer"]
    assert owner.decrypt(sent.sealed, answer, matrix).tolist() == stated["result"]


@pytest.mark.parametrize(
    "stated", VECTORS["requests"], ids=lambda s: f"{s['preset']}-{s['up_bits']}-{s['down_bits']}"
)
def test_requests_by_the_fast_code(stated: dict[str, Any]) -> None:
    """Two blocks, and more than one group of columns."""
    parameters = preset(stated["preset"])
    x, weight, out_scale = large_case()
    public = PublicMatrix(bytes.fromhex(VECTORS["public_matrix"]["seed"]), parameters.rank)
    matrix = generate_vectors.matrix_of(weight, np.ones(200, np.float32), out_scale, public)
    hint = HintBuilder(public).build(weight, True)
    assert sha256(hint) == stated["hint_sha256"]
    form = Format(stated["up_bits"], stated["down_bits"])
    plan = replace(plan_matrix(weight, out_scale), up_bits=form.up_bits, down_bits=form.down_bits)
    matrix = replace(matrix, hint=hint, plan=plan)
    owner = MlweOwner(parameters, public, VectorsKey(), unverified=True)
    sent = owner.encrypt(x, matrix)
    assert sha256(sent.payload) == stated["request_sha256"]
    worker = MlweWorker()
    answer = worker.multiply(sent.payload, len(x), worker.load(weight, True, form))
    assert sha256(answer) == stated["answer_sha256"]
    assert sha256(owner.decrypt(sent.sealed, answer, matrix)) == stated["result_sha256"]


def test_the_documents_constants_are_the_codes() -> None:
    """Every number of its parameters, and what it says follows from them."""
    table = dict(re.findall(r"^\| (\S+) \|.*\| ([^|]*) \|$", TEXT, re.MULTILINE))
    q, p, ratio = NTT_PRIME, EXACT.modulus, EXACT.modulus / NTT_PRIME
    stated = {"d": RING_DEGREE, "q": q, "L": EXACT.limbs, "p": p, "delta": 8}
    assert {name: int(table[name]) for name in stated} == stated
    assert table["psi"] == str(PSI) == str(pow(5, (q - 1) // 512, q))
    assert table["r"].split(", ") == [str(each.rank) for each in PRESETS.values()]
    assert table["n"].split(", ") == [str(each.dimension) for each in PRESETS.values()]
    assert EXACT.dropped_bits == stated["delta"]
    assert all(q % n for n in range(2, math.isqrt(q) + 1)), "q is prime"
    assert q == 2**28 - 2559
    assert q % 512 == 1
    assert f"{FOLD} = floor(2^48 2559/q)" in TEXT
    assert f"floor({FOLD} u / 2^48)" in TEXT
    assert 2**48 * 2559 // q == FOLD
    assert "one in 104,899" in TEXT
    assert round(2**28 / 2559) == 104_899
    up = 1 / 12 + ratio**2 * (10 + 1 / 12)
    assert f"{up:.4f}" == "0.1227"
    assert "0.1227" in TEXT
    shares = (1 / 12 / up, ratio**2 * 10 / up, ratio**2 / 12 / up)
    assert [round(100 * share, 1) for share in shares] == [67.9, 31.8, 0.3]


@pytest.mark.parametrize(("inputs", "share"), [(8192, 0.05), (128_256, 0.77)])
def test_the_share_of_the_range_that_is_held_back(inputs: int, share: float) -> None:
    """With normal weights of deviation 36."""
    weight = np.rint(np.random.default_rng(0).normal(0, 36, (64, inputs))).clip(-127, 127)
    plan = plan_matrix(weight.astype(np.int8), np.ones(64, np.float32))
    assert plan.margin(STANDARD) / (EXACT.modulus / 2) == pytest.approx(share, abs=0.02)


def test_the_price_of_no_wrap() -> None:
    """Section 6's shares of the range, by its bound on E for a row of average size."""
    said = re.search(
        r"weights of deviation (\d+) that and the roundings are (\d+) % of the\s+range at "
        r"([\d,]+) inputs, and (\d+) % at ([\d,]+)\.",
        TEXT,
    )
    assert said
    size = int(said[1]) * math.sqrt(2 / math.pi)  # of a weight, on average
    for percent, width in ((said[2], said[3]), (said[4], said[5])):
        inputs = int(width.replace(",", ""))
        p_over_q = Document.p / Document.q
        each = 0.5 + 2**-24 + p_over_q * (20 + 0.5 + 2**-25)
        margin = inputs * size * each + 2**Document.delta + 2
        assert round(100 * margin / (Document.p / 2)) == int(percent)
        plan = MatrixPlan(size * math.sqrt(inputs), inputs * size, 1.0, inputs)
        assert plan.margin(STANDARD) == pytest.approx(margin)
