"""What scenarios that need a prepared model share: options, the model, and finding or making it."""

from __future__ import annotations

import argparse
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from backends.door import cache_directory, place_of, prepared_at
from backends.hardware import CPU, Hardware
from backends.he.cuda.device import require_memory
from backends.he.cuda.hints import cuda_arithmetic, preparation_needs
from backends.he.manifest import OWNER_TAG_BYTES, is_finished
from backends.he.params import PRESETS, Parameters
from backends.he.preparation import Arithmetic, disk_bytes, work_units
from backends.he.store import PreparedModel
from backends.he.verdict import owner_verdicts
from backends.he.verification import Progress, Trust
from backends.nn.base import open_base
from backends.nn.skeleton import LEAST_REMOTE, Skeleton, build_skeleton
from backends.nn.sources import Base, RandomBase
from backends.options import Number, place
from backends.places import PlaceError, named, output_directory
from backends.units import human_bytes
from scenarios.estimate import Shape
from scenarios.head import CHOICES, decided
from sim.models import model_config


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """`--cache`. One that cannot be looked into, or no home to have it in, is an error at once."""
    parser.add_argument(
        "--cache", type=_cache, default="", metavar="DIR",
        help="where prepared models are kept ($XDG_CACHE_HOME/private-lora, or "
        "~/.cache/private-lora)",
    )  # fmt: skip


def _cache(text: str) -> Path:
    """Of an option's text, or where prepared models live when there is none."""
    try:
        place = named(text) if text else cache_directory()
        place.exists()
        there = next(each for each in (place, *place.parents) if os.path.lexists(each))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no directory")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of an unknown user
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"{text or 'no place of your own'}: {why}; name a directory that you can use"
        ) from error
    return place


def add_preparation_options(parser: argparse.ArgumentParser, usual: str = "thin") -> None:
    """`--preset`, `--owner-tag` and `--cache`: which prepared model, and where.

    usual  preset
    """
    add = parser.add_argument
    add("--preset", default=usual, choices=sorted(PRESETS),
        help="cipher: `thin` has few bits and products a few per cent off, `thin-6bit` rounds "
        "weights to 6 bits too, `exact` has products to some tenths of a per cent and nothing "
        "wraps; `conservative` and `paranoid` are exact with larger lattices "
        f"({usual})")  # fmt: skip
    add("--owner-tag", type=_owner_tag, default=b"", metavar="TEXT",
        help="prepare a public matrix and hints of your own instead of those that all owners of "
        "the model share (docs/security.md); any text, not a secret")  # fmt: skip
    add_cache_option(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--weights` and `--lm-head`: which model; and the above. `chosen_base` needs `--seed` too."""
    add = parser.add_argument
    add(
        "--weights",
        type=weights_text,
        metavar="DIR|FILE|ID",
        help="checkpoint: a directory, a GGUF file, or an id of the hub; random weights without",
    )
    add_head_options(parser)
    add_preparation_options(parser)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """`--lm-head` and `--least-remote`: what of a model is the workers'."""
    add = parser.add_argument
    add("--lm-head", choices=CHOICES, default="local",
        help="who multiplies by the head: remote saves the owner work and costs traffic (see "
        "docs/design.md); auto asks the simulator and says why")  # fmt: skip
    add(
        "--least-remote",
        type=Number(0, 1),
        default=LEAST_REMOTE,
        metavar="SHARE",
        help="refuse a model of whose frozen weights workers can compute less than this "
        f"({LEAST_REMOTE:g})",
    )


def weights_text(text: str) -> str:
    """For an option's type: a directory or a hub id. What is left empty, as by a variable that is
    not set, is neither.
    """
    place(text)
    try:
        named(text)
    except PlaceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _owner_tag(text: str) -> bytes:
    tag = os.fsencode(text)
    if not 1 <= len(tag) <= OWNER_TAG_BYTES:
        raise argparse.ArgumentTypeError(f"a tag has 1 to {OWNER_TAG_BYTES} bytes")
    return tag


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
