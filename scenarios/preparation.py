"""Finding or making the prepared model a scenario needs, with progress a person can follow."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers import PretrainedConfig

from backends.he.cuda.device import require_memory
from backends.he.cuda.hints import cuda_arithmetic, preparation_needs
from backends.he.params import Parameters
from backends.he.preparation import Arithmetic, disk_bytes, prepare, work_units
from backends.he.store import PreparedModel
from backends.nn.skeleton import Skeleton
from backends.nn.sources import WeightSource, human_bytes
from scenarios.hardware import CPU, Hardware


def default_cache() -> Path:
    """Where prepared models live unless `--cache` says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "private-lora"


def prepared_for(
    skeleton: Skeleton,
    config: PretrainedConfig,
    source: WeightSource,
    parameters: Parameters,
    cache: Path,
    hardware: Hardware = CPU,
) -> tuple[PreparedModel, float]:
    """(prepared model, seconds it took). Made once per model and parameter set, then found.

    What is written is the same wherever it is computed. Interrupting is safe: the next run goes
    on with the file after the last finished one.
    """
    facts = json.dumps(
        [source.identity(), asdict(parameters), [asdict(g) for g in skeleton.groups]],
        sort_keys=True,
    )
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    directory = cache / f"{config.model_type}-{parameters.name}-{key}"
    start = time.perf_counter()
    if (directory / "manifest.json").exists():
        print(f"prepared model found in {directory}; checking its digests")
        return PreparedModel.open(directory), time.perf_counter() - start
    size = human_bytes(disk_bytes(skeleton.groups, parameters))
    print(f"preparing the public set-up once: {size} in {directory}")
    total = work_units(skeleton.groups, parameters)
    with tqdm(
        total=total, unit="weight", unit_scale=True, dynamic_ncols=True, desc="prepare"
    ) as bar:

        def advance(label: str, done: int) -> None:
            bar.set_postfix_str(label[-48:], refresh=False)
            bar.update(done)

        prepared = prepare(
            directory,
            skeleton.groups,
            lambda module: skeleton.load_weight(source, module),
            parameters,
            advance,
            arithmetic=_arithmetic_of(hardware, skeleton, parameters),
        )
    return prepared, time.perf_counter() - start


def _arithmetic_of(hardware: Hardware, skeleton: Skeleton, parameters: Parameters) -> Arithmetic:
    """Raises GpuError when the GPU has too little memory left to prepare on."""
    if hardware.gpu is None:
        return Arithmetic()
    needs = preparation_needs(skeleton.groups, parameters)
    require_memory(hardware.gpu, needs, "prepare with --real-cpu once: the files are the same")
    return cuda_arithmetic(hardware.gpu)
