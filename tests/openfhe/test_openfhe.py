"""OpenFHE as a scheme: the suite, what crosses the wire, and the protocol over it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from backends.he.conformance import CHECKS, Case, Scheme
from backends.he.conformance.case import delivers
from backends.he.interface import OwnerMatrix, WorkerMatrix
from backends.he.openfhe import NAMES, coefficients, scheme
from backends.he.openfhe.library import OpenFheError, openfhe
from backends.he.openfhe.owner import OpenFheOwner
from backends.he.openfhe.worker import OpenFheWorker
from backends.he.wire import EXACT
from backends.net.devices import OneDevice
from backends.net.owner import OwnerClient
from backends.net.worker import WorkerServer
from docs.skeleton_backend import matrix_of
from protocol.catalogue import Catalogue, MatrixShape
from protocol.errors import WrongAnswerError
from protocol.messages import Frame

ROOT = Path(__file__).resolve().parents[2]
library = pytest.mark.library


def scheme_of(name: str) -> Scheme:
    """As the suite takes it; made where OpenFHE is."""
    used = scheme.scheme(name)
    return Scheme(
        name, partial(OpenFheOwner, name), partial(OpenFheWorker, name), matrix_of, 1e-4, "<u8",
        used.form.modulus, block=used.packing.block_tokens,
    )  # fmt: skip


@library
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_openfhe_conforms(name: str, check: Callable[[Scheme], None]) -> None:
    """BFV and CKKS pass what every scheme passes."""
    check(scheme_of(name))


@library
def test_bfv_is_exact() -> None:
    """To the last integer, at the largest result there can be, of many inputs."""
    case = Case(scheme_of("openfhe-bfv"), 300, 2)
    # Along a row, as large as can be.
    x = (case.weight[:1] / case.matrix.in_scale * 0.37).astype(np.float32)
    sent, answer = case.ask(x)
    owner = case.owner
    assert isinstance(owner, OpenFheOwner)
    found = owner._open(sent.sealed.key, answer, 1, 2)
    message = np.rint(x.astype(np.float64) * case.matrix.in_scale / sent.sealed.inverse[:, None])
    assert np.array_equal(found, message @ case.weight.T.astype(np.float64))
    assert np.abs(found).max() > 0.9 * scheme.BFV_PLAIN / 2


@library
def test_bfv_is_exact_whatever_the_weights() -> None:
    """Against 64-bit integers: the extremes of int8 among them, results up to the limit, and inputs
    that are all of one sign, so that roundings of encryption add up; one input and many."""
    owner, worker = OpenFheOwner("openfhe-bfv", None, True), OpenFheWorker("openfhe-bfv")
    rng = np.random.default_rng(7)
    for inputs in (1, 2, 3, 17, 64, 1500):
        weight = rng.integers(-128, 128, (3, inputs)).astype(np.int8)
        weight[0], weight[1] = 127, -128
        room = (scheme.BFV_PLAIN - 1) // 2 // int(np.abs(weight.astype(int)).sum(axis=1).max())
        message = rng.integers(-room, room + 1, (5, inputs))
        message[0], message[1] = room, -room
        payload, key = owner._seal(message.astype(np.float64))
        answer = worker.multiply(payload, 5, worker.load(weight, True, EXACT))
        right = message @ weight.astype(np.int64).T
        assert np.array_equal(owner._open(key, answer, 5, 3), right)


@library
def test_bfv_is_exact_for_every_weight() -> None:
    """Of 8 bits, both ends included; a row of zeros, a column of zeros, and one weight twice."""
    rows = np.arange(-128, 128).astype(np.int8).reshape(8, 32)
    weight = np.concatenate([rows, np.zeros((1, 32), np.int8), rows[:1]])
    weight[:, 5] = 0
    owner, worker = OpenFheOwner("openfhe-bfv"), OpenFheWorker("openfhe-bfv")
    message = np.random.default_rng(0).integers(-99, 100, (3, 32)).astype(np.float64)
    payload, key = owner._seal(message)
    operand = worker.load(weight, True, matrix_of(weight, True).plan.format)
    found = owner._open(key, worker.multiply(payload, 3, operand), 3, len(weight))
    assert np.array_equal(found, message @ weight.T.astype(np.float64))


@library
@pytest.mark.parametrize("name", NAMES)
def test_whatever_bytes_come_neither_half_falls(name: str) -> None:
    """Numbers at and above the modulus, OpenFHE's own format, and noise: an answer or a refusal."""
    case, used = Case(scheme_of(name), 2, 2), scheme.scheme(name)
    x = case.inputs(3)
    sent, answer = case.ask(x)
    size = used.form.nbytes
    q = used.form.modulus
    numbers = [np.full(size // 8, n, "<u8").tobytes() for n in (q - 1, q, q + 1, (1 << 64) - 1)]
    for one in (*numbers, used.form._template[:size], used.form._template[-size:]):
        assert len(case.answer(one * 2, 3)) == len(answer)
        with pytest.raises(WrongAnswerError):
            case.open(sent, one * 2)
    delivers(case, sent, answer, x)


@library
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_ciphertexts_is_read_and_written(name: str) -> None:
    """Fewer than are taken together, as many, and more: each comes out as it went in."""
    form, together = scheme.scheme(name).form, coefficients._TOGETHER
    for count in (1, together - 1, together, together + 1, 2 * together):
        words = np.random.default_rng(count).integers(
            0, form.modulus, (count, 2, scheme.RING), np.uint64
        )
        read = form.ciphertexts(words)
        assert len(read) == count
        assert np.array_equal(form.coefficients(read), words)


@library
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_predicted(name: str) -> None:
    """Within a factor of two, or what float32 can show of it."""
    case = Case(scheme_of(name), 200, 40)
    x = case.rng.standard_normal((50, 200)).astype(np.float32)
    sent, answer = case.ask(x)
    found, want = case.open(sent, answer), case.exact(x)
    off = np.linalg.norm(found - want) / np.linalg.norm(want)
    exactness = case.owner.exactness([case.matrix])
    assert exactness is not None
    assert off < 2 * exactness.largest + 1e-7
    if name == "openfhe-bfv":
        assert off > exactness.largest / 2


@library
@pytest.mark.parametrize("name", NAMES)
def test_no_key_and_no_context_crosses_the_wire(name: str) -> None:
    """A request is numbers below q, nothing of OpenFHE's own format; a worker takes any numbers."""
    case, used = Case(scheme_of(name), 3, 2), scheme.scheme(name)
    sent = case.owner.encrypt(case.inputs(4), case.matrix)
    words = np.frombuffer(sent.payload, "<u8")
    assert words.max() < used.form.modulus
    assert np.unique(words).size > 0.99 * words.size
    more = words.copy()
    more[::7] += np.uint64(used.form.modulus)  # the same residue, written otherwise
    right = case.answer(sent.payload, 4)
    assert np.array_equal(case.answer(more.tobytes(), 4), right)


@library
def test_a_key_is_of_one_block() -> None:
    """Another block's, or another request's, opens nothing."""
    case = Case(scheme_of("openfhe-bfv"), 2, 2, unverified=True, guarded=False)
    x = case.inputs(scheme.RING + 1)
    sent, answer = case.ask(x)
    keys = sent.sealed.key
    assert len(keys) == 2
    sent.sealed.key = keys[::-1]
    assert not np.allclose(case.open(sent, answer), case.exact(x), rtol=0.1)


@library
@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_runs_over_it(name: str) -> None:
    """Both real machines, frames between them: right products, and a liar is found."""
    case, used = Case(scheme_of(name)), scheme.scheme(name)
    lying = False

    class Liar(OpenFheWorker):
        def multiply(self, payload: object, tokens: int, matrix: object) -> np.ndarray:
            told = super().multiply(payload, tokens, matrix)  # type: ignore[arg-type]
            told[0] ^= lying
            return told

    facts: OwnerMatrix = replace(case.matrix, name="only")
    case.owner.guard(facts, case.weight, True)
    shape = MatrixShape(
        "only", 12, 10, used.packing.bytes_of(12, 1), used.packing.bytes_of(10, 1),
        used.packing.block_tokens,
    )  # fmt: skip
    catalogue = Catalogue(bytes(32), used.packing.digest, (shape,))
    servers: list[WorkerServer] = []

    def transmit(worker: str, frame: Frame) -> None:
        servers[0].deliver("owner", frame)

    client = OwnerClient(
        catalogue, [facts], case.owner, workers=["worker"], transmit=transmit, workers_here=False
    )
    weight = WorkerMatrix(case.weight, True, facts.plan.format)
    servers.append(
        WorkerServer(
            OneDevice(catalogue, Liar(name), [weight]), lambda _, f: client.deliver("worker", f)
        )
    )
    servers[0].start()
    client.start()
    try:
        for tokens in (1, 5):
            x = case.inputs(tokens)
            assert np.allclose(client.linear(0, x), case.exact(x), rtol=1e-3, atol=1e-2)
        lying = True
        with pytest.raises(Exception, match="not the product"):
            client.linear(0, case.inputs(2))
    finally:
        client.close()
        servers[0].stop()


@library
def test_another_way_of_writing_ciphertexts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the coefficients are not found, nothing is guessed."""
    context = scheme.scheme("openfhe-bfv").context
    written = coefficients._written
    monkeypatch.setattr(coefficients, "_written", lambda made: written(made)[:-9000])
    with pytest.raises(OpenFheError, match="does not know"):
        coefficients.CiphertextForm(context, context.MakePackedPlaintext([0]), scheme.RING)


def test_the_scheme_needs_no_torch() -> None:
    """Its environment has none, nor has a worker that serves it."""
    ask = (
        "import sys; sys.modules['torch'] = None\n"
        "import backends.he.openfhe.owner, backends.he.openfhe.worker, backends.he.conformance\n"
        "import backends.he.clear, docs.skeleton_backend, backends.net.owner, backends.net.worker"
    )
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, timeout=60)


def test_who_has_no_openfhe_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and where it can be had."""
    monkeypatch.setitem(sys.modules, "openfhe", None)
    openfhe.cache_clear()
    try:
        with pytest.raises(OpenFheError, match=r"3\.10 .*3\.12 .*leave --scheme out") as caught:
            openfhe()
    finally:
        openfhe.cache_clear()
    assert "\n" not in str(caught.value)
