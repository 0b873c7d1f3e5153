"""OpenFHE, tokens packed into slots: a ciphertext for each input, weighted sums of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# With one modulus its threads only wait for each other; read when its OpenMP is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

from importlib.metadata import version
from typing import Any

import numpy as np
import openfhe
from numpy.typing import NDArray

from benchmarks.peers.problem import (
    SIDE,
    Row,
    cores,
    inputs,
    on_every_core,
    relative_error,
    rounded,
    seconds,
    weights,
)

OUTPUTS = 4
"""Rows of the weights that are computed on each core."""
MODULUS = 132_120_577
"""Of BFV's messages: a prime above all sums, 1 modulo twice the ring's degree."""


def rows() -> Iterator[Row]:
    """BFV and CKKS."""
    yield _bfv()
    yield _ckks()


def _size(thing: Any) -> int:
    return len(openfhe.Serialize(thing, openfhe.BINARY))


def _bfv() -> Row:
    parameters = openfhe.CCParamsBFVRNS()
    parameters.SetPlaintextModulus(MODULUS)
    parameters.SetMultiplicativeDepth(0)
    parameters.SetSecurityLevel(openfhe.HEStd_128_classic)
    context = openfhe.GenCryptoContext(parameters)
    context.Enable(openfhe.PKE)
    context.Enable(openfhe.LEVELEDSHE)
    keys = context.KeyGen()
    tokens = context.GetRingDimension()
    x = inputs(tokens)
    codes, scale = rounded(x)
    encrypt_s, sent = seconds(lambda: [
        context.Encrypt(keys.secretKey, context.MakePackedPlaintext(column.tolist()))
        for column in codes.T
    ])  # fmt: skip
    # A negative constant would be encoded as one near the modulus, and its noise with it.
    constants = [context.MakePackedPlaintext([w] * tokens) for w in range(128)]

    def output(row: Any) -> Any:
        sums: list[Any] = [None, None]
        for value, ciphertext in zip(row.tolist(), sent, strict=True):
            if value:
                product = context.EvalMult(ciphertext, constants[abs(value)])
                side = value < 0
                if sums[side] is None:
                    sums[side] = product
                else:
                    context.EvalAddInPlace(sums[side], product)
        return context.EvalSub(*sums)

    def opened(answer: Any) -> Any:
        plain = context.Decrypt(keys.secretKey, answer)
        plain.SetLength(tokens)
        return np.array(plain.GetPackedValue(), np.float64)[:, None] * scale

    return _measured(
        "BFV, packed", context, x, encrypt_s, sent, output, opened, f"ring degree {tokens}"
    )


def _ckks() -> Row:
    parameters = openfhe.CCParamsCKKSRNS()
    parameters.SetMultiplicativeDepth(1)
    parameters.SetScalingModSize(30)
    parameters.SetFirstModSize(40)
    parameters.SetScalingTechnique(openfhe.FIXEDMANUAL)
    parameters.SetSecurityLevel(openfhe.HEStd_128_classic)
    context = openfhe.GenCryptoContext(parameters)
    for feature in (openfhe.PKE, openfhe.LEVELEDSHE, openfhe.ADVANCEDSHE):
        context.Enable(feature)
    keys = context.KeyGen()
    tokens = context.GetRingDimension() // 2
    x = inputs(tokens)
    encrypt_s, sent = seconds(lambda: [
        context.Encrypt(keys.publicKey, context.MakeCKKSPackedPlaintext(column.tolist()))
        for column in x.T.astype(np.float64)
    ])  # fmt: skip

    def output(row: Any) -> Any:
        # Scaled down: the last modulus holds 10 bits beyond the scale.
        return context.EvalLinearWSum(sent, (row / 1024).tolist())

    def opened(answer: Any) -> Any:
        plain = context.Decrypt(keys.secretKey, answer)
        plain.SetLength(tokens)
        return np.array(plain.GetRealPackedValue())[:, None] * 1024

    return _measured(
        "CKKS, packed",
        context,
        x,
        encrypt_s,
        sent,
        output,
        opened,
        f"EvalLinearWSum, {tokens} slots",
    )


def _measured(
    scheme: str, context: Any, x: NDArray[np.float32], encrypt_s: float, sent: list[Any],
    output: Callable[[Any], Any], opened: Callable[[Any], Any], note: str,
) -> Row:  # fmt: skip
    """A scheme's row, of the products that `output` makes of a row of the weights."""
    tokens, table = len(x), weights()
    multiply_s = on_every_core(
        lambda core: [output(table[core * OUTPUTS + n]) for n in range(OUTPUTS)]
    )
    answer = output(table[0])
    decrypt_s, found = seconds(lambda: opened(answer))
    return Row(
        "OpenFHE", version("openfhe"), scheme, tokens,
        multiply_s * SIDE / (OUTPUTS * cores()) / tokens, (encrypt_s + decrypt_s * SIDE) / tokens,
        _size(sent[0]) * SIDE / tokens, _size(answer) * SIDE / tokens, _size(context),
        relative_error(found, x, table[:1]), True,
        f"{note}, a process for each core, {OUTPUTS * cores()} of {SIDE} outputs",
    )  # fmt: skip
