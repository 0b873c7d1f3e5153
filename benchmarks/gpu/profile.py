"""The device profile that the simulator runs on, from what was measured here."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from backends.he.params import Parameters
from backends.he.plan import nominal_plan
from backends.machine import commit
from benchmarks.gpu.scale import Matrix, Scale
from protocol.catalogue import MatrixShape
from sim.device import DeviceProfile, Origin
from sim.workload import decrypt_work, encrypt_work

_ASSUMED = (
    "copies between network and GPU memory overlap with computation",
    "one task at a time has the whole device",
    "overheads are those of the device's queue; hand-over between threads is not in them",
)


def shape_of(matrix: Matrix, parameters: Parameters) -> MatrixShape:
    """As a catalogue has it."""
    form = nominal_plan(matrix.inputs, matrix.outputs, parameters).format
    up, down = form.up_bytes(matrix.inputs), form.down_bytes(matrix.outputs)
    return MatrixShape(matrix.name, matrix.inputs, matrix.outputs, up, down)


def ring_rates(
    works: list[dict[str, Any]], parameters: Parameters, scale: Scale
) -> dict[str, float]:
    """Rates and overheads of the owner's tasks: time = rows/r + values/v + overhead.

    works  results of `owner.ring_work` at one or several token counts

    Least squares of relative errors; a rate that would be negative is left at a value too fast to
    matter.
    """
    by_name = {matrix.name: shape_of(matrix, parameters) for matrix in scale.matrices}
    lines, seconds = [], []
    for work in works:
        for row in work["matrices"]:
            shape, tokens = by_name[row["matrix"]], work["tokens"]
            for counted, key, task in (
                (encrypt_work(shape, tokens, parameters), "encrypt_ms", 0),
                (decrypt_work(shape, tokens, parameters), "decrypt_checked_ms", 1),
            ):
                counts = counted.operations
                lines.append([counts["ring_row"], counts["value"], 1 - task, task])
                seconds.append(row[key] / 1e3)
    measured = np.array(seconds)
    matrix = np.array(lines, float) / measured[:, None]
    found, *_ = np.linalg.lstsq(matrix, np.ones(len(measured)), rcond=None)
    row_s, value_s, encrypt_s, decrypt_s = np.maximum(found, [1e-12, 1e-14, 0, 0])
    return {
        "ring_row": 1 / row_s, "value": 1 / value_s, "encrypt": encrypt_s, "decrypt": decrypt_s,
    }  # fmt: skip


def profile(
    name: str, where: str, figures: dict[str, Any], parameters: Parameters, scale: Scale
) -> DeviceProfile:
    """Of the device these figures were measured on."""
    products, single = figures["throughput"], figures["layers"][0]
    products_a_token = sum(
        m.count * m.inputs * m.outputs * nominal_plan(m.inputs, m.outputs, parameters).format.limbs
        for m in scale.matrices
    )
    operations = products_a_token * products["tokens"]
    macs = single["tokens"] * single["in"] * single["out"]
    ring = ring_rates(figures["owner"], parameters, scale)
    overhead = {
        "local": figures["launch"]["local_s"],
        "update": figures["launch"]["local_s"],
        "multiply": figures["launch"]["multiply_s"],
        "encrypt": ring["encrypt"],
        "decrypt": ring["decrypt"],
    }
    rates = {
        "int8": operations / products["step_ms"] * 1e3,
        "float": macs / single["bf16_ms"] * 1e3,
        "ring_row": ring["ring_row"],
        "value": ring["value"],
    }
    return DeviceProfile(
        name,
        Origin("measured", where, time.strftime("%Y-%m-%d"), commit(), _ASSUMED),
        1.0,
        {key: float(f"{value:.4g}") for key, value in rates.items()},
        float(f"{figures['library']['bytes_per_s']:.4g}"),
        {key: float(f"{value:.4g}") for key, value in overhead.items()},
    )
