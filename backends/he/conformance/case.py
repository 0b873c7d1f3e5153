"""What the checks share: a scheme to try, a matrix with both halves, and how to look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.he.entropy import Entropy
from backends.he.interface import Encrypted, Float32Array, OwnerCipher, OwnerMatrix, WorkerCipher

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scheme:
    """One to try, and what it says of itself.

    owner     makes the owner's half, from a source of keys (None: its own), unverified or not
    worker    makes the worker's half
    matrix    the owner's view of int8[N, K] and a direction (True: forward)
    error     of products, relative, at most
    word      an answer's bytes are numbers of this type (as bits, where they are not whole)
    modulus   that these numbers are below
    encrypts  False for one that sends its inputs as they are
    block     tokens after which it begins another ciphertext
    """

    name: str
    owner: Callable[[Entropy | None, bool], OwnerCipher]
    worker: Callable[[], WorkerCipher]
    matrix: Callable[[NDArray[np.int8], bool], OwnerMatrix]
    error: float
    word: str = "<u2"
    modulus: int = 1 << 16
    encrypts: bool = True
    block: int = 256


class Case:
    """A matrix with random weights and scales, both halves, and the check of answers.

    like  a case whose halves are used again, for a matrix of another name
    """

    def __init__(
        self, scheme: Scheme, inputs: int = 12, outputs: int = 10, forward: bool = True,
        guarded: bool = True, unverified: bool = False, like: Case | None = None,
    ) -> None:  # fmt: skip
        self.rng = np.random.default_rng([inputs, outputs, forward, like is not None])
        shape = (outputs, inputs) if forward else (inputs, outputs)
        self.scheme, self.forward = scheme, forward
        self.weight = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.matrix = self._scaled(scheme.matrix(self.weight, forward))
        if like is None:
            self.owner, self.worker = scheme.owner(None, unverified), scheme.worker()
        else:
            self.owner, self.worker = like.owner, like.worker
            name = f"{like.matrix.name}, another, {inputs} to {outputs}"
            self.matrix = replace(self.matrix, name=name)
        if guarded:
            self.owner.guard(self.matrix, self.weight, forward)
        self.operand = self._load(self.weight)

    def _scaled(self, matrix: OwnerMatrix) -> OwnerMatrix:
        """With scales that no half may forget, whatever the scheme's own are."""
        into = self.rng.uniform(0.5, 2, matrix.in_features) * matrix.in_scale
        out = self.rng.uniform(0.5, 2, matrix.out_features) * matrix.out_scale
        return replace(
            matrix, in_scale=into.astype(np.float32), out_scale=out.astype(np.float32)
        )  # fmt: skip

    def _load(self, weight: NDArray[np.int8]) -> Any:
        return self.worker.load(weight, self.forward, self.matrix.plan.format)

    def inputs(self, tokens: int, size: float = 1.0) -> Float32Array:
        """float32[T, K], a few of them much larger than others."""
        drawn = self.rng.standard_t(2, (tokens, self.matrix.in_features))
        return np.ascontiguousarray((size * drawn).astype(np.float32))

    def exact(self, x: Float32Array) -> NDArray[np.float64]:
        """What the product stands for."""
        operand = (self.weight.T if self.forward else self.weight).astype(np.float64)
        scaled = x.astype(np.float64) * self.matrix.in_scale
        return (scaled @ operand) * self.matrix.out_scale

    def typical(self, x: Float32Array) -> NDArray[np.float64]:
        """float64[T]: how long a token's result is, where its terms do not happen to cancel."""
        scaled = x.astype(np.float64) * self.matrix.in_scale
        operand = (self.weight.T if self.forward else self.weight) * self.matrix.out_scale
        return np.linalg.norm(scaled, axis=1) * np.linalg.norm(operand) / np.sqrt(x.shape[1])

    def answer(self, payload: Any, tokens: int, operand: Any = None) -> Bytes:
        """The worker's, as bytes of its own."""
        operand = self.operand if operand is None else operand
        return own(self.worker.multiply(payload, tokens, operand))

    def ask(self, x: Float32Array) -> tuple[Encrypted, Bytes]:
        """A request, and an honest answer to it."""
        sent = self.owner.encrypt(x, self.matrix)
        return sent, self.answer(sent.payload, len(x))

    def open(self, sent: Encrypted, answer: Any) -> Float32Array:
        found = self.owner.decrypt(sent.sealed, answer, self.matrix, "worker")
        return np.asarray(found.cpu() if hasattr(found, "cpu") else found)

    def without_a_row(self) -> Any:
        """The matrix as a worker has it that takes one output's weights for zeros."""
        broken = self.weight.copy()
        broken[(0, ...) if self.forward else (..., 0)] = 0
        return self._load(broken)


def own(answer: Any) -> Bytes:
    """A copy of what may be the other half's memory."""
    return np.array(np.frombuffer(answer, np.uint8))


def refused(
    call: Callable[[], object], kinds: type[BaseException] | tuple[type[BaseException], ...],
    what: str,
) -> None:  # fmt: skip
    """Raise AssertionError unless the call raises one of `kinds`."""
    try:
        call()
    except kinds:
        return
    except Exception as error:
        raise AssertionError(f"{what}: raised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: was taken")


def close(case: Case, found: Float32Array, x: Float32Array) -> None:
    """Raise AssertionError unless results are right: together, and each token's by itself."""
    want = case.exact(x)
    assert found.shape == want.shape, f"a result of shape {found.shape}, not {want.shape}"
    assert found.dtype == np.float32, f"results are {found.dtype}"
    said = case.scheme.error
    off = np.linalg.norm(found - want) / max(np.linalg.norm(want), np.linalg.norm(case.typical(x)))
    assert off <= said, f"a product is {off:.2e} off; {said:.2e} was said"
    # One token of small numbers may be all wrong among large ones.
    size = np.maximum(np.linalg.norm(want, axis=1), case.typical(x))
    worst = (np.linalg.norm(found - want, axis=1) / np.maximum(size, np.finfo(float).tiny)).max()
    assert worst <= 3 * said, f"a token's product is {worst:.2e} off"


def delivers(case: Case, sent: Encrypted, answer: Any, x: Float32Array) -> Float32Array:
    """The product that an honest answer opens to. Raise AssertionError unless it does."""
    try:
        found = case.open(sent, answer)
    except Exception as error:
        raise AssertionError(f"an honest answer was refused: {error}") from error
    close(case, found, x)
    return found


def held(thing: Any) -> Iterator[Any]:
    """All arrays, tensors and bytes that can be reached from an object, wherever it has them."""
    seen: set[int] = set()
    todo = [thing]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, bytes | bytearray | np.ndarray) or _is_tensor(part):
            yield part
        else:
            todo += _within(part)


def _is_tensor(thing: Any) -> bool:
    return hasattr(type(thing), "any") and hasattr(type(thing), "dtype")


_CODE = ("numba", "llvmlite", "ctypes", "_ctypes")
"""Whose objects are compiled code."""


def _within(thing: Any) -> list[Any]:
    """What an object holds; nothing of classes, modules and code, which belong to everyone."""
    if isinstance(thing, type | ModuleType | Enum | str | int | float | None):
        return []
    if type(thing).__module__.partition(".")[0] in _CODE:
        return []
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or ()]
    slots = [n for each in type(thing).__mro__ for n in getattr(each, "__slots__", ())]
    found = [getattr(thing, name, None) for name in slots if isinstance(name, str)]
    names = getattr(thing, "__dict__", None)
    return [*found, *(names.values() if isinstance(names, dict) else ())]
