"""Programs under the installed Triton and under the oldest that `pyproject.toml` allows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.6.0"
"""What torch brings to many GPU machines. Its wait for products has no barrier of its own."""
INSTALLED = triton.__version__


class NoPackageError(Exception):
    """The package index does not answer, or has no such Triton for this machine."""


def packages(version: str, store: Path) -> Path | None:
    """Where that Triton is: a folder in `store`, filled from the package index once.

    None where it is the installed one. Raises NoPackageError.
    """
    if version == INSTALLED:
        return None
    folder = store / "packages"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=store) as fresh:
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
                 "--disable-pip-version-check", "--retries", "1", "--timeout", "15",
                 "--target", f"{fresh}/packages", f"triton=={version}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise NoPackageError(f"no Triton {version}: {done.stderr.strip()[-200:]}")
            Path(fresh, "packages").rename(folder)
    return folder


def run(module: str, arguments: list[str], packages: Path | None, cache: Path, said: str) -> None:
    """Run a module of this repository in a process where kernels are compiled, not interpreted.

    cache  folder for what Triton compiles
    said   on standard input
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=said, text=True, check=True, env=environment, cwd=ROOT,
    )  # fmt: skip
