"""What scenarios that need a prepared model share: options, the model, and finding or making it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from backends.door import place_of, prepared_at
from backends.hardware import CPU, Hardware
from backends.he.cuda.device import require_memory
from backends.he.cuda.hints import cuda_arithmetic, preparation_needs
from backends.he.manifest import is_finished
from backends.he.params import Parameters
from backends.he.preparation import Arithmetic, disk_bytes, work_units
from backends.he.store import PreparedModel
from backends.he.verdict import owner_verdicts
from backends.he.verification import Progress, Trust
from backends.nn.base import open_base
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import Base, RandomBase
from backends.places import output_directory
from backends.units import human_bytes
from scenarios.estimate import Shape
from scenarios.head import decided
from sim.models import model_config


def chosen_base(args: argparse.Namespace) -> Base:
    """The base that `--weights` names, or the 1B shape with random weights; said in a line.

    Raises CheckpointError when it cannot be had.
    """
    if args.weights is None:
        base: Base = RandomBase(model_config("llama-3.2-1b"), args.seed)
    else:
        base = open_base(args.weights)
    print(f"weights: {base.describe()}")
    return base


def settle_head(
    args: argparse.Namespace, shape: Shape, base: Base, hardware: Hardware, here: bool
) -> None:
    """Put `local` or `remote` in the place of `--lm-head auto`; see `scenarios.head`.

    here  the worker is in this process
    """
    if args.lm_head == "auto":
        args.lm_head = decided(shape, base, hardware, here, args.cache, args.owner_tag)


def chosen_skeleton(
    args: argparse.Namespace, base: Base, dtype: torch.dtype = torch.float32
) -> Skeleton:
    """The owner's model of a base; says what goes to workers. Raises CheckpointError."""
    # What is mapped would be copied to a GPU all the same.
    tables = args.cache / "tables" if dtype == CPU.dtype else None
    skeleton = build_skeleton(
        base, args.lm_head == "remote", dtype, least_remote=args.least_remote, tables=tables
    )
    print(f"workers compute {skeleton.remote_share:.1%} of the weights of the model's layers")
    for note in skeleton.notes:
        print(note)
    return skeleton


@contextmanager
def _bar(name: str, unit: str, total: int) -> Iterator[Progress]:
    with tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True, desc=name) as bar:

        def advance(label: str, done: int) -> None:
            bar.set_postfix_str(label[-48:], refresh=False)
            bar.update(done)

        yield advance


@contextmanager
def _verifying(reason: str, total: int) -> Iterator[Progress]:
    print(f"verifying weights, plans and hints ({human_bytes(total)}): {reason}")
    with _bar("verify", "B", total) as advance:
        yield advance


def prepared_for(
    skeleton: Skeleton,
    parameters: Parameters,
    cache: Path,
    hardware: Hardware = CPU,
    owner_tag: bytes = b"",
    anew: bool = False,
) -> tuple[PreparedModel, float]:
    """(prepared model, seconds it took). Made once per model, parameter set and tag, then found.

    What is written is the same wherever it is computed. Interrupting is safe: the next run goes
    on with the file after the last finished one.

    anew  verify it in any case

    Raises PreparationError when it cannot be made, or what lies there is damaged, wrong or not
    what is asked for.
    """
    directory = place_of(skeleton.base, skeleton.groups, parameters, cache, owner_tag)
    start = time.perf_counter()
    found = is_finished(directory)
    if found:
        print(f"prepared model found in {directory}; checking its digests")
    else:
        output_directory(directory)
        size = human_bytes(disk_bytes(skeleton.groups, parameters))
        print(f"preparing the public set-up once: {size} in {directory}")
    arithmetic = None if found else _arithmetic_of(hardware, skeleton, parameters)
    # A model that is there is at most verified, which has a bar of its own.
    quiet = nullcontext(lambda label, done: None)
    total = work_units(skeleton.groups, parameters)
    with quiet if found else _bar("prepare", "weight", total) as advance:
        prepared = prepared_at(
            directory,
            skeleton,
            parameters,
            owner_tag,
            advance,
            arithmetic,
            Trust(owner_verdicts(), anew, _verifying),
        )
    return prepared, time.perf_counter() - start


def _arithmetic_of(hardware: Hardware, skeleton: Skeleton, parameters: Parameters) -> Arithmetic:
    """Raises GpuError when the GPU has too little memory left to prepare on."""
    if hardware.gpu is None:
        return Arithmetic()
    needs = preparation_needs(skeleton.groups, parameters)
    require_memory(hardware.gpu, needs, "prepare with --real-cpu once: the files are the same")
    return cuda_arithmetic(hardware.gpu)
