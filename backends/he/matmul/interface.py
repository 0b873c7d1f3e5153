"""What every kernel for products with int8 weights does, whatever it multiplies with.

There are two products. Workers need an *answer*: digit planes times a weight, recombined mod p and
rounded. Public set-up needs *exact* integers: a matrix of 32-bit values, cut into a kernel's own
digits once, times many weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.defaults import MAX_INPUTS


@dataclass(frozen=True)
class Digits:
    """An int32 matrix as a kernel multiplies it.

    values  [digits, M, >= K], signed digits of `bits` bits, least significant first
    inputs  K
    """

    values: NDArray[Any]
    inputs: int
    bits: int


class Kernel(ABC):
    """Products with int8 weights, all kernels to the same bit.

    name     as `--kernel` and PRIVATE_LORA_KERNEL call it
    warning  what a user should know of its speed; empty when there is nothing to say
    """

    name: str
    warning: str

    @abstractmethod
    def pack(self, weight: NDArray[np.int8], forward: bool) -> Any:
        """A weight int8[N, K] in this kernel's form, for products with its transpose (forward: K
        in, N out) or with itself (N in, K out). Opaque, but for `inputs` and `outputs`.

        Raises ValueError for another dtype, no rows or columns, or more than MAX_INPUTS.
        """

    @abstractmethod
    def answer(
        self, planes: NDArray[np.int8], packed: Any, dropped_bits: int
    ) -> NDArray[np.uint16]:
        """planes int8[limbs, T, inputs], 2 or 3 limbs -> the rounded answer uint16[T, outputs].

        Raises ValueError when the planes do not fit.
        """

    @abstractmethod
    def digits_of(self, values: NDArray[np.int32]) -> Digits:
        """int32[M, K], |values| <= 2^30, for `exact`. Raises ValueError for another shape."""

    @abstractmethod
    def exact(self, digits: Digits, packed: Any) -> NDArray[np.int64]:
        """values[M, inputs] @ matrix[inputs, outputs] as exact integers.

        Raises ValueError when they do not fit.
        """


def check_weight(weight: NDArray[np.int8]) -> None:
    """Raise ValueError unless weight is int8[N, K] with 1 to MAX_INPUTS of each."""
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise ValueError(f"a weight is int8[N, K], not {weight.dtype}{list(weight.shape)}")
    if not all(1 <= side <= MAX_INPUTS for side in weight.shape):
        raise ValueError(f"a weight has 1 to {MAX_INPUTS} rows and columns, not {weight.shape}")


def check_values(values: NDArray[np.int32]) -> None:
    """Raise ValueError unless values are int32[M >= 1, 1 to MAX_INPUTS]."""
    if values.dtype != np.int32 or values.ndim != 2 or not len(values):
        raise ValueError(f"values are int32[M, K], not {values.dtype}{list(values.shape)}")
    if not 1 <= values.shape[1] <= MAX_INPUTS:
        raise ValueError(f"values have 1 to {MAX_INPUTS} columns, not {values.shape[1]}")


def check_planes(planes: NDArray[np.int8], inputs: int) -> None:
    """Raise ValueError unless planes are int8[2 or 3, T >= 1, inputs]."""
    fits = planes.dtype == np.int8 and planes.ndim == 3 and planes.shape[2] == inputs
    if not fits or planes.shape[0] not in (2, 3) or not planes.shape[1]:
        raise ValueError(f"planes {planes.shape} do not fit a weight with {inputs} inputs")
