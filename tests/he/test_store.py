"""The prepared model on disk: whole or absent, resumable, checked when opened."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from backends import files
from backends.files import WriteError, replacing
from backends.he.manifest import GroupSpec, PreparationError
from backends.he.params import preset
from backends.he.plan import plan_matrix
from backends.he.preparation import disk_bytes, prepare, work_units
from backends.he.quantise import channel_scales, dequantise, quantise
from backends.he.store import PreparedModel
from backends.threads import Job, run_ahead

GROUPS = [GroupSpec("a.q+k", ("a.q", "a.k"), 24, (24, 8)), GroupSpec("a.o", ("a.o",), 32, (24,))]
SHAPES = {"a.q": (24, 24), "a.k": (8, 24), "a.o": (24, 32)}
STANDARD = preset("exact")


class Loader:
    """Random weights; counts reads and fails on request."""

    def __init__(self, fail_at: int = -1) -> None:
        self.reads: list[str] = []
        self.fail_at = fail_at

    def __call__(self, module: str) -> torch.Tensor:
        if len(self.reads) == self.fail_at:
            raise KeyboardInterrupt
        self.reads.append(module)
        generator = torch.Generator().manual_seed(sum(map(ord, module)))
        return torch.randn(SHAPES[module], generator=generator)


def quiet(label: str, done: int) -> None:
    """No progress."""


def test_prepared_arrays_and_sizes(tmp_path: Path) -> None:
    """Weights, scales and hints of the stated shapes; the announced size is the size."""
    done: list[int] = []
    model = prepare(tmp_path, GROUPS, Loader(), STANDARD, lambda label, n: done.append(n))
    assert sum(done) == work_units(GROUPS, STANDARD)
    arrays = sum(np.load(p, mmap_mode="r").nbytes for p in tmp_path.rglob("*.npy"))
    assert arrays == disk_bytes(GROUPS, STANDARD)
    assert [w.shape for w in model.worker_weights()] == [(32, 24), (24, 32)]
    shapes = [(m.in_features, m.out_features) for m in model.owner_matrices()]
    assert shapes == [(24, 32), (32, 24), (32, 24), (24, 32)]


def test_an_interrupted_preparation_goes_on(tmp_path: Path) -> None:
    """What was finished is not done again, and the result is the uninterrupted one."""
    first = Loader(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "a", GROUPS, first, STANDARD, quiet)
    with pytest.raises(PreparationError, match="no finished preparation"):
        PreparedModel.open(tmp_path / "a")
    second = Loader()
    resumed = prepare(tmp_path / "a", GROUPS, second, STANDARD, quiet)
    assert second.reads == ["a.o"]
    whole = prepare(tmp_path / "b", GROUPS, Loader(), STANDARD, quiet)
    assert resumed.model_digest == whole.model_digest
    for ours, theirs in zip(resumed.owner_matrices(), whole.owner_matrices(), strict=True):
        assert ours.hint is not None
        assert np.array_equal(ours.hint, theirs.hint)
    third = Loader()
    prepare(tmp_path / "a", GROUPS, third, STANDARD, quiet)
    assert third.reads == []


def test_hints_interrupted_go_on(tmp_path: Path) -> None:
    """Hints that were written before the interruption stay, and the files are those of one go."""
    built = 0

    def interrupted(label: str, done: int) -> None:
        nonlocal built
        built += label.startswith("hint")
        if built == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "a", GROUPS, Loader(), STANDARD, interrupted)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("ahead")]
    assert not list(tmp_path.rglob("*.tmp"))
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*ward.npy")}
    assert len(left) >= 2
    prepare(tmp_path / "a", GROUPS, Loader(fail_at=0), STANDARD, quiet)
    assert {path: path.stat().st_mtime_ns for path in left} == left
    prepare(tmp_path / "b", GROUPS, Loader(), STANDARD, quiet)
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            twin = tmp_path / "a" / path.relative_to(tmp_path / "b")
            assert twin.read_bytes() == path.read_bytes()


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how much is needed and where."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    loader = Loader()
    with pytest.raises(PreparationError, match=r"needs .* more in .* --cache"):
        prepare(tmp_path, GROUPS, loader, STANDARD, quiet)
    assert loader.reads == []


_MANY_GROUPS = """
import resource, sys
from pathlib import Path
import torch
from backends.he.manifest import GroupSpec
from backends.he.params import preset
from backends.he.preparation import prepare

soft, hard = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
groups = [GroupSpec(f"g{i}", (f"g{i}",), 2, (2,)) for i in range(60)]
try:
    made = prepare(Path(sys.argv[1]), groups, lambda name: torch.ones(2, 2), None,
                   lambda label, done: None)
    print("opened", len(made.worker_weights()))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_many_arrays_have_files_enough(tmp_path: Path) -> None:
    """The soft limit is raised; where the hard one is too low, that is said before any work."""
    answers = {}
    for name, soft, hard in (("raised", 128, 1024), ("refused", 128, 128)):
        answers[name] = subprocess.run(
            [sys.executable, "-c", _MANY_GROUPS, str(tmp_path / name), str(soft), str(hard)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    assert answers["raised"] == "opened 60\n"
    assert answers["refused"].startswith("PreparationError a model of 120 arrays needs ")
    assert "ulimit -n" in answers["refused"]
    assert not (tmp_path / "refused").exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    """The error names the module and both shapes."""
    wrong = [GroupSpec("a.o", ("a.o",), 33, (24,))]
    with pytest.raises(PreparationError, match=r"a\.o.*\[24, 32\].*\[24, 33\]"):
        prepare(tmp_path, wrong, Loader(), None, quiet)


def test_quantisation_is_within_half_a_step() -> None:
    """Per row; zero rows stay zero; NaN is refused."""
    weight = torch.randn(40, 30) * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0
    codes, scales = quantise(weight)
    half_step = torch.from_numpy(scales)[:, None] * 0.5001
    assert torch.all((dequantise(codes, scales) - weight).abs() <= half_step)
    assert not codes[7].any()
    assert scales[7] == 1
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantise(weight)


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """An error while writing leaves the old file and no stray one."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with pytest.raises(RuntimeError), files.replacing_directory(tmp_path / "d") as aside:
        (aside / "x").write_bytes(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_others_put_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    """Names aside cannot be guessed, and an existing one of them is never used."""
    target, victim = tmp_path / "result.json", tmp_path / "victim"
    victim.write_text("precious")
    with mock.patch.object(secrets, "token_hex", return_value="0" * 16):
        (tmp_path / f".result.json.{'0' * 16}.tmp").symlink_to(victim)
        with pytest.raises(WriteError, match="File exists"), replacing(target) as file:
            file.write(b"private")
    assert victim.read_text() == "precious"
    assert not target.exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    """Whatever the mask says of new ones."""
    target = tmp_path / "result.json"
    target.write_text("old")
    target.chmod(mode)
    before = os.umask(0o000)
    try:
        with replacing(target) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == mode
    assert target.read_bytes() == b"new"


def test_jobs_run_ahead_in_order_and_within_their_budget() -> None:
    """Results in order; never more begun and uncollected than threads + 1, or than the budget."""
    begun: list[int] = []
    sizes = [3, 3, 3, 50, 3, 3, 3, 3]
    last_collected = -1

    def jobs() -> Iterator[Job[int]]:
        for index, size in enumerate(sizes):
            held = sizes[last_collected + 1 : index]
            assert len(held) <= 3
            begun.append(index)
            yield Job(size, partial(int, index))

    for result in run_ahead(jobs(), threads=2, budget_bytes=10):
        assert result == last_collected + 1
        waiting = sizes[result : len(begun) - 1]
        assert sum(waiting) <= 10 or len(waiting) == 1
        last_collected = result
    assert last_collected == len(sizes) - 1


def test_an_error_waits_for_the_jobs_begun() -> None:
    """The error comes in its turn, and nothing runs on after it."""
    begun, running = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        running.wait(0.2)
        running.set()

    def broken() -> None:
        begun.wait()
        raise KeyError

    with pytest.raises(KeyError):
        list(run_ahead([Job(1, broken), Job(1, slow)], threads=2, budget_bytes=10))
    assert running.is_set()


def factors_plainly(weights: list[torch.Tensor]) -> list[float]:
    """c by its definition, number by number in Python's own."""
    rows = [row for weight in weights for row in weight.tolist()]
    norms = []
    for k in range(len(rows[0])):
        shares = [row[k] / max(map(abs, row)) for row in rows if any(row)]
        norms.append(math.sqrt(sum(share * share for share in shares)))
    some = sorted(norm for norm in norms if norm)
    middle = some[len(some) // 2] if some else 0.0
    doublings = [round(math.log2(middle / norm)) if norm else 0 for norm in norms]
    return [2.0 ** (max(-20, min(20, d)) if abs(d) > 1 else 0) for d in doublings]


@pytest.mark.parametrize("seed", range(4))
def test_factors_of_channels_are_those_defined(seed: int) -> None:
    """Powers of two that even out columns, chosen for all members of a group together."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, 37, generator=generator) for rows in (1100, 25)]
    sizes = 2.0 ** (3 * torch.randn(37, generator=generator)).clamp(-5, 5)
    weights = [weight * sizes for weight in weights]
    weights[1] *= 1e-5
    weights[0][9] = 0
    for weight in weights:
        weight[:, 4] = 0
    found = channel_scales(weights)
    assert found.tolist() == factors_plainly(weights)
    assert found[4] == 1
    assert len(set(found.tolist())) > 5


def test_columns_that_are_alike_are_left_alone() -> None:
    """And so are weights of sizes that no model has: factors could leave float32."""
    ones = np.ones(30, np.float32)
    weight = torch.randn(50, 30) * torch.linspace(0.6, 1.6, 30)
    assert np.array_equal(channel_scales([weight]), ones)
    for size, alone in ((0.0, False), (1e-42, True), (1e30, True), (float("nan"), True)):
        outliers = torch.randn(50, 30)
        outliers[:, 3] *= 1000
        outliers[7] *= size
        assert np.array_equal(channel_scales([outliers]), ones) == alone


def test_factors_of_channels_are_undone(tmp_path: Path) -> None:
    """The prepared matrices multiply by the model's own weight, both ways, to 8 bits."""
    weight = Loader()("a.o")
    weight[:, [3, 17]] *= torch.tensor([1 / 300, 256.0])
    group = GroupSpec("a.o", ("a.o",), 32, (24,))
    model = prepare(tmp_path, [group], lambda name: weight, None, quiet)
    codes = model.worker_weights()[0].astype(np.float32)
    forward, backward = model.owner_matrices()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 32)).astype(np.float32) / np.linalg.norm(weight, axis=0)
    dy = rng.normal(size=(9, 24)).astype(np.float32)
    for found, exact in (
        ((x * forward.in_scale) @ codes.T * forward.out_scale, x @ weight.numpy().T),
        ((dy * backward.in_scale) @ codes * backward.out_scale, dy @ weight.numpy()),
    ):
        off = np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)
        assert off.max() < 0.06
    whole = dequantise(model.worker_weights()[0], forward.out_scale, 1 / forward.in_scale)
    assert (whole - weight).norm() < 0.01 * weight.norm()
    assert backward.plan == plan_matrix(model.worker_weights()[0].T, backward.out_scale)
