"""Every scheme passes one suite, `backends/he/conformance`; and what is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he.clear import ClearOwner, ClearWorker
from backends.he.conformance import CHECKS, Scheme
from backends.he.interface import OwnerMatrix
from backends.he.matmul.choice import runnable
from backends.he.mlwe_owner import MlweOwner
from backends.he.mlwe_worker import MlweWorker
from backends.he.params import Parameters, preset
from backends.he.reference import ReferenceOwner, ReferenceWorker
from backends.he.wire import Format
from docs import skeleton_backend
from docs.skeleton_backend import SkeletonWorker
from tests.he.broken_schemes import BROKEN
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
