"""The CUDA backend passes what every scheme passes (`backends/he/conformance`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from backends.he.conformance import CHECKS, Scheme
from backends.he.cuda.device import Gpu
from backends.he.cuda.owner import CudaOwner
from backends.he.cuda.worker import CudaWorker
from backends.he.params import preset
from tests.he.conftest import make_case
from tests.he.test_conformance import mlwe_matrix


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_cuda_conforms(gpu: Gpu, check: Callable[[Scheme], None]) -> None:
    """Both halves, on a GPU or emulated, bytes between them."""
    parameters = preset("exact")
    public = make_case(1, 1).public
    check(
        Scheme(
            "mlwe-cuda",
            owner=lambda keys, unverified: CudaOwner(
                parameters, public, gpu, keys, unverified=unverified
            ),
            worker=lambda: CudaWorker(gpu),
            matrix=mlwe_matrix(parameters, None),
            error=0.01,
        )
    )
