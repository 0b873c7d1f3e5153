"""What scenarios that need a prepared model share: options, the model, and finding or making it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig

from backends.he.cuda.device import require_memory
from backends.he.cuda.hints import cuda_arithmetic, preparation_needs
from backends.he.manifest import OWNER_TAG_BYTES, is_finished
from backends.he.params import PRESETS, Parameters
from backends.he.preparation import Arithmetic, disk_bytes, prepare, work_units
from backends.he.store import PreparedModel
from backends.he.verdict import owner_verdicts
from backends.he.verification import Progress, Trust
from backends.nn.skeleton import Skeleton
from backends.nn.sources import CheckpointError, WeightSource, source_for
from backends.options import place
from backends.units import human_bytes
from scenarios.hardware import CPU, Hardware
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
        base = os.environ.get("XDG_CACHE_HOME")
        place = Path(text or base or Path.home() / ".cache")
        place = place if text else place / "private-lora"
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of an unknown user
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"{text or 'no place of your own'}: {why}; name a directory that you can use"
        ) from error
    return place


def add_preparation_options(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--owner-tag` and `--cache`: which prepared model, and where."""
    add = parser.add_argument
    add("--preset", default="standard", choices=sorted(PRESETS), help="cipher parameters")
    add("--owner-tag", type=_owner_tag, default=b"", metavar="TEXT",
        help="prepare a public matrix and hints of your own instead of those that all owners of "
        "the model share (docs/security.md); any text, not a secret")  # fmt: skip
    add_cache_option(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--weights` and `--lm-head`: which model; and the above. `base_source` needs `--seed` too."""
    add = parser.add_argument
    add("--weights", type=_base, metavar="DIR|ID",
        help="Hugging Face checkpoint; random weights without")  # fmt: skip
    add("--lm-head", choices=("local", "remote"), default="local",
        help="who multiplies by the head: remote saves the owner work and costs traffic and "
        "precision (see docs/design.md)")  # fmt: skip
    add_preparation_options(parser)


def _base(text: str) -> str:
    """A directory or a hub id. What is left empty, as by a variable that is not set, is neither."""
    place(text)
    return text


def _owner_tag(text: str) -> bytes:
    tag = os.fsencode(text)
    if not 1 <= len(tag) <= OWNER_TAG_BYTES:
        raise argparse.ArgumentTypeError(f"a tag has 1 to {OWNER_TAG_BYTES} bytes")
    return tag


def base_source(args: argparse.Namespace) -> tuple[WeightSource, Path | None, PretrainedConfig]:
    """Weights, the directory of their checkpoint if any, and the config, said in a line.

    Raises CheckpointError when they cannot be had.
    """
    source, directory = source_for(args.weights, args.seed)
    print(f"weights: {source.describe()}")
    if directory is None:
        return source, None, model_config("llama-3.2-1b")
    try:
        return source, directory, AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: no usable config.json ({error})") from error


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
    config: PretrainedConfig,
    source: WeightSource,
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
    facts = json.dumps(
        [
            source.identity(), asdict(parameters), [asdict(g) for g in skeleton.groups],
            owner_tag.hex(),
        ],
        sort_keys=True,
    )  # fmt: skip
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    directory = cache / f"{config.model_type}-{parameters.name}-{key}"
    start = time.perf_counter()
    found = is_finished(directory)
    if found:
        print(f"prepared model found in {directory}; checking its digests")
    else:
        size = human_bytes(disk_bytes(skeleton.groups, parameters))
        print(f"preparing the public set-up once: {size} in {directory}")
    arithmetic = None if found else _arithmetic_of(hardware, skeleton, parameters)
    # A model that is there is at most verified, which has a bar of its own.
    quiet = nullcontext(lambda label, done: None)
    total = work_units(skeleton.groups, parameters)
    with quiet if found else _bar("prepare", "weight", total) as advance:
        prepared = prepare(
            directory,
            skeleton.groups,
            lambda module: skeleton.load_weight(source, module),
            parameters,
            advance,
            owner_tag,
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
