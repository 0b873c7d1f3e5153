"""What a training step is made of, whatever the machines: the cost trace of one micro-batch.

A `Workload` holds, in the order in which they happen, the owner's own layers (`Local`) and the
remote linears between them (`Linear`, by its index in the catalogue), forward and backward, for
one micro-batch; and what a step does once. `trace_step` gets it from any Hugging Face causal-LM
config, without weights, by running the owner's real program on the meta device (`sim.tracing`).

What the cipher does for one linear is counted here too, in the units of `sim.device`:

    ring_row   one output row of one block of up to 256 tokens under a module of rank 5. A row
               costs its NTT and `rank` products, of which one takes about 0.15 of an NTT, so
               other ranks count in proportion. Rows come in tiles of 16.
    value      one input value made into ciphertext (AES for 40 error bits, error, rounding,
               digits). Opening a result takes a third of that, and checking one input or result
               a fifth (measured on one AVX-512 core: 3.8, 1.3, 0.75 ns).
    int8       multiply-adds of the worker's product: limbs * tokens * inputs * outputs
    int8_pair  the same of products of two limbs

Not counted: packing and unpacking of values of 18 or 20 bits, learning a scale, and repairing what
wrapped; all of it is little beside what is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import torch
from transformers import PretrainedConfig

from backends.he.manifest import GroupSpec
from backends.he.params import RING_DEGREE, Parameters
from backends.he.params import preset as named_preset
from backends.he.store import nominal_formats, shapes_of
from backends.he.vector import LANES
from protocol.catalogue import MatrixShape
from sim.device import DeviceProfile, Work
from sim.layers import trace_deep
from sim.models import MODELS
from sim.trace import HEAD
from sim.tracing import LaneTrace, trace_lane, trace_update

__all__ = [
    "MODELS", "Linear", "Local", "Workload", "WorkloadError", "decrypt_work", "encrypt_work",
    "limbs_of", "multiply_work", "trace_step",
]  # fmt: skip

_NTT, _PRODUCT = 0.16, 0.024  # microseconds of one row on a Zen 4 core, see docs/design.md
_OPENED, _CHECKED = 0.35, 0.2  # in values made
_ERROR_BYTES = 5
_HINT_BYTES = 4 * RING_DEGREE  # of one row and rank


class WorkloadError(ValueError):
    """A workload cannot be made; the text says why and what to do."""


@dataclass(frozen=True)
class Local:
    """The owner's own layers between two remote linears.

    parts  their work by arithmetic intensity: the sum of the parts' times is the time of all,
           where one sum of all counts would let memory hide behind arithmetic (see `sim.tally`)
    """

    label: str
    parts: tuple[Work, ...]

    def on(self, profile: DeviceProfile) -> Work:
        """One work that takes as long on this device as all parts one after the other.

        Raises ProfileError when the profile has no rate for it.
        """
        busy_s = sum(profile.seconds(replace(part, launches=0.0), "local") for part in self.parts)
        return Work({}, busy_s * profile.bytes_per_s, sum(part.launches for part in self.parts))


@dataclass(frozen=True)
class Linear:
    """A remote linear: encrypt, send, multiply, send back, decrypt."""

    matrix: int


@dataclass(frozen=True)
class Workload:
    """One training step of one model.

    tokens       of a micro-batch, that is of each request
    sequence     tokens of a sequence, `tokens` being a multiple of it
    matrices     as in the catalogue of a prepared model: forward and backward of each group
    lane         one micro-batch's pass
    accumulate   adding a micro-batch's gradients to those of the step's first
    update       clipping and optimiser, once a step
    preset       name of the cipher parameters
    groups       of linears that share an input; each has two matrices
    """

    name: str
    tokens: int
    sequence: int
    matrices: tuple[MatrixShape, ...]
    lane: tuple[Local | Linear, ...]
    accumulate: Work
    update: Work
    lora_rank: int
    remote_head: bool
    preset: str
    groups: tuple[GroupSpec, ...] = ()

    @property
    def linears(self) -> tuple[MatrixShape, ...]:
        """The matrices that one pass asks for, one by one."""
        return tuple(self.matrices[i.matrix] for i in self.lane if isinstance(i, Linear))

    @property
    def up_bytes(self) -> int:
        """Ciphertext bytes that one pass sends."""
        return sum(shape.up_bytes(self.tokens) for shape in self.linears)

    @property
    def down_bytes(self) -> int:
        """Ciphertext bytes that one pass receives."""
        return sum(shape.down_bytes(self.tokens) for shape in self.linears)


def trace_step(
    config: PretrainedConfig,
    tokens: int,
    sequence: int | None = None,
    lora_rank: int = 16,
    remote_head: bool = False,
    preset: str = "thin",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Workload:
    """The workload of fine-tuning a causal LM of this config with LoRA.

    tokens    of one micro-batch
    sequence  tokens of a sequence (None: the micro-batch is one sequence)
    dtype     of the owner's own layers
    name      for people; None takes the config's own
    Raises WorkloadError for sizes that do not fit the model or each other, and
    `sim.tally.NoNumbersError` for a model whose program depends on its data.
    """
    sequence = sequence or tokens
    if min(tokens, lora_rank) < 1 or sequence < 2 or tokens % sequence:
        raise WorkloadError(
            f"{tokens} tokens in sequences of {sequence} with adapters of rank {lora_rank}: give "
            "positive numbers, sequences of at least 2, and tokens that are a multiple of them"
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise WorkloadError(
            f"a sequence of {sequence} tokens is longer than the {longest} that "
            f"{config.model_type} takes; give a shorter sequence"
        )
    parameters = named_preset(preset)
    request = _Request(
        config.to_json_string(use_diff=False),
        tokens // sequence, sequence, lora_rank, remote_head, dtype, copy.deepcopy(config),
    )  # fmt: skip
    trace, accumulate, update = _traced(request)
    matrices = _matrices(trace.groups, parameters)
    return Workload(
        name or config.name_or_path or config.model_type,
        tokens, sequence, matrices, _items(trace, matrices), accumulate, update,
        lora_rank, remote_head, preset, trace.groups,
    )  # fmt: skip


@dataclass(frozen=True)
class _Request:
    """What a trace depends on; the config counts by its text."""

    text: str
    sequences: int
    sequence: int
    lora_rank: int
    remote_head: bool
    dtype: torch.dtype
    config: PretrainedConfig = field(compare=False, repr=False)


@lru_cache(maxsize=64)
def _traced(request: _Request) -> tuple[LaneTrace, Work, Work]:
    """(a pass, adding gradients, update). A sweep asks for the same again and again."""
    r = request

    def trace(config: PretrainedConfig) -> LaneTrace:
        return trace_lane(config, r.sequences, r.sequence, r.lora_rank, r.remote_head, r.dtype)

    lane = trace_deep(r.config, trace)
    return lane, *trace_update(lane.parameters.values(), r.dtype)


def _matrices(groups: tuple[GroupSpec, ...], parameters: Parameters) -> tuple[MatrixShape, ...]:
    """The shapes in a prepared model's catalogue, for weights of which only these are known."""
    return shapes_of(groups, nominal_formats(groups, parameters))


def _items(trace: LaneTrace, matrices: tuple[MatrixShape, ...]) -> tuple[Local | Linear, ...]:
    items: list[Local | Linear] = []
    turn = next(a.matrix for a, b in pairwise(trace.segments) if b.matrix is None or b.matrix % 2)
    previous = None
    for segment in trace.segments:
        matrix = segment.matrix
        if matrix is None:
            label = "last gradients"
        elif previous == turn:
            label = HEAD
        else:
            label = f"before {matrices[matrix].name}"
        items.append(Local(label, segment.parts))
        if matrix is not None:
            items.append(Linear(matrix))
        previous = matrix
    return tuple(items)


def limbs_of(shape: MatrixShape) -> int:
    """Base-256 digits of a value that the worker multiplies."""
    return -(-shape.up_bytes(1) // shape.in_features)


def _ring_rows(features: int, tokens: int, rank: int) -> float:
    """Ring rows, in rows of rank 5, of so many features of every block of tokens."""
    rows = -(-features // LANES) * LANES
    blocks = -(-tokens // RING_DEGREE)
    return rows * blocks * (_NTT + rank * _PRODUCT) / (_NTT + 5 * _PRODUCT)


def encrypt_work(shape: MatrixShape, tokens: int, parameters: Parameters) -> Work:
    """What `MlweOwner.encrypt` does for one request, its half of the integrity check included.

    Memory: A's rows once for all blocks; the input three times (norms, digits, check); the random
    bits written and read; the digit planes written.
    """
    values = tokens * shape.in_features
    public = _HINT_BYTES * parameters.rank * shape.in_features
    return Work(
        {
            "ring_row": _ring_rows(shape.in_features, tokens, parameters.rank),
            "value": (1 + _CHECKED) * values,
        },
        public + values * (3 * 4 + 2 * _ERROR_BYTES + limbs_of(shape)),
    )


def decrypt_work(shape: MatrixShape, tokens: int, parameters: Parameters) -> Work:
    """What `MlweOwner.decrypt` does for one answer, its half of the integrity check included.

    Memory: the hint once for all blocks; the answer; the result written, then read and written by
    the check.
    """
    opened = tokens * shape.out_features
    hint = _HINT_BYTES * parameters.rank * shape.out_features
    return Work(
        {
            "ring_row": _ring_rows(shape.out_features, tokens, parameters.rank),
            "value": (_OPENED + _CHECKED) * opened,
        },
        hint + opened * 3 * 4 + shape.down_bytes(tokens),
    )


def multiply_work(shape: MatrixShape, tokens: int) -> Work:
    """What a worker does for one request: the weight and the planes read, the answer written."""
    inputs, outputs, limbs = shape.in_features, shape.out_features, limbs_of(shape)
    return Work(
        {"int8_pair" if limbs == 2 else "int8": float(limbs * tokens * inputs * outputs)},
        inputs * outputs + shape.up_bytes(tokens) + shape.down_bytes(tokens),
    )
