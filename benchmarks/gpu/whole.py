"""What is run as a user runs it: the correctness suite, preparing, a training step, a peer."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from backends.he.cuda.hints import cuda_arithmetic
from backends.he.manifest import GroupSpec
from backends.he.preparation import prepare
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.task import Figures, Task

ROOT = Path(__file__).resolve().parent.parent.parent
_SUMMING_UP_S = 10.0  # of the suite's deadline, for what comes after the tests


def suite(task: Task) -> Figures:
    """The tests that need the device, on it; one that hangs ends them.

    What only compiles or emulates is left to `make test`.
    """
    return tests_of("tests/cuda", task.deadline_s - _SUMMING_UP_S)


def tests_of(tests: str, patience_s: float) -> Figures:
    """What the device tests in a folder or file say within so many seconds."""
    # Each test is named as it begins, and the options of pyproject.toml do not add up with these.
    command = [sys.executable, "-m", "pytest", tests, "-o", "addopts=", "-v", "-rfEs"]
    command += ["-m", "device", "--ignore", "tests/cuda/test_benchmark.py"]
    # A kernel that hangs is waited for in C, where only the thread method reaches.
    command += ["-p", "no:cacheprovider", "--timeout", "60", "--timeout-method", "thread"]
    status, said = _output_of(command, patience_s)
    lines = said.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:40]
    summary = lines[-1].strip("= ") if lines else ""
    return {
        "passed": status == 0,
        "summary": summary if status is not None else f"not ended after {patience_s:.0f} s",
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "failures": failures,
        "end": lines[-40:] if status else lines[-3:],
    }


def _output_of(command: list[str], patience_s: float) -> tuple[int | None, str]:
    """(exit status, None when it had to be stopped; all it said) of a program."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            ended = subprocess.run(
                command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, timeout=patience_s,
                check=False,
            )  # fmt: skip
            status: int | None = ended.returncode
        except subprocess.TimeoutExpired:
            status = None
        said.seek(0)
        return status, said.read().strip()


def groups_of(scale: Scale) -> list[GroupSpec]:
    """The model's linear groups, one weight each."""
    specs = []
    for matrix in scale.matrices:
        name, direction = matrix.name.rsplit(" ", 1)
        if direction == "forward":
            for layer in range(matrix.count):
                full = f"layers.{layer}.{name}"
                specs.append(GroupSpec(full, (full,), matrix.inputs, (matrix.outputs,)))
    return specs


def preparing(task: Task) -> Figures:
    """Quantise the model and build all hints, written to disk; bf16 weights are in memory."""
    groups = groups_of(task.scale)
    weights = {
        g.name: torch.randn(g.total_out, g.in_features, dtype=torch.bfloat16) * 0.02 for g in groups
    }
    with tempfile.TemporaryDirectory(prefix="hints-") as place:
        start_s = time.perf_counter()
        prepare(
            Path(place), groups, lambda name: weights[name], task.parameters,
            lambda label, done: None, arithmetic=cuda_arithmetic(task.gpu),
        )  # fmt: skip
        seconds = time.perf_counter() - start_s
        written = sum(file.stat().st_size for file in Path(place).rglob("*.npy"))
    return {"seconds": seconds, "written_bytes": written, "groups": len(groups)}


def step(task: Task) -> Figures:
    """`scenarios.llama1b --real-gpu --compare-clear`, in a process of its own.

    What it says goes to this process's output, which is shown when it fails.
    """
    scale = task.scale
    arguments = ["--steps", str(scale.training_steps), "--tokens", str(scale.tokens)]
    arguments += ["--sequence", str(min(scale.tokens, 512))]
    with tempfile.TemporaryDirectory(prefix="step-") as place:
        figures = Path(place) / "figures.json"
        command = [sys.executable, "-m", "scenarios.llama1b", "--real-gpu", "--compare-clear"]
        command += ["--json", str(figures), "--out", f"{place}/out", "--cache", f"{place}/cache"]
        subprocess.run([*command, *arguments], cwd=ROOT, check=True)
        found: Figures = json.loads(figures.read_text())
    found.pop("adapter_dir", None)
    found.pop("origin", None)
    return found | {"arguments": " ".join(arguments)}


def peer(task: Task) -> Figures:
    """Seconds per token of the published peer for one layer, if its CUDA wheel is installed.

    concrete-ml-extensions: encrypted matrix product over GLWE, 8-bit values.
    """
    inputs, outputs = task.scale.layers[-1]
    try:
        extension = importlib.import_module("concrete_ml_extensions")
    except ImportError:
        return {"skipped": "concrete-ml-extensions is not installed (pip install it to compare)"}
    if not (extension.is_cuda_enabled() and extension.is_cuda_available()):
        return {"skipped": "this concrete-ml-extensions does not run on this GPU"}
    parameters = extension.MatmulCryptoParameters.deserialize(extension.default_params())
    private, compression = extension.create_private_key(parameters)
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, (inputs, outputs)).astype(np.uint64)
    token = rng.integers(0, 256, (1, inputs)).astype(np.uint64)
    on_gpu = extension.make_cuda_clear_matrix(weight, compression)
    encrypted = extension.encrypt_matrix(pkey=private, crypto_params=parameters, data=token)
    times = []
    for _ in range(3):
        start_s = time.perf_counter()
        extension.matrix_multiplication(
            encrypted_matrix=encrypted, data=on_gpu, compression_key=compression
        )
        times.append(time.perf_counter() - start_s)
    return {"seconds_per_token": median(times), "in": inputs, "out": outputs}
