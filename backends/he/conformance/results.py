"""Checks of what a scheme computes: right results, of right sizes, out of anybody's memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from backends.he.conformance.case import Case, Scheme, delivers, own, refused
from backends.he.interface import NonFiniteInputError


def products_are_right(scheme: Scheme) -> None:
    """Both directions, also of a square; one token and many, a ragged last block, one input."""
    for inputs, outputs, tokens, forward in (
        (12, 10, 5, True), (10, 12, 5, False), (1, 3, 2, True), (40, 1, 1, True),
        (7, 7, 3, True), (7, 7, 3, False), (3, 2, scheme.block + 3, True),
    ):  # fmt: skip
        case = Case(scheme, inputs, outputs, forward)
        x = case.inputs(tokens)
        sent, answer = case.ask(x)
        delivers(case, sent, answer, x)


def products_are_right_at_any_scale(scheme: Scheme) -> None:
    """Tokens of every size in one request, and zeros, of which the product is zero."""
    case = Case(scheme)
    x = case.inputs(9)
    x /= np.abs(x).max(axis=1, keepdims=True)
    sizes = np.array([1, 1e-30, 1e30, 0, 1e-6, 1e6, 3, 0, 1e-37], np.float32)
    sent, answer = case.ask(x * sizes[:, None])
    found = case.open(sent, answer)
    want = case.exact(x * sizes[:, None])
    assert not found[sizes == 0].any(), "a token of zeros has a product"
    for row, right in zip(found[sizes > 0], want[sizes > 0], strict=True):
        off = np.linalg.norm(row - right) / np.linalg.norm(right)
        assert off <= 3 * scheme.error, f"a token's product is {off:.2e} off"


def errors_are_predicted(scheme: Scheme) -> None:
    """What `exactness` tells people is not less than half of what products are off by."""
    case = Case(scheme, 64, 48)
    x = case.inputs(32)
    sent, answer = case.ask(x)
    off = np.linalg.norm(case.open(sent, answer) - case.exact(x)) / np.linalg.norm(case.exact(x))
    told = case.owner.exactness([case.matrix])
    if told is not None:
        assert off <= 2 * told.largest + 1e-6, (
            f"a product is {off:.2e} off; {told.largest:.2e} was predicted"
        )


def sizes_are_as_declared(scheme: Scheme) -> None:
    """Of requests and answers; whatever is in them, odd ones too, and both halves agree."""
    for case in (Case(scheme), Case(scheme, 7, 5, False)):
        for tokens in (1, 2, scheme.block, scheme.block + 1):
            up = case.owner.up_bytes(case.matrix, tokens)
            down = case.owner.down_bytes(case.matrix, tokens)
            for size in (0.0, 1.0, 1e20):
                sent = case.owner.encrypt(case.inputs(tokens, size), case.matrix)
                assert len(sent.payload) == up, f"{len(sent.payload)} bytes went up, {up} were said"
                case.owner.discard(sent.sealed)
            answer = case.answer(bytes(up), tokens)
            assert len(answer) == down, f"{len(answer)} bytes came down, {down} were said"
            _packed_alike(case, tokens, up, down)


def _packed_alike(case: Case, tokens: int, up: int, down: int) -> None:
    """Catalogues, and limits of a line, are made of what either half says of its sizes."""
    packing, shape = case.owner.packing, case.matrix
    assert packing == case.worker.packing, "the halves do not agree on a packing"
    if packing is None:
        form = shape.plan.format
        said = (
            tokens * form.up_bytes(shape.in_features),
            tokens * form.down_bytes(shape.out_features),
        )
    else:
        sizes = (shape.in_features, shape.out_features)
        said = packing.bytes_of(sizes[0], tokens), packing.bytes_of(sizes[1], tokens)
    assert said == (up, down), f"{said} bytes by the packing, {(up, down)} by the owner"


def bad_input_is_refused(scheme: Scheme) -> None:
    """What is no number, and what has another shape or type; the next request works."""
    case = Case(scheme)
    good = case.inputs(3)
    for value in (np.nan, np.inf, -np.inf):
        for place in ((1, 2), (0, 0), (-1, -1)):
            bad = good.copy()
            bad[place] = value
            refused(partial(case.owner.encrypt, bad, case.matrix), NonFiniteInputError, str(value))
    shapes: tuple[Any, ...] = (
        good[:, 1:], good[0], good[None], good[:0], good.astype(np.float64), good[:, ::-1],
        good[::2], np.asfortranarray(good), good.astype(np.float16), good.astype(np.int32),
        good.astype(">f4"), good.astype(np.complex64), good.view(np.int32),
    )  # fmt: skip
    for bad in shapes:
        what = f"{bad.dtype.str}{list(bad.shape)}, strides {bad.strides}"
        refused(partial(case.owner.encrypt, bad, case.matrix), ValueError, what)
    sent, answer = case.ask(good)
    delivers(case, sent, answer, good)


def memory_is_its_owners(scheme: Scheme) -> None:
    """What is given stays as it was, read-only or not; what was got does not change later."""
    case = Case(scheme)
    x, more = case.inputs(4), case.inputs(4)
    kept = x.copy()
    first, second = case.owner.encrypt(x, case.matrix), case.owner.encrypt(more, case.matrix)
    asked = own(first.payload)
    raw = case.worker.multiply(first.payload, 4, case.operand)
    told = own(raw)
    other = case.answer(second.payload, 4)
    assert np.array_equal(own(first.payload), asked), "a worker has altered a request"
    assert np.array_equal(own(raw), told), "an answer changed with the next one"
    frozen = told.tobytes()
    found = delivers(case, first, frozen, kept)
    before = found.copy()
    unread = other.copy()
    delivers(case, second, other, more)
    assert np.array_equal(other, unread), "an owner has altered an answer"
    assert np.array_equal(found, before), "a result changed with the next one"
    case.owner.discard(first.sealed)
    spare = case.owner.encrypt(x, case.matrix)
    case.owner.discard(spare.sealed)
    assert np.array_equal(x, kept), "an owner has altered its input"


def nothing_gets_mixed_up(scheme: Scheme) -> None:
    """Two matrices by the same halves, many requests under way, answers in any order, threads."""
    case = Case(scheme)
    cases = (case, Case(scheme, 9, 11, False, like=case), Case(scheme, like=case))
    asked = []
    for each in cases * 2:
        x = each.inputs(5)
        asked.append((each, x, each.owner.encrypt(x, each.matrix)))
    for each, x, sent in reversed(asked):
        delivers(each, sent, each.answer(sent.payload, 5), x)
    work = [(each, each.inputs(3)) for each in cases * 2]

    def one(each: Case, x: Any) -> None:
        sent, answer = each.ask(x)
        delivers(each, sent, answer, x)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(one, *each) for each in work]:
            done.result()


def workers_are_exact(scheme: Scheme) -> None:
    """The same request has the same answer, alone or with others, in whatever bytes come in."""
    case = Case(scheme)
    sent = case.owner.encrypt(case.inputs(5), case.matrix)
    right, raw = case.answer(sent.payload, 5), own(sent.payload).tobytes()
    for payload in (raw, bytearray(raw), memoryview(raw)):
        assert np.array_equal(case.answer(payload, 5), right), "an answer differs from the first"
    requests = [(raw, 5)]
    for tokens in (3, 5, scheme.block + 1):
        more = case.owner.encrypt(case.inputs(tokens), case.matrix)
        requests.append((own(more.payload).tobytes(), tokens))
    for several in (requests, requests[::-1], [requests[0]] * 2, requests[:1]):
        answers = case.worker.multiply_many(several, case.operand)
        assert len(answers) == len(several), f"{len(answers)} answers to {len(several)} requests"
        for answer, (payload, tokens) in zip(answers, several, strict=True):
            alone = case.answer(payload, tokens)
            assert np.array_equal(own(answer), alone), "an answer differs when there are several"
