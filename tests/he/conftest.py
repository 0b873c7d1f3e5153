"""Small matrices prepared for the cipher, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.he.interface import OwnerMatrix, WorkerCipher
from backends.he.params import Parameters, preset
from backends.he.plan import plan_matrix
from backends.he.public import HintBuilder, PublicMatrix, public_seed
from backends.he.wire import Format


@dataclass
class Case:
    """One direction of one int8 weight, with everything either side needs."""

    parameters: Parameters
    public: PublicMatrix
    weight: NDArray[np.int8]
    forward: bool
    matrix: OwnerMatrix

    def load(self, worker: WorkerCipher) -> Any:
        """The matrix as a worker computes with it."""
        return worker.load(self.weight, self.forward, self.matrix.plan.format)

    def exact(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the encrypted product stands for, in float64."""
        operand = self.weight.T if self.forward else self.weight
        scaled = x.astype(np.float64) * self.matrix.in_scale
        return scaled @ operand.astype(np.float64) * self.matrix.out_scale


def make_case(
    inputs: int,
    outputs: int,
    forward: bool = True,
    seed: int = 0,
    parameters: Parameters | None = None,
    weight: NDArray[np.int8] | None = None,
    form: Format | None = None,
) -> Case:
    """A case with random int8 weights; `inputs` and `outputs` are those of the direction.

    form  instead of the planner's
    """
    parameters = parameters or preset("exact")
    rng = np.random.default_rng(seed)
    shape = (outputs, inputs) if forward else (inputs, outputs)
    if weight is None:
        limit = parameters.weight_limit
        weight = rng.integers(-limit, limit + 1, size=shape).astype(np.int8)
    public = PublicMatrix(public_seed(bytes(32), parameters), parameters.rank)
    scale = rng.uniform(0.001, 0.1, shape[0]).astype(np.float32)
    ones = np.ones(shape[1], np.float32)
    in_scale, out_scale = (ones, scale) if forward else (scale, ones)
    plan = plan_matrix(weight if forward else weight.T, out_scale, parameters)
    if form is not None:
        plan = replace(plan, up_bits=form.up_bits, down_bits=form.down_bits)
    hint = HintBuilder(public).build(weight, forward)
    matrix = OwnerMatrix(f"{inputs}x{outputs}", in_scale, out_scale, plan, hint)
    return Case(parameters, public, weight, forward, matrix)


@pytest.fixture(scope="session")
def small() -> Case:
    """48 inputs, 40 outputs."""
    return make_case(48, 40)
