"""Launches on a GPU down to the driver's call, without a GPU; and that their cost is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the worker's kernel is written in Triton")

from benchmarks import null_cuda
from tests.cuda import tritons

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _null_driver() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver of its own")
    if (why := null_cuda.missing()) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("version", sorted({tritons.INSTALLED, tritons.OLDEST}))
def test_kept_launches_are_the_front_doors(
    version: str, oldest_store: Path, tmp_path: Path
) -> None:
    """Function, grid, block, shared memory and every argument, for each kind of kernel."""
    try:
        found = tritons.packages(version, oldest_store)
    except tritons.NoPackageError as error:
        pytest.skip(str(error))
    tritons.run("tests.cuda.launch_path", [], found, tmp_path, "")


def test_the_benchmark_measures(tmp_path: Path) -> None:
    """One round of everything."""
    figures = tmp_path / "figures.json"
    tritons.run(
        "benchmarks.gpu_host", ["--rounds", "1", "--json", str(figures)], None, tmp_path, ""
    )
    assert '"async"' in figures.read_text()
