"""Every scheme passes one suite, `backends/he/conformance.py`; and what is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he import conformance
from backends.he.clear import ClearOwner, ClearWorker
from backends.he.conformance import CHECKS, Scheme
from backends.he.entropy import Entropy
from backends.he.interface import Encrypted, OwnerMatrix
from backends.he.matmul.choice import runnable
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters, preset
from backends.he.reference import ReferenceOwner, ReferenceWorker
from backends.he.wire import Format
from docs import skeleton_backend
from docs.skeleton_backend import SkeletonOwner, SkeletonWorker
from tests.he.conftest import make_case


def mlwe_matrix(parameters: Parameters, form: Format | None) -> Callable[..., OwnerMatrix]:
    """The owner's view of a weight under the module-LWE scheme, in a format or the planner's."""

    def matrix(weight: NDArray[np.int8], forward: bool) -> OwnerMatrix:
        inputs, outputs = weight.shape[::-1] if forward else weight.shape
        return make_case(
            inputs, outputs, forward, parameters=parameters, weight=weight, form=form
        ).matrix

    return matrix


def mlwe(name: str, kernel: str | None = None, **more: Any) -> Scheme:
    """The module-LWE scheme under a preset, on a kernel of this processor."""
    parameters = preset(name)
    public = make_case(1, 1, parameters=parameters).public
    worker = MlweWorker if kernel is None else partial(MlweWorker, runnable()[kernel]())
    given: dict[str, Any] = {
        "owner": partial(MlweOwner, parameters, public), "worker": worker,
        "matrix": mlwe_matrix(parameters, None), "error": 0.01,
    }  # fmt: skip
    return Scheme(f"mlwe-{name}-{kernel or 'fastest'}", **given | more)


def thin() -> Scheme:
    """The lightest format: two digits up, eight bits down."""
    matrix = mlwe_matrix(preset("thin"), Format(16, 8))
    return mlwe("thin", matrix=matrix, error=0.2, word="u1", modulus=1 << 8)


def reference() -> Scheme:
    public = make_case(1, 1).public
    owner = partial(ReferenceOwner, preset("exact"), public)
    return replace(mlwe("exact"), name="reference", owner=owner, worker=ReferenceWorker)


CLEAR = Scheme(
    "clear", ClearOwner, ClearWorker, mlwe_matrix(preset("exact"), None), 1e-6, "<u4", 1 << 32,
    encrypts=False,
)  # fmt: skip
SCHEMES = [
    skeleton_backend.SCHEME,
    CLEAR,
    reference(),
    thin(),
    *(mlwe("exact", kernel) for kernel in runnable()),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_conforms(scheme: Scheme, check: Callable[[Scheme], None]) -> None:
    """The skeleton of docs/extend.md, clear, the slow reference, and the module-LWE scheme on every
    kernel of this processor."""
    check(scheme)


class OffByALittle(SkeletonOwner):
    """Spoils what it delivers."""

    def decrypt(self, *a: Any) -> Any:
        return super().decrypt(*a) * np.float32(1.001)


class TakesNothingForSomething(SkeletonOwner):
    """Delivers noise for a token of zeros."""

    def decrypt(self, *a: Any) -> Any:
        found = super().decrypt(*a)
        found[~found.any(axis=1)] = 1
        return found


class Talkative(SkeletonOwner):
    """Its requests' length tells what is in them."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        sent = super().encrypt(x, matrix)
        more = np.zeros(0 if x.any() else 8, np.uint8)
        return Encrypted(np.concatenate([sent.payload, more]), sent.sealed)


class Indulgent(SkeletonOwner):
    """Makes numbers of what is none."""

    def encrypt(self, x: Any, matrix: Any) -> Encrypted:
        return super().encrypt(np.nan_to_num(x), matrix)


class Hoarder(SkeletonOwner):
    """Keeps what it should overwrite."""

    def discard(self, sealed: Any) -> None:
        pass


class Reopener(SkeletonOwner):
    """Opens one request twice."""

    def decrypt(self, sealed: Any, *a: Any) -> Any:
        key = sealed.key.copy()
        found = super().decrypt(sealed, *a)
        sealed.__init__(key, sealed.inverse, sealed.expected)
        return found


class OneKey(SkeletonOwner):
    """Draws the same numbers for every request."""

    def _random(self, *shape: int) -> NDArray[np.uint64]:
        return np.random.default_rng(1).integers(0, 1 << 63, shape, np.uint64)


class Uncounted(SkeletonOwner):
    """Counts a request for one block."""

    def _seal(self, message: Any) -> Any:
        sealed = super()._seal(message)
        self.blocks += 1 - len(message)
        return sealed


class Believer(SkeletonOwner):
    """Checks nothing, and does not say so."""

    def __init__(self, entropy: Entropy | None = None, unverified: bool = False) -> None:
        super().__init__(entropy, True)

    def guard(self, *a: Any) -> None:
        pass

    def weakness(self, matrices: Any) -> str | None:
        return None


class Accuser(SkeletonOwner):
    """Takes what it has spoilt itself for a lie."""

    def _open(self, *a: Any) -> Any:
        return super()._open(*a) + 100


class Careless(SkeletonWorker):
    """Takes as many bytes as it needs."""

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        size = skeleton_backend.PACKING.bytes_of(matrix.shape[1], tokens)
        return super().multiply((bytes(payload) + bytes(size))[:size], tokens, matrix)


class Restless(SkeletonWorker):
    """Answers the same request in two ways."""

    def multiply(self, payload: Any, tokens: int, matrix: Any) -> Any:
        told = super().multiply(payload, tokens, matrix)
        told[0] ^= np.random.default_rng().integers(0, 256)
        return told


BROKEN: list[tuple[type, Callable[[Scheme], None]]] = [
    (OffByALittle, conformance.products_are_right),
    (TakesNothingForSomething, conformance.products_are_right_at_any_scale),
    (Talkative, conformance.sizes_are_as_declared),
    (Indulgent, conformance.bad_input_is_refused),
    (Hoarder, conformance.a_sealed_value_opens_once),
    (Reopener, conformance.a_sealed_value_opens_once),
    (OneKey, conformance.requests_are_fresh),
    (Uncounted, conformance.requests_are_fresh),
    (Restless, conformance.workers_are_exact),
    (Careless, conformance.wrong_lengths_are_refused),
    (Believer, conformance.garbage_is_refused),
    (Believer, conformance.lies_are_found),
    (Believer, conformance.nothing_unchecked_is_delivered),
    (Accuser, conformance.honest_workers_stay_trusted),
]


@pytest.mark.parametrize(("broken", "check"), BROKEN)
def test_the_suite_finds_what_is_wrong(broken: type, check: Callable[[Scheme], None]) -> None:
    """Each check fails a scheme that breaks what it is for, and says so."""
    half = "worker" if issubclass(broken, SkeletonWorker) else "owner"
    with pytest.raises(AssertionError, match=r"\w+ \w+"):
        check(replace(skeleton_backend.SCHEME, **{half: broken}))


def test_every_check_has_something_to_find() -> None:
    """None of the suite's checks passes whatever it is given."""
    assert {check for _, check in BROKEN} == set(CHECKS)


def test_the_skeleton_is_short() -> None:
    """As docs/extend.md says."""
    source = Path(skeleton_backend.__file__).read_text()
    assert len(source.splitlines()) < 100
